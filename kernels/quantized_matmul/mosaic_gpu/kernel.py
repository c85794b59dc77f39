"""The kernel of quantized_matmul for a few rows, on Hopper's tensor cores.

    product[out, rows] = sum over units of in:  scale * (code - zero) @ x^T  +  minimum * sum(x)

Weights are the left operand of wgmma, which takes it out of registers: codes of 64 channels become 16-bit floats there
(`gpu_codes.py`) and never go back to memory. x is the right operand, in shared memory.

               in ->
     out  ┌────────┬────────┬────────┐
      |   │ codes  │ codes  │ codes  │   [block_out, block_in], in a ring of num_stages blocks that TMA fills
      v   ├────────┼────────┼────────┤
    rows  │   x    │   x    │   x    │   [block_rows, block_in], in the same ring
          └────────┴────────┴────────┘

Grid: (blocks of channels, splits of `in`, blocks of rows). A program is one warpgroup and goes along its share of `in`;
a gated one has a block of gates and one of ups. A block is multiplied in units, none of which reaches over the end of a
group: the float32 products of a unit are scaled and added up in registers. The tensor cores multiply a unit while the
next one is converted. Scales, zero points and minimums of the next block come from memory meanwhile.

TMA fills with zeros what lies beyond the end of an array: zeros of x make it harmless. The last block of channels ends
with the last channel, and overlaps the one before, which writes the same.

Bound by memory: each code is read once, for 2 * rows FLOPs. Arithmetic in registers is 4 to 8 instructions a byte of
codes, where a multiprocessor of an H200 has time for 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.compat import load_to_registers, store_from_registers
from palladion.kernels.gpu_codes import convert, recipe
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.types import Ref, Scalar

CHANNELS: Final = 64
"""Channels of a wgmma."""

SWIZZLES: Final = (128, 64, 32)
"""Bytes that TMA permutes in shared memory so that reads do not collide; an array's rows must be multiples of them."""

Tile = tuple[int, int]
"""64 channels: part, 0 for the gate or the only one and 1 for the up, and first channel in the program's block."""


class Refs(NamedTuple):
    """The inputs, in device memory; None where the call has no such array.

    Attributes:
      layer: `[1]`; None for a single matrix.
      x: `[rows, in]`.
      codes: `[num_layers, out, in or in / 2]`.
      scales: `[num_layers, out, groups]`.
      zeros: like scales.
      minimums: like scales.
      bias: `[out]`; None where sums of splits are returned.
    """

    layer: Any
    x: Ref
    codes: Ref
    scales: Ref
    zeros: Any = None
    minimums: Any = None
    bias: Any = None


class Factors(NamedTuple):
    """Numbers that belong to a unit, one for each of 64 channels, as they are stored: to convert is to wait for them.

    Attributes:
      scale: the scale.
      zero: the zero point, or None.
      minimum: the minimum, or None.
    """

    scale: jax.Array
    zero: jax.Array | None
    minimum: jax.Array | None


def unit_of(problem: Problem, block_in: int) -> int:
    """Returns the weights along `in` whose products are scaled together."""
    return block_in if problem.scheme.group_size is None else math.gcd(problem.scheme.group_size, block_in)


