"""Weights of published quantized checkpoints, unpacked to one code each, and what they are converted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_reader import StoredTensor, cast
from palladion.reference.e2m1 import E2M1_LEVELS
from palladion.reference.quantization import QuantizedArray
from palladion.reference.scheme import INT4_ZERO, PACK_BLOCK, Scheme, WeightFormat, check_in_features

DECODED_AT_ONCE: Final = 1 << 22
"""Weights dequantized to float32 at a time, which bounds the memory needed beside the result."""

E2M1: Final = np.array([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)], np.float32)
"""Numbers of the codes of mxfp4."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """A weight `[out, in]`: scales * (codes - zeros).

    Attributes:
      codes: `[out, in]`: int8, a float8, or uint8 from 0 to 15 for int4 and mxfp4.
      scales: `[out, groups]`.
      zeros: `[out, groups]` in code units; None means 8 for int4, otherwise 0.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> Codes:
        """Returns the weight with a function of rows applied to all parts."""
        zeros = None if self.zeros is None else function(self.zeros)
        return Codes(function(self.codes), function(self.scales), zeros)


@dataclasses.dataclass(frozen=True)
class CodedWeight:
    """A weight in a file that is not read yet; its parts have the right shapes.

    Attributes:
      label: name of its format, for messages.
      shape: `[out, in]`.
      format: format of its codes.
      groups: group of each weight of a channel, int `[in]`.
      read: reads and unpacks it.
    """

    label: str
    shape: tuple[int, int]
    format: WeightFormat
    groups: np.ndarray
    read: Callable[[], Codes]

    @property
    def group_size(self) -> int | None:
        """Size of groups that follow one another, as a scheme has them; None where one group has all weights."""
        size = int(np.count_nonzero(self.groups == 0))
        return None if size == self.shape[1] else size

    @property
    def has_scheme(self) -> bool:
        """Whether a scheme holds the weight: its groups follow one another, and `in` is a multiple of all sizes."""
        size = self.group_size
        try:
            check_in_features(self.shape[1], Scheme(self.format, size))
        except ValueError:
            return False
        return bool((self.groups == np.arange(self.shape[1]) // (size or self.shape[1])).all())


def stored_tensor(
    name: str, source: str, weight: CodedWeight, reorder: Callable[[np.ndarray], np.ndarray]
) -> StoredTensor:
    """Returns a weight as the loader reads it, quantized where a scheme holds it without loss.

    Args:
      name: name of the weight.
      source: the file and the tensor, for errors.
      weight: the weight.
      reorder: moves whole rows.
    """

    def read() -> Codes:
        codes = weight.read().mapped(reorder)
        for part in (codes.scales, codes.codes if weight.format.startswith("float8") else None):
            if part is not None:
                cast(part, part.dtype, source)  # checks that all are finite
        return codes

    def read_quantized() -> QuantizedArray:
        return _quantized(read(), weight)

    return StoredTensor(
        name=name,
        shape=weight.shape,
        read=lambda dtype: _dense(read(), weight, dtype, source),
        read_quantized=read_quantized if weight.has_scheme else None,
        format=weight.label,
    )


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Packs 4-bit codes `[..., in]` as in a `QuantizedArray` of the order "out_in"."""
    halves = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 2, PACK_BLOCK // 2)
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).reshape(*codes.shape[:-1], -1)


def _quantized(weight: Codes, stored: CodedWeight) -> QuantizedArray:
    """Returns a weight in the scheme that holds it; zero points that a symmetric scheme implies are left out."""
    packed = stored.format in ("int4", "mxfp4")
    zeros = weight.zeros
    if zeros is not None and (zeros == (INT4_ZERO if stored.format == "int4" else 0)).all():
        zeros = None
    scheme = Scheme(stored.format, stored.group_size, "none" if zeros is None else "zeros")
    values = jnp.asarray(pack_codes(weight.codes) if packed else weight.codes)
    return QuantizedArray(
        values, jnp.asarray(weight.scales), None if zeros is None else jnp.asarray(zeros), None, scheme, "out_in"
    )


def _dense(weight: Codes, stored: CodedWeight, dtype: Any, source: str) -> np.ndarray:
    """Returns dequantized weights, computed in float32 some rows at a time."""
    result = np.empty(stored.shape, dtype)
    step = max(1, DECODED_AT_ONCE // stored.shape[1])
    for start in range(0, stored.shape[0], step):
        rows = slice(start, start + step)
        codes = E2M1[weight.codes[rows]] if stored.format == "mxfp4" else weight.codes[rows].astype(np.float32)
        if weight.zeros is not None:
            codes -= weight.zeros[rows].astype(np.float32)[:, stored.groups]
        elif stored.format == "int4":
            codes -= INT4_ZERO
        result[rows] = cast(codes * weight.scales[rows].astype(np.float32)[:, stored.groups], dtype, source)
    return result
