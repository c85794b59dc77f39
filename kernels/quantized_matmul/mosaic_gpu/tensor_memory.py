"""The kernel of quantized_matmul on Blackwell's tensor cores: weights and sums are in tensor memory.

    product[out, rows] = sum over in:  (scale * (code - zero) + minimum) @ x^T

A program is one warpgroup. It converts the codes of 128 channels in registers, a channel in each thread
(`gpu_codes.py`), and stores them to tensor memory, out of which tcgen05.mma takes its left operand; the right one is x,
in shared memory. One form serves all numbers of rows.

    shared memory, by TMA                        registers           tensor memory, 128 rows of 512 words

    codes [128, block_in]    ┐ a ring of  ───>  16-bit weights ───>  weights [128, 2 * block_in], two numbers a word
    x [block_rows, block_in] ┘ num_stages ────────────────────────>  sums [128, block_rows] of each part, float32

Grid: as the Hopper kernel, with blocks of 128 channels; a gated program has a block of gates and one of ups.

A scale that all of `in` shares is applied to sums. Others multiply weights before they are multiplied by x: in 16 bits,
or in float32 where a minimum follows. Results of 16 bits show nothing of that.

The tensor cores multiply a tile, the part of a block that is gates or ups, while the warpgroup converts the next one.
Weights have two places, and a product is awaited right before the next one starts (`add_blocks`). Programs that share a
multiprocessor share its tensor memory: one that finds none free waits, before anything else, until another one ends.

No Blackwell GPU has run it, and nothing was measured: what bounds it is a count. Memory delivers 29 bytes a cycle to a
multiprocessor of a B200, which leaves time for 4.4 instructions a byte of codes; int8 takes 3.6, int4-g128 7.3. So one
byte a weight is bound by memory, 4-bit codes by their conversion.

Its maths, copies and barriers run in jax's interpreter, races included, which knows tensor memory from jax 0.11 on. In
jax 0.10 shared memory takes its place there, and `jax.numpy` multiplies (`Tensors`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.compat import INTERPRETS_TENSOR_MEMORY
from palladion.kernels.gpu_codes import READ_ROWS, ROWS, convert
from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import (
    CHANNELS,
    operand_dtype,
    scales_last,
    takes_many_rows,
)
from palladion.kernels.quantized_matmul.mosaic_gpu.program import Ends, Factors, Program, swizzle_of
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.types import Ref, Scalar

ROWS_AT_A_TIME: Final = 32
"""Rows of x whose sums a thread has in registers at a time."""


def unsupported(problem: Problem) -> str | None:
    """Returns why this kernel cannot run a problem that the Hopper kernel runs, or None."""
    p, operand = problem, operand_dtype(problem)
    if operand == "int8":
        return "quantize_x='int8' on sm_100, where weights are multiplied in 16 bits; backend='triton' takes it"
    if p.result_features < 2 * CHANNELS:
        return f"channels of the result must be at least {2 * CHANNELS} on sm_100, got {p.result_features}"
    if not scales_last(p) and p.out_dtype == "float32":
        return "weights are scaled in 16 bits on sm_100, which results of float32 show; backend='triton' takes them"
    if not scales_last(p) and operand == "float16" and p.scale_dtype != "float16":
        return f"float16 operands need float16 scales on sm_100, got {p.scale_dtype}; backend='triton' takes them"
    return None


class TensorProgram(Program):
    """A program of this kernel."""

    layout = ROWS
    turned = plgpu.Layout.TCGEN05_TMEM_NATIVE(vector_length=1)
    tile_channels = 2 * CHANNELS

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # x is multiplied by whole blocks of weights, whatever their groups.
        self.piece = swizzle_of(math.gcd(self.problem.in_features, self.config.block_in), 16) // 2

    def convert(self, codes: Ref, format: str, dtype: str) -> jax.Array:
        """Loads the codes of a tile and returns them as floats; see `gpu_codes.convert`."""
        return convert(self.load(codes, READ_ROWS), format, dtype, self.interpret, rows=True)

    def in_specs(self) -> list[plgpu.BlockSpec]:
        """Returns the blocks in the ring: codes of each part, and x, which is multiplied until the next block."""
        *codes, x = super().in_specs()
        return [*codes, dataclasses.replace(x, delay_release=1)]

    def scaled(self, weights: Sequence[Any], factors: Sequence[Factors]) -> list[Any]:
        """Returns weights times their scales, plus their minimums."""
        if takes_many_rows(self.problem):
            return super().scaled(weights, factors)
        found = []
        for weight, own in zip(weights, factors, strict=True):
            number = weight.astype(jnp.float32)
            for factor, apply in ((own.scale, jnp.multiply), (own.minimum, jnp.add)):
                assert factor is not None  # without minimums 16 bits suffice
                number = apply(number, jax.lax.broadcast_in_dim(self.real(factor), weight.shape, (0,)))
            found.append(number.astype(self.operand))
        return found


class Tensors:
    """Tensor memory of a program, and its product.

    Args:
      program: the program.
      weights: `[128, 2 * block_in]` of 16 bits: two places for a tile.
      sums: `[128, block_rows]` of float32, for each part.
      done: barrier on which each product arrives at its end, once.
    """

    def __init__(self, program: Program, weights: Ref, sums: Sequence[Ref], done: Ref) -> None:
        self.block_in, self.weights, self.sums, self.done = program.config.block_in, weights, sums, done
        self.native = is_native(program)

    def place(self, tile: Scalar | int, start: int = 0, count: int | None = None) -> Ref:
        """Returns the place of a tile's weights, or of some of its columns."""
        first = jax.lax.rem(tile, 2) * self.block_in + start
        return self.weights.at[:, pl.ds(first, self.block_in if count is None else count)]

    def store(self, tile: Scalar | int, units: Sequence[jax.Array]) -> None:
        """Stores the weights of a tile, so that a product that is started next sees them."""
        start = 0
        for unit in units:
            place = self.place(tile, start, unit.shape[1])
            start += unit.shape[1]
            if self.native:
                plgpu.async_store_tmem(place, unit)
            else:
                place[...] = unit
        if self.native:
            plgpu.commit_tmem()  # waits for the stores of all warps

    def start(self, tile: Scalar | int, part: int, x: Ref, accumulate: jax.Array) -> None:
        """Starts a product, which arrives on the barrier when it has read weights and x and written the sums."""
        weights, total = self.place(tile), self.sums[part]
        if self.native:
            plgpu.tcgen05_mma(total, weights, x.transpose((1, 0)), self.done, accumulate=accumulate)
            return
        before = jnp.where(accumulate, total[...], 0)
        total[...] = before + jnp.dot(weights[...], x[...].T, preferred_element_type=jnp.float32)
        plgpu.barrier_arrive(self.done)

    def load(self, part: int, rows: Any) -> jax.Array:
        """Loads the sums of some rows of x to registers, `[128, rows]`."""
        place = self.sums[part].at[:, rows]
        return plgpu.async_load_tmem(place, layout=ROWS) if self.native else place[...]


