"""Two ways to multiply a thread's codes, 16 bytes of a channel, by numbers of x.

Whatever the format, codes become words of four bytes first: int8 as it is, the nibbles of int4 by masks, those of mxfp4
by a table. `Config.multiply` names the way, and the tuner compares them:

    Floats   A byte is put into the mantissa of a power of two, by one byte permutation, and multiplied by a number of x
             in float32. The power of two, and the zero of a code, are left in the product; the sum of x takes them off.
             Where the result is float32, which would show what that rounds, they are subtracted from each weight.
    Bytes    A segment of x, the 16 or 32 numbers that meet a thread's weights, is made integers of 16 bits in units of
             a power of two, once for all channels: x = unit * (low + 256 * high). `dp4a` multiplies four bytes by four
             and adds them up, exactly. A number is off by up to 2^-15 of the segment's largest, which results of 16
             bits do not show.

For 16 bytes of a channel, x aside, int8 takes 43 instructions as floats and 16 as bytes, int4 90 and 39.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.gpu_ptx import Ptx
from palladion.kernels.gpu_rows import add_up, columns
from palladion.kernels.quantized_matmul.triton.operands import widen
from palladion.reference.scheme import Scheme

WORDS: Final = 4
"""Words of 32 bits that a thread reads at a time."""

LOW_NIBBLES: Final = 0x0F0F0F0F
TOP_BITS: Final = 0x80808080 - 2**32

LEVELS: Final = ((0, 1, 2, 3), (4, 6, 8, 12))
"""Twice the magnitudes of e2m1 in the order of its codes, as two words have them."""

LEVEL_OF_ZERO: Final = 12
"""Added to levels, so that none is negative."""

# The lower three bits of a code of mxfp4 select its magnitude from a table of eight bytes. Where the sign above them is
# set, a permutation puts the sign of that byte instead: 0. So one table finds positive numbers, and one negative ones.
POSITIVE, NEGATIVE = (
    tuple(sum((LEVEL_OF_ZERO + sign * level) << (8 * place) for place, level in enumerate(half)) for half in LEVELS)
    for sign in (1, -1)
)
SIGNS: Final = 0x88888888 - 2**32


class Magic(NamedTuple):
    """A power of two that a byte becomes a part of.

    Attributes:
      bits: of the power of two, a float32.
      place: of the byte in it.
    """

    bits: int
    place: int

    @property
    def value(self) -> int:
        """The power of two: the byte counts ones."""
        return 2 ** (23 - 8 * self.place)

    def selector(self, byte: int) -> int:
        """Returns the selector of `prmt` that takes one byte of a word, and all others of `bits`."""
        digits = [4, 5, 6, 7]
        digits[self.place] = byte
        return sum(digit << (4 * place) for place, digit in enumerate(digits))


SMALL: Final = Magic(0x43000000, place=2)
"""128, to which up to 127 can be added."""

LARGE: Final = Magic(0x47000000, place=1)
"""32,768, to which up to 255 can be added."""

ROUND: Final = 1.5 * 2.0**23
"""A float whose lowest bits count ones: added to a small number, it leaves the nearest integer in them."""

BITS: Final = 15
"""The largest number of a segment takes up to so many bits, without its sign."""

LEAST_EXPONENT: Final = BITS
"""The least biased exponent that a segment's largest number is taken to have: units are normal numbers."""


