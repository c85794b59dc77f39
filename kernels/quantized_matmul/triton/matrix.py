"""quantized_matmul for more than a few rows: tensor cores multiply codes that become operands in registers.

    grid: (row blocks * out blocks, splits)

A program takes a block of rows, a block of channels and a share of `in`, along which it goes in tiles. Codes
[block_out, bytes] are copied to shared memory as they are, `num_stages` tiles in flight; from there they go into
registers, become operands (`operands.py`), and are multiplied as the left operand, weights @ x transposed: tensor cores
take their left operand out of registers, and their right one, x, out of shared memory. Packed codes are two operands,
low and high nibbles, each of which meets the elements of x that it belongs to.

Scales of groups and offsets are applied in one of two places:

    scales_weights   to the operands, in 16 bits: one product for a tile. For results of 16 bits, which show nothing of
                     it.
    otherwise        to the products of a group, in float32, with the sum of x over the group for zeros and minimums: a
                     product of a matrix of ones and x, which lies where the products lie. A tile is several spans then.

Scales of channels multiply the result. float32 rows are three bfloat16 pieces; codes are exact in bfloat16. int8 rows
meet integer codes of symmetric channels in int32, exactly, and all others in bfloat16, exactly within a group.

Bound by memory up to about 64 rows, beyond by tensor cores and the conversion of codes, which each block of rows
repeats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.devices import Gpu
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.quantized_matmul.float_bits import bfloat16_pieces
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton.config import Config
from palladion.kernels.quantized_matmul.triton.matrix_store import Block, Outputs, store
from palladion.kernels.quantized_matmul.triton.operands import raw_bytes, unit, widen
from palladion.kernels.quantized_matmul.triton.refs import Refs, both, read, read_scales
from palladion.reference.scheme import PACK_BLOCK

HALF: Final = PACK_BLOCK // 2
"""Consecutive elements of a half of a block of packed codes: they share a group."""

PIECES: Final = 3
"""bfloat16 numbers that a float32 is the sum of."""

QUAD: Final = 4
"""Threads that share a row of wgmma's left operand, whose bytes each of them reads at once."""

LOAD_BYTES: Final = 16
"""The most bytes that a thread reads from shared memory at once."""


def operand(problem: Problem) -> str:
    """Returns the dtype that tensor cores multiply."""
    p = problem
    if p.quantize_x == "int8":
        return "int8" if p.scheme.group_size is None and p.scheme.offset == "none" else "bfloat16"
    if p.quantize_x is not None:
        return "float16"
    return "bfloat16" if p.x_dtype == "float32" else p.x_dtype


def scales_groups(problem: Problem) -> bool:
    """Returns whether scales belong to groups or to offsets, and cannot be left to the end."""
    return problem.scheme.group_size is not None or problem.scheme.offset == "minimums"


def can_scale_weights(problem: Problem) -> bool:
    """Returns whether there are scales or offsets for weights, and 16 bits show no more than the result's do."""
    p = problem
    # A float16 has the range of other scales neither by itself nor, to a compiler that narrows, in a product.
    in_range = operand(p) != "float16" or p.scale_dtype == "float16"
    return (scales_groups(p) or p.scheme.offset == "zeros") and in_range and p.out_dtype != "float32"


def reorders(problem: Problem, config: Config, gpu: Gpu) -> bool:
    """Returns whether Triton takes Hopper's wgmma, with codes that become other numbers in registers; see `reorder`."""
    is_wgmma = gpu.compute_capability // 10 == 9 and config.num_warps % 4 == 0 and config.block_out >= 64
    return is_wgmma and operand(problem) != problem.scheme.format


