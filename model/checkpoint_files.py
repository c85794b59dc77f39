"""CheckpointError, and the checks that the loaders of all formats share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

MAX_INTEGER: Final = 2**31 - 1
"""Largest size, count or token id: they are int32."""

MAX_REAL: Final = 3.4028234e38
"""Largest constant: the model computes in float32."""

WIDEST_HEAD: Final = 2**16
"""Most features of a head, many times more than models have."""

ENDLESS_WINDOW: Final = 2**30
"""Windows of this many tokens or more count as none: no cache holds them, and adding a position could overflow."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file, what is wrong with it and what to do."""


@contextlib.contextmanager
def models_extra(purpose: str) -> Iterator[None]:
    """Wraps imports of packages in `palladion[models]`; if one is missing, the ImportError says how to install them."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs a package that is not installed: pip install "palladion[models]"'
        ) from error


def shorten(value: Any, limit: int = 100) -> str:
    """Returns a value's repr for an error message, without its middle if it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        # Python refuses to write integers of thousands of digits.
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 4 :]}"


def exists(path: Path) -> bool:
    """Returns whether a path exists; False for one that the file system cannot look up."""
    try:
        return path.exists()
    except OSError:
        return False


def check_regular(path: Path) -> None:
    """Raises CheckpointError unless a path is a regular file: opening a pipe or a device may block forever."""
    if exists(path) and not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file; put the checkpoint's own file in its place")


def check_integer(value: Any, label: str, minimum: int = 1) -> int:
    """Returns `value` if it is an integer from `minimum` to 2^31 - 1; `label` names it in an error."""
    if not isinstance(value, bool) and isinstance(value, int) and minimum <= value <= MAX_INTEGER:
        return value
    accepted = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
    below = " below 2^31" if isinstance(value, int) and value > MAX_INTEGER else ""
    raise CheckpointError(f"{label} must be {accepted}{below}, got {shorten(value)}; take the original file")


def check_real(value: Any, label: str) -> float:
    """Returns `value` as a float if it is a positive number in the range of float32; `label` names it in an error."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_REAL:
        raise CheckpointError(f"{label} must be a positive number, got {shorten(value)}; take the original file")
    return float(value)


def check_head_dim(value: int, path: Path) -> int:
    """Returns `value` if a head may be so wide: rotary tables of that size are made before tensors are looked at."""
    if value <= WIDEST_HEAD:
        return value
    raise CheckpointError(
        f"{path}: has heads of {value} features; supported: up to {WIDEST_HEAD}; take the original file"
    )


def check_window(value: Any, label: str) -> int | None:
    """Returns `value` as a sliding window; None where it is longer than any cache and so masks nothing."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= ENDLESS_WINDOW:
        return None
    return check_integer(value, label)


class JsonFile:
    """A JSON object in a file, whose values are checked when they are read; null counts as absent.

    Attributes:
      path: the file.
      content: the object.
    """

    def __init__(self, path: Path, *, optional: bool = False, content: dict[str, Any] | None = None) -> None:
        """Reads `path`, unless `content` is given; an `optional` file that does not exist counts as {}.

        Raises:
          CheckpointError: the file is missing, unreadable, or holds anything but a JSON object.
        """
        self.path = path
        self.content: dict[str, Any] = content or {}
        if content is not None or (optional and not exists(path)):
            return
        check_regular(path)
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; a Hugging Face folder has it, download it again") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got a {type(parsed).__name__}; download it again")
        self.content = parsed

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """Returns an integer from `minimum` to 2^31 - 1."""
        return check_integer(self._value(key, default), f"{self.path}: {key!r}", minimum)

    def real(self, key: str, default: float | None = None) -> float:
        """Returns a positive number in the range of float32."""
        return check_real(self._value(key, default), f"{self.path}: {key!r}")

    def boolean(self, key: str, default: bool) -> bool:
        """Returns a boolean; the string "true" is none."""
        value = self._value(key, default)
        if isinstance(value, bool):
            return value
        raise CheckpointError(
            f"{self.path}: {key!r} must be true or false, got {shorten(value)}; write it so, without quotes"
        )

    def text(self, key: str) -> str | None:
        """Returns a string, or None where it is absent."""
        value = self.content.get(key)
        if value is None or isinstance(value, str):
            return value
        raise CheckpointError(f"{self.path}: {key!r} must be a string, got {shorten(value)}; take the original file")

    def section(self, key: str) -> JsonFile:
        """Returns the object under a key, empty where it is absent."""
        value = self.content.get(key)
        if value is None or isinstance(value, dict):
            return JsonFile(self.path, content=value or {})
        raise CheckpointError(f"{self.path}: {key!r} must be an object, got {shorten(value)}; take the original file")

    def tokens(self, key: str) -> list[int]:
        """Returns the token ids under a key, which holds one, a list, or nothing."""
        value = self.content.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(_is_token(entry) for entry in ids):
            return ids
        raise CheckpointError(f"{self.path}: {key!r} must be token ids, got {shorten(value)}; take the original file")

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self.path}: {key!r} is missing; take the original file")
        return default if value is None else value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER
