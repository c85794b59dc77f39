"""The error that every part of checkpoint loading raises, and the small helpers that the parts share."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file, what is wrong with it and the way out."""


@contextlib.contextmanager
def models_extra(purpose: str) -> Iterator[None]:
    """Around imports that `palladion[models]` brings: says so where they fail."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{purpose} needs a package that is not here: pip install "palladion[models]"') from error


def check_integer(value: Any, label: str) -> int:
    """`value` if it is a positive integer; `label` says in an error what and where it is."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{label} must be a positive integer, got {value!r}; take the original file")
    return value


def check_real(value: Any, label: str) -> float:
    """`value` as a float if it is a positive finite number; `label` says in an error what and where it is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{label} must be a positive number, got {value!r}; take the original file")
    return float(value)


class JsonFile:
    """A JSON object, or an object within one, whose values are checked as they are read; null counts as absent.

    Attributes:
      path: the file.
      content: the object.
    """

    def __init__(self, path: Path, *, optional: bool = False, content: dict[str, Any] | None = None) -> None:
        """Reads `path`, unless `content` is given; where it is `optional` and absent, it counts as {}.

        Raises:
          CheckpointError: the file is missing, unreadable or holds something else than a JSON object.
        """
        self.path = path
        self.content: dict[str, Any] = content or {}
        if content is not None or (optional and not path.exists()):
            return
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; a Hugging Face folder has it, download it again") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got a {type(parsed).__name__}; download it again")
        self.content = parsed

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        return check_integer(self._value(key, default), f"{self.path}: {key!r}")

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        return check_real(self._value(key, default), f"{self.path}: {key!r}")

    def text(self, key: str) -> str | None:
        """A string, or None where there is none."""
        value = self.content.get(key)
        if value is None or isinstance(value, str):
            return value
        raise CheckpointError(f"{self.path}: {key!r} must be a string, got {value!r}; take the original file")

    def section(self, key: str) -> JsonFile:
        """The object under a key, empty where there is none."""
        value = self.content.get(key)
        if value is None or isinstance(value, dict):
            return JsonFile(self.path, content=value or {})
        raise CheckpointError(f"{self.path}: {key!r} must be an object, got {value!r}; take the original file")

    def tokens(self, key: str) -> list[int]:
        """Token ids: one, a list of them, or none."""
        value = self.content.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            return ids
        raise CheckpointError(f"{self.path}: {key!r} must be token ids, got {value!r}; take the original file")

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self.path}: {key!r} is missing; take the original file")
        return default if value is None else value
