"""When is a result right? The one rule that tests and benchmarks share.

A result is measured against a float64 oracle, beside the XLA reference in the same dtypes. It is right when

    error(result) <= FACTOR * error(reference) + ULPS * ulp

where error is the largest deviation from the oracle, relative to the scale of the oracle's values, and also the root
mean square of the deviations; an ulp is that of the output dtype at that scale. NaN and infinities must stand exactly
where the oracle has them. Nothing here is tuned to make a test pass: a reference that is bad in some dtype shows in
`Comparison`, and the references themselves are held to `bound_of_rounding` by their own tests.
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
    """How far a result and the reference are from the oracle.

    Attributes:
      error: largest |result - oracle| / scale, scale being the largest finite |oracle|.
      reference_error: the same of the reference.
      rms: root mean square of (result - oracle) / scale.
      reference_rms: the same of the reference.
      ulp: spacing of the output dtype at 1.
      same_specials: whether NaN and infinities stand where the oracle has them.
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
        specials = "" if self.same_specials else "; NaN or infinities stand elsewhere than in the oracle"
        return (
            f"error {self.error:.3g} (reference {self.reference_error:.3g}), rms {self.rms:.3g} (reference "
            f"{self.reference_rms:.3g}), accepted: {FACTOR:g} x the reference's + {ULPS:g} ulp of {self.ulp:.3g}"
            f"{specials}"
        )


def compare(result: Any, reference: Any, oracle: Any) -> Comparison:
    """Measures a result and the reference against the oracle.

    Args:
      result: what is judged, any float dtype.
      reference: the XLA reference's result of the same inputs, in the same dtype and shape.
      oracle: the float64 result.

    Raises:
      ValueError: the shapes or dtypes differ, so that there is nothing to compare.
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
    special = ~np.isfinite(oracle)
    return bool(
        np.array_equal(special, ~np.isfinite(result))
        and np.array_equal(result[special], oracle[special], equal_nan=True)
    )


def assert_right(result: Any, reference: Any, oracle: Any, what: str = "") -> Comparison:
    """Raises AssertionError, saying by how much, where `compare` finds the result wrong; returns the comparison."""
    comparison = compare(result, reference, oracle)
    if not comparison.ok:
        raise AssertionError(f"{what}: {comparison}" if what else str(comparison))
    return comparison
