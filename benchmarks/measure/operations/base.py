"""The interface of an operation for benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Protocol, TypedDict, Unpack

import numpy as np

from palladion.kernels.implementation import Implementation
from palladion.reference import oracle
from palladion.reference.compare import FACTOR, ULPS, Comparison, compare

PEER_TOLERANCE: Final = 2.0
"""Error that a peer may have, in parts of what is accepted of a kernel.

A peer may round where kernels do not, weights of the softmax to bfloat16 for example, and its error is shown. With a
larger error it computes something else, or with less precision than was asked for.
"""


class Case(Protocol):
    """A workload of an operation: what the `Case` classes of all operations have in common."""

    @property
    def name(self) -> str:
        """Its name in tables and files."""

    def problem(self) -> Any:
        """Returns the operation's `Problem`."""

    def shapes(self) -> Any:
        """Returns the operation's `Inputs`, without their values."""


class CallOptions(TypedDict, total=False):
    """Options of a call: the backend, explicit block sizes, and whether a kernel is interpreted."""

    backend: str
    config: Any
    interpret: bool | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The accuracy of a result.

    Attributes:
      units: error in parts of what is accepted (`reference/compare.py`); at most 1 is right.
      error: largest error, relative to the scale of the oracle's values; 0 or infinity for results that must be exact.
      description: the comparison in words.
    """

    units: float
    error: float
    description: str

    @property
    def right(self) -> bool:
        """Whether the result is accepted."""
        return self.units <= 1

    @property
    def comparable(self) -> bool:
        """Whether the error is small enough for a peer, which may round where kernels do not."""
        return self.units <= PEER_TOLERANCE


def verdict_of(comparison: Comparison) -> Verdict:
    """Returns a comparison's error in parts of what is accepted."""
    slack = ULPS * comparison.ulp
    units = max(
        comparison.error / (FACTOR * comparison.reference_error + slack),
        comparison.rms / (FACTOR * comparison.reference_rms + slack),
    )
    return Verdict(units if comparison.same_specials else np.inf, comparison.error, str(comparison))


class Operation:
    """An operation: its cases, its calls, and the judge of its results.

    It is enough for an operation of one result that the float64 oracle computes quickly; others override methods.

    Attributes:
      name: the operation's name.
      cases: the operation's module `cases`.
      package: the operation's package in `kernels`.
    """

    name: ClassVar[str]
    cases: ClassVar[Any]
    package: ClassVar[Any]

    @property
    def table(self) -> Sequence[Implementation]:
        """The operation's table of implementations."""
        implementations: Sequence[Implementation] = self.package.IMPLEMENTATIONS
        return implementations

    def named_cases(self) -> dict[str, Any]:
        """Returns the operation's cases by name: those of real models first, then the small ones of tests."""
        return {case.name: case for case in (*self.cases.MODELS, *getattr(self.cases, "SHAPES", ()), *self.cases.TESTS)}

    def inputs(self, case: Any) -> Any:
        """Returns random arrays of a case."""
        return self.cases.make_inputs(case)

    def stored_for(self, case: Any, platform: str) -> Any:
        """Returns the case with weights in the storage order that a platform's kernels read, unless it names one."""
        del platform
        return case

    def bytes_moved(self, case: Any) -> int:
        """Returns the bytes that a call must move."""
        return int(case.problem().bytes_moved())

    def flops(self, case: Any) -> int:
        """Returns the floating-point operations of a call."""
        return int(case.problem().flops())

    def function(self, case: Any, **call: Unpack[CallOptions]) -> Callable[..., Any]:
        """Returns a call of the operation, as `timing.CompiledCalls` takes it: here the package's function of its name.

        Args:
          case: the workload; its `options`, if it has any, are keyword arguments.
          **call: options of the call.
        """
        operation, options = getattr(self.package, self.name), getattr(case, "options", {})
        return lambda inputs: operation(**inputs._asdict(), **options, **call)

    def split(self, inputs: Any) -> tuple[Any, Any]:
        """Splits inputs into those that are donated, or None, and the rest."""
        return None, inputs

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """Judges a result by the float64 oracle, beside the reference's; here by the oracle's function of its name."""
        options = getattr(case, "options", {})
        exact = getattr(oracle, self.name)(**inputs._asdict(), **options)
        return verdict_of(compare(np.asarray(result), np.asarray(reference), exact))


def spread(count: int, most: int) -> list[int]:
    """Returns at most `most` evenly spaced indices of range(count), the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})
