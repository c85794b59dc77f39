"""Converts stored codes into operands of tensor cores, four bytes of a channel at a time.

A GPU converts integers to floats at an eighth of the rate at which it adds, and takes single bytes out of its 32-bit
registers one by one. A word of four codes becomes two pairs of 16-bit floats by byte permutations, masks and fused
multiply-adds instead, 1 to 2.5 instructions for a code:

    integers in bfloat16   a byte n in the low bits of a bfloat16 is n * 2^-133, a subnormal number up to 127 and a
                           normal one beyond: one multiply-add makes it (n - zero) / 64, exactly
    integers in float16    a code ORed into the mantissa of 1024 is 1024 + code: one multiply-add removes 1024
    float8, mxfp4          sign, exponent and mantissa are moved to where a 16-bit float has them, and a power of two
                           corrects the bias of the exponent, for subnormal numbers too

Packed codes have two halves: low nibbles, of the first 16 elements of a block of 32, and high ones, of the others.
Codes of float8 must be finite: NaN and infinities come out as numbers.
"""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.quantized_matmul.float_bits import decode_finite_float

FLOAT_BITS: Final = {"float8_e4m3fn": (4, 3), "float8_e5m2": (5, 2), "mxfp4": (2, 1)}
"""Exponent and mantissa bits of the float formats of a code."""

OPERAND_BITS: Final = {"bfloat16": (8, 7), "float16": (5, 10)}
"""Exponent and mantissa bits of the dtypes that tensor cores multiply."""

SIGNS: Final = 0x80008000
"""Sign bits of two 16-bit floats, and the bits of two negative zeros."""

LOW_BYTES: Final = ("0x4140", "0x4342")
"""Byte permutations that put the first two codes, or the last two, into the low bytes of two 16-bit numbers."""

HIGH_BYTES: Final = ("0x1404", "0x3424")
"""Byte permutations that put them into the high bytes."""


def unit(format: str, operand: str) -> float:
    """Returns the number that operands have to be multiplied by to be the codes."""
    return 64.0 if format in ("int8", "int4") and operand == "bfloat16" else 1.0


def raw_bytes(codes: jax.Array) -> jax.Array:
    """Returns codes of any 8-bit dtype as uint8."""
    return codes if codes.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(codes, jnp.uint8)


def widen(codes: jax.Array, format: str, operand: str, half: int, zero: int, *, native: bool) -> jax.Array:
    """Returns codes less an integer zero, over their `unit`, in the dtype of an operand.

    Args:
      codes: stored bytes, uint8 `[channels, bytes]`.
      format: format of the codes, a `WeightFormat`.
      operand: "bfloat16", "float16" or "int8".
      half: 1 for the high nibbles of packed formats, otherwise 0.
      zero: integer that is subtracted from integer codes.
      native: whether the kernel is compiled for an NVIDIA GPU, so that it may contain PTX.
    """
    if native and format != operand:
        text, registers = assembly(format, operand, half, zero), 1 if operand == "int8" else 2
        (found,) = plgpu.elementwise_inline_asm(
            text,
            args=[codes],
            constraints="=r," * registers + "r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.dtype(operand))],
        )
        return found
    if format in ("int4", "mxfp4"):
        codes = codes >> 4 if half else codes & jnp.uint8(15)
    if format in FLOAT_BITS:
        words = codes.astype(jnp.int32) << (28 if format == "mxfp4" else 24)
        return decode_finite_float(FLOAT_BITS[format][0], words).astype(operand)
    integers = jax.lax.bitcast_convert_type(codes, jnp.int8)
    if operand == "int8":
        return integers - jnp.int8(zero)
    return ((integers.astype(jnp.float32) - zero) / unit(format, operand)).astype(operand)


def assembly(format: str, operand: str, half: int, zero: int) -> str:
    """Returns the PTX that converts four codes, the last register, into operands in the others; see `widen`.

    Four int8 take one register, `$0`, and 16-bit floats two, `$0` and `$1`.
    """
    if operand == "int8":  # of nibbles; the highest bits keep differences of bytes apart
        nibbles, zeros = 0x0F0F0F0F << (4 * half), zero * 0x01010101
        lines = [f"and.b32 $0, $1, {nibbles:#x}", f"shr.u32 $0, $0, {4 * half}", "or.b32 $0, $0, 0x80808080"]
        return "; ".join([*lines, f"sub.s32 $0, $0, {zeros:#x}", "xor.b32 $0, $0, 0x80808080;"])
    lines = [".reg .b32 word, pair, sign, times, plus", "mov.b32 word, $2"]
    pairs = _integers if format in ("int8", "int4") else _floats
    permutations, times, plus, steps = pairs(format, operand, half, zero)
    if format == "int8":
        lines.append("xor.b32 word, word, 0x80808080")
    lines += [f"mov.b32 times, {times:#x}", f"mov.b32 plus, {plus:#x}"]
    for result, permutation in zip(("$0", "$1"), permutations, strict=True):
        lines += [f"prmt.b32 pair, word, 0, {permutation}", *steps]
        lines.append(f"fma.rn.{'bf16x2' if operand == 'bfloat16' else 'f16x2'} {result}, pair, times, plus")
    return f"{{ {'; '.join(lines)}; }}"


Pairs = tuple[tuple[str, str], int, int, list[str]]
"""How a word becomes pairs of floats: permutations, factors and addends as bits of pairs, instructions on `pair`."""


def _integers(format: str, operand: str, half: int, zero: int) -> Pairs:
    """Returns how integers become floats: int8 codes had their sign bits flipped, so that they are 128 larger."""
    zero = zero + (128 if format == "int8" else 0)
    place = 2.0 ** (4 * half)  # a high nibble counts 16 times as much
    steps = [f"and.b32 pair, pair, {0x000F000F << (4 * half):#x}"] if format == "int4" else []
    if operand == "bfloat16":
        return LOW_BYTES, _twice(2.0**127 / place, operand), _twice(-zero / 64, operand), steps
    steps.append("or.b32 pair, pair, 0x64006400")
    return LOW_BYTES, _twice(1 / place, operand), _twice(-1024 / place - zero, operand), steps


def _floats(format: str, operand: str, half: int, zero: int) -> Pairs:
    """Returns how the bits of narrow floats become those of wider ones."""
    del zero
    (exponent, mantissa), (wide_exponent, wide_mantissa) = FLOAT_BITS[format], OPERAND_BITS[operand]
    lowest = 12 if half else 8  # place of the lowest bit of the mantissa
    right = lowest - (wide_mantissa - mantissa)
    mask = ((1 << (exponent + mantissa)) - 1) << (wide_mantissa - mantissa)
    to_top = 4 if format == "mxfp4" and not half else 0
    steps = [
        f"shl.b32 sign, pair, {to_top}",
        f"and.b32 sign, sign, {SIGNS:#x}",
        f"shr.u32 pair, pair, {right}" if right >= 0 else f"shl.b32 pair, pair, {-right}",
        f"and.b32 pair, pair, {mask * 0x10001:#x}",
        "or.b32 pair, pair, sign",
    ]
    bias = 2 ** (wide_exponent - 1) - 2 ** (exponent - 1)
    return HIGH_BYTES, _twice(2.0**bias, operand), SIGNS, steps if bias else []


def _twice(number: float, operand: str) -> int:
    """Returns the bits of two equal 16-bit floats."""
    return int(np.asarray(number, jnp.dtype(operand)).view(np.uint16)) * 0x10001
