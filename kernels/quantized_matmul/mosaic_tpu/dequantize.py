"""Turns stored codes into operands of a TPU's matrix unit, in the way that each generation is fastest at.

The matrix unit takes bfloat16 on all generations, 8-bit integers and floats on some, and pushing a weight into it costs
time by the byte. The vector unit works on 32-bit words: masks and shifts treat four codes at once, conversions of
narrow numbers are slow. The best operands are therefore bytes that need no conversion:

    int4     The bits of a nibble n *are* an e4m3 float, n times the smallest subnormal: subnormals and the first binade
             are evenly spaced up to 15. As an int8 they are n.
    mxfp4    The bits s ee m, spread out to s 000ee m0, are an e5m2 float, 2**-14 times the same number.
    float8   Unchanged. Where a chip has no e4m3fn the compiler pushes its bits as e4m3b11fnuz, 16 times smaller.
    int8     Unchanged against integers, converted to bfloat16 against floats.

The matrix unit converts 8-bit floats to bfloat16, so their subnormals count like all other numbers; the compiler itself
relies on that where it pushes e4m3fn as e4m3b11fnuz.

TPU v4 takes bfloat16 only, and converts bytes very slowly: there shifts take words of four bytes apart.

The operands of a chunk of weights come in another order than the weights. The columns of x are put into the same order
once, before the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from palladion.kernels.devices import Chip
from palladion.kernels.quantized_matmul.float_bits import decode_finite_float
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.reference.scheme import PACK_BLOCK, Scheme

FLOAT32: Final = "float32"
"""Name of the dequantizer that every format has: float32 operands, which can be scaled before they are multiplied."""

NEWER: Final = ("v6e", "v7x")
"""Chips whose vector units multiply bfloat16, and whose matrix units are 256 weights deep along `in`, not 128."""


@dataclasses.dataclass(frozen=True)
class Dequantizer:
    """A way to turn codes into operands of the matrix unit: code = unit * (operand - offset).

    Attributes:
      operand: dtype of the operands.
      to_operands: converts codes `[rows, out]`, as they are stored, to operands `[chunk, out]`.
      shape: dimensions into which the weights of a chunk along `in` are split; one of them is -1.
      axes: the order of these dimensions among the operands.
      unit: value of an operand of 1, a power of two.
      offset: number added to every operand.
    """

    operand: str
    to_operands: Callable[[jax.Array], jax.Array]
    shape: tuple[int, ...] = (-1,)
    axes: tuple[int, ...] = (0,)
    unit: float = 1.0
    offset: int = 0

    @property
    def runs(self) -> int:
        """Number of runs of operands in a chunk; each holds equally many weights of every group."""
        leading = itertools.takewhile(lambda axis: self.shape[axis] != -1, self.axes)
        return math.prod(self.shape[axis] for axis in leading)

    def reorder(self, x: Any, chunk: int) -> Any:
        """Returns x, `[..., in]`, with its last axis in the order of the operands of each chunk."""
        *leading, columns = x.shape
        shape = [-chunk // math.prod(self.shape) if size == -1 else size for size in self.shape]
        first = len(leading) + 1
        split = x.reshape(*leading, columns // chunk, *shape)
        return split.transpose(*range(first), *(first + axis for axis in self.axes)).reshape(x.shape)


def dequantizers(scheme: Scheme) -> dict[str, Dequantizer]:
    """Returns the dequantizers of a scheme's codes by name."""
    return _DEQUANTIZERS[scheme.format]


def best_dequantizer(problem: Problem, chip: Chip | None, scales_weights: bool) -> str:
    """Returns the name of the dequantizer that is fastest on a chip; None is an interpreter, which runs all of them."""
    kind = problem.scheme.format
    operands = ("int8", "float8_e5m2", "float8_e4m3b11fnuz") if chip is None else chip.one_byte_operands
    if scales_weights:
        as_bfloat16 = fits_bfloat16(problem) and "bfloat16" in dequantizers(problem.scheme)
        return "bfloat16" if as_bfloat16 and (chip is None or chip.name in NEWER) else FLOAT32
    if not operands:
        # An offset in every code costs bits of the float32 sums.
        return "nibbles" if kind == "int4" and problem.out_dtype == "float32" else "words"
    if problem.quantize_x == "int8" and "int8" in operands:
        return "int8"
    if kind == "int4":
        return next(name for name in ("float8_e4m3b11fnuz", "float8_e4m3fn") if name in operands)
    return {"int8": "bfloat16", "mxfp4": "float8_e5m2"}.get(kind, kind)


