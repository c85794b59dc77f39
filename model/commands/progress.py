"""Progress on standard error: a bar and a spinner by rich in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Shows what a command is doing until there is text to show, or its context ends; rich draws where it is installed.

    Args:
      doing: what is done to a model part by part.
      done: what it is in the end.
    """

    def __init__(self, doing: str = "loading", done: str = "loaded") -> None:
        self._doing, self._done = doing, done
        self._start = time.perf_counter()
        self._console = _terminal()
        self._bar: Any = None
        self._task: Any = None
        self._spinner: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.done()

    def loading(self, step: str, fraction: float) -> None:
        """Shows the fraction of a model that is loaded, or otherwise dealt with."""
        if self._console is not None:
            if self._bar is None:
                import rich.progress

                self._bar = rich.progress.Progress(console=self._console, transient=True)
                self._task = self._bar.add_task(self._doing, total=1.0)
                self._bar.start()
            self._bar.update(self._task, completed=fraction, description=f"{self._doing} {step}")
        if fraction == 1:
            self.done()
            self.say(f"{self._done} in {time.perf_counter() - self._start:.1f} s")

    def working(self, text: str) -> None:
        """Shows that something takes its time, until `done`."""
        if self._console is None:
            self.say(text)
        else:
            self.done()
            self._spinner = self._console.status(text)
            self._spinner.start()

    def done(self) -> None:
        """Ends what is shown, so that text can follow."""
        for shown in (self._bar, self._spinner):
            if shown is not None:
                shown.stop()
        self._bar = self._spinner = None

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr, flush=True)


def _terminal() -> Any:
    """Returns rich's console on standard error; None where that is no terminal, or rich is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        import rich.console
    except ImportError:
        return None
    console = rich.console.Console(stderr=True)
    return console if console.is_terminal else None
