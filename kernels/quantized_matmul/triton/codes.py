"""Stored codes as numbers that a GPU multiplies, in few instructions: four bytes at a time, and by their bits.

A GPU converts integers to floats at a fraction of the rate at which it adds, and takes single bytes out of its 32-bit
registers one by one. So four bytes stay together in a word, and masks and shifts turn two codes at a time into a pair
of 16-bit floats:

    int8, int4   ORed into the mantissa of a power of two, which is then subtracted with the zero: exact
    float8, mxfp4   sign, exponent and mantissa moved to where a 16-bit float has them, with another bias of exponents:
                 exact after a multiplication by a power of two, subnormal numbers included

A word is written as four bytes ORed together. The compiler sees that these lay side by side in a register and moves
nothing; where they come from two rows it takes one byte permutation. Codes of float8 are finite (so is what `quantize`
makes): NaN and infinities come out as numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.reference.platforms import target_platform

BYTE_PAIR: Final = 0x00FF00FF
NIBBLE_PAIR: Final = 0x000F000F
HIGH_BYTES: Final = 0xFF00FF00 - 2**32
SIGNS: Final = 0x80008000 - 2**32


Bits = Callable[[jax.Array, int, Callable[[int], Any]], jax.Array]
"""The bits of two floats, made of a word, how far up the codes lie in its halves, and of what `hide` returns."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How the bytes, or nibbles, of both halves of a word become two floats.

    Attributes:
      bits: of the floats.
      minus: to be subtracted from the floats; a number, or bits of floats where it depends on the code.
      times: to be multiplied by then: a power of two.
    """

    bits: Bits
    minus: float | Bits = 0.0
    times: float = 1.0


def _up(word: jax.Array, places: int) -> jax.Array:
    """Shifted towards higher places, or lower ones where that is negative; what is beyond a mask is of no interest."""
    if places < 0:
        return jax.lax.shift_right_logical(word, jnp.int32(-places))
    return word << places if places else word


def _mantissa(mask: int, power: int, flipped: int = 0) -> Bits:
    """A code, some of its bits flipped, ORed into the lowest bits of a power of two."""

    def bits(word: jax.Array, shift: int, hidden: Callable[[int], Any]) -> jax.Array:
        code = _up(word, -shift)
        return ((code ^ hidden(flipped) if flipped else code) & hidden(mask)) | hidden(power)

    return bits


def _moved(magnitude: int, up: int, sign_up: int) -> Bits:
    """Exponent and mantissa of a float moved up, its sign moved to the top."""

    def bits(word: jax.Array, shift: int, hidden: Callable[[int], Any]) -> jax.Array:
        signs = _up(word, sign_up - shift) & hidden(SIGNS)
        return (_up(word, up - shift) & hidden(magnitude << up)) | signs

    return bits


PAIRS: Final[dict[tuple[str, str], Pairs]] = {
    # 1024 has ten bits of mantissa below it. An int8 with its top bit flipped is one of 0 to 255, 128 larger.
    ("int8", "float16"): Pairs(_mantissa(BYTE_PAIR, 0x64006400, flipped=0x00800080), minus=1024 + 128),
    ("int4", "float16"): Pairs(_mantissa(NIBBLE_PAIR, 0x64006400), minus=1024),
    # 128 has seven bits of mantissa in bfloat16. The eighth of an int8 makes 256 of what is subtracted.
    ("int8", "bfloat16"): Pairs(_mantissa(0x007F007F, 0x43004300), minus=_mantissa(0x00800080, 0x43004300)),
    ("int4", "bfloat16"): Pairs(_mantissa(NIBBLE_PAIR, 0x43004300), minus=128),
    ("float8_e4m3fn", "float16"): Pairs(_moved(0x007F007F, 7, 8), times=2.0**8),
    ("float8_e4m3fn", "bfloat16"): Pairs(_moved(0x007F007F, 4, 8), times=2.0**120),
    ("float8_e5m2", "float16"): Pairs(lambda word, shift, hidden: _up(word, 8 - shift) & hidden(HIGH_BYTES)),
    ("float8_e5m2", "bfloat16"): Pairs(_moved(0x007F007F, 5, 8), times=2.0**112),
    ("mxfp4", "float16"): Pairs(_moved(0x00070007, 9, 12), times=2.0**14),
    ("mxfp4", "bfloat16"): Pairs(_moved(0x00070007, 6, 12), times=2.0**126),
}
"""The conversions, by format of the codes and dtype of the floats."""


def magic(format: str, operand: str) -> int:
    """The power of two that integer codes are widened by: `zero=-magic` leaves it in them."""
    minus = PAIRS[format, operand].minus
    assert not callable(minus)
    return int(minus)


def hide(zero: jax.Array) -> Callable[[int], jax.Array]:
    """Constants that the compiler takes for variables.

    It knows two operands of a bit operation as constants, and would load one of them into a register before each.

    Args:
      zero: a scalar that is never negative, int32; a layer's index for example.
    """
    nothing = jnp.minimum(zero, 0)
    return lambda constant: jnp.int32(constant) + nothing


def raw_bytes(codes: jax.Array) -> jax.Array:
    """Codes of any 8-bit dtype as uint8."""
    return codes if codes.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(codes, jnp.uint8)


def channel_words(codes: jax.Array) -> jax.Array:
    """Codes `[rows, channels]` as int32 `[rows, channels / 4]`, four channels in each."""
    quads = raw_bytes(codes).reshape(codes.shape[0], codes.shape[1] // 4, 2, 2)
    even, odd = jnp.unstack(quads, axis=-1)
    (b0, b2), (b1, b3) = jnp.unstack(even, axis=-1), jnp.unstack(odd, axis=-1)
    return _word(b0, b1, b2, b3)


def wide_channels(words: jax.Array, shift: int, format: str, hidden: Callable[[int], Any], zero: int) -> jax.Array:
    """One code of each byte of `channel_words`: float32 `[rows, channels]`, not yet multiplied by `Pairs.times`."""
    halves = [floats(words, shift + 8 * i, format, "float16", hidden, zero, times=False) for i in range(2)]
    even, odd = (jnp.stack([x.astype(jnp.float32) for x in pair], axis=-1) for pair in halves)
    return jnp.stack([even, odd], axis=-1).reshape(words.shape[0], -1)


def _word(b0: jax.Array, b1: jax.Array, b2: jax.Array, b3: jax.Array) -> jax.Array:
    word = b0.astype(jnp.int32)
    for place, byte in enumerate((b1, b2, b3), 1):
        word = word | (byte.astype(jnp.int32) << (8 * place))
    return word


def floats(
    word: jax.Array,
    shift: int,
    format: str,
    operand: str,
    hidden: Callable[[int], Any],
    zero: int = 0,
    *,
    times: bool = True,
) -> list[jax.Array]:
    """Two floats of every word: of the bytes or nibbles that lie `shift` bits up in its halves, the lower half first.

    Args:
      word: int32.
      shift: 0 to 12.
      format: of the codes.
      operand: "bfloat16" or "float16".
      hidden: what `hide` returns.
      zero: is subtracted from integers; the negative of `minus` leaves that in them.
      times: whether the result is multiplied by `Pairs.times`.
    """
    pairs = PAIRS[format, operand]
    found = _halves(pairs.bits(word, shift, hidden), operand)
    if callable(pairs.minus):
        minus_bits = _halves(pairs.minus(word, shift, hidden), operand)
        found = [x - y for x, y in zip(found, minus_bits, strict=True)]
    else:
        minus = pairs.minus + zero
        found = [x - jnp.asarray(minus, x.dtype) for x in found] if minus else found
    return [_scaled(x, pairs.times) for x in found] if times and pairs.times != 1 else found


def _halves(bits: jax.Array, operand: str) -> list[jax.Array]:
    halves = bits.astype(jnp.int16), jax.lax.shift_right_logical(bits, jnp.int32(16)).astype(jnp.int16)
    return [jax.lax.bitcast_convert_type(half, jnp.dtype(operand)) for half in halves]


def _scaled(x: jax.Array, times: float) -> jax.Array:
    """x * times, subnormal numbers included."""
    if target_platform() != "cpu" or x.dtype != jnp.bfloat16:
        return x * jnp.asarray(times, x.dtype)
    # XLA on a CPU takes subnormal numbers for zeros: there the exponent is added to, or the mantissa multiplied.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)
    exponent = math.frexp(times)[1] - 1
    magnitude = bits & 0x7FFF
    normal = jax.lax.bitcast_convert_type((magnitude + (exponent << 7)) << 16, jnp.float32)
    found = jnp.where(magnitude >= 0x80, normal, magnitude.astype(jnp.float32) * 2.0 ** (exponent - 133))
    return jnp.where(bits >= 0x8000, -found, found).astype(x.dtype)
