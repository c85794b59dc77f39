"""A program of the kernels of quantized_matmul: its place in the grid, its loads, its products on Hopper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.compat import load_to_registers, store_from_registers
from palladion.kernels.gpu_codes import FLOATS, Recipe, convert, convert_to_bytes, numbers, recipe
from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import (
    CHANNELS,
    SWIZZLES,
    Config,
    is_stored,
    operand_dtype,
    scales_last,
    unit_of,
)
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.types import Ref, Scalar

Tile = tuple[int, int]
"""64 channels: part, 0 for the gate or the only one and 1 for the up, and first channel among the warpgroup's."""

NAN_BITS: Final = 0x7FC00000

PREFETCHED: Final = 256
"""Most columns that TMA takes at a time."""


class Refs(NamedTuple):
    """The inputs, in device memory; None where the call has no such array.

    Attributes:
      layer: `[1]`; None for a single matrix.
      x: `[rows, in]`.
      codes: `[num_layers, out, in or in / 2]`.
      scales: `[num_layers, out, groups]`; e8m0 as its bits, uint8.
      zeros: like scales.
      minimums: like scales.
      x_scale: `[blocks of rows * block_rows]`, scales of quantized x; None where sums of splits are written.
      bias: `[out]`; likewise.
      residual: `[rows, out]`; likewise.
    """

    layer: Any
    x: Ref
    codes: Ref
    scales: Ref
    zeros: Any = None
    minimums: Any = None
    x_scale: Any = None
    bias: Any = None
    residual: Any = None


class Factors(NamedTuple):
    """Numbers that belong to a unit, one for each of 64 channels, as they are stored: to convert is to wait for them.

    Attributes:
      scale: the scale; None where it is applied at the end.
      zero: the zero point, or None.
      minimum: the minimum, or None.
    """

    scale: jax.Array | None
    zero: jax.Array | None
    minimum: jax.Array | None


class Ends(NamedTuple):
    """Numbers that belong to the sums over all of `in`, one for each of 64 channels, as they are stored.

    Attributes:
      scale: the scale, or None where it is applied before.
      bias: the bias, or None.
    """

    scale: jax.Array | None
    bias: jax.Array | None