class Operand(NamedTuple):
    """A segment of a row of x.

    Attributes:
      numbers: as floats, four arrays `[threads * 4]` for each array of words of codes; as bytes, the low bytes and then
        the high ones, `[threads]` for each word of a thread.
      total: sum of the numbers, float32 `[threads]`.
      unit: float32 `[threads]`, NaN where a number is not finite; None for floats.
    """

    numbers: tuple[tuple[jax.Array, ...], ...]
    total: jax.Array
    unit: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Floats:
    """Multiplies bytes of codes as floats.

    Attributes:
      scheme: of the codes.
      ptx: byte instructions.
      exact: whether nothing is left in the floats that cancels with the sum of x.
    """

    scheme: Scheme
    ptx: Ptx
    exact: bool

    @property
    def magic(self) -> Magic:
        """The power of two that bytes are made floats by."""
        return LARGE if self.scheme.format == "int8" else SMALL

    @property
    def offset(self) -> int:
        """The number that weights are larger by than codes minus their implied zero."""
        return byte_of_zero(self.scheme) + (128 if self.scheme.format == "int8" else 0) + self.magic.value

    @property
    def left(self) -> int:
        """The number that is left in the weights of `product`."""
        return 0 if self.exact or _is_float8(self.scheme) else self.offset

    def operand(self, quads: Sequence[Sequence[jax.Array]]) -> Operand:
        """Returns numbers of x as an operand: four arrays for each word of codes."""
        numbers = tuple(map(tuple, quads))
        return Operand(numbers, of_threads(add_up([add_up(quad) for quad in numbers])))

    def weights(self, codes: jax.Array, layer: jax.Array) -> list[list[jax.Array]]:
        """Returns float32 weights, four arrays for each of `byte_words`."""
        if _is_float8(self.scheme):
            wide = widen(codes, self.scheme.format, "float16", 0, 0, native=self.ptx.native)
            return [columns(wide.astype(jnp.float32), 4)]
        words = byte_words(codes, self.scheme, self.ptx, layer)
        if self.scheme.format == "int8":
            words = [word ^ TOP_BITS for word in words]
        quads = [[self._wide(word, byte) for byte in range(4)] for word in words]
        return [[wide - self.offset for wide in quad] for quad in quads] if self.exact else quads

    def _wide(self, word: jax.Array, byte: int) -> jax.Array:
        bits = self.ptx.prmt(word, self.magic.bits, self.magic.selector(byte))
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def product(self, weights: Sequence[Sequence[jax.Array]], x: Operand) -> jax.Array:
        """Returns the sum of products of a segment, float32 `[threads]`."""
        pairs = [pair for both in zip(weights, x.numbers, strict=True) for pair in zip(*both, strict=True)]
        return of_threads(add_up([weight * number for weight, number in pairs]))


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Multiplies bytes of codes by bytes of x.

    Attributes:
      scheme: of the codes.
      ptx: byte instructions.
    """

    scheme: Scheme
    ptx: Ptx

    @property
    def left(self) -> int:
        """The number that is left in the weights of `product`."""
        return byte_of_zero(self.scheme)

    def operand(self, quads: Sequence[Sequence[jax.Array]]) -> Operand:
        """Returns numbers of x as an operand: low and high bytes of four numbers for each word of codes."""
        numbers = [number for quad in quads for number in quad]
        total = of_threads(add_up(numbers))
        largest = numbers[0]
        for number in numbers:
            largest = jnp.maximum(largest, jnp.abs(number))
        largest = jnp.max(largest.reshape(-1, WORDS), axis=1)
        bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
        exponent = jnp.maximum(jax.lax.shift_right_logical(bits, jnp.int32(23)), LEAST_EXPONENT)
        unit = _power_of_two(exponent - (BITS - 1))
        inverse = _for_words(_power_of_two(254 + (BITS - 1) - exponent))
        rounded = [jax.lax.bitcast_convert_type(number * inverse + ROUND, jnp.int32) for number in numbers]
        quads = [self._low_and_high(rounded[start : start + 4]) for start in range(0, len(rounded), 4)]
        pieces = tuple(tuple(word for quad in quads for word in columns(quad[piece], WORDS)) for piece in range(2))
        return Operand(pieces, total, unit + 0 * total)

    def _low_and_high(self, quad: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns the lowest bytes of four integers as a word, and their second bytes."""
        first, last = (self.ptx.prmt(quad[start], quad[start + 1], 0x5140) for start in (0, 2))
        return self.ptx.prmt(first, last, 0x5410), self.ptx.prmt(first, last, 0x7632)

    def weights(self, codes: jax.Array, layer: jax.Array) -> list[list[jax.Array]]:
        """Returns the words of each thread, one array for each of them and of `byte_words`."""
        return [columns(word, WORDS) for word in byte_words(codes, self.scheme, self.ptx, layer)]

    def product(self, weights: Sequence[Sequence[jax.Array]], x: Operand) -> jax.Array:
        """Returns the sum of products of a segment, float32 `[threads]`."""
        is_signed = self.scheme.format == "int8"
        words = [word for quad in weights for word in quad]
        sums: list[Any] = [0, 0]
        for piece, numbers in enumerate(x.numbers):
            for word, number in zip(words, numbers, strict=True):
                sums[piece] = self.ptx.dp4a(word, number, sums[piece], signed=(is_signed, piece == 1))
        low, high = (total.astype(jnp.float32) for total in sums)
        return (high * 256 + low) * x.unit


def byte_of_zero(scheme: Scheme) -> int:
    """Returns the byte of `byte_words` that stands for a weight of 0, where no zeros are stored."""
    return LEVEL_OF_ZERO if scheme.format == "mxfp4" else scheme.implied_zero


def byte_words(codes: jax.Array, scheme: Scheme, ptx: Ptx, layer: jax.Array) -> list[jax.Array]:
    """Returns codes as words of four bytes `[threads * 4]`, in the order in which x meets them.

    Args:
      codes: as stored, int8 `[threads * 16]`.
      scheme: of the codes.
      ptx: byte instructions.
      layer: a number that is not negative. It hides constants: the compiler would load a known table before each use.
    """
    words = words_of(codes)
    if scheme.format == "int4":
        return [words & LOW_NIBBLES, jax.lax.shift_right_logical(words, jnp.int32(4)) & LOW_NIBBLES]
    if scheme.format != "mxfp4":
        return [words]
    nothing = jnp.minimum(layer, 0)
    tables = [[jnp.int32(half) + nothing for half in table] for table in (POSITIVE, NEGATIVE)]
    found = []
    for shift in (0, 16):  # four codes select at a time
        selectors = [jax.lax.shift_right_logical(word, jnp.int32(shift)) for word in (words, words ^ SIGNS)]
        pairs = zip(tables, selectors, strict=True)
        positive, negative = (ptx.prmt(low, high, selector) for (low, high), selector in pairs)
        found.append(positive | negative)
    return found


def of_threads(x: jax.Array) -> jax.Array:
    """Returns the sum over the words of each thread: `[threads * 4]` to `[threads]`."""
    return jnp.sum(x.reshape(-1, WORDS), axis=1)


def _for_words(x: jax.Array) -> jax.Array:
    """Returns an array `[threads]` as `[threads * 4]`, the same for all words of a thread."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], WORDS)).reshape(-1)


def words_of(codes: jax.Array) -> jax.Array:
    """Returns int8 codes as int32 words of four: `[n * 4]` to `[n]`.

    The compiler sees that the four bytes lie side by side in a register, and moves nothing.
    """
    stored = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    word, *others = (byte.astype(jnp.int32) for byte in columns(stored, 4))
    for place, byte in enumerate(others, 1):
        word = word | (byte << (8 * place))
    return word


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2 ** (exponent - 127) for exponents from 1 to 254."""
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _is_float8(scheme: Scheme) -> bool:
    return scheme.format.startswith("float8")