def kernel(
    ref: Refs, zeros: Any, out: Outputs, *, problem: Problem, config: Config, native: bool, reordered: bool
) -> None:
    """Runs a program, as the head of the file describes.

    Args:
      ref: the inputs.
      zeros: what the counters of the outputs are before the first program, or None; the same memory.
      out: the outputs.
      problem: the call.
      config: block sizes.
      native: whether the kernel is compiled for an NVIDIA GPU.
      reordered: whether codes are read in the order of wgmma's left operand; see `reorder`.
    """
    del zeros
    p, c = problem, config
    number, split = pl.program_id(0), pl.program_id(1)
    row_block, out_block = divide_with_remainder(number, pl.cdiv(p.result_features, c.block_out))
    row = row_block * c.block_rows + jnp.arange(c.block_rows, dtype=jnp.int32)
    channel = out_block * c.block_out + jnp.arange(c.block_out, dtype=jnp.int32)
    real_row = None if p.rows % c.block_rows == 0 else row < p.rows
    real = None if p.result_features % c.block_out == 0 else channel < p.result_features
    block = Block(number, row, channel, real_row, real)
    program = Program(ref, p, c, block, native, reordered)
    tiles = pl.cdiv(p.in_features, c.tile)
    share = pl.cdiv(tiles, c.splits)
    begin = split * share

    def trip(index: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        for offset in range(0, c.tile, program.span):
            totals = program.add(totals, Place(index, offset))
        return totals

    nothing = jnp.zeros((c.block_out, c.block_rows), jnp.int32 if operand(p) == "int8" else jnp.float32)
    totals = jax.lax.fori_loop(begin, jnp.minimum(begin + share, tiles), trip, (nothing,) * p.parts)
    products = [(total.astype(jnp.float32) * program.last_factor).T for total in totals]
    store(ref, out, p, c, block, products, native=native)


class Place(NamedTuple):
    """A weight along `in`, as an offset in a tile; the offset is known to the compiler."""

    tile: jax.Array
    offset: int

    def later(self, weights: int) -> Place:
        """Returns the place of a weight further on."""
        return self._replace(offset=self.offset + weights)


@dataclasses.dataclass(frozen=True)
class Program:
    """Reads the operands of a program, and multiplies them.

    Attributes:
      ref: the inputs.
      problem: the call.
      config: block sizes.
      block: its rows and channels.
      native: whether the kernel is compiled for an NVIDIA GPU.
      reordered: whether codes are read in the order of wgmma's left operand.
    """

    ref: Refs
    problem: Problem
    config: Config
    block: Block
    native: bool
    reordered: bool

    @property
    def scales_products(self) -> bool:
        """Whether products of a group are scaled."""
        offset = self.problem.scheme.offset != "none"
        return not self.config.scales_weights and (scales_groups(self.problem) or offset)

    @property
    def per_byte(self) -> int:
        """Codes of a byte."""
        return 2 if self.problem.scheme.packed else 1

    @property
    def shared(self) -> int:
        """Consecutive weights that surely share a group: a power of two, at most a tile."""
        group = self.problem.scheme.group_size
        return self.config.tile if group is None else min(self.config.tile, group & -group)

    @property
    def span(self) -> int:
        """Weights along `in` that are multiplied at a time."""
        return max(self.shared, HALF * self.per_byte) if self.scales_products else self.config.tile

    @property
    def unit(self) -> float:
        """The number that operands have to be multiplied by to be codes."""
        return unit(self.problem.scheme.format, operand(self.problem))

    @property
    def last_factor(self) -> float:
        """The number that totals have to be multiplied by to be products."""
        return 1.0 if self.scales_products else self.unit

    def add(self, totals: Sequence[jax.Array], first: Place) -> tuple[jax.Array, ...]:
        """Returns totals `[block_out, block_rows]` with the products of the span from weight `first` on added."""
        xs = [self.x(first, half) for half in range(self.per_byte)]
        # Halves of a block of packed codes may belong to two groups.
        apart = self.scales_products and self.per_byte == 2 and self.shared < PACK_BLOCK
        groups = [[0], [1]] if apart else [list(range(self.per_byte))]
        results = []
        for part, total in enumerate(totals):
            channel = self.block.channel + part * self.problem.result_features
            weights = self.weights(first, channel)
            for halves in groups:
                pairs = [(weights[half], xs[half]) for half in halves]
                if self.scales_products:
                    total = self.scaled(pairs, first.later(HALF * halves[0]), channel) + total
                else:
                    total = multiply(pairs, total)
            results.append(total)
        return tuple(results)

    def x(self, first: Place, half: int) -> jax.Array:
        """Returns x `[block_rows, bytes]` of one half of a span's codes, in their order."""
        count = self.span // self.per_byte
        begin, offset = in_order(count, self.pair if self.reordered else count)
        if self.per_byte == 2:  # which no run of bytes crosses the end of a half of
            half_block = jnp.int32(HALF)
            begin = jax.lax.div(begin, half_block) * PACK_BLOCK + jax.lax.rem(begin, half_block) + half * HALF
        element = self.weight(first) + begin + offset
        mask = both(_column(self.block.real_row), self.exists(element, self.problem.in_features))
        window = self.ref.x.at[self.block.row[:, None], element[None, :]]
        return plgpu.load(window, mask=mask, other=None if mask is None else 0)

    def weights(self, first: Place, channel: jax.Array) -> list[jax.Array]:
        """Returns the operands `[block_out, bytes]` of a span, one for each half of packed codes."""
        scheme = self.problem.scheme
        start, count = jax.lax.div(self.weight(first), jnp.int32(self.per_byte)), self.span // self.per_byte
        byte = start + jnp.arange(count, dtype=jnp.int32)
        exists = self.exists(byte, self.problem.in_features // self.per_byte)
        window = self.ref.codes.at[self.ref.layer[0], channel[:, None], byte[None, :]]
        mask = both(_column(self.block.real), exists)
        other = None if mask is None else jnp.zeros((), self.ref.codes.dtype)
        codes = raw_bytes(plgpu.load(window, mask=mask, other=other))
        found = []
        for half in range(self.per_byte):
            weights = widen(codes, scheme.format, operand(self.problem), half, scheme.implied_zero, native=self.native)
            if self.config.scales_weights:
                weights = self.scale(weights, first.later(HALF * half), channel)
            found.append(reorder(weights, self.pair) if self.reordered else weights)
        return found

    @property
    def pair(self) -> int:
        """Operands of a 32-bit register."""
        return 4 if operand(self.problem) == "int8" else 2

    def scale(self, weights: jax.Array, first: Place, channel: jax.Array) -> jax.Array:
        """Returns operands `[block_out, bytes]` with zeros, scales and minimums applied.

        Args:
          weights: the operands.
          first: the weight that the first of them is.
          channel: `[block_out]`, channels of the weight.
        """
        ref, dtype = self.ref, weights.dtype
        each = max(self.shared // self.per_byte, HALF) if self.per_byte == 2 else self.shared
        group = self.groups(first, weights.shape[1] // each, each * self.per_byte)

        def spread(factors: jax.Array) -> jax.Array:
            shape = (*factors.shape, each)
            return jnp.broadcast_to(factors.astype(dtype)[:, :, None], shape).reshape(weights.shape)

        if ref.zeros is not None:
            weights = weights - spread(self.factors(ref.zeros, group, channel) / self.unit)
        if scales_groups(self.problem):
            weights = weights * spread(self.factors(ref.scales, group, channel))
        if ref.minimums is not None:
            weights = weights + spread(self.factors(ref.minimums, group, channel) / self.unit)
        return weights

    def scaled(self, pairs: list[tuple[jax.Array, jax.Array]], first: Place, channel: jax.Array) -> jax.Array:
        """Returns the products of a group, `[block_out, block_rows]`, zeros, scales and minimums applied."""
        ref, group = self.ref, self.groups(first, 1, self.span)
        arrays = (ref.zeros, ref.scales if scales_groups(self.problem) else None, ref.minimums)
        zeros, scales, minimums = [None if of is None else self.factors(of, group, channel) for of in arrays]
        found, times = multiply(pairs), self.unit
        if self.problem.scheme.offset != "none":
            sums = multiply([(jnp.ones_like(weights), x) for weights, x in pairs])
        if zeros is not None:
            found = found - sums * (zeros / self.unit)
        if scales is not None:
            found, times = found * (scales * self.unit), 1.0
        if minimums is not None:
            found = found + sums * minimums
        return found if times == 1 else found * times

    def groups(self, first: Place, count: int, apart: int) -> jax.Array:
        """Returns the groups of `count` weights from the first on that are so many weights apart."""
        size, place = self.problem.group_size, jnp.arange(count, dtype=jnp.int32)
        if size == apart:  # written so that Triton sees that they lie side by side, and where they are aligned
            return first.tile * (self.config.tile // size) + first.offset // size + place
        return jax.lax.div(self.weight(first) + place * apart, jnp.int32(size))

    def weight(self, place: Place) -> jax.Array:
        """Returns the number of a weight along `in`."""
        return place.tile * self.config.tile + place.offset

    def factors(self, of: Any, group: jax.Array, channel: jax.Array) -> jax.Array:
        """Returns scales, zeros or minimums, float32 `[block_out, groups]`."""
        mask = both(_column(self.block.real), self.exists(group, self.problem.groups))
        load = read_scales if of is self.ref.scales else read
        return load(of, (self.ref.layer[0], channel[:, None], group[None, :]), mask)

    def exists(self, places: jax.Array, count: int) -> jax.Array | None:
        """Returns a mask `[1, places]` of what lies before the end of `in`; None where all tiles are full."""
        return None if self.problem.in_features % self.config.tile == 0 else (places < count)[None, :]


def multiply(pairs: Sequence[tuple[jax.Array, jax.Array]], total: jax.Array | None = None) -> jax.Array:
    """Returns the sum of the products weights `[block_out, span]` @ x `[block_rows, span]` transposed, and of a total.

    The sum is float32, or int32 of int8 operands. A product plus a sum, in this order, is one accumulating instruction
    of tensor cores to Triton; a sum plus a product is not.
    """
    for weights, x in pairs:
        pieces = [x]
        if x.dtype == jnp.float32:
            pieces = [piece.astype(jnp.bfloat16) for piece in reversed([*bfloat16_pieces(x, PIECES)])]
        for piece in pieces:
            dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
            product = jnp.dot(weights, piece.T, preferred_element_type=dtype)
            total = product if total is None else product + total
    assert total is not None
    return total


def run(count: int) -> int:
    """Returns the consecutive bytes of a channel that a thread reads from shared memory, of so many in a span."""
    return min(LOAD_BYTES, count // QUAD)


def in_order(count: int, pair: int) -> tuple[jax.Array, jax.Array]:
    """Returns the bytes of a span in the order in which `reorder` puts them: beginnings of runs, and offsets in them.

    With all of a span for a pair it is the order of `in`.
    """
    place, of_thread = jnp.arange(count, dtype=jnp.int32), run(count)

    def digit(unit: int, size: int) -> jax.Array:
        return jax.lax.rem(jax.lax.div(place, jnp.int32(unit)), jnp.int32(size))

    if pair == count:
        return digit(of_thread, count // of_thread) * of_thread, digit(1, of_thread)
    chunk = QUAD * of_thread
    begin = digit(chunk, count // chunk) * chunk + digit(pair, QUAD) * of_thread
    return begin, digit(QUAD * pair, of_thread // pair) * pair + digit(1, pair)


def reorder(weights: jax.Array, pair: int) -> jax.Array:
    """Returns operands `[block_out, span]` in an order along `in` in which wgmma takes consecutive bytes of a thread.

    A thread holds one register's worth of operands, a pair, out of every four. In the order of `in` it would read its
    codes from shared memory two by two, a sixteenth of the width that its loads have. So each of four threads reads up
    to 16 bytes that lie side by side, and its pairs are distributed: [thread, pair] becomes [pair, thread].
    """
    channels, count = weights.shape
    of_thread = run(count)
    shape = (channels, count // (QUAD * of_thread), QUAD, of_thread // pair, pair)
    return weights.reshape(shape).transpose(0, 1, 3, 2, 4).reshape(channels, count)


def _column(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else mask[:, None]
