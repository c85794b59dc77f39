"""The tensor-core forms: from a few rows to prefill.

    grid: (row blocks * out blocks, splits)

A program takes a block of rows, a block of channels and a share of `in`, along which it goes in tiles. Codes are copied
to shared memory as they are, `num_stages` tiles in flight; from there they go into registers, become 16-bit floats
(`codes.py`) or stay int8, and meet x in tensor cores. A tile is several spans: what is multiplied before a scale
is due. Products of a span are scaled in float32, or, where rows are many, weights are scaled before.

The product is taken the other way round, weights [channels, span] @ x [rows, span] transposed: tensor cores take their
first operand out of registers, where the weights come to be, and the second, x, out of shared memory. Their channels
are multiplied in an order of their own. Channel c wants to be with threads 4 (c mod 8) to 4 (c mod 8) + 3, which have
different weights of it along `in`. Channels taken as they lie would leave each thread with single bytes. So these
threads get channels that lie side by side, whole words of codes:

    channel (warp, c, r, i) of [warps, 8, repetitions, 2]   is multiplied as row (r, warp, i, c)

Triton finds the layout by itself, from the order that is asked for; products are put in order before they are stored.

float32 rows are three bfloat16 pieces; codes are exact in bfloat16. int8 rows meet int8 codes in int32, exactly.
Where a span holds two groups (groups of 16, or no multiple of 32), it is multiplied once for each, the others' x zero.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.quantized_matmul.float_bits import bfloat16_pieces
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton.codes import hide, magic, raw_bytes, widen, widen_to_int8
from palladion.kernels.quantized_matmul.triton.refs import Refs, both, finish, read, read_scales
from palladion.kernels.types import Ref

SEGMENT: Final = 16
"""Weights that always share a group."""

PIECES: Final = 3
"""bfloat16 numbers that a float32 is the sum of."""


def operand(problem: Problem) -> str:
    """The dtype that tensor cores multiply."""
    if problem.quantize_x is not None:
        return "int8" if problem.quantize_x == "int8" else "float16"
    return "bfloat16" if problem.x_dtype == "float32" else problem.x_dtype


def least_span(problem: Problem) -> int:
    """The fewest weights along `in` that are loaded and multiplied at a time."""
    return 32 if problem.scheme.packed or operand(problem) == "int8" else 16


def largest_span(problem: Problem, tile: int) -> int:
    """Weights of a tile that share their scales, or as few as can be multiplied; a power of two."""
    group = problem.scheme.group_size
    if group is None:
        return tile
    return min(tile, max(least_span(problem), group & -group))


def kernel(
    ref: Refs,
    out_ref: Ref,
    *,
    problem: Problem,
    block_rows: int,
    block_out: int,
    tile: int,
    splits: int,
    num_warps: int,
    scales_weights: bool,
    out_blocks: int,
) -> None:
    """Runs a program of the tensor-core form, as the head of the file describes."""
    p, scheme = problem, problem.scheme
    block, split = pl.program_id(0), pl.program_id(1)
    row_block, out_block = jax.lax.div(block, jnp.int32(out_blocks)), jax.lax.rem(block, jnp.int32(out_blocks))
    row = row_block * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
    channel = out_block * block_out + jnp.arange(block_out, dtype=jnp.int32)
    real_row = None if p.rows % block_rows == 0 else (row < p.rows)[:, None]
    real = None if p.result_features % block_out == 0 else channel < p.result_features
    layer, hidden = ref.layer[0], hide(ref.layer[0])

    per_byte = 2 if scheme.packed else 1
    dtype = operand(p)
    span = largest_span(p, tile)
    tiles = pl.cdiv(p.in_features, tile)
    share = pl.cdiv(tiles, splits)
    ragged = p.in_features % tile != 0
    grouped = scheme.group_size is not None or scheme.offset == "minimums"
    segments = 1 if p.group_size % span == 0 or not grouped else span // SEGMENT
    needs_sums = scheme.offset != "none"
    integers = dtype == "int8" and not grouped and not needs_sums
    # What nibbles were widened by is taken off by the sums too where they are there, and where a result of 16 bits
    # shows nothing of it.
    leave = needs_sums and scheme.format == "int4" and dtype != "int8" and p.out_dtype != "float32"
    left_in = magic(scheme.format, dtype) if leave else 0
    order = interleave(block_out, num_warps)

    def factor(of: Any, start: jax.Array, columns: jax.Array) -> jax.Array:
        """Returns a factor of the group of weight `start` for every channel, [block_out, 1]."""
        group = jax.lax.div(start, jnp.int32(p.group_size))
        mask = both(group < p.groups if ragged and grouped else None, real)
        load = read_scales if of is ref.scales else read
        return to_order(load(of, (layer, group, columns), mask)[None, :], order).reshape(block_out, 1)

    def load_x(first: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """x [block_rows, span] from weight `first` on: for each group, zero elsewhere, with where the group begins."""
        element = first + jnp.arange(span, dtype=jnp.int32)
        mask = both(real_row, (element < p.in_features)[None, :] if ragged else None)
        x = plgpu.load(ref.x.at[row[:, None], element[None, :]], mask=mask, other=None if mask is None else 0)
        if segments == 1:
            return [(x, first)]
        segment = jax.lax.div(jnp.arange(span, dtype=jnp.int32), jnp.int32(SEGMENT))[None, :]
        return [(jnp.where(segment == i, x, jnp.zeros_like(x)), first + i * SEGMENT) for i in range(segments)]

    def load_weights(first: jax.Array, columns: jax.Array) -> jax.Array:
        """Codes as numbers, [block_out, span], zeros and scales applied as far as they are at all."""
        stored = jax.lax.div(first, jnp.int32(per_byte)) + jnp.arange(span // per_byte, dtype=jnp.int32)
        there = (stored < p.in_features // per_byte)[:, None] if ragged else None
        mask = both(there, None if real is None else real[None, :])
        codes = raw_bytes(plgpu.load(ref.codes.at[layer, stored[:, None], columns[None, :]], mask=mask))
        if there is not None:
            codes = jnp.where(there, codes, jnp.uint8(0))
        if dtype == "int8":
            weights = widen_to_int8(codes, scheme.format, scheme.implied_zero)
        else:
            weights = widen(codes, scheme.format, dtype, hidden, -left_in if leave else scheme.implied_zero)
        weights = to_order(weights, order).T
        if not scales_weights:
            return weights
        scale = factor(ref.scales, first, columns)
        if dtype == "bfloat16":
            return weights * scale.astype(weights.dtype)
        return (weights.astype(jnp.float32) * scale).astype(weights.dtype)  # float16 may not have the scale

    def product(x: jax.Array, weights: jax.Array, start: jax.Array, columns: jax.Array) -> jax.Array:
        """Returns the product of a group of a span, float32 or int32."""
        found = multiply(weights, x)
        if integers:
            return found
        found = found.astype(jnp.float32)
        sums = jnp.sum(x.astype(jnp.float32), axis=1)[None, :]  # nothing, where it is not used
        if ref.zeros is not None:
            found = found - sums * (factor(ref.zeros, start, columns) + left_in)
        elif left_in:
            found = found - sums * left_in
        if grouped and not scales_weights:
            found = found * factor(ref.scales, start, columns)
        if ref.minimums is not None:
            found = found + sums * factor(ref.minimums, start, columns)
        return found

    def trip(index: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        for place in range(tile // span):
            first = index * tile + place * span
            xs = load_x(first)
            found = []
            for part, total in enumerate(totals):
                columns = channel + part * p.result_features
                weights = load_weights(first, columns)
                for x, start in xs:
                    total = product(x, weights, start, columns) + total
                found.append(total)
            totals = tuple(found)
        return totals

    begin = split * share
    nothing = jnp.zeros((block_out, block_rows), jnp.int32 if integers else jnp.float32)
    totals = jax.lax.fori_loop(begin, jnp.minimum(begin + share, tiles), trip, (nothing,) * p.parts)

    products = [from_order(total, order).astype(jnp.float32).T for total in totals]
    x_scale = None
    if ref.x_scale is not None:
        real_scale = None if real_row is None else real_row[:, 0]
        x_scale = read(ref.x_scale, (row,), real_scale)[:, None]
    mask = both(real_row, None if real is None else real[None, :])
    for part, result in enumerate(finish(ref, p, products, channel, real, x_scale, splits)):
        place = (row[:, None], channel[None, :])
        plgpu.store(
            out_ref.at[place if splits == 1 else (split, part, *place)], result.astype(out_ref.dtype), mask=mask
        )


def interleave(block_out: int, num_warps: int) -> tuple[int, int, int, int] | None:
    """Warps, 8, repetitions and 2, as which a block's channels are multiplied; None leaves them in their order."""
    repetitions = block_out // (16 * num_warps)
    return (num_warps, 8, repetitions, 2) if repetitions else None


