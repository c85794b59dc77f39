"""Rows of activations as bytes, and their products with codes that are integers: four weights an instruction, exactly.

A float costs two instructions a weight, one to widen a code and one to multiply it. A GPU also multiplies four pairs of
bytes and adds all four products to an int32, in one (`dp4a`). So x becomes a fixed-point number: 16 or 32 numbers that
meet a chunk of a weight share a unit, a power of two, in which the largest of them takes 24 bits, sign included, and
each is three bytes of its own:

    x = unit * (b0 + 256 * b1 + 65536 * b2)        0 <= b0, b1 < 256, -128 <= b2 < 128

Rounding x to the unit is off by at most 2^-23 of the largest number of the chunk, which float32 does to that number as
well; of numbers with 8 significant bits only those are rounded at all that are 2^15 times smaller than it. Products
with codes, and their sums over a chunk, are exact. Bytes cost the same whether codes have 4 or 8 bits, and a chunk is
made bytes of once for all of its channels.

Four weights that are multiplied together lie below each other, where memory has four channels side by side: a block of
four rows by four channels is turned over by eight byte permutations, for 16 or 32 weights.

                  w0: c0 c1 c2 c3                       c0: w0 w1 w2 w3
    loaded words  w1: c0 c1 c2 c3      become words     c1: w0 w1 w2 w3      with weights of
                  w2: c0 c1 c2 c3                       c2: w0 w1 w2 w3      one channel each
                  w3: c0 c1 c2 c3                       c3: w0 w1 w2 w3

Nibbles are masked then. Those of mxfp4 look up, four at a time, twice the number that they stand for, plus 12: a byte
permutation is a table of eight bytes. The two codes of a byte stay side by side, and numbers of x get that order.

Sums start at the bits of the float 1.5 * 2^23, so that as a float they are that number and the sum, as long as it is
below 2^22: converting integers takes an instruction that a GPU executes at an eighth of the rate.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.gpu_ptx import Program
from palladion.kernels.gpu_rows import LOAD_BYTES
from palladion.reference.quantization import Scheme

QUAD: Final = 4
"""Number of weights along `in` in a word."""

SIGNED: Final = (False, False, True)
"""Whether each byte of a number is signed, the lowest byte first."""

BASE: Final = 1.5 * 2.0**23
"""A float whose lowest bits count ones: an integer below 2^22 that is added to its bits is added to the number."""


def _bits(number: float) -> int:
    """Returns the bits of a float32."""
    return int(struct.unpack("I", struct.pack("f", number))[0])


BASE_BITS: Final = _bits(BASE)

BIAS: Final = 127
"""The bias of a float32's exponent."""

INFINITY_BITS: Final = 0x7F800000
"""The bits of infinity; those of NaN are larger."""

UNITS: Final = 22
"""The largest number of a chunk is 2^22 units or more, and fewer than 2^23."""

LEAST_EXPONENT: Final = UNITS + 2
"""Biased, of a chunk's largest number: for smaller ones the unit stays as it is, 2^-125."""

LOW_NIBBLES: Final = 0x0F0F0F0F

LEVELS: Final = ((0, 1, 2, 3), (4, 6, 8, 12))
"""Twice the magnitudes of e2m1, in the order of its codes, as two words have them."""

LEVEL_OF_ZERO: Final = 12
"""Added to levels, so that none is negative."""


class Row(NamedTuple):
    """A chunk of a row of x, for every lane.

    Attributes:
      words: of four bytes, int32 `[lanes, threads]`: for each place all quads of numbers, in the order of `in`.
      unit: float32 `[lanes, threads]`; NaN where a number is not finite.
      sums: over the chunk, int32 `[lanes, threads]` for each place.
    """

    words: tuple[tuple[jax.Array, ...], ...]
    unit: jax.Array
    sums: tuple[jax.Array, ...]

    @property
    def total(self) -> jax.Array:
        """The sum of the numbers, in float32 `[lanes, threads]`."""
        return _weighed([of_place.astype(jnp.float32) for of_place in self.sums]) * self.unit


ROWS: Final = ("w0", "w1", "w2", "w3")
NUMBERS: Final = ("x0", "x1", "x2", "x3")

# Bytes of two words, and then of both pairs: (3, 2, 1, 0) of one and (7, 6, 5, 4) of the other stand in the selector.
FIRST_OF_PAIRS, LAST_OF_PAIRS = "prmt.b32 result, low, high, 0x5410", "prmt.b32 result, low, high, 0x7632"


def _pairs(words: Sequence[str], selector: int) -> tuple[str, ...]:
    return tuple(
        f"prmt.b32 {name}, {first}, {second}, {selector:#06x}"
        for name, first, second in (("low", *words[:2]), ("high", *words[2:]))
    )


