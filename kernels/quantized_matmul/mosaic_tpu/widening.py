"""How a TPU turns codes into operands of its matrix unit: a `Widening` for each way that some generation is good at.

The matrix unit takes bfloat16 everywhere, 8-bit integers and floats on some generations, and what a weight costs there
is the bytes that are pushed into it. The vector unit works on 32-bit words, four codes at a time where a mask will do,
and converts narrow numbers slowly. So the best operands are bytes that need no conversion:

    int4     The bits of a nibble n *are* an e4m3 float, n times the smallest subnormal: subnormals and the first binade
             are spaced alike, up to 15. As an int8 it is n.
    mxfp4    The bits s ee m, spread out to s 000ee m0, are an e5m2 float, 2**-14 times the same number.
    float8   As they are. Where a chip has no e4m3fn the compiler pushes its bits as e4m3b11fnuz, 16 times smaller.
    int8     As they are against integers, converted to bfloat16 against floats.

Subnormals of 8-bit floats are numbers like all others to the matrix unit: it makes bfloat16 of them, and the compiler
itself relies on that where it pushes e4m3fn as e4m3b11fnuz.

TPU v4 has bfloat16 only, and converts bytes very slowly. There words of four bytes are taken apart by shifts.

Operands of a chunk of weights come in another order than the weights. The columns of x are put in the same order, once,
before the kernel.
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

from palladion.kernels.devices import Chip
from palladion.kernels.quantized_matmul.float_bits import decode_finite_float
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.reference.quantization import PACK_BLOCK, Scheme

SCALED: Final = "float32"
"""The widening that every format has; its operands are weights in float32, which can be scaled before they are
multiplied."""

NEWER: Final = ("v6e", "v7x")
"""Chips whose vector units multiply bfloat16, and whose matrix units take 256 weights along `in` at a time, not 128."""


@dataclasses.dataclass(frozen=True)
class Widening:
    """A way to turn codes into operands: code = unit * (operand - offset).

    Attributes:
      operand: dtype of the operands.
      widen: codes `[rows, out]`, as they are stored, to operands `[chunk, out]`.
      shape: the weights of a chunk along `in`, as dimensions, one of which is -1.
      axes: those dimensions in the order in which operands come.
      unit: what an operand is worth, a power of two.
      offset: what was added to every operand.
    """

    operand: str
    widen: Callable[[jax.Array], jax.Array]
    shape: tuple[int, ...] = (-1,)
    axes: tuple[int, ...] = (0,)
    unit: float = 1.0
    offset: int = 0

    @property
    def runs(self) -> int:
        """Runs of operands in a chunk, each with as many of every group."""
        return math.prod(
            self.shape[axis] for axis in itertools.takewhile(lambda axis: self.shape[axis] != -1, self.axes)
        )

    def arrange(self, x: Any, chunk: int) -> Any:
        """Puts the last axis of x, `[..., in]`, in the order of the operands, chunk by chunk."""
        *leading, columns = x.shape
        shape = [-chunk // math.prod(self.shape) if size == -1 else size for size in self.shape]
        lead = len(leading) + 1
        apart = x.reshape(*leading, columns // chunk, *shape)
        return apart.transpose(*range(lead), *(lead + axis for axis in self.axes)).reshape(x.shape)


def widenings(scheme: Scheme) -> dict[str, Widening]:
    """The widenings of a scheme's codes, by name."""
    return _WIDENINGS[scheme.format]


