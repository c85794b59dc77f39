"""The acceptance rule that tests and benchmarks share: when a result is right.

A result and the XLA reference's result of the same inputs, in the same dtypes, are measured against a float64 oracle.
The result is right when

    error(result) <= FACTOR * error(reference) + ULPS * ulp

holds for the largest deviation from the oracle and for the root mean square of the deviations, both relative to the
oracle's largest finite magnitude; an ulp is the spacing of the output dtype at 1. NaN and infinities must be exactly
where the oracle has them. The rule has no tolerance to tune: a bad reference shows in `Comparison`, and tests hold the
references to bounds of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

FACTOR: Final = 2.0
ULPS: Final = 2.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors of a result and of the reference against the oracle.

    Attributes:
      error: largest |result - oracle| / scale, where scale is the largest finite |oracle|.
      reference_error: the same for the reference.
      rms: root mean square of (result - oracle) / scale.
      reference_rms: the same for the reference.
      ulp: spacing of the output dtype at 1.
      same_specials: whether NaN and infinities are where the oracle has them.
    """

    error: float
    reference_error: float
    rms: float
    reference_rms: float
    ulp: float
    same_specials: bool

    @property
    def ok(self) -> bool:
        """Whether the result counts as right."""
        return (
            self.same_specials
            and self.error <= FACTOR * self.reference_error + ULPS * self.ulp
            and self.rms <= FACTOR * self.reference_rms + ULPS * self.ulp
        )

    def __str__(self) -> str:
        specials = "" if self.same_specials else "; NaN or infinities are not where the oracle has them"
        return (
            f"error {self.error:.3g} (reference {self.reference_error:.3g}), rms {self.rms:.3g} (reference "
            f"{self.reference_rms:.3g}), accepted: {FACTOR:g} x the reference's + {ULPS:g} ulp of {self.ulp:.3g}"
            f"{specials}"
        )


def compare(result: Any, reference: Any, oracle: Any) -> Comparison:
    """Measures a result and the reference against the oracle.

    Args:
      result: any float dtype.
      reference: the XLA reference's result of the same inputs, in the same dtype and shape.
      oracle: the float64 result.

    Raises:
      ValueError: the shapes or dtypes differ.
    """
    result, reference, oracle = np.asarray(result), np.asarray(reference), np.asarray(oracle, np.float64)
    if not (result.shape == reference.shape == oracle.shape):
        raise ValueError(f"compare: shapes differ: {result.shape}, {reference.shape} and oracle {oracle.shape}")
    if result.dtype != reference.dtype:
        raise ValueError(f"compare: dtypes differ: {result.dtype} and reference {reference.dtype}")
    dtype = result.dtype
    result, reference = result.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(oracle)
    same = _same_specials(result, oracle)
    if not finite.any():
        return Comparison(0.0, 0.0, 0.0, 0.0, float(jnp.finfo(dtype).eps), same)
    scale = np.abs(oracle[finite]).max() or 1.0
    deviation = np.abs(result[finite] - oracle[finite]) / scale
    reference_deviation = np.abs(reference[finite] - oracle[finite]) / scale
    return Comparison(
        error=float(deviation.max()),
        reference_error=float(reference_deviation.max()),
        rms=float(np.sqrt((deviation**2).mean())),
        reference_rms=float(np.sqrt((reference_deviation**2).mean())),
        ulp=float(jnp.finfo(dtype).eps),
        same_specials=same,
    )


def _same_specials(result: np.ndarray, oracle: np.ndarray) -> bool:
    """Returns whether NaN and infinities of the oracle are in the result, and no others."""
    special = ~np.isfinite(oracle)
    return bool(
        np.array_equal(special, ~np.isfinite(result))
        and np.array_equal(result[special], oracle[special], equal_nan=True)
    )


def assert_right(result: Any, reference: Any, oracle: Any, what: str = "") -> Comparison:
    """Compares and returns the comparison; raises AssertionError with both errors where the result is wrong."""
    comparison = compare(result, reference, oracle)
    if not comparison.ok:
        raise AssertionError(f"{what}: {comparison}" if what else str(comparison))
    return comparison