CHANNELS: Final = tuple(
    Program((*_pairs(ROWS, selector), last), ROWS)
    for selector in (0x5140, 0x7362)
    for last in (FIRST_OF_PAIRS, LAST_OF_PAIRS)
)
"""Four rows of four channels as a word, for each of the channels."""

# The lower three bits of a code of mxfp4 are the place of its magnitude in a table, and its sign above them has a
# permutation put in the sign of that byte: 0. So one table finds the numbers, and one the negative ones, turned over.
UP, DOWN = (
    tuple(sum((LEVEL_OF_ZERO + sign * level) << (8 * place) for place, level in enumerate(half)) for half in LEVELS)
    for sign in (1, -1)
)


def _levels(selector: int, shift: int) -> Program:
    """The levels of two rows of a channel, two codes of each."""
    return Program(
        (
            f"prmt.b32 codes, w0, w1, {selector:#06x}",
            "xor.b32 turned, codes, 0x88888888",
            f"shr.u32 codes_from, codes, {shift}",
            f"shr.u32 turned_from, turned, {shift}",
            "prmt.b32 up, up0, up1, codes_from",
            "prmt.b32 down, down0, down1, turned_from",
            "or.b32 result, up, down",
        ),
        ("w0", "w1", "up0", "up1", "down0", "down1"),
    )


LEVELS_OF_CHANNELS: Final = tuple(_levels(selector, shift) for selector in (0x5140, 0x7362) for shift in (0, 16))
"""Two rows of four channels, in mxfp4, and both tables, as a word of four levels for each of the channels."""

ROUNDED: Final = tuple(f"cvt.rni.s32.f32 n{place}, {number}" for place, number in enumerate(NUMBERS))

PLACES: Final = tuple(
    Program((*ROUNDED, *_pairs(("n0", "n1", "n2", "n3"), selector), last), NUMBERS)
    for selector, last in ((0x5140, FIRST_OF_PAIRS), (0x5140, LAST_OF_PAIRS), (0x0062, FIRST_OF_PAIRS))
)
"""Four numbers of x in units as a word, for each of the places."""


def _sum(name: str, words: Sequence[str], others: Sequence[str], kinds: str, start: str) -> tuple[str, ...]:
    """Products of bytes, one word after the other."""
    before = [start, *[name] * (len(words) - 1)]
    return tuple(
        f"dp4a.{kinds} {name}, {word}, {other}, {total}"
        for word, other, total in zip(words, others, before, strict=True)
    )


@functools.cache
def product(quads: int, signed: bool) -> Program:
    """The sum of products of weights, which are signed or not, and of numbers of x: what it starts at is taken off."""
    weights = [f"w{quad}" for quad in range(quads)]
    places = [[f"x{place}_{quad}" for quad in range(quads)] for place in range(len(SIGNED))]
    starts = [f"start{place}" for place in range(len(SIGNED))]
    sums = [
        line
        for place, words in enumerate(places)
        for line in _sum(f"sum{place}", weights, words, _kinds(signed, SIGNED[place]), starts[place])
    ]
    floats = [f"add.f32 sum{place}, sum{place}, 0f{_bits(-BASE):08X}" for place in range(len(SIGNED))]
    return Program(
        (
            *sums,
            *floats,
            f"fma.rn.f32 upper, sum2, 0f{_bits(256):08X}, sum1",
            f"fma.rn.f32 all, upper, 0f{_bits(256):08X}, sum0",
            "mul.f32 result, all, unit",
        ),
        (*weights, *itertools.chain(*places), *starts, "unit"),
    )


@functools.cache
def largest(count: int) -> Program:
    """The bits of the largest magnitude: NaN if a number is, which the maximum that Pallas asks for leaves out."""
    magnitudes = [f"abs.f32 a{place}, x{place}" for place in range(count)]
    maxima = [f"max.NaN.f32 a0, a0, a{place}" for place in range(1, count)]
    return Program((*magnitudes, *maxima), tuple(f"x{place}" for place in range(count)))


@functools.cache
def total(quads: int, signed: bool) -> Program:
    """The sum of a place of x."""
    words = [f"x{quad}" for quad in range(quads)]
    return Program(_sum("sum", words, ["0x01010101"] * quads, _kinds(signed, False), "0"), tuple(words))


def _kinds(*signed: bool) -> str:
    return ".".join("s32" if has_sign else "u32" for has_sign in signed)


def row(numbers: Sequence[jax.Array], native: bool) -> Row:
    """A chunk of numbers, float32 `[lanes, threads]` each, as bytes; a multiple of four of them."""
    bits = largest(len(numbers)).run(*numbers, native=native)
    # The last float below a power of two would be rounded up to it: it is taken for that.
    bounded = jnp.maximum(jax.lax.shift_right_logical(bits + 1, jnp.int32(23)), LEAST_EXPONENT)
    units_of_one = jax.lax.bitcast_convert_type((2 * BIAS + UNITS - bounded) << 23, jnp.float32)
    unit = jax.lax.bitcast_convert_type((bounded - UNITS) << 23, jnp.float32)
    unit = jnp.where(bits >= INFINITY_BITS, jnp.nan, unit)
    in_units = [number * units_of_one for number in numbers]
    quads = [in_units[start : start + QUAD] for start in range(0, len(numbers), QUAD)]
    words = tuple(tuple(place.run(*quad, native=native) for quad in quads) for place in PLACES)
    sums = [total(len(quads), signed).run(*place, native=native) for place, signed in zip(words, SIGNED, strict=True)]
    return Row(words, unit, tuple(sums))


