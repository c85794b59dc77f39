"""Scalars that are not known, and what happens where something depends on them."""

from __future__ import annotations

from typing import Any


class Undecided(Exception):  # noqa: N818 – no error: an answer
    """What a kernel does depends on something that is not known; the message says on what."""


class Opaque:
    """A scalar that is not known: whatever is computed from it is opaque too, and to decide by it is an error."""

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
    """One of two values; opaque where the condition is."""
    return condition if type(condition) is Opaque else yes if condition else no


def either(a: Any, b: Any) -> Any:
    """Whether one of two conditions holds; opaque where that cannot be told."""
    if type(a) is Opaque:
        return 1 if type(b) is not Opaque and b else a
    return 1 if a else b
