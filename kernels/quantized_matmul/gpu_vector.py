"""The vector form: up to a few rows times a quantized matrix, without tensor cores.

Grid: (blocks of channels, splits). Blocks, chunks and lanes are those of `gpu_rows.py`; a thread has 16 channels, which
are 128 bits of codes, and a program all of `in`, or a split of it.

A thread takes a chunk of 16 channels at a time: its loads, of 16 bytes each, are independent of each other and on their
way together. Codes become float16 in pairs (`gpu_codes.py`), float32 one by one, and are multiplied by one number of x
for each row: a row more costs a multiply-add a weight and nothing else. A chunk lies in one group, so that scales meet
its sum. Zero points and minimums meet the sum of x over the chunk; so does what stays in int4 codes of the power of two
by which they were widened, where the result has 16 bits and shows nothing of it.

Sums stay in registers until the end; then lanes are added up through shared memory, once. Where x is to be normalized,
its squares are summed beside the products, and the root of their mean divides the result: a program that goes through
all of `in` has met all of x by then, and nobody has to wait for it before.

Bound by memory while a byte of codes takes fewer instructions than the GPU has time for (README.md).
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.quantized_matmul.gpu_codes import PAIRS, channel_words, hide, magic, raw_bytes, wide_channels
from palladion.kernels.quantized_matmul.gpu_refs import both, finish, named, read, read_scales
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.reference.quantization import PACK_BLOCK

MAX_ROWS: Final = 4
"""Of x: with more, multiply-adds take longer than tensor cores do."""

MORE_REGISTERS_FROM: Final = 100
"""Compute capability for which the compiler takes some registers more for the same."""

HALF: Final = PACK_BLOCK // 2
"""Rows between the two nibbles of a byte: a chunk of a packed weight lies in one half of a block, or is one."""


class Sums(NamedTuple):
    """What a part of the result, gate or up, is added up in.

    Attributes:
      totals: of products, `[lanes, block_out]` for each row of x.
      squares: of x, `[lanes]` for each row; nothing where it is not normalized, or another part has them.
    """

    totals: tuple[jax.Array, ...]
    squares: tuple[jax.Array, ...]


def chunk_rows(problem: Problem, num_warps: int) -> int:
    """Rows of codes in a chunk, a power of two that divides them."""
    p = problem
    longest = gpu_rows.chunk_rows(num_warps, p.parts)
    if not p.scheme.packed:
        return math.gcd(p.in_features, longest)
    # Each row is two of weights: what has minimums, too, or a gate on a newer GPU, has no registers for as many.
    tight = p.scheme.offset == "minimums" or (p.gated and gpu_to_plan_for().compute_capability >= MORE_REGISTERS_FROM)
    return longest // 2 if tight else longest


def chunks(problem: Problem, num_warps: int) -> int:
    """Chunks along `in`."""
    return problem.in_features // (2 if problem.scheme.packed else 1) // chunk_rows(problem, num_warps)


def trips(problem: Problem, block_out: int, num_warps: int) -> int:
    """Of all splits together."""
    return pl.cdiv(chunks(problem, num_warps), gpu_rows.lanes(block_out, num_warps))


class Factors(NamedTuple):
    """What a group has for each channel, `[lanes, block_out]`, as far as there is any."""

    scale: jax.Array | None
    zero: jax.Array | None
    minimum: jax.Array | None


def kernel(*refs: Any, problem: Problem, block_out: int, splits: int, num_warps: int, ahead: bool) -> None:
    """See the head of the file; `refs` are those of `gpu_refs.Refs`, `ahead` is `gpu_rows.together`'s."""
    p, scheme = problem, problem.scheme
    ref = named(refs, p, splits)
    per_byte = 2 if scheme.packed else 1
    rows, all_chunks = chunk_rows(p, num_warps), chunks(p, num_warps)
    at_a_time = gpu_rows.lanes(block_out, num_warps)
    share = pl.cdiv(trips(p, block_out, num_warps), splits)
    layer = ref.layer[0]
    hidden = hide(layer)
    channel = pl.program_id(0) * block_out + jnp.arange(block_out, dtype=jnp.int32)
    real = None if p.result_features % block_out == 0 else channel < p.result_features

    # What stays in the codes, for sums of x to take off.
    exact = p.out_dtype == "float32" or scheme.format != "int4"
    zero = scheme.implied_zero if exact else -magic(scheme.format, "float16")
    left_in = 0 if exact else magic(scheme.format, "float16") + scheme.implied_zero
    grouped = scheme.group_size is not None or scheme.offset == "minimums"
    apart = scheme.packed and p.group_size % PACK_BLOCK != 0  # the halves of a packing block lie in two groups

    def trip(index: jax.Array, sums: tuple[Sums, ...]) -> tuple[Sums, ...]:
        chunk = index * at_a_time + jnp.arange(at_a_time, dtype=jnp.int32)  # [lanes]
        there = None if all_chunks % at_a_time == 0 else chunk < all_chunks
        mask = both(None if there is None else there[:, None], None if real is None else real[None, :])
        # The weights of a row of codes: itself; or in packing blocks, of which a chunk may be a part, two 16 apart.
        first_row = chunk * rows
        first = first_row if per_byte == 1 else first_row + jax.lax.div(first_row, jnp.int32(HALF)) * HALF
        firsts = [first + half * HALF for half in range(per_byte)]

        def of_x(source: Any, *m: int) -> list[list[jax.Array]]:
            """Numbers along `in`, [lanes], for the rows of codes of each half."""
            return [[read(source, (*m, start + row), there) for row in range(rows)] for start in firsts]

        def factors(part: int, start: jax.Array) -> Factors:
            group = jax.lax.div(start, jnp.int32(p.group_size))[:, None]
            place = (layer, group, (channel + part * p.result_features)[None, :])
            return Factors(
                read_scales(ref.scales, place, mask) if grouped else None,
                None if ref.zeros is None else read(ref.zeros, place, mask),
                None if ref.minimums is None else read(ref.minimums, place, mask),
            )

        def words(part: int, row: int) -> jax.Array:
            place = (layer, (first_row + row)[:, None], (channel + part * p.result_features)[None, :])
            return channel_words(_codes(ref.codes, place, mask))

        # All that a trip takes from memory is asked for before any of it is used; x is in a cache, and there sooner.
        scaling = [[factors(part, start) for start in (firsts if apart else firsts[:1])] for part in range(p.parts)]
        codes = [words(part, row) for part in range(p.parts) for row in range(rows)]
        codes = gpu_rows.together(codes) if ahead else codes
        xs = [of_x(ref.x, m) for m in range(p.rows)]
        norms = None if ref.norm is None else of_x(ref.norm)

        totals, squares = [list(of_part.totals) for of_part in sums], list(sums[0].squares)
        for m in range(p.rows):
            if norms is not None:
                squares[m] = squares[m] + _add_up([number * number for half in xs[m] for number in half])
                xs[m] = [
                    [number * norm for number, norm in zip(*both_of, strict=True)]
                    for both_of in zip(xs[m], norms, strict=True)
                ]
        for part in range(p.parts):
            of_part = codes[part * rows : (part + 1) * rows]
            weights = [
                [wide_channels(w, 4 * half, scheme.format, hidden, zero) for w in of_part] for half in range(per_byte)
            ]
            for m in range(p.rows):
                products = [
                    _add_up([number[:, None] * weight for number, weight in zip(*half, strict=True)])
                    for half in zip(xs[m], weights, strict=True)
                ]
                x_sums = [_add_up(half)[:, None] for half in xs[m]]
                if not apart:
                    products, x_sums = [_add_up(products)], [_add_up(x_sums)]
                for product, total_x, factor in zip(products, x_sums, scaling[part], strict=True):
                    if factor.zero is not None:
                        product = product - (factor.zero + left_in) * total_x
                    elif left_in:
                        product = product - left_in * total_x
                    if factor.scale is not None:
                        product = product * factor.scale
                    if factor.minimum is not None:
                        product = product + total_x * factor.minimum
                    totals[part][m] = totals[part][m] + product
        return tuple(Sums(tuple(totals[part]), tuple(squares) if part == 0 else ()) for part in range(p.parts))

    begin = pl.program_id(1) * share
    end = jnp.minimum(begin + share, trips(p, block_out, num_warps))
    totals = (jnp.zeros((at_a_time, block_out), jnp.float32),) * p.rows
    squares = (jnp.zeros(at_a_time, jnp.float32),) * (p.rows if ref.norm is not None else 0)
    # Both parts meet the same x.
    start = (Sums(totals, squares), Sums(totals, ()))[: p.parts]
    sums = jax.lax.fori_loop(begin, end, trip, start)

    times = PAIRS[scheme.format, "float16"].times
    for m in range(p.rows):
        products = [jnp.sum(of_part.totals[m], axis=0) * times for of_part in sums]
        x_scale = None if ref.x_scale is None else plgpu.load(ref.x_scale.at[jnp.int32(m)])
        if p.norm_eps is not None:
            x_scale = gpu_rows.inverse_root(jnp.sum(sums[0].squares[m]), p.in_features, p.norm_eps)
        results = finish(ref, p, products, channel, real, x_scale)
        for part, result in enumerate(results):
            if ref.residual is not None:
                result = result + read(ref.residual, (m, channel), real)
            place = (m, channel) if splits == 1 else (pl.program_id(1), part, m, channel)
            plgpu.store(ref.out.at[place], result.astype(ref.out.dtype), mask=real)


def _add_up(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _codes(ref: Any, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    codes = raw_bytes(plgpu.load(ref.at[place], mask=mask))
    return codes if mask is None else jnp.where(mask, codes, jnp.uint8(0))
