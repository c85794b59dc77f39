"""The vector form: up to a few rows times a quantized matrix, without tensor cores.

Grid: (blocks of channels, splits). Blocks, chunks and lanes are those of `gpu_rows.py`; a thread has 16 channels, which
are 128 bits of codes, and a program all of `in`, or a split of it.

A thread takes a chunk of 16 channels at a time: its loads, of 16 bytes each, are independent of each other and on their
way together. A chunk lies in one group, so that scales meet its sum. Zero points and minimums meet the sum of x over
the chunk. There are two ways to multiply:

    Bytes    x in three bytes, by four codes at a time: integers and mxfp4, x of 16 bits (`bytewise.py`)
    Floats   codes in float32, by one number of x: float8, x in float32, other GPUs than NVIDIA's

Floats are made of codes by bits, in pairs (`codes.py`); a row more costs a multiply-add a weight. What stays in
int4 codes of the power of two by which they were widened meets the sum of x, too, where the result has 16 bits and
shows nothing of it.

Sums stay in registers until the end; then lanes are added up through shared memory, once. Where x is to be normalized,
its squares are summed beside the products, and the root of their mean divides the result: a program that goes through
all of `in` has met all of x by then, and nobody has to wait for it before.

Bound by memory while a byte of codes takes fewer instructions than the GPU has time for (README.md).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import bytewise as gpu_bytes
from palladion.kernels.quantized_matmul.triton.bytewise import Bytes
from palladion.kernels.quantized_matmul.triton.codes import PAIRS, channel_words, hide, magic, raw_bytes, wide_channels
from palladion.kernels.quantized_matmul.triton.refs import Refs, both, finish, read, read_scales
from palladion.kernels.types import Ref
from palladion.reference.quantization import PACK_BLOCK, Scheme

MAX_ROWS: Final = 4
"""Rows of x that a config may ask for; `most_rows` says for how many there are registers."""

MORE_REGISTERS_FROM: Final = 100
"""Compute capability for which the compiler takes some registers more for the same."""

HALF: Final = PACK_BLOCK // 2
"""Rows between the two nibbles of a byte: a chunk of a packed weight lies in one half of a block, or is one."""


class Sums(NamedTuple):
    """The accumulators of a part, gate or up. (In another order the compiler for sm_100 spills some.)

    Attributes:
      squares: of x, `[lanes]` for each row, or `[lanes, threads]` where x is in bytes; nothing where it is not
        normalized, or another part has them.
      totals: of products, `[lanes, block_out]` for each row of x.
    """

    squares: tuple[jax.Array, ...]
    totals: tuple[jax.Array, ...]


def integers(problem: Problem) -> bool:
    """Whether weights can be multiplied by bytes of x: integers, by 16-bit floats, of a chunk that shares a scale."""
    p = problem
    shared = not (p.scheme.packed and p.group_size % PACK_BLOCK)
    return p.scheme.format in ("int8", "int4", "mxfp4") and p.x_dtype != "float32" and shared


def scales_chunks(scheme: Scheme) -> bool:
    """Whether sums of chunks are scaled, not just all of their sum."""
    return scheme.group_size is not None or scheme.offset == "minimums"


def chunk_rows(problem: Problem, num_warps: int) -> int:
    """Rows of codes in a chunk, a power of two that divides them."""
    p = problem
    longest = gpu_rows.chunk_rows(num_warps, p.parts)
    newer, factors = _takes_more_registers(), _factors(p.scheme)
    # What there are no registers for, as compilers found; each row of packed codes is two of weights.
    tight = p.scheme.packed and (p.rows > 1 or p.scheme.offset == "minimums")
    tight |= p.gated and newer and p.rows + factors >= 3
    tight |= not integers(p) and (p.rows > 1 or (p.scheme.packed and p.gated and newer))
    return math.gcd(p.in_features // (2 if p.scheme.packed else 1), longest // 2 if tight else longest)


def most_rows(problem: Problem) -> int:
    """Rows of x that there are registers for."""
    p = problem
    if p.scheme.offset == "minimums" or p.scheme.format == "mxfp4" or (p.scheme.packed and not integers(p)):
        return 1
    if p.scheme.packed or not integers(p):
        return 2
    return 3 - _takes_more_registers() - (_factors(p.scheme) > 1)


def _takes_more_registers() -> bool:
    return gpu_to_plan_for().compute_capability >= MORE_REGISTERS_FROM


def _factors(scheme: Scheme) -> int:
    """Arrays of scales, zeros and minimums that a chunk meets."""
    return scales_chunks(scheme) + (scheme.offset != "none")


def in_bytes(problem: Problem, num_warps: int) -> bool:
    """Whether x is multiplied in bytes, four rows of a chunk at a time, where the GPU can."""
    return integers(problem) and chunk_rows(problem, num_warps) % gpu_bytes.QUAD == 0


class Cost(NamedTuple):
    """The cost of a way to multiply.

    Attributes:
      once: instructions of a thread for a byte of codes, about, whatever the rows.
      of_row: more of them for each row.
      even: times the channels that the busiest multiprocessor may have: instructions in bytes leave a quarter of the
        memory's time, widening codes takes about as long as memory does.
    """

    once: float
    of_row: float
    even: float

    def instructions(self, rows: int) -> float:
        """Returns the instructions of a thread for a byte of codes."""
        return self.once + self.of_row * rows


COSTS: Final = {
    "int8": Cost(once=1.1, of_row=1.6, even=1.25),
    "int4": Cost(once=0.6, of_row=4.4, even=1.25),
    "mxfp4": Cost(once=2.0, of_row=4.4, even=1.1),
}
"""Costs of multiplying bytes, by format of the codes."""

WIDENED: Final = {False: Cost(once=4.0, of_row=1.0, even=1.1), True: Cost(once=6.0, of_row=2.0, even=1.1)}
"""Costs of multiplying floats, by whether codes are packed."""


def cost(problem: Problem) -> Cost:
    """Returns the cost of the way to multiply that a problem's dtypes take."""
    return COSTS[problem.scheme.format] if integers(problem) else WIDENED[problem.scheme.packed]