def best(problem: Problem, chip: Chip | None, scales_weights: bool) -> str:
    """The name of the widening that a chip is best at; None is an interpreter, which can do all of them."""
    kind = problem.scheme.format
    operands = ("int8", "float8_e5m2", "float8_e4m3b11fnuz") if chip is None else chip.one_byte_operands
    if scales_weights:
        fitting = is_narrow(problem) and "bfloat16" in widenings(problem.scheme)
        return "bfloat16" if fitting and (chip is None or chip.name in NEWER) else SCALED
    if not operands:
        # What is added to every code costs bits of the float32 sums.
        return "nibbles" if kind == "int4" and problem.out_dtype == "float32" else "words"
    if problem.quantize_x == "int8" and "int8" in operands:
        return "int8"
    if kind == "int4":
        return next(name for name in ("float8_e4m3b11fnuz", "float8_e4m3fn") if name in operands)
    return {"int8": "bfloat16", "mxfp4": "float8_e5m2"}.get(kind, kind)


def is_narrow(problem: Problem) -> bool:
    """Whether x has no more bits than a bfloat16, and the result shows no more: scaled weights may be rounded to it."""
    return (problem.x_dtype == "bfloat16" or problem.quantize_x is not None) and problem.out_dtype == "bfloat16"


def _nibbles(
    dtype: Any, low: Callable[[jax.Array], jax.Array], high: Callable[[jax.Array], jax.Array], codes: jax.Array
) -> jax.Array:
    """Low nibbles, then high ones, as bytes of another dtype: four in a word, by functions of such words."""
    words = pltpu.bitcast(codes, jnp.int32)
    return jnp.concatenate([pltpu.bitcast(part, dtype) for part in (low(words), high(words))])


def _e2m1_to_e5m2_low(words: jax.Array) -> jax.Array:
    return ((words & 0x07070707) << 1) | ((words << 4) & SIGNS)


def _e2m1_to_e5m2_high(words: jax.Array) -> jax.Array:
    return ((words >> 3) & 0x0E0E0E0E) | (words & SIGNS)


SIGNS: Final = np.int32(-0x7F7F7F80)
"""The highest bit of every byte of a word."""


def _pairs(decode: Callable[[jax.Array], jax.Array], codes: jax.Array) -> jax.Array:
    """Nibbles two at a time, in the halves of a word, moved by 3 bits; `decode` turns them into bfloat16 numbers."""
    words = pltpu.bitcast(codes, jnp.int32)
    moved = [words << 3, words >> 1, words >> 5, words >> 9]
    return jnp.concatenate([pltpu.bitcast(decode(pair & 0x00780078), jnp.bfloat16) for pair in moved])


def _int4_pair(codes: jax.Array) -> jax.Array:
    """16 + n: below the exponent of 16.0, in the upper bits of the mantissa."""
    return codes | 0x41804180


def _e2m1_pair(moved: jax.Array) -> jax.Array:
    """The same number in bfloat16, bit by bit: from code 2 on exponent and mantissa are moved, 1 is 0.5 and 0 is 0."""
    codes = moved >> 3
    normal = ((codes >> 1) | (codes >> 2)) & 0x00010001
    some = normal | (codes & 0x00010001)
    bits = (codes << 6) & ((normal << 9) - (normal << 6))
    return (bits + (some << 14) - (some << 8)) | ((codes & 0x00080008) << 12)


def _bytes(decode: Callable[[jax.Array], jax.Array], codes: jax.Array) -> jax.Array:
    """Bytes one at a time, in the highest bits of a word, which `decode` turns into float32 numbers."""
    words = pltpu.bitcast(codes, jnp.int32)
    taken = [words << shift if shift else words for shift in (24, 16, 8, 0)]
    return jnp.concatenate([decode(word).astype(jnp.bfloat16) for word in taken])


def _nibble_by_nibble(codes: jax.Array) -> jax.Array:
    words = pltpu.bitcast(codes, jnp.int32)
    taken = [(words >> shift if shift else words) & 0xF for shift in range(0, 32, 4)]
    return jnp.concatenate([nibbles.astype(jnp.float32).astype(jnp.bfloat16) for nibbles in taken])


def _float8_byte(exponent_bits: int, words: jax.Array) -> jax.Array:
    return decode_finite_float(exponent_bits, words & np.int32(-(2**24)))


def _as_they_are(codes: jax.Array) -> jax.Array:
    return codes


