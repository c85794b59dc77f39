"""The vector form: up to a few rows times a quantized matrix, without tensor cores.

    grid: (out blocks, splits)            in the block of a program:

              out ->   16 channels to a thread, 128 bits of codes
    in    ┌────────┬────────┬───┐
     |    │ thread │ thread │ … │  chunk 0: the next up to 16 rows of codes below each other
     v    ├────────┼────────┼───┤
          │ thread │ thread │ … │  chunk 1
          ├────────┼────────┼───┤
             …  as many chunks side by side as there are threads: `lanes`

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

from palladion.kernels.quantized_matmul.gpu_codes import PAIRS, channel_words, hide, magic, raw_bytes, wide_channels
from palladion.kernels.quantized_matmul.gpu_refs import both, finish, named, read, read_scales
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.reference.quantization import PACK_BLOCK

MAX_ROWS: Final = 4
"""Of x: with more, multiply-adds take longer than tensor cores do."""

THREAD_CHANNELS: Final = 16
"""Codes that 128 bits hold."""

CHUNK: Final = 16
"""Rows of codes of a chunk: those of a packing block, and of the smallest group."""


class Sums(NamedTuple):
    """What a part of the result, gate or up, is added up in.

    Attributes:
      totals: of products, `[lanes, block_out]` for each row of x.
      squares: of x, `[lanes]` for each row; nothing where it is not normalized, or another part has them.
    """

    totals: tuple[jax.Array, ...]
    squares: tuple[jax.Array, ...]


def chunk_rows(problem: Problem) -> int:
    """Rows of codes in a chunk, a power of two that divides them; half as many where they are read for two products."""
    longest = CHUNK // problem.parts
    return longest if problem.scheme.packed else math.gcd(problem.in_features, longest)


def chunks(problem: Problem) -> int:
    """Chunks along `in`."""
    return problem.in_features // (2 if problem.scheme.packed else 1) // chunk_rows(problem)


def lanes(block_out: int, num_warps: int) -> int:
    """Chunks that a program works on at a time."""
    return max(1, 32 * num_warps * THREAD_CHANNELS // block_out)


def kernel(*refs: Any, problem: Problem, block_out: int, splits: int, num_warps: int) -> None:
    """See the head of the file; `refs` are those of `gpu_refs.Refs`."""
    p, scheme = problem, problem.scheme
    ref = named(refs, p, splits)
    per_byte = 2 if scheme.packed else 1
    rows = chunk_rows(p)
    at_a_time = lanes(block_out, num_warps)
    share = pl.cdiv(pl.cdiv(chunks(p), at_a_time), splits)
    layer = ref.layer[0]
    hidden = hide(layer)
    channel = pl.program_id(0) * block_out + jnp.arange(block_out, dtype=jnp.int32)
    real = None if p.result_features % block_out == 0 else channel < p.result_features

    # What stays in the codes, for sums of x to take off.
    exact = p.out_dtype == "float32" or scheme.format != "int4"
    zero = scheme.implied_zero if exact else -magic(scheme.format, "float16")
    left_in = 0 if exact else magic(scheme.format, "float16") + scheme.implied_zero
    grouped = scheme.group_size is not None or scheme.offset == "minimums"

    def multiply(chunk: jax.Array, there: jax.Array | None, part: int, sums: Sums) -> Sums:
        """Adds chunks [lanes] of one part to its sums."""
        totals, squares = list(sums.totals), list(sums.squares)
        columns = channel + part * p.result_features
        mask = both(None if there is None else there[:, None], None if real is None else real[None, :])
        words = []
        for row in range(rows):
            place = (layer, (chunk * rows + row)[:, None], columns[None, :])
            words.append(channel_words(_codes(ref.codes, place, mask)))
        halves = [[wide_channels(w, 4 * half, scheme.format, hidden, zero) for w in words] for half in range(per_byte)]
        # The weights of a row of codes: itself; or in packing blocks, of which a chunk may be a part, two 16 apart.
        first_row = chunk * rows
        first_weight = first_row if per_byte == 1 else first_row + jax.lax.div(first_row, jnp.int32(CHUNK)) * CHUNK
        for m in range(p.rows):
            x_sums, products = [], []
            for half in range(per_byte):
                first = first_weight + half * CHUNK
                x = [read(ref.x, (m, first + row), there) for row in range(rows)]
                if ref.norm is not None:
                    if squares:
                        squares[m] = squares[m] + _add_up([number * number for number in x])
                    x = [number * read(ref.norm, (first + row,), there) for row, number in enumerate(x)]
                products.append(_add_up([x[row][:, None] * weights for row, weights in enumerate(halves[half])]))
                x_sums.append(_add_up(x)[:, None])
            if not scheme.packed or p.group_size % PACK_BLOCK == 0:  # both halves lie in one group
                products, x_sums = [_add_up(products)], [_add_up(x_sums)]
            for half, (product, total_x) in enumerate(zip(products, x_sums, strict=True)):
                group = jax.lax.div(first_weight + half * CHUNK, jnp.int32(p.group_size))[:, None]
                place = (layer, group, columns[None, :])
                if ref.zeros is not None:
                    product = product - (read(ref.zeros, place, mask) + left_in) * total_x
                elif left_in:
                    product = product - left_in * total_x
                if grouped:
                    product = product * read_scales(ref.scales, place, mask)
                if ref.minimums is not None:
                    product = product + total_x * read(ref.minimums, place, mask)
                totals[m] = totals[m] + product
        return Sums(tuple(totals), tuple(squares))

    def trip(index: jax.Array, sums: tuple[Sums, ...]) -> tuple[Sums, ...]:
        chunk = index * at_a_time + jnp.arange(at_a_time, dtype=jnp.int32)
        there = None if chunks(p) % at_a_time == 0 else chunk < chunks(p)
        return tuple(multiply(chunk, there, part, of_part) for part, of_part in enumerate(sums))

    begin = pl.program_id(1) * share
    end = jnp.minimum(begin + share, pl.cdiv(chunks(p), at_a_time))
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
            x_scale = jax.lax.rsqrt(jnp.sum(sums[0].squares[m]) / p.in_features + p.norm_eps)
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