def to_order(x: jax.Array, order: tuple[int, int, int, int] | None) -> jax.Array:
    """Channels `[n, block_out]` in the order in which they are multiplied."""
    return x if order is None else x.reshape(len(x), *order).transpose(0, 3, 1, 4, 2).reshape(x.shape)


def from_order(x: jax.Array, order: tuple[int, int, int, int] | None) -> jax.Array:
    """The inverse of `to_order`, of channels `[block_out, n]`."""
    if order is None:
        return x
    warps, eight, repetitions, two = order
    split = x.reshape(repetitions, warps, two, eight, x.shape[1])
    return split.transpose(1, 3, 0, 2, 4).reshape(x.shape)


def multiply(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights `[block_out, span]` @ x `[block_rows, span]` transposed: `[block_out, block_rows]`, float32 or int32."""
    if x.dtype == jnp.int8:
        return jnp.dot(weights, x.T, preferred_element_type=jnp.int32)
    if x.dtype != jnp.float32:
        return jnp.dot(weights, x.T, preferred_element_type=jnp.float32)
    found = [
        jnp.dot(weights, piece.astype(jnp.bfloat16).T, preferred_element_type=jnp.float32)
        for piece in bfloat16_pieces(x, PIECES)
    ]
    return (found[2] + found[1]) + found[0]


def can_scale_weights(problem: Problem, tile: int) -> bool:
    """Whether scaled weights, of 16 bits, show no more than the result's rounding does."""
    p = problem
    grouped = p.scheme.group_size is not None and p.scheme.group_size % largest_span(p, tile) == 0
    return grouped and p.scheme.offset != "minimums" and operand(p) != "int8" and p.dot_dtype != "float32"