class Program:
    """A program's place in the grid, its loads and its products; those of one warpgroup where there are two.

    Args:
      problem: what is computed.
      refs: the inputs.
      config: block sizes.
      interpret: whether the kernel is interpreted: arrays have no layouts then, and products are those of jax.numpy.
      split: the program's share of `in`.
      warpgroup: index of the warpgroup among those that multiply.

    Attributes:
      layout: registers of what is multiplied, and of sums.
      turned: registers of sums out of which rows of x are stored.
      tile_channels: channels of a tile.
    """

    layout: Any = plgpu.Layout.WGMMA
    turned: Any = plgpu.Layout.WGMMA_TRANSPOSED
    tile_channels = CHANNELS

    def __init__(
        self,
        problem: Problem,
        refs: Refs,
        config: Config,
        interpret: bool,
        split: Scalar | int,
        warpgroup: Scalar | int = 0,
    ) -> None:
        self.problem, self.refs, self.config, self.interpret = problem, refs, config, interpret
        self.operand = operand_dtype(problem)
        self.stored = is_stored(problem)
        self.sums_dtype: Any = jnp.int32 if self.operand == "int8" else jnp.float32
        self.unit = unit_of(problem, config.block_in)
        # Weights of a wgmma: not more, so that the first products do not wait for the last codes.
        bits = 8 * jnp.dtype(self.operand).itemsize
        self.piece = swizzle_of(math.gcd(problem.in_features, self.unit), bits) * 8 // bits
        self.layer = 0 if refs.layer is None else refs.layer[0]
        self.row, self.split = jax.lax.axis_index("row"), split
        last = problem.result_features - config.block_out
        out = jax.lax.axis_index("out")
        if config.multicast > 1:
            out = out * config.multicast + jax.lax.axis_index("multicast")
        self.channel = jnp.minimum(out * config.block_out, last)
        self.width = config.block_out // config.warpgroups
        self.own = warpgroup * self.width
        self.blocks = pl.cdiv(pl.cdiv(problem.in_features, config.block_in), config.splits)
        self.first = self.split * self.blocks

    @property
    def tiles(self) -> list[Tile]:
        """All channels of the warpgroup, part by part."""
        starts = range(0, self.width, self.tile_channels)
        return [(part, start) for part in range(self.problem.parts) for start in starts]

    def channels(self, part: int, start: Scalar | int, count: int) -> Any:
        """Returns the slice of channels of the weight that begins at a channel of the program's block of a part."""
        return pl.ds(self.channel + part * self.problem.result_features + start, count)

    def load(self, ref: Ref, layout: Any, optimized: bool = True) -> jax.Array:
        """Loads a reference to registers of a layout."""
        return ref[...] if self.interpret else load_to_registers(ref, layout, optimized)

    def constant(self, shape: tuple[int, int], value: float, dtype: Any) -> jax.Array:
        """Returns a constant array in the registers of wgmma's operands and products."""
        array = jnp.full(shape, value, dtype)
        layout = plgpu.Layout.WGMMA_8BIT if array.dtype == jnp.int8 else plgpu.Layout.WGMMA
        return array if self.interpret else plgpu.layout_cast(array, layout)

    def of_channels(self, ref: Ref, tile: Tile, group: Scalar | int | None = None, layout: Any = None) -> jax.Array:
        """Loads a number of each channel of a tile, from `[out]` or, of a group, from `[num_layers, out, groups]`."""
        part, start = tile
        channels = self.channels(part, self.own + start, self.tile_channels)
        place = ref.at[channels] if group is None else ref.at[self.layer, channels, group]
        return self.load(place, (layout or self.layout).reduce(1), optimized=False)

    def factors(self, tile: Tile, block: Scalar | int) -> list[Factors]:
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

    def tile_factors(self, block: Scalar | int) -> list[list[Factors]]:
        """Loads the factors of a block of the split, of each tile and unit."""
        return [self.factors(tile, block) for tile in self.tiles]

    def _factors(self, tile: Tile, group: Scalar | int) -> Factors:
        refs = self.refs
        scales = None if scales_last(self.problem) else refs.scales
        parts = (scales, refs.zeros, refs.minimums)
        return Factors(*(None if part is None else self.of_channels(part, tile, group) for part in parts))

    def weights(self, codes: Ref, factors: Sequence[Factors]) -> list[Any]:
        """Returns the left operand of each unit of a block, without its scales: registers, or the codes as stored."""
        p, unit = self.problem, self.unit
        starts = range(0, self.config.block_in, unit)
        if self.stored:
            return [codes.at[:, pl.ds(start, unit)] for start in starts]
        if self.operand == "int8":  # whose zero points are a matter of sums of x
            loaded = self.load(codes, plgpu.Layout.WGMMA_8BIT)
            weights = convert_to_bytes(loaded, p.scheme.implied_zero, self.interpret)
            return [weights[:, start : start + unit] for start in starts]
        format = p.scheme.format
        # Interpreted arithmetic may take subnormal numbers as 0, which floats among codes are for a while in bfloat16.
        dtype = "float16" if self.interpret and format in FLOATS else self.operand
        floats, how = self.convert(codes, format, dtype), recipe(format, dtype)
        units = [floats[:, start : start + unit] for start in starts]
        return [self.less_zero(one, how, dtype, own.zero) for one, own in zip(units, factors, strict=True)]

    def convert(self, codes: Ref, format: str, dtype: str) -> jax.Array:
        """Loads the codes of a tile and returns them as floats; see `gpu_codes.convert`."""
        return convert(self.load(codes, plgpu.Layout.WGMMA_UPCAST_2X), format, dtype, self.interpret)

    def less_zero(self, floats: jax.Array, how: Recipe, dtype: str, zero: jax.Array | None) -> jax.Array:
        """Returns the weights of a unit without their scales, given the converted codes `[64, unit]`."""
        if zero is None:
            how = dataclasses.replace(how, offset=how.offset + self.problem.scheme.implied_zero)
            return numbers(floats, how, dtype).astype(self.operand)
        offset = (zero.astype(jnp.float32) + how.offset).astype(dtype)  # exact, as all of these numbers are
        floats = floats - jax.lax.broadcast_in_dim(offset, floats.shape, (0,))
        return numbers(floats, dataclasses.replace(how, offset=0), dtype).astype(self.operand)

    def scaled(self, weights: Sequence[Any], factors: Sequence[Factors]) -> list[Any]:
        """Returns weights times the scales of their groups, in the dtype of the operand."""
        if scales_last(self.problem):
            return list(weights)
        scales = [self.real(own.scale).astype(self.operand) for own in factors if own.scale is not None]
        return [
            weight * jax.lax.broadcast_in_dim(scale, weight.shape, (0,))
            for weight, scale in zip(weights, scales, strict=True)
        ]

    def real(self, scale: jax.Array) -> jax.Array:
        """Returns scales or minimums in float32."""
        if scale.dtype != jnp.uint8:
            return scale.astype(jnp.float32)
        byte = scale.astype(jnp.int32)
        bits = jnp.where(byte == 0, 1 << 22, byte << 23)  # 2^(byte - 127), which is subnormal for 0
        return jax.lax.bitcast_convert_type(jnp.where(byte == 255, NAN_BITS, bits), jnp.float32)

    def multiply(self, total: Any, unit: int, weight: Any, x: Ref) -> Any:
        """Adds weights `[64, unit]` times the columns of x that they meet to a sum.

        Args:
          total: `[64, block_rows]`, an accumulator of the tensor cores; an array where the kernel is interpreted.
          unit: index of the unit in the block.
          weight: its weights.
          x: `[block_rows, block_in]` in shared memory.

        Returns:
          The sum, or its accumulator.
        """
        start = unit * self.unit
        if self.interpret:
            columns = x.at[:, pl.ds(start, self.unit)][...]
            product = jnp.dot(weight[...], columns.T, preferred_element_type=total.dtype)
            return total + product
        for first in range(0, self.unit, self.piece):
            columns = x.at[:, pl.ds(start + first, self.piece)].transpose((1, 0))
            is_ref = not isinstance(weight, jax.Array)
            part = weight.at[:, pl.ds(first, self.piece)] if is_ref else weight[:, first : first + self.piece]
            plgpu.wgmma(total, part, columns)
        return total

    def prefetch(self) -> None:
        """Starts to read the first codes of the warpgroup's channels, as many as the ring holds, into the L2 cache."""
        p, config = self.problem, self.config
        block = config.block_in // (2 if p.scheme.packed else 1)
        columns = min(config.num_stages, self.blocks) * block
        for part in range(p.parts):
            codes = self.refs.codes.at[self.layer, self.channels(part, self.own, self.width), :]
            for start in range(0, columns, PREFETCHED):
                size = min(PREFETCHED, columns - start)
                plgpu.async_prefetch(codes.at[:, pl.ds(self.first * block + start, size)])

    def release(self) -> None:
        """Orders reads of a block to registers before the copy that takes its place; TMA sees no order otherwise."""
        if self.interpret or not self.stored:
            plgpu.commit_smem()

    def ends(self, tile: Tile, layout: Any = None) -> Ends:
        """Loads what the sums of a tile are scaled by and what is added to them, for sums of a layout."""
        scales, bias = self.refs.scales if scales_last(self.problem) else None, self.refs.bias
        return Ends(
            scale=None if scales is None else self.of_channels(scales, tile, 0, layout),
            bias=None if bias is None else self.of_channels(bias, tile, layout=layout),
        )

    def finish(self, total: jax.Array, ends: Ends, layout: Any = None, row: Scalar | int = 0) -> jax.Array:
        """Returns the products of a tile in float32.

        Args:
          total: the sums, `[64, rows]`.
          ends: what they are scaled by, and what is added to them.
          layout: the layout of the sums; None for that of the tensor cores.
          row: the first row of the sums in the block.
        """

        def across(numbers: jax.Array, axis: int) -> jax.Array:
            found = jax.lax.broadcast_in_dim(numbers.astype(jnp.float32), total.shape, (axis,))
            return found if self.interpret else plgpu.layout_cast(found, layout or self.layout)

        found = total.astype(jnp.float32)
        if ends.scale is not None:
            found = found * across(self.real(ends.scale), 0)
        if self.refs.x_scale is not None:
            rows = pl.ds(self.row * self.config.block_rows + row, total.shape[1])
            found = found * across(
                self.load(self.refs.x_scale.at[rows], (layout or self.layout).reduce(0), optimized=False), 1
            )
        return found if ends.bias is None else found + across(ends.bias, 0)

    def place(self, row: Scalar | int = 0, rows: int | None = None) -> tuple[Any, Any]:
        """Returns rows of the block, or all of them, and the warpgroup's channels, as indices of the result."""
        first, most = self.row * self.config.block_rows + row, self.config.block_rows
        return pl.ds(first, most if rows is None else rows), pl.ds(self.channel + self.own, self.width)

    def stage(self, ref: Ref, value: jax.Array, layout: Any = None, adds: bool = False) -> None:
        """Stores sums or results `[64, rows]` to shared memory.

        Args:
          ref: `[rows, 64]`.
          value: what is stored.
          layout: the layout in which threads store it; None for `turned`.
          adds: whether what is there is added to it before.
        """
        if self.interpret:
            value = value.T + ref[...].astype(jnp.float32) if adds else value.T
            ref[...] = value.astype(ref.dtype)
            return
        across = ref.transpose((1, 0))
        if not adds:
            value = value.astype(ref.dtype)
        value = plgpu.layout_cast(value, layout or self.turned)
        if adds:
            residual = self.load(across, layout or self.turned, optimized=False)
            value = (value + residual.astype(jnp.float32)).astype(ref.dtype)
        store_from_registers(across, value)

    def copy_out(self, result: Ref, staged: Ref, whole: bool) -> None:
        """Writes what is staged; see `kernel`."""
        plgpu.commit_smem()
        rows, channels = self.place()
        for part in range(staged.shape[0]):
            place = (rows, channels) if whole else (rows, self.split, part, channels)
            plgpu.copy_smem_to_gmem(staged.at[part], result.at[place])
        plgpu.wait_smem_to_gmem(0)

    def in_specs(self) -> list[plgpu.BlockSpec]:
        """Returns the blocks in the ring: codes of each part, and x."""
        p, config, first, row = self.problem, self.config, self.first, self.row
        columns, row_bytes = (size // (2 if p.scheme.packed else 1) for size in (config.block_in, p.in_features))
        # wgmma wants both operands permuted alike where it reads both from shared memory.
        length = self.piece if self.stored else math.gcd(row_bytes, columns)
        codes = block_spec((config.block_out, columns), lambda block: (0, first + block), length, 8, self.interpret)
        bits = 8 * jnp.dtype(self.operand).itemsize
        shape = (config.block_rows, config.block_in)
        x = block_spec(shape, lambda block: (row, first + block), self.piece, bits, self.interpret)
        if config.multicast > 1:
            x = dataclasses.replace(x, collective_axes=("multicast",))
        return [codes] * p.parts + [x]

    def in_refs(self) -> list[Ref]:
        """Returns what these blocks are read from."""
        channels = [self.channels(part, 0, self.config.block_out) for part in range(self.problem.parts)]
        return [*(self.refs.codes.at[self.layer, own, :] for own in channels), self.refs.x]


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
