"""The form for one to four rows: a quantized weight `[out, in]` as threads read and multiply it (`gpu_rows.py`).

A thread's 16 bytes of a channel are four words: 16 weights of 8 bits, or the 32 of a packing block. Whatever the
format, its codes become words of four bytes first: int8 as it is, the nibbles of int4 by masks, those of mxfp4 by a
table. There are two ways to multiply them, which the tuner compares:

    Floats   A byte is put into the mantissa of a power of two, one byte permutation, and multiplied by a number of x in
             float32. The power of two, and the zero of a code, meet the sum of x, and are subtracted from the product.
    Bytes    A segment of x, the 16 or 32 numbers that meet a thread's weights, is made integers of 16 bits in units of
             a power of two, once for all channels: x = unit * (low + 256 * high). `dp4a` multiplies four bytes by four
             and adds them up, exactly. What is lost is 2^-16 of the largest number of the segment, too little for
             results of 16 bits to show.

For 16 bytes of a channel, x aside: int8 takes 36 instructions on floats and 14 on bytes, int4 83 and 40.

Scales, zeros and minimums of a group meet the sum of a segment, which lies in one group; where a group has 16 weights,
or no multiple of 32, the two nibbles of a byte lie in two groups and are two segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.gpu_ptx import Ptx
from palladion.kernels.gpu_rows import MAX_ROWS, Share, add_up, columns, load, read
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton.config import Config
from palladion.kernels.quantized_matmul.triton.operands import widen
from palladion.kernels.quantized_matmul.triton.refs import Refs, finish, read_scales
from palladion.kernels.types import Ref
from palladion.reference.quantization import PACK_BLOCK, Scheme

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


def covers(problem: Problem) -> bool:
    """Returns whether this form can run a problem; sums of rows of int8 must be exact in int32."""
    return problem.rows <= MAX_ROWS and problem.quantize_x != "int8"


def can_multiply_bytes(problem: Problem) -> bool:
    """Whether results show nothing of x in 16 bits a number, and codes are integers, or mxfp4."""
    p = problem
    narrow = "float32" not in (p.x_dtype, p.out_dtype) and p.quantize_x is None
    return narrow and p.scheme.format in ("int8", "int4", "mxfp4")


class Factors(NamedTuple):
    """The factors of a segment, float32 `[threads]`; None where the scheme has none."""

    scale: jax.Array | None
    zero: jax.Array | None
    minimum: jax.Array | None


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


@dataclasses.dataclass(frozen=True)
class Codes:
    """The weight of `gpu_rows.multiply`.

    Attributes:
      ref: the arrays.
      problem: what is computed.
      multiplies: how.
      ptx: byte instructions.
    """

    ref: Refs
    problem: Problem
    multiplies: Floats | Bytes
    ptx: Ptx

    run = gpu_rows.LOAD_BYTES

    @property
    def per_thread(self) -> int:
        """Weights of a channel that a thread multiplies in a trip."""
        return per_thread(self.problem)

    @property
    def segments(self) -> int:
        """Parts of a thread's weights that may lie in different groups."""
        return 2 if self.problem.scheme.packed and self.problem.group_size % PACK_BLOCK else 1

    def load(self, share: Share, channels: Sequence[jax.Array]) -> list[tuple[jax.Array, list[Factors]]]:
        """Loads bytes of codes, int8 `[threads * 16]`, and the factors of their segments."""
        p, ref = self.problem, self.ref
        layer, per_byte = ref.layer[0], 2 if p.scheme.packed else 1
        place = share.places(self.run, self.run)
        mask = share.exist(place, p.in_features // per_byte)
        codes = [load(ref.codes, (layer, channel, place), mask) for channel in channels]
        codes = [jax.lax.bitcast_convert_type(stored, jnp.int8) for stored in codes]
        factors = [[self._factors(share, channel, n) for n in range(self.segments)] for channel in channels]
        return list(zip(self.ptx.together(codes), factors, strict=True))

    def _factors(self, share: Share, channel: jax.Array, segment: int) -> Factors:
        p, ref = self.problem, self.ref
        if not scales_segments(p.scheme) and ref.zeros is None:
            return Factors(None, None, None)
        start = share.starts(self.per_thread) + segment * self.run
        place = (ref.layer[0], channel, jax.lax.div(start, jnp.int32(p.group_size)))
        mask = share.exist(start, p.in_features)
        return Factors(
            read_scales(ref.scales, place, mask) if scales_segments(p.scheme) else None,
            None if ref.zeros is None else read(ref.zeros, place, mask),
            None if ref.minimums is None else read(ref.minimums, place, mask),
        )

    def operand(self, runs: Sequence[jax.Array]) -> list[Operand]:
        """Returns x as operands, one for each segment."""
        quads = [columns(run, 4) for run in runs]
        if self.problem.scheme.format == "mxfp4":
            low, high = quads  # nibbles of a byte stay side by side
            quads = [[low[i], high[i], low[i + 1], high[i + 1]] for i in (0, 2)]
        return [self.multiplies.operand(segment) for segment in self._segmented(quads)]

    def products(self, loaded: tuple[jax.Array, list[Factors]], operands: Sequence[Any]) -> list[jax.Array]:
        """Returns the sum of a thread's scaled products for each row of x."""
        codes, factors = loaded
        weights = self._segmented(self.multiplies.weights(codes, self.ref.layer[0]))
        return [
            add_up([self._scaled(*segment) for segment in zip(weights, operand, factors, strict=True)])
            for operand in operands
        ]

    def _segmented(self, of_words: Sequence[Any]) -> list[Sequence[Any]]:
        """Returns what belongs to words of codes, by segment."""
        length = len(of_words) // self.segments
        return [of_words[start : start + length] for start in range(0, len(of_words), length)]

    def _scaled(self, weights: Any, x: Operand, factors: Factors) -> jax.Array:
        product = self.multiplies.product(weights, x)
        left: Any = self.multiplies.left
        left = left if factors.zero is None else factors.zero + left
        product = product if isinstance(left, int) and left == 0 else product - left * x.total
        product = product * 0.5 if self.problem.scheme.format == "mxfp4" else product
        product = product if factors.scale is None else product * factors.scale
        return product if factors.minimum is None else product + factors.minimum * x.total


def kernel(ref: Refs, out: Ref, *, problem: Problem, config: Config, native: bool) -> None:
    """Computes a block of channels.

    Args:
      ref: the inputs.
      out: `[rows, result_features]`.
      problem: what is computed.
      config: block sizes, and how codes are multiplied.
      native: whether the kernel is compiled, and not interpreted.
    """
    p, ptx = problem, Ptx(native)
    exact = p.out_dtype == "float32"
    multiplies = Bytes(p.scheme, ptx) if config.multiply == "bytes" else Floats(p.scheme, ptx, exact)

    def finished(m: int, products: list[jax.Array], channel: jax.Array, real: jax.Array | None) -> jax.Array:
        x_scale = None if ref.x_scale is None else plgpu.load(ref.x_scale.at[jnp.int32(m)])
        (result,) = finish(ref, p, products, channel, real, x_scale, splits=1)
        return result if ref.residual is None else result + read(ref.residual, (m, channel), real)

    weight = Codes(ref, p, multiplies, ptx)
    gpu_rows.multiply(ref.x, out, weight, finished, problem=p, block_out=config.block_out, num_warps=config.num_warps)


def per_thread(problem: Problem) -> int:
    """Returns the weights of a channel that a thread multiplies in a trip: 16 bytes of codes."""
    return gpu_rows.LOAD_BYTES * (2 if problem.scheme.packed else 1)


def scales_segments(scheme: Scheme) -> bool:
    """Whether sums of segments are scaled, and not the whole sum."""
    return scheme.group_size is not None or scheme.offset == "minimums"


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