class Bytes(NamedTuple):
    """The products of a chunk in integers; `vector.Floats` computes them in floats.

    Attributes:
      scheme: of the codes.
      hidden: the function that `codes.hide` returns.
      native: whether the kernel is compiled for an NVIDIA GPU, not interpreted.
    """

    scheme: Scheme
    hidden: Callable[[int], jax.Array]
    native: bool

    @property
    def zero(self) -> int:
        """The byte that stands for a weight of 0, where that is the same for all weights."""
        return LEVEL_OF_ZERO if self.scheme.format == "mxfp4" else self.scheme.implied_zero

    @property
    def times(self) -> float:
        """The factor that products still need."""
        return 0.5 if self.scheme.format == "mxfp4" else 1.0

    def row(self, numbers: Sequence[jax.Array]) -> Row:
        """Numbers of x, float32 `[lanes, threads]`, as an operand: those of low nibbles, then those of high ones."""
        if self.scheme.format == "mxfp4":  # the codes of a byte stay side by side
            half = len(numbers) // 2
            numbers = [number for pair in zip(numbers[:half], numbers[half:], strict=True) for number in pair]
        return row(numbers, self.native)

    def spread(self, of_x: jax.Array) -> jax.Array:
        """Returns numbers of x, one for each thread, repeated for the thread's channels: `[lanes, channels]`."""
        return side_by_side([of_x] * LOAD_BYTES)

    def weights(self, words: Sequence[jax.Array]) -> list[list[list[jax.Array]]]:
        """Rows of `codes.channel_words`, as many as a multiple of four, as words of four weights along `in`.

        Returns:
          For the low nibbles, and then the high ones where there are two codes in a byte, or for both together: for
          every quad of weights arrays `[lanes, threads]`, one for each channel of a thread.
        """
        programs, tables = CHANNELS, []
        if self.scheme.format == "mxfp4":
            programs, tables = LEVELS_OF_CHANNELS, [self.hidden(half) for half in (*UP, *DOWN)]
        rows = len(programs[0].inputs) - len(tables)
        quads = []
        for start in range(0, len(words), rows):
            blocks = zip(*map(_of_thread, words[start : start + rows]), strict=True)
            quads.append([channel.run(*block, *tables, native=self.native) for block in blocks for channel in programs])
        if self.scheme.format != "int4":
            return [quads]
        return [
            [[jax.lax.shift_right_logical(word, jnp.int32(4 * half)) & LOW_NIBBLES for word in quad] for quad in quads]
            for half in range(2)
        ]

    def product(self, weights: Sequence[Sequence[jax.Array]], x: Row) -> jax.Array:
        """The sum of products over a chunk, float32 `[lanes, channels]`.

        Args:
          weights: quads of those that meet the numbers of x, in their order.
          x: of `row`.
        """
        starts = [BASE_BITS - self.zero * of_place for of_place in x.sums]
        operands = (*itertools.chain(*x.words), *starts, x.unit)
        program = product(len(weights), signed=not self.scheme.packed)
        bits = [program.run(*channel, *operands, native=self.native) for channel in zip(*weights, strict=True)]
        return side_by_side([jax.lax.bitcast_convert_type(of_channel, jnp.float32) for of_channel in bits])


def side_by_side(channels: Sequence[jax.Array]) -> jax.Array:
    """Arrays `[lanes, threads]`, one for each channel of a thread, as `[lanes, channels]`."""

    def stacked(arrays: Sequence[jax.Array]) -> jax.Array:
        if len(arrays) == 1:
            return arrays[0]
        return jnp.stack([stacked(arrays[0::2]), stacked(arrays[1::2])], axis=-1)

    return stacked(channels).reshape(channels[0].shape[0], -1)


def _of_thread(words: jax.Array) -> list[jax.Array]:
    """Words `[lanes, channels / 4]` as four arrays `[lanes, threads]`, side by side in 16 bytes."""
    parts = words.reshape(words.shape[0], -1, 2, 2)
    (w0, w2), (w1, w3) = (jnp.unstack(half, axis=-1) for half in jnp.unstack(parts, axis=-1))
    return [w0, w1, w2, w3]


def _weighed(places: Sequence[jax.Array]) -> jax.Array:
    """Sums of bytes as that of the numbers they are places of."""
    first, second, third = places
    return (third * 256.0 + second) * 256.0 + first