def fits_bfloat16(problem: Problem) -> bool:
    """Whether x and the result have no more bits than a bfloat16, so that scaled weights may be rounded to it."""
    return (problem.x_dtype == "bfloat16" or problem.quantize_x is not None) and problem.out_dtype == "bfloat16"


def _nibbles(
    dtype: DTypeLike, low: Callable[[jax.Array], jax.Array], high: Callable[[jax.Array], jax.Array], codes: jax.Array
) -> jax.Array:
    """Returns the low nibbles, then the high ones, as bytes of `dtype`; `low` and `high` convert words of four."""
    words = pltpu.bitcast(codes, jnp.int32)
    return jnp.concatenate([pltpu.bitcast(half, dtype) for half in (low(words), high(words))])


def _e2m1_to_e5m2_low(words: jax.Array) -> jax.Array:
    return ((words & 0x07070707) << 1) | ((words << 4) & SIGNS)


def _e2m1_to_e5m2_high(words: jax.Array) -> jax.Array:
    return ((words >> 3) & 0x0E0E0E0E) | (words & SIGNS)


SIGNS: Final = np.int32(-0x7F7F7F80)
"""The highest bit of every byte of a word."""


def _pairs(decode: Callable[[jax.Array], jax.Array], codes: jax.Array) -> jax.Array:
    """Returns nibbles as bfloat16: `decode` gets two in each word, 3 bits up in its halves, and returns their bits."""
    words = pltpu.bitcast(codes, jnp.int32)
    shifted = [words << 3, words >> 1, words >> 5, words >> 9]
    return jnp.concatenate([pltpu.bitcast(decode(pair & 0x00780078), jnp.bfloat16) for pair in shifted])


def _int4_pair(codes: jax.Array) -> jax.Array:
    """Returns the bits of 16 + n: n ORed into the upper mantissa bits of 16.0."""
    return codes | 0x41804180


def _e2m1_pair(shifted: jax.Array) -> jax.Array:
    """Returns bfloat16 bits of e2m1: exponent and mantissa shifted up from code 2 on; code 1 is 0.5, and 0 is 0."""
    codes = shifted >> 3
    normal = ((codes >> 1) | (codes >> 2)) & 0x00010001
    nonzero = normal | (codes & 0x00010001)
    bits = (codes << 6) & ((normal << 9) - (normal << 6))
    return (bits + (nonzero << 14) - (nonzero << 8)) | ((codes & 0x00080008) << 12)


def _bytes(decode: Callable[[jax.Array], jax.Array], codes: jax.Array) -> jax.Array:
    """Returns bytes as bfloat16: `decode` gets each in the highest bits of a word and returns it as float32."""
    words = pltpu.bitcast(codes, jnp.int32)
    shifted = [words << shift if shift else words for shift in (24, 16, 8, 0)]
    return jnp.concatenate([decode(word).astype(jnp.bfloat16) for word in shifted])


def _nibble_by_nibble(codes: jax.Array) -> jax.Array:
    words = pltpu.bitcast(codes, jnp.int32)
    nibbles = [(words >> shift if shift else words) & 0xF for shift in range(0, 32, 4)]
    return jnp.concatenate([each.astype(jnp.float32).astype(jnp.bfloat16) for each in nibbles])


def _float8_byte(exponent_bits: int, words: jax.Array) -> jax.Array:
    return decode_finite_float(exponent_bits, words & np.int32(-(2**24)))


def _unchanged(codes: jax.Array) -> jax.Array:
    return codes