def is_native(program: Program) -> bool:
    """Returns whether a program has tensor memory; otherwise shared memory takes its place."""
    return not program.interpret or INTERPRETS_TENSOR_MEMORY


def multiply(program: TensorProgram, result: Ref, staged: Ref, whole: bool, residual: Callable[[], None]) -> None:
    """Computes a program's block of the result, or its sums.

    Args:
      program: the program.
      result: see `kernel`.
      staged: `[1, or parts of sums, block_rows, 128]` in shared memory.
      whole: whether it is the result that is written.
      residual: waits until the residual is staged.
    """
    p, config, native = program.problem, program.config, is_native(program)
    memory: Any = functools.partial(plgpu.TMEM, packed=True) if native else plgpu.SMEM
    weights = memory((program.tile_channels, 2 * config.block_in), jnp.dtype(program.operand))
    memory = plgpu.TMEM if native else plgpu.SMEM
    sums = [memory((program.tile_channels, config.block_rows), jnp.float32) for _ in range(p.parts)]

    def scoped(*allocated: Any) -> None:
        tensors = Tensors(program, *allocated)
        ends = [program.ends(tile) for tile in program.tiles]
        add_blocks(program, tensors)
        residual()
        write(program, tensors, ends, result, staged, whole)

    pl.run_scoped(scoped, weights, sums, plgpu.Barrier(orders_tensor_core=native))


def add_blocks(program: TensorProgram, tensors: Tensors) -> None:
    """Multiplies all tiles of a program over its share of `in`; the products are complete at the end.

    Tile t is stored while tile t - 1 is multiplied: its place was that of tile t - 2, whose product was awaited before
    that of t - 1 was started. Each product arrives once on the barrier, and is awaited before the next one is started,
    the last one after the loop: n arrivals, n waits, and never two arrivals without a wait between them.

    When step s ends, the products of step s - 1 have been awaited: TMA may fill the place of its x.
    """
    p = program.problem
    grouped = p.scheme.group_size is not None

    def step(indices: tuple[jax.Array, ...], *blocks_and_carry: Any) -> Any:
        (block,), (*codes, x, factors) = indices, blocks_and_carry
        ahead = program.tile_factors(block + 1) if grouped else factors
        for (part, _), own in zip(program.tiles, factors, strict=True):
            tile = block * p.parts + part
            tensors.store(tile, program.scaled(program.weights(codes[part], own), own))
            pl.when(tile > 0)(lambda: plgpu.barrier_wait(tensors.done))
            tensors.start(tile, part, x, block > 0)
        program.release()
        return ahead

    plgpu.emit_pipeline(
        step,
        grid=(program.blocks,),
        in_specs=program.in_specs(),
        max_concurrent_steps=program.config.num_stages,
        init_carry=program.tile_factors(0),
    )(*program.in_refs())
    plgpu.barrier_wait(tensors.done)


def write(
    program: TensorProgram, tensors: Tensors, ends: Sequence[Ends], result: Ref, staged: Ref, whole: bool
) -> None:
    """Writes the result of a program, or its sums, finished with `ends` of each part; see `multiply`."""
    p, size = program.problem, min(program.config.block_rows, ROWS_AT_A_TIME)
    for first in range(0, program.config.block_rows, size):
        rows = pl.ds(first, size)
        found = [program.finish(tensors.load(part, rows), own, row=first) for part, own in enumerate(ends)]
        if whole:
            found = [p.finish(found)]
        for part, value in enumerate(found):
            program.stage(staged.at[part, rows, :], value, adds=program.refs.residual is not None)
    program.copy_out(result, staged, whole)
