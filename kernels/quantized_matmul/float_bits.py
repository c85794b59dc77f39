"""Decodes and splits floats by their bits, in plain jax.numpy that every kernel's compiler takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

NAN: Final = 0x7FC00000
"""The bits of a float32 NaN."""

INFINITY: Final = 0x7F800000
"""The bits of the float32 infinity; larger magnitudes are NaN."""

MANTISSA_BITS: Final = 23
"""Mantissa bits of a float32."""

E8M0_NAN: Final = 255
"""The only e8m0 byte that is no power of two."""

FLOAT16_EXPONENT: Final = 0x7C000000
"""The exponent bits of a float16 in the upper half of a word: all ones mean infinity, or NaN with a mantissa."""

FLOAT16_MANTISSA: Final = 0x03FF0000
"""The mantissa bits of a float16 in the upper half of a word."""


def bfloat16_pieces(x: jax.Array, count: int) -> Iterator[jax.Array]:
    """Yields float32 numbers that bfloat16 holds exactly and whose sum is a float32 x; three have all of its bits."""
    for _ in range(count):
        # The upper half of a float32 is a bfloat16. XLA may drop a conversion to bfloat16 and back.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(2**16)
        piece = jax.lax.bitcast_convert_type(bits, jnp.float32)
        yield piece
        x = x - piece


def decode_e8m0(exponents: jax.Array) -> jax.Array:
    """Returns the float32 values 2^(byte - 127) of e8m0 bytes; 255 is NaN (OCP Microscaling Formats 1.0, 5.4.1).

    Byte 0 is 2^-127, the one value that is a subnormal float32: hardware that flushes subnormals reads it as 0.

    Args:
      exponents: the bytes, in an integer dtype, 0 to 255.
    """
    bits = exponents.astype(jnp.int32) << MANTISSA_BITS
    half_of_smallest = 1 << (MANTISSA_BITS - 1)  # 2^-127: without exponent bits the mantissa counts from 2^-126 down
    bits = jnp.where(exponents == E8M0_NAN, NAN, jnp.maximum(bits, half_of_smallest))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def decode_float16(bits: jax.Array) -> jax.Array:
    """Returns the float32 values of float16 numbers, infinities and NaN included.

    Args:
      bits: of the numbers, in a 16-bit integer dtype.
    """
    words = bits.astype(jnp.int32) << 16
    is_finite = (words & FLOAT16_EXPONENT) != FLOAT16_EXPONENT
    infinity_or_nan = (words & np.int32(-(2**31))) | INFINITY | ((words & FLOAT16_MANTISSA) >> 3)
    special = jax.lax.bitcast_convert_type(infinity_or_nan, jnp.float32)
    return jnp.where(is_finite, decode_finite_float(5, words), special)


def decode_finite_float(exponent_bits: int, words: jax.Array) -> jax.Array:
    """Returns the float32 values of finite narrower floats, subnormal ones included.

    Args:
      exponent_bits: of the narrow format, whose bias is 2^(exponent_bits - 1) - 1.
      words: int32, with sign, exponent and mantissa of the narrow float in the highest bits and zeros below.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    magnitude = (words & 0x7FFFFFFF) >> (8 - exponent_bits)  # exponent and mantissa where float32 has them
    normal = jax.lax.bitcast_convert_type(magnitude + ((127 - bias) << MANTISSA_BITS), jnp.float32)
    # A subnormal has the exponent of 1, and no implied leading one.
    number = jnp.where(magnitude < 1 << MANTISSA_BITS, 2 * normal - 2.0 ** (1 - bias), normal)
    return jnp.where(words < 0, -number, number)
