"""Narrow numbers and the ways of adding them up, emulated operation by operation in NumPy.

Compilers may keep float32 where bfloat16 was asked for, and reorder sums. Here every operation rounds exactly where it
says so. Vectors are rows of a matrix, `[vectors, n]` in float32, and are added up together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from palladion.reference.quantization import quantize_rows

Array = np.ndarray

BLOCK: Final = 128
"""Elements of a block, of which two-level sums are made and which share a scale: the width of a vector register."""

DTYPES: Final[dict[str, Any]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def rounded(x: Array, dtype: str) -> Array:
    """Rounds to the nearest number of a dtype, ties to even; returns float32."""
    return x if dtype == "float32" else x.astype(DTYPES[dtype]).astype(np.float32)


def stochastically_rounded(x: Array, generator: np.random.Generator) -> Array:
    """Rounds to one of the two neighbouring bfloat16 numbers at random, without bias."""
    bits = x.view(np.uint32) + generator.integers(0, 2**16, x.shape, np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def padded(x: Array, multiple: int) -> Array:
    """Appends zeros to each vector, up to a multiple of a length."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))


def sequential(x: Array, dtype: str) -> Array:
    """Sums with one accumulator of that dtype."""
    total = np.zeros(len(x), np.float32)
    for column in np.ascontiguousarray(x.T):
        total = rounded(total + column, dtype)
    return total


def stochastic(x: Array, dtype: str) -> Array:
    """Sums with one bfloat16 accumulator and stochastic rounding, with a fixed seed."""
    assert dtype == "bfloat16"
    generator, total = np.random.default_rng(0), np.zeros(len(x), np.float32)
    for column in np.ascontiguousarray(x.T):
        total = stochastically_rounded(total + column, generator)
    return total


def pairwise(x: Array, dtype: str) -> Array:
    """Sums neighbours, then neighbouring sums: a tree as deep as the logarithm of the length."""
    while x.shape[1] > 1:
        x = padded(x, 2)
        x = rounded(x[:, ::2] + x[:, 1::2], dtype)
    return x[:, 0]


def kahan(x: Array, dtype: str) -> Array:
    """Sums with one accumulator and a second one for its rounding errors (Kahan, 1965)."""
    total = lost = np.zeros(len(x), np.float32)
    for column in np.ascontiguousarray(x.T):
        number = rounded(column - lost, dtype)
        new = rounded(total + number, dtype)
        lost = rounded(rounded(new - total, dtype) - number, dtype)
        total = new
    return total


def lanes(x: Array, dtype: str) -> Array:
    """Sums as a vector unit does: an accumulator for each of 128 lanes, then a tree over the lanes."""
    x = padded(x, BLOCK)
    total = np.zeros((len(x), BLOCK), np.float32)
    for start in range(0, x.shape[1], BLOCK):
        total = rounded(total + x[:, start : start + BLOCK], dtype)
    return pairwise(total, dtype)


def blocked(x: Array, dtype: str) -> Array:
    """Sums each block sequentially in that dtype, and the sums of blocks in float32."""
    x = padded(x, BLOCK)
    sums = sequential(x.reshape(-1, BLOCK), dtype).reshape(len(x), -1)
    return sequential(sums, "float32")


ORDERS: Final[dict[str, Callable[[Array, str], Array]]] = {
    "one after the other": sequential,
    "pairwise": pairwise,
    "128 lanes": lanes,
    "blocks of 128, then float32": blocked,
    "Kahan": kahan,
    "stochastic rounding": stochastic,
}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized vectors, with a scale for each block.

    Attributes:
      codes: `[vectors, blocks, size]`, the stored codes exactly, in float32.
      scales: `[vectors, blocks]` float32.
    """

    codes: Array
    scales: Array

    @classmethod
    def of(cls, x: Array, dtype: str, block: int | None) -> Quantized:
        """Quantizes by the absolute maximum of each vector, or of each block."""
        x = x if block is None else padded(x, block)
        blocks = x.reshape(len(x), 1 if block is None else -1, x.shape[1] if block is None else block)
        codes, scales = _quantize_rows(jnp.asarray(blocks), dtype)
        return cls(np.asarray(codes).astype(np.float32), np.asarray(scales))

    def sum(self) -> Array:
        """Sums codes exactly, as int32 does, and the scaled sums of blocks in float32."""
        sums = self.codes.sum(axis=2, dtype=np.float64).astype(np.float32)
        return sequential(sums * self.scales, "float32")

    def dot(self, other: Quantized) -> Array:
        """Sums products of codes exactly, and the scaled sums of blocks in float32."""
        sums = (self.codes.astype(np.float64) * other.codes).sum(axis=2).astype(np.float32)
        return sequential(sums * (self.scales * other.scales), "float32")


_quantize_rows = jax.jit(quantize_rows, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class SumMethod:
    """A way to store vectors and to add them up.

    Attributes:
      inputs: dtype of the vectors: a float dtype, or int8, float8_e4m3fn or float8_e5m2 with scales.
      accumulator: a float dtype, or "exact" for codes, which int32 adds up without rounding.
      order: one of `ORDERS`; for codes "one scale" or "scale per 128".
    """

    inputs: str
    accumulator: str
    order: str

    def __str__(self) -> str:
        return f"{self.inputs}, {self.accumulator} {self.order}"

    @property
    def quantized(self) -> bool:
        """Whether vectors are stored as codes with scales."""
        return self.inputs not in DTYPES

    def sum(self, x: Array) -> Array:
        """Sums vectors `[vectors, n]` to `[vectors]`."""
        if self.quantized:
            return self._codes(x).sum()
        return ORDERS[self.order](rounded(x, self.inputs), self.accumulator)

    def dot(self, x: Array, w: Array) -> Array:
        """Returns the dot products `[vectors]` of pairs of vectors `[vectors, n]`; each product is a float32."""
        if self.quantized:
            return self._codes(x).dot(self._codes(w))
        return ORDERS[self.order](rounded(x, self.inputs) * rounded(w, self.inputs), self.accumulator)

    def _codes(self, x: Array) -> Quantized:
        return Quantized.of(x, self.inputs, None if self.order == "one scale" else BLOCK)


def methods() -> list[SumMethod]:
    """Returns all methods that are studied, float32 first; they vary accumulators, orders and dtypes of inputs."""
    found = [SumMethod("float32", "float32", "one after the other")]
    found += [SumMethod("float32", "float32", order) for order in ("pairwise", "128 lanes", "Kahan")]
    found += [
        SumMethod("float32", "float16", "one after the other"),
        SumMethod("float32", "bfloat16", "one after the other"),
    ]
    found += [SumMethod("bfloat16", "float32", "one after the other"), SumMethod("bfloat16", "float32", "pairwise")]
    found += [SumMethod("bfloat16", "bfloat16", order) for order in ORDERS]
    for dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
        found += [SumMethod(dtype, "exact", scale) for scale in ("one scale", "scale per 128")]
    return found
