"""Unknown scalars, which make everything that is computed from them unknown."""

from __future__ import annotations

from typing import Any


class Undecided(Exception):  # noqa: N818 – no error: an answer
    """A kernel's behaviour depends on something that is not known; the message says on what."""


class Opaque:
    """A scalar that is not known.

    Whatever is computed from it is opaque, too; a branch that depends on it raises Undecided.

    Args:
      reason: why it is not known, "it depends on …".
    """

    def __init__(self, reason: str):
        self.reason = reason

    def _same(self, *_: Any) -> Opaque:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __xor__ = __rxor__ = _same
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __neg__ = __invert__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _same  # type: ignore[assignment]

    def __and__(self, other: Any) -> Any:
        return 0 if type(other) is not Opaque and other == 0 else self

    __rand__ = __and__
    __or__ = __ror__ = _same

    def __bool__(self) -> bool:
        raise Undecided(self.reason)

    def __hash__(self) -> int:
        raise Undecided(self.reason)


def select(condition: Any, yes: Any, no: Any) -> Any:
    """Returns one of two values; opaque if the condition is."""
    return condition if type(condition) is Opaque else yes if condition else no


def either(a: Any, b: Any) -> Any:
    """Whether one of two conditions holds; opaque if that is not known."""
    if type(a) is Opaque:
        return 1 if type(b) is not Opaque and b else a
    return 1 if a else b