def chunks(problem: Problem, num_warps: int) -> int:
    """Chunks along `in`."""
    return problem.in_features // (2 if problem.scheme.packed else 1) // chunk_rows(problem, num_warps)


def trips(problem: Problem, block_out: int, num_warps: int) -> int:
    """Returns the trips of the loop, of all splits together."""
    return pl.cdiv(chunks(problem, num_warps), gpu_rows.lanes(block_out, num_warps))


class Factors(NamedTuple):
    """The factors of a group for each channel, `[lanes, block_out]`; None where the scheme has none."""

    scale: jax.Array | None
    zero: jax.Array | None
    minimum: jax.Array | None


class Floats(NamedTuple):
    """The products of a chunk, in float32; `bytewise.Bytes` computes them in integers.

    Attributes:
      scheme: of the codes.
      hidden: the function that `codes.hide` returns.
      exact: whether nothing is left in widened codes that sums would show.
    """

    scheme: Scheme
    hidden: Callable[[int], Any]
    exact: bool

    @property
    def left_in(self) -> int:
        """The offset left in widened codes, which sums of x subtract."""
        return 0 if self.exact else magic(self.scheme.format, "float16") + self.scheme.implied_zero

    @property
    def times(self) -> float:
        """The factor that products still need."""
        return PAIRS[self.scheme.format, "float16"].times

    def row(self, numbers: Sequence[jax.Array]) -> FloatRow:
        """Numbers of x, float32 `[lanes]`, as an operand."""
        return FloatRow(tuple(numbers), _add_up(numbers))

    def spread(self, of_x: jax.Array) -> jax.Array:
        """Returns numbers of x, one for each lane, so that they broadcast over channels."""
        return of_x[:, None]

    def weights(self, words: Sequence[jax.Array]) -> list[list[jax.Array]]:
        """Rows of `channel_words` as float32 `[lanes, channels]`: the low nibbles, then the high ones if there are."""
        zero = self.scheme.implied_zero if self.exact else -magic(self.scheme.format, "float16")
        shifts = (0, 4) if self.scheme.packed else (0,)
        return [[wide_channels(w, shift, self.scheme.format, self.hidden, zero) for w in words] for shift in shifts]

    def product(self, weights: Sequence[jax.Array], x: FloatRow) -> jax.Array:
        """The sum of products over a chunk, float32 `[lanes, channels]`."""
        product = _add_up([number[:, None] * weight for number, weight in zip(x.numbers, weights, strict=True)])
        return product - self.left_in * x.total[:, None] if self.left_in else product