class Program:
    """A program's place in the grid, its loads and its products.

    Args:
      problem: what is computed.
      refs: the inputs.
      config: block sizes, a `call.Config`.
      interpret: whether the kernel is interpreted: arrays have no layouts then, and products are those of jax.numpy.
    """

    def __init__(self, problem: Problem, refs: Refs, config: Any, interpret: bool) -> None:
        self.problem, self.refs, self.config, self.interpret = problem, refs, config, interpret
        self.recipe = recipe(problem.scheme.format, problem.x_dtype)
        self.unit = unit_of(problem, config.block_in)
        # Weights of a wgmma: not more, so that the first products do not wait for the last codes.
        self.piece = swizzle_of(math.gcd(problem.in_features, self.unit), 16) // 2
        self.layer = 0 if refs.layer is None else refs.layer[0]
        self.row, self.split = jax.lax.axis_index("row"), jax.lax.axis_index("split")
        last = problem.result_features - config.block_out
        self.channel = jnp.minimum(jax.lax.axis_index("out") * config.block_out, last)
        self.blocks = pl.cdiv(pl.cdiv(problem.in_features, config.block_in), config.splits)
        self.first = self.split * self.blocks

    @property
    def tiles(self) -> list[Tile]:
        """All channels of the program, part by part."""
        starts = range(0, self.config.block_out, CHANNELS)
        return [(part, start) for part in range(self.problem.parts) for start in starts]

    def channels(self, part: int, start: int, count: int) -> Any:
        """Returns the slice of channels of the weight that begins at a channel of the program's block of a part."""
        return pl.ds(self.channel + part * self.problem.result_features + start, count)

    def load(self, ref: Ref, layout: Any, optimized: bool = True) -> jax.Array:
        """Loads a reference to registers of a layout."""
        return ref[...] if self.interpret else load_to_registers(ref, layout, optimized)

    def constant(self, shape: tuple[int, int], value: float, dtype: Any) -> jax.Array:
        """Returns a constant array in the registers of wgmma's operands and products."""
        array = jnp.full(shape, value, dtype)
        return array if self.interpret else plgpu.layout_cast(array, plgpu.Layout.WGMMA)

    def of_channels(self, ref: Ref, tile: Tile, group: Scalar | None = None) -> jax.Array:
        """Loads a number of each channel of a tile, from `[out]` or, of a group, from `[num_layers, out, groups]`."""
        channels = self.channels(*tile, CHANNELS)
        place = ref.at[channels] if group is None else ref.at[self.layer, channels, group]
        return self.load(place, plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def factors(self, tile: Tile, block: Scalar) -> list[Factors]:
        """Loads the factors of all units of a block of the split, or of the last one of `in` for those beyond it."""
        p, size = self.problem, self.config.block_in
        if p.scheme.group_size is None:
            return [self._factors(tile, 0)]
        block = jnp.minimum(self.first + block, pl.cdiv(p.in_features, size) - 1)
        found = []
        for start in range(0, size, self.unit):
            if p.group_size == self.unit:  # the compiler then sees that groups are neighbours
                group = block * (size // self.unit) + start // self.unit
            else:
                group = jax.lax.div(block * size + start, p.group_size)
            if p.in_features % size:
                group = jnp.minimum(group, p.groups - 1)
            found.append(self._factors(tile, group))
        return found

    def _factors(self, tile: Tile, group: Scalar) -> Factors:
        zeros, minimums = (
            None if part is None else self.of_channels(part, tile, group)
            for part in (self.refs.zeros, self.refs.minimums)
        )
        return Factors(self.of_channels(self.refs.scales, tile, group), zeros, minimums)

    def numbers(self, floats: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Returns the weights of a unit without their scales, given the converted codes `[64, unit]`."""
        how, dtype = self.recipe, self.problem.x_dtype
        constant = how.offset + self.problem.scheme.implied_zero
        if zero is not None:
            offset = (zero.astype(jnp.float32) + how.offset).astype(dtype)  # exact, as all of these numbers are
            floats = floats - jax.lax.broadcast_in_dim(offset, floats.shape, (0,))
        elif constant:
            floats = floats - jnp.asarray(constant, dtype)
        return floats * jnp.asarray(how.factor, dtype) if how.factor != 1 else floats

    def add_block(self, total: jax.Array, codes: Ref, x: Ref, factors: Sequence[Factors]) -> jax.Array:
        """Adds the products of a block to those before, float32 `[64, block_rows]`.

        Args:
          total: what was summed up before.
          codes: `[64, block_in or block_in / 2]` in shared memory.
          x: `[block_rows, block_in]` in shared memory.
          factors: of each unit, or the only ones.
        """
        p, unit = self.problem, self.unit
        floats = self.load(codes, plgpu.Layout.WGMMA_UPCAST_2X)
        floats = convert(floats, p.scheme.format, p.x_dtype, self.interpret)
        starts = range(0, self.config.block_in, unit)
        weights = [
            (start, self.numbers(floats[:, start : start + unit], own.zero))
            for start, own in zip(starts, factors, strict=True)
        ]
        rounds = [(weights, [own.scale for own in factors])]
        if p.scheme.offset == "minimums":
            ones = self.constant((CHANNELS, unit), 1, p.x_dtype)  # times x: its sums, for every channel
            rounds.append(
                ([(start, ones) for start in starts], [own.minimum for own in factors if own.minimum is not None])
            )
        for operands, multipliers in rounds:
            for product, multiplier in zip(self.products(operands, x), multipliers, strict=True):
                total = total + product * jax.lax.broadcast_in_dim(multiplier.astype(jnp.float32), product.shape, (0,))
        return total

    def products(self, weights: Sequence[tuple[int, jax.Array]], x: Ref) -> list[jax.Array]:
        """Multiplies weights `[64, unit]`, each by the columns of x from the one on that stands before them."""
        if self.interpret:
            columns = [x.at[:, pl.ds(start, self.unit)][...] for start, _ in weights]
            pairs = zip(weights, columns, strict=True)
            return [jnp.dot(w, column.T, preferred_element_type=jnp.float32) for (_, w), column in pairs]
        piece = self.piece

        def on_tensor_cores(*sums: Ref) -> list[jax.Array]:
            for (start, weight), total in zip(weights, sums, strict=True):
                for first in range(0, self.unit, piece):
                    columns = x.at[:, pl.ds(start + first, piece)]
                    plgpu.wgmma(total, weight[:, first : first + piece], columns.transpose((1, 0)))
            return [total[...] for total in sums]

        sums = [plgpu.WGMMAAccumulatorRef((CHANNELS, self.config.block_rows), jnp.float32) for _ in weights]
        return list(pl.run_scoped(on_tensor_cores, *sums))

    def stage(self, ref: Ref, value: jax.Array) -> None:
        """Stores a result `[64, block_rows]` to shared memory `[block_rows, 64]`."""
        if self.interpret:
            ref[...] = value.T
        else:
            store_from_registers(ref.transpose((1, 0)), plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED))


def swizzle_of(length: int, bits: int) -> int:
    """Returns the bytes that TMA permutes in shared memory: the most that rows of so many numbers are multiples of."""
    return next(size for size in SWIZZLES if length * bits % (8 * size) == 0)


def block_spec(
    shape: tuple[int, int], place: Callable[[Scalar], Any], length: int, bits: int, interpret: bool
) -> plgpu.BlockSpec:
    """Returns the block of an input that the ring holds.

    Args:
      shape: of the block.
      place: returns its indices among blocks, given that along the program's share of `in`.
      length: of which the rows of the input, and what is read at a time from the block, are multiples.
      bits: of a number.
      interpret: whether the kernel is interpreted: blocks are not permuted then.
    """
    swizzle = swizzle_of(length, bits)
    transforms = plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
    return plgpu.BlockSpec(shape, place, transforms=() if interpret else transforms)


def accumulate(program: Program) -> list[jax.Array]:
    """Returns the products of all tiles of a program over its share of `in`, float32 `[64, block_rows]` each."""
    p, config, first, row, refs = program.problem, program.config, program.first, program.row, program.refs
    columns, row_bytes = (size // (2 if p.scheme.packed else 1) for size in (config.block_in, p.in_features))
    codes_shape, x_shape = (config.block_out, columns), (config.block_rows, config.block_in)
    codes_length = math.gcd(row_bytes, columns)
    codes_spec = block_spec(codes_shape, lambda block: (0, first + block), codes_length, 8, program.interpret)
    x_spec = block_spec(x_shape, lambda block: (row, first + block), program.piece, 16, program.interpret)
    grouped = p.scheme.group_size is not None
    start = [program.factors(tile, 0) for tile in program.tiles]

    def step(indices: tuple[jax.Array, ...], *blocks_and_carry: Any) -> Any:
        *codes, x, (sums, factors) = blocks_and_carry
        ahead = [program.factors(tile, indices[0] + 1) for tile in program.tiles] if grouped else []
        added = [
            program.add_block(total, codes[part].at[pl.ds(channel, CHANNELS), :], x, own)
            for (part, channel), total, own in zip(program.tiles, sums, factors if grouped else start, strict=True)
        ]
        return added, ahead

    zeros = [program.constant((CHANNELS, config.block_rows), 0, jnp.float32) for _ in program.tiles]
    pipeline = plgpu.emit_pipeline(
        step,
        grid=(program.blocks,),
        in_specs=[codes_spec] * p.parts + [x_spec],
        max_concurrent_steps=config.num_stages,
        init_carry=(zeros, start if grouped else []),
    )
    channels = [program.channels(part, 0, config.block_out) for part in range(p.parts)]
    sums, _ = pipeline(*[refs.codes.at[program.layer, own, :] for own in channels], refs.x)
    return list(sums)


def kernel(
    refs: Refs, result: Ref, staged: Ref, *, problem: Problem, config: Any, whole: bool, interpret: bool
) -> None:
    """Computes `[block_rows, block_out]` of the result, or of the sums of a split.

    Args:
      refs: the inputs.
      result: `[rows, result_features]`, or sums `[splits, parts, rows, result_features]`.
      staged: `[1, or parts of sums, block_rows, block_out]` in shared memory: what is written to `result`.
      problem: what is computed.
      config: block sizes, a `call.Config`.
      whole: whether it is the result that is written.
      interpret: whether the kernel is interpreted.
    """
    program = Program(problem, refs, config, interpret)
    sums = dict(zip(program.tiles, accumulate(program), strict=True))
    for start in range(0, config.block_out, CHANNELS):
        found = [sums[part, start] for part in range(problem.parts)]
        if refs.bias is not None:
            biases = [
                program.of_channels(refs.bias, (part, start)).astype(jnp.float32) for part in range(problem.parts)
            ]
            shape = (CHANNELS, config.block_rows)
            found = [
                product + jax.lax.broadcast_in_dim(bias, shape, (0,))
                for product, bias in zip(found, biases, strict=True)
            ]
        if whole:
            found = [problem.finish(found)]
        for part, value in enumerate(found):
            program.stage(staged.at[part, :, pl.ds(start, CHANNELS)], value.astype(staged.dtype))
    if not interpret:
        plgpu.commit_smem()
    rows = pl.ds(program.row * config.block_rows, config.block_rows)
    channels = pl.ds(program.channel, config.block_out)
    for part in range(staged.shape[0]):
        place = (rows, channels) if whole else (program.split, part, rows, channels)
        plgpu.copy_smem_to_gmem(staged.at[part], result.at[place])
    plgpu.wait_smem_to_gmem(0)
