"""The kernels of quantized_matmul on Hopper's tensor cores, for a few rows and for many.

    product[out, rows] = sum over units of in:  scale * (code - zero) @ x^T  +  minimum * sum(x)

Weights are the left operand of wgmma, which takes it out of registers: codes of 64 channels become 16-bit floats, or
bytes for int8 rows, there (`gpu_codes.py`) and never go back to memory; int8 codes for int8 rows are taken as they lie
in shared memory. x is the right operand, in shared memory.

               in ->
     out  ┌────────┬────────┬────────┐
      |   │ codes  │ codes  │ codes  │   [block_out, block_in], in a ring of num_stages blocks that TMA fills
      v   ├────────┼────────┼────────┤
    rows  │   x    │   x    │   x    │   [block_rows, block_in], in the same ring
          └────────┴────────┴────────┘

Grid: (blocks of channels, splits of `in`, blocks of rows). A program goes along its share of `in`; a gated one has a
block of gates and one of ups. A block is multiplied in units, none of which reaches over the end of a group.

*A few rows*, up to 64: a program is one warpgroup. The products of a unit are scaled and added up in registers, in
float32: nothing is rounded before. The tensor cores multiply a unit while the next one is converted. Bound by memory:
each code is read once, for 2 * rows FLOPs. Arithmetic in registers is 4 to 8 instructions a byte of codes, where a
multiprocessor of an H200 has time for 7.

*Many rows*, blocks of 128 or 256: two warpgroups have half of the channels each, for the same rows, and a third one
starts the copies. Weights are scaled before they are multiplied, in 16 bits, and the tensor cores add up all of `in`:
registers have no room for products of a unit beside the sums. One warpgroup converts while the other multiplies. Bound
by tensor cores: 64 channels by 16 weights take block_rows / 2 cycles, and 18 to 26 to be converted by one warpgroup.

Splits write their sums, or merge them in a cluster (`cluster_merge.py`), for a few rows.

Scales, zero points and minimums of the next block come from memory meanwhile. TMA fills with zeros what lies beyond the
end of an array: zeros of x make it harmless. The last block of channels ends with the last channel, and overlaps the
one before, which writes the same.

On Blackwell the products are those of `tensor_memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.quantized_matmul.mosaic_gpu import cluster_merge, tensor_memory
from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import CHANNELS, Config, total_dtype
from palladion.kernels.quantized_matmul.mosaic_gpu.program import Ends, Factors, Program, Refs, Tile
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.types import Ref

MEMORY_REGISTERS = 40
"""Registers of a thread of the warpgroup that starts copies; the others take what it leaves."""


def few_rows(program: Program) -> list[jax.Array]:
    """Returns the sums of all tiles of a program over its share of `in`, `[64, block_rows]` each."""
    p, config = program.problem, program.config
    grouped = p.scheme.group_size is not None
    start = program.tile_factors(0)

    def step(indices: tuple[jax.Array, ...], *blocks_and_carry: Any) -> Any:
        *codes, x, (sums, factors) = blocks_and_carry
        ahead = program.tile_factors(indices[0] + 1) if grouped else []
        added = [
            add_block(program, total, codes[part].at[pl.ds(channel, CHANNELS), :], x, own)
            for (part, channel), total, own in zip(program.tiles, sums, factors if grouped else start, strict=True)
        ]
        program.release()
        return added, ahead

    zeros = [program.constant((CHANNELS, config.block_rows), 0, total_dtype(p)) for _ in program.tiles]
    pipeline = plgpu.emit_pipeline(
        step,
        grid=(program.blocks,),
        in_specs=program.in_specs(),
        max_concurrent_steps=config.num_stages,
        init_carry=(zeros, start if grouped else []),
    )
    sums, _ = pipeline(*program.in_refs())
    return list(sums)


def add_block(program: Program, total: jax.Array, codes: Ref, x: Ref, factors: Sequence[Factors]) -> jax.Array:
    """Adds the products of a block to those before, `[64, block_rows]`.

    Args:
      program: the program.
      total: what was summed up before: float32, or int32 if whole numbers are scaled at the end.
      codes: `[64, block_in or block_in / 2]` in shared memory.
      x: `[block_rows, block_in]` in shared memory.
      factors: of each unit, or the only ones.
    """
    p = program.problem
    products = unit_products(program, program.weights(codes, factors), x)
    sums: Sequence[jax.Array | None] = [None] * len(products)
    if p.scheme.offset == "minimums" or (p.scheme.offset == "zeros" and program.operand == "int8"):
        ones = program.constant((CHANNELS, program.unit), 1, program.operand)  # times x: its sums, for every channel
        sums = unit_products(program, [ones] * len(products), x)
    for product, sum_of_x, own in zip(products, sums, factors, strict=True):
        if sum_of_x is not None and own.zero is not None:
            zero = jax.lax.broadcast_in_dim(own.zero.astype(jnp.int32), product.shape, (0,))
            product = product - sum_of_x * zero
        if own.scale is None:
            total = total + product
        else:
            scale = jax.lax.broadcast_in_dim(program.real(own.scale), product.shape, (0,))
            total = total + product.astype(jnp.float32) * scale
        if sum_of_x is not None and own.minimum is not None:
            minimum = jax.lax.broadcast_in_dim(program.real(own.minimum), product.shape, (0,))
            total = total + sum_of_x.astype(jnp.float32) * minimum
    return total


def unit_products(program: Program, weights: Sequence[Any], x: Ref) -> list[jax.Array]:
    """Multiplies the weights `[64, unit]` of each unit by the columns of x that they meet."""
    shape = (CHANNELS, program.config.block_rows)
    if program.interpret:
        zeros = jnp.zeros(shape, program.sums_dtype)
        return [program.multiply(zeros, unit, weight, x) for unit, weight in enumerate(weights)]

    def on_tensor_cores(*sums: Ref) -> list[jax.Array]:
        for unit, (weight, total) in enumerate(zip(weights, sums, strict=True)):
            program.multiply(total, unit, weight, x)
        return [total[...] for total in sums]

    sums = [plgpu.WGMMAAccumulatorRef(shape, program.sums_dtype) for _ in weights]
    return list(pl.run_scoped(on_tensor_cores, *sums))


def many_rows(program: Program, prepare: Callable[[], None], store: Callable[[list[jax.Array]], None]) -> None:
    """Sums up all tiles of a warpgroup over its program's share of `in`, or starts the copies of both of them.

    Args:
      program: the program.
      prepare: starts what is to be there for `store`.
      store: stores the sums `[64, block_rows]` of the warpgroup's tiles.
    """
    config, grouped = program.config, program.problem.scheme.group_size is not None
    shape, dtype = (CHANNELS, config.block_rows), program.sums_dtype

    def compute(run: Callable[[Any], Any]) -> None:
        prepare()
        start = program.tile_factors(0)
        if program.interpret:
            sums, _ = run(([jnp.zeros(shape, dtype) for _ in program.tiles], start))
            store(sums)
            return

        def on_tensor_cores(*sums: Ref) -> None:
            run((list(sums), start))
            store([total[...] for total in sums])

        pl.run_scoped(on_tensor_cores, *(plgpu.WGMMAAccumulatorRef(shape, dtype) for _ in program.tiles))

    def step(indices: tuple[jax.Array, ...], *blocks_and_carry: Any) -> Any:
        *codes, x, (sums, factors) = blocks_and_carry
        ahead = program.tile_factors(indices[0] + 1) if grouped else factors
        added = []
        for (part, channel), total, own in zip(program.tiles, sums, factors, strict=True):
            block = codes[part].at[pl.ds(program.own + channel, CHANNELS), :]
            for unit, weight in enumerate(program.scaled(program.weights(block, own), own)):
                total = program.multiply(total, unit, weight, x)
            added.append(total)
        if not program.interpret:
            plgpu.wgmma_wait(0)
        program.release()
        return added, ahead

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(program.blocks,),
        memory_registers=MEMORY_REGISTERS,
        in_specs=program.in_specs(),
        max_concurrent_steps=config.num_stages,
        wg_axis="warpgroup",
        num_compute_wgs=config.warpgroups,
        compute_context=compute,
    )(*program.in_refs())


def kernel(
    refs: Refs,
    result: Ref,
    staged: Ref,
    sums: Ref | None,
    barrier: Ref | None,
    *,
    problem: Problem,
    config: Config,
    whole: bool,
    interpret: bool,
) -> None:
    """Computes `[block_rows, block_out]` of the result, or of the sums of a split.

    Args:
      refs: the inputs.
      result: `[rows, result_features]`, or sums `[rows, splits, parts, result_features]`.
      staged: `[warpgroups, 1, or parts of sums, block_rows, block_out / warpgroups]` in shared memory: what is written
        to `result`, and the residual before.
      sums: `[1, or splits if interpreted, parts, block_rows, block_out]` in shared memory, where a cluster merges
        splits, or None.
      barrier: `[warpgroups]`, on which the residual arrives; None without one.
      problem: what is computed.
      config: block sizes.
      whole: whether it is the result that is written.
      interpret: whether the kernel is interpreted.
    """
    warpgroup = 0 if config.warpgroups == 1 else jax.lax.axis_index("warpgroup")
    program_type = tensor_memory.TensorProgram if config.tensor_memory else Program
    simulated = sums is not None and interpret
    splits = [jnp.int32(split) for split in range(config.splits)] if simulated else [jax.lax.axis_index("split")]
    if config.overlaps and not interpret:
        # What comes next may start at once: it waits likewise, for the end of this kernel.
        plgpu.griddepcontrol_launch_dependents()
        if refs.layer is None:  # which the kernel before may have written, as everything but the weight
            program_type(problem, refs, config, interpret, splits[0], warpgroup).prefetch()
        plgpu.griddepcontrol_wait()
    programs = [program_type(problem, refs, config, interpret, split, warpgroup) for split in splits]
    program = programs[0]

    def prepare() -> None:
        if barrier is not None:
            plgpu.copy_gmem_to_smem(refs.residual.at[program.place()], staged.at[warpgroup, 0], barrier.at[warpgroup])

    def await_residual() -> None:
        if barrier is not None:
            plgpu.barrier_wait(barrier.at[warpgroup])

    def store(sums: list[jax.Array], ends: list[Ends] | None = None) -> None:
        ends = [program.ends(tile) for tile in program.tiles] if ends is None else ends
        await_residual()
        tiles = dict(zip(program.tiles, zip(sums, ends, strict=True), strict=True))
        write(program, tiles, result, staged.at[warpgroup], whole)

    if config.warpgroups > 1:
        many_rows(program, prepare, store)
        return
    prepare()
    if isinstance(program, tensor_memory.TensorProgram):
        tensor_memory.multiply(program, result, staged.at[warpgroup], whole, await_residual)
        return
    # What sums are finished with comes from memory while codes do.
    layout = plgpu.Layout.WGMMA if sums is None else cluster_merge.layout_of(config)
    ends = [program.ends(tile, layout) for tile in program.tiles]
    if sums is None:
        store(few_rows(program), ends)
        return
    for index, each in enumerate(programs):
        cluster_merge.leave(each, few_rows(each), sums.at[index])
    await_residual()
    cluster_merge.merge(programs, dict(zip(program.tiles, ends, strict=True)), sums, result, staged.at[0, 0])


def write(program: Program, tiles: dict[Tile, tuple[jax.Array, Ends]], result: Ref, staged: Ref, whole: bool) -> None:
    """Writes the result of a warpgroup, or its sums.

    Args:
      program: the program.
      tiles: the sums `[64, block_rows]` of each tile, and what they are finished with.
      result: see `kernel`.
      staged: the warpgroup's part of shared memory.
      whole: whether it is the result that is written.
    """
    p, adds = program.problem, program.refs.residual is not None
    for start in range(0, program.width, CHANNELS):
        found = [program.finish(*tiles[part, start]) for part in range(p.parts)]
        if whole:
            found = [p.finish(found)]
        for part, value in enumerate(found):
            program.stage(staged.at[part, :, pl.ds(start, CHANNELS)], value, adds=adds)
    program.copy_out(result, staged, whole)