class FloatRow(NamedTuple):
    """A chunk of a row of x.

    Attributes:
      numbers: float32 `[lanes]` each.
      total: their sum.
    """

    numbers: tuple[jax.Array, ...]
    total: jax.Array


def kernel(
    ref: Refs,
    out_ref: Ref,
    *,
    problem: Problem,
    block_out: int,
    splits: int,
    num_warps: int,
    nvidia: bool,
    bytewise: bool,
) -> None:
    """Runs a program of the vector form, as the head of the file describes.

    Args:
      ref: the inputs.
      out_ref: `[rows, result_features]`, or sums `[splits, parts, rows, result_features]`.
      problem: what is computed.
      block_out: channels of a program.
      splits: shares of `in`.
      num_warps: of a program.
      nvidia: whether the kernel is compiled, for an NVIDIA GPU, and takes its instructions by name.
      bytewise: whether x is multiplied in bytes.
    """
    p, scheme = problem, problem.scheme
    per_byte = 2 if scheme.packed else 1
    rows, all_chunks = chunk_rows(p, num_warps), chunks(p, num_warps)
    at_a_time = gpu_rows.lanes(block_out, num_warps)
    threads = block_out // gpu_rows.LOAD_BYTES
    share = pl.cdiv(trips(p, block_out, num_warps), splits)
    layer = ref.layer[0]
    channel = pl.program_id(0) * block_out + jnp.arange(block_out, dtype=jnp.int32)
    real = None if p.result_features % block_out == 0 else channel < p.result_features
    exact = p.out_dtype == "float32" or scheme.format != "int4"
    multiply = Bytes(scheme, hide(layer), nvidia) if bytewise else Floats(scheme, hide(layer), exact)
    apart = scheme.packed and p.group_size % PACK_BLOCK != 0  # the halves of a packing block lie in two groups

    def together_or_apart(halves: list[list[Any]]) -> list[list[Any]]:
        """Returns lists by group from lists by nibble, low and high."""
        return halves if apart else [[one for half in halves for one in half]]

    def each_thread(of_lanes: jax.Array) -> jax.Array:
        """[lanes], or [lanes, threads] for bytes."""
        return jnp.broadcast_to(of_lanes[:, None], (at_a_time, threads)) if bytewise else of_lanes

    def trip(index: jax.Array, sums: tuple[Sums, ...]) -> tuple[Sums, ...]:
        chunk = index * at_a_time + jnp.arange(at_a_time, dtype=jnp.int32)  # [lanes]
        there = None if all_chunks % at_a_time == 0 else chunk < all_chunks
        mask = both(None if there is None else there[:, None], None if real is None else real[None, :])
        # The weights of a row of codes: itself; or in packing blocks, of which a chunk may be a part, two 16 apart.
        first_row = chunk * rows
        first = first_row if per_byte == 1 else first_row + jax.lax.div(first_row, jnp.int32(HALF)) * HALF
        firsts = [first + half * HALF for half in range(per_byte)]

        def of_x(source: Any, *m: int) -> list[list[jax.Array]]:
            """Numbers along `in`, [lanes], of each group."""
            places = [[each_thread(start + row) for row in range(rows)] for start in firsts]
            mask = None if there is None else each_thread(there)
            return together_or_apart([[read(source, (*m, place), mask) for place in half] for half in places])

        def factors(part: int, start: jax.Array) -> Factors:
            group = jax.lax.div(start, jnp.int32(p.group_size))[:, None]
            place = (layer, group, (channel + part * p.result_features)[None, :])
            return Factors(
                read_scales(ref.scales, place, mask) if scales_chunks(scheme) else None,
                None if ref.zeros is None else read(ref.zeros, place, mask),
                None if ref.minimums is None else read(ref.minimums, place, mask),
            )

        def words(part: int, row: int) -> jax.Array:
            place = (layer, (first_row + row)[:, None], (channel + part * p.result_features)[None, :])
            return channel_words(_codes(ref.codes, place, mask))

        # All that a trip takes from memory is asked for before any of it is used; x is in a cache, and there sooner.
        scaling = [[factors(part, start) for start in (firsts if apart else firsts[:1])] for part in range(p.parts)]
        codes = [words(part, row) for part in range(p.parts) for row in range(rows)]
        codes = gpu_rows.together(codes) if nvidia else codes
        xs = [of_x(ref.x, m) for m in range(p.rows)]
        norms = None if ref.norm is None else of_x(ref.norm)

        totals, squares = [list(of_part.totals) for of_part in sums], list(sums[0].squares)
        for m in range(p.rows):
            if norms is not None:
                for number in itertools.chain(*xs[m]):
                    squares[m] = squares[m] + number * number
                xs[m] = [
                    [number * norm for number, norm in zip(*both_of, strict=True)]
                    for both_of in zip(xs[m], norms, strict=True)
                ]
        operands: list[list[Any]] = [[multiply.row(group) for group in of_row] for of_row in xs]
        for part in range(p.parts):
            weights = together_or_apart(multiply.weights(codes[part * rows : (part + 1) * rows]))
            for m in range(p.rows):
                for of_group, x, factor in zip(weights, operands[m], scaling[part], strict=True):
                    product = multiply.product(of_group, x)
                    if factor.zero is not None:
                        product = product - factor.zero * multiply.spread(x.total)
                    if factor.scale is not None:
                        product = product * factor.scale
                    if factor.minimum is not None:
                        product = product + multiply.spread(x.total) * factor.minimum
                    totals[part][m] = totals[part][m] + product
        return tuple(Sums(tuple(squares) if part == 0 else (), tuple(totals[part])) for part in range(p.parts))

    begin = pl.program_id(1) * share
    end = jnp.minimum(begin + share, trips(p, block_out, num_warps))
    totals = (jnp.zeros((at_a_time, block_out), jnp.float32),) * p.rows
    squares = (each_thread(jnp.zeros(at_a_time, jnp.float32)),) * (p.rows if ref.norm is not None else 0)
    # Both parts meet the same x.
    start = (Sums(squares, totals), Sums((), totals))[: p.parts]
    sums = jax.lax.fori_loop(begin, end, trip, start)

    for m in range(p.rows):
        products = [jnp.sum(of_part.totals[m], axis=0) * multiply.times for of_part in sums]
        x_scale = None if ref.x_scale is None else plgpu.load(ref.x_scale.at[jnp.int32(m)])
        if p.norm_eps is not None:
            x_scale = gpu_rows.inverse_root(
                jnp.sum(sums[0].squares[m]) / (threads if bytewise else 1), p.in_features, p.norm_eps
            )
        results = finish(ref, p, products, channel, real, x_scale, splits)
        for part, result in enumerate(results):
            if ref.residual is not None:
                result = result + read(ref.residual, (m, channel), real)
            place = (m, channel) if splits == 1 else (pl.program_id(1), part, m, channel)
            plgpu.store(out_ref.at[place], result.astype(out_ref.dtype), mask=real)


def _add_up(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _codes(ref: Ref, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    codes = raw_bytes(plgpu.load(ref.at[place], mask=mask))
    return codes if mask is None else jnp.where(mask, codes, jnp.uint8(0))