_HALF: Final = PACK_BLOCK // 2
# The order of a chunk's operands. Row j of a packing block of 32 holds weights j and j + 16 in its nibbles.
_LOW_THEN_HIGH: Final[dict[str, Any]] = {"shape": (-1, 2, _HALF), "axes": (1, 0, 2)}
_BYTE_BY_BYTE: Final[dict[str, Any]] = {"shape": (-1, 4), "axes": (1, 0)}
_NIBBLE_BY_NIBBLE: Final[dict[str, Any]] = {"shape": (-1, 2, _HALF // 4, 4), "axes": (3, 1, 0, 2)}
_PAIR_BY_PAIR: Final[dict[str, Any]] = {"shape": (-1, 2, _HALF // 2, 2), "axes": (3, 1, 0, 2)}


def _int4_as(dtype: DTypeLike, unit: float) -> Dequantizer:
    to_operands = functools.partial(
        _nibbles, dtype, lambda words: words & 0x0F0F0F0F, lambda words: (words >> 4) & 0x0F0F0F0F
    )
    return Dequantizer(jnp.dtype(dtype).name, to_operands, **_LOW_THEN_HIGH, unit=unit)


def _int4_as_bfloat16(codes: jax.Array) -> jax.Array:
    return _int4_as(jnp.int8, 1.0).to_operands(codes).astype(jnp.bfloat16)


def _float8_dequantizers(name: str, exponent_bits: int) -> dict[str, Dequantizer]:
    return {
        name: Dequantizer(name, _unchanged),
        "words": Dequantizer(
            "bfloat16", functools.partial(_bytes, functools.partial(_float8_byte, exponent_bits)), **_BYTE_BY_BYTE
        ),
        FLOAT32: Dequantizer("float32", lambda codes: codes.astype(jnp.float32)),
    }


_DEQUANTIZERS: Final[dict[str, dict[str, Dequantizer]]] = {
    "int8": {
        "bfloat16": Dequantizer("bfloat16", lambda codes: codes.astype(jnp.bfloat16)),
        "int8": Dequantizer("int8", _unchanged),
        "words": Dequantizer(
            "bfloat16", functools.partial(_bytes, lambda words: (words >> 24).astype(jnp.float32)), **_BYTE_BY_BYTE
        ),
        FLOAT32: Dequantizer("float32", lambda codes: codes.astype(jnp.float32)),
    },
    "int4": {
        "float8_e4m3b11fnuz": _int4_as(jnp.float8_e4m3b11fnuz, 2.0**13),
        "float8_e4m3fn": _int4_as(jnp.float8_e4m3fn, 2.0**9),
        "int8": _int4_as(jnp.int8, 1.0),
        "bfloat16": Dequantizer("bfloat16", _int4_as_bfloat16, **_LOW_THEN_HIGH),
        "words": Dequantizer("bfloat16", functools.partial(_pairs, _int4_pair), **_PAIR_BY_PAIR, offset=16),
        "nibbles": Dequantizer("bfloat16", _nibble_by_nibble, **_NIBBLE_BY_NIBBLE),
        FLOAT32: Dequantizer(
            "float32", lambda codes: _pairs(_int4_pair, codes).astype(jnp.float32) - 16, **_PAIR_BY_PAIR
        ),
    },
    "float8_e4m3fn": _float8_dequantizers("float8_e4m3fn", 4),
    "float8_e5m2": _float8_dequantizers("float8_e5m2", 5),
    "mxfp4": {
        "float8_e5m2": Dequantizer(
            "float8_e5m2",
            functools.partial(_nibbles, jnp.float8_e5m2, _e2m1_to_e5m2_low, _e2m1_to_e5m2_high),
            **_LOW_THEN_HIGH,
            unit=2.0**14,
        ),
        "words": Dequantizer("bfloat16", functools.partial(_pairs, _e2m1_pair), **_PAIR_BY_PAIR),
        FLOAT32: Dequantizer("float32", lambda codes: _pairs(_e2m1_pair, codes).astype(jnp.float32), **_PAIR_BY_PAIR),
    },
}
