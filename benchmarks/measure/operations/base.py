"""What an operation is to benchmarks: its cases, its calls, its judge."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import numpy as np

from palladion.kernels.backend import Implementation
from palladion.reference.compare import FACTOR, ULPS, Comparison

ROUGH: Final = 2.0
"""Bounds that a peer may be off: it may round where we do not (weights to bfloat16, weights of the softmax), and is
shown as being off. What is further off computes something else, or in less precision than was asked for."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How right a result is.

    Attributes:
      units: its error in parts of what is accepted (`reference/compare.py`); at most 1 is right.
      error: its largest error, relative to the scale of the oracle's values; 0 or infinity where it must be exact.
      said: in words.
    """

    units: float
    error: float
    said: str

    @property
    def right(self) -> bool:
        """Whether it is accepted as right."""
        return self.units <= 1

    @property
    def comparable(self) -> bool:
        """Whether it is right, or merely rounded elsewhere, as a peer may."""
        return self.units <= ROUGH


def verdict_of(comparison: Comparison) -> Verdict:
    """A comparison in units of its bound."""
    slack = ULPS * comparison.ulp
    units = max(
        comparison.error / (FACTOR * comparison.reference_error + slack),
        comparison.rms / (FACTOR * comparison.reference_rms + slack),
    )
    return Verdict(units if comparison.same_specials else np.inf, comparison.error, str(comparison))


class Operation(abc.ABC):
    """An operation: its cases, its calls, its judge."""

    name: ClassVar[str]
    cases: ClassVar[Any]
    package: ClassVar[Any]

    @property
    def table(self) -> Sequence[Implementation]:
        """What can run it."""
        rows: Sequence[Implementation] = self.package.IMPLEMENTATIONS
        return rows

    def named_cases(self) -> dict[str, Any]:
        """Its cases by name: those of real models, then small ones."""
        return {case.name: case for case in (*self.cases.MODELS, *getattr(self.cases, "SHAPES", ()), *self.cases.TESTS)}

    def inputs(self, case: Any) -> Any:
        """Arrays of a case."""
        return self.cases.make_inputs(case)

    def bytes_moved(self, case: Any) -> int:
        """Bytes that a call must move."""
        return int(case.problem().bytes_moved())

    def flops(self, case: Any) -> int:
        """Floating-point operations of a call."""
        return int(case.problem().flops())

    @abc.abstractmethod
    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """A call of the operation as `timing.JaxRunner` takes it.

        Args:
          case: which.
          **how: backend, config and interpret.
        """

    def split(self, inputs: Any) -> tuple[Any, Any]:
        """What of the inputs is donated, or None; and the rest."""
        return None, inputs

    @abc.abstractmethod
    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """Whether a result is right, beside the reference's."""


def spread(count: int, most: int) -> list[int]:
    """So many places in range(count) at most, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})
