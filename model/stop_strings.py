"""Stop strings: end a generation at a text, whatever tokens it is made of, before any part of it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palladion.model.vocabulary import check_text


class StopStrings:
    """A filter between a stream of text and its reader, which ends the text at the first stop string.

    Text that may be the beginning of a stop string is held back until it is known not to be. The result does not depend
    on how the text is cut into pieces: it ends before the stop string that is complete first, and of those that end
    with the same character before the longest.

    Attributes:
      found: whether a stop string was found; nothing is returned from then on.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> str:
        """Adds a piece of text; returns what can be shown."""
        if self.found:
            return ""
        held = self._held + text
        places = [(held.find(string) + len(string), held.find(string)) for string in self._strings if string in held]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)[1]]
        shown = len(held) - max((_overlap(held, string) for string in self._strings), default=0)
        self._held = held[shown:]
        return held[:shown]

    def flush(self) -> str:
        """Ends the text; returns what was held back."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, string: str) -> int:
    """Returns the length of the longest end of `text` that begins `string`, which is not in `text`."""
    longest = min(len(text), len(string) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)


def check_stop_strings(stop: Any) -> tuple[str, ...]:
    """Returns stop strings, one or several, as a tuple; raises ValueError where one is empty or not text."""
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise ValueError(f"stop: got {type(stop).__name__} {stop!r:.60}; accepted: a string, or a list of strings")
    for index, string in enumerate(stop):
        if not check_text(string, f"stop[{index}]"):
            raise ValueError(f"stop[{index}]: is empty, and every text begins with it; give at least one character")
    return tuple(stop)