_HALF: Final = PACK_BLOCK // 2
# Where operands of a chunk of weights are taken from. Nibbles: row j of a block of 32 holds weights j and j + 16.
_LOW_THEN_HIGH: Final[dict[str, Any]] = {"shape": (-1, 2, _HALF), "axes": (1, 0, 2)}
_BYTE_BY_BYTE: Final[dict[str, Any]] = {"shape": (-1, 4), "axes": (1, 0)}
_NIBBLE_BY_NIBBLE: Final[dict[str, Any]] = {"shape": (-1, 2, _HALF // 4, 4), "axes": (3, 1, 0, 2)}
_PAIR_BY_PAIR: Final[dict[str, Any]] = {"shape": (-1, 2, _HALF // 2, 2), "axes": (3, 1, 0, 2)}


def _int4_as(dtype: Any, unit: float) -> Widening:
    widen = functools.partial(
        _nibbles, dtype, lambda words: words & 0x0F0F0F0F, lambda words: (words >> 4) & 0x0F0F0F0F
    )
    return Widening(jnp.dtype(dtype).name, widen, **_LOW_THEN_HIGH, unit=unit)


def _int4_as_bfloat16(codes: jax.Array) -> jax.Array:
    return _int4_as(jnp.int8, 1.0).widen(codes).astype(jnp.bfloat16)


def _float8_widenings(name: str, exponent_bits: int) -> dict[str, Widening]:
    return {
        name: Widening(name, _as_they_are),
        "words": Widening(
            "bfloat16", functools.partial(_bytes, functools.partial(_float8_byte, exponent_bits)), **_BYTE_BY_BYTE
        ),
        SCALED: Widening("float32", lambda codes: codes.astype(jnp.float32)),
    }


_WIDENINGS: Final[dict[str, dict[str, Widening]]] = {
    "int8": {
        "bfloat16": Widening("bfloat16", lambda codes: codes.astype(jnp.bfloat16)),
        "int8": Widening("int8", _as_they_are),
        "words": Widening(
            "bfloat16", functools.partial(_bytes, lambda words: (words >> 24).astype(jnp.float32)), **_BYTE_BY_BYTE
        ),
        SCALED: Widening("float32", lambda codes: codes.astype(jnp.float32)),
    },
    "int4": {
        "float8_e4m3b11fnuz": _int4_as(jnp.float8_e4m3b11fnuz, 2.0**13),
        "float8_e4m3fn": _int4_as(jnp.float8_e4m3fn, 2.0**9),
        "int8": _int4_as(jnp.int8, 1.0),
        "bfloat16": Widening("bfloat16", _int4_as_bfloat16, **_LOW_THEN_HIGH),
        "words": Widening("bfloat16", functools.partial(_pairs, _int4_pair), **_PAIR_BY_PAIR, offset=16),
        "nibbles": Widening("bfloat16", _nibble_by_nibble, **_NIBBLE_BY_NIBBLE),
        SCALED: Widening("float32", lambda codes: _pairs(_int4_pair, codes).astype(jnp.float32) - 16, **_PAIR_BY_PAIR),
    },
    "float8_e4m3fn": _float8_widenings("float8_e4m3fn", 4),
    "float8_e5m2": _float8_widenings("float8_e5m2", 5),
    "mxfp4": {
        "float8_e5m2": Widening(
            "float8_e5m2",
            functools.partial(_nibbles, jnp.float8_e5m2, _e2m1_to_e5m2_low, _e2m1_to_e5m2_high),
            **_LOW_THEN_HIGH,
            unit=2.0**14,
        ),
        "words": Widening("bfloat16", functools.partial(_pairs, _e2m1_pair), **_PAIR_BY_PAIR),
        SCALED: Widening("float32", lambda codes: _pairs(_e2m1_pair, codes).astype(jnp.float32), **_PAIR_BY_PAIR),
    },
}
