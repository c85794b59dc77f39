"""Attention whose splits are merged by the programs of a cluster, out of each other's shared memory.

Grid: (sequences, KV heads, row blocks), and in a cluster the splits of each. A program leaves out and lse of its share
in its shared memory, as tiles `[block_rows, 64]` of head_dim, and merges some units of 2, 4 or 8 rows of a tile
(`gpu_cluster.py`). A sink is part of the first split. A split without KV blocks leaves an lse of -inf.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels import gpu_cluster
from palladion.kernels.decode_attention import online_softmax
from palladion.kernels.decode_attention.mosaic_gpu.config import TILE, Config
from palladion.kernels.decode_attention.mosaic_gpu.kernel import TOKENS, Program, Results
from palladion.kernels.decode_attention.mosaic_gpu.memory import Refs, Scratch
from palladion.kernels.decode_attention.mosaic_gpu.merge import Merged
from palladion.kernels.decode_attention.mosaic_gpu.registers import OF_COLUMNS, Registers
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Scalar


def cluster_kernel(
    refs: Refs, results: Results, scratch: Scratch, *, problem: Problem, config: Config, interpret: bool
) -> None:
    """Computes attention of a block of query rows, which share a sequence and KV head.

    Args:
      refs: the inputs.
      results: what is written.
      scratch: shared memory and barriers.
      problem: the call.
      config: block sizes.
      interpret: whether the kernel is interpreted: the program computes all splits then.
    """
    sequence, head, row_block = (jax.lax.axis_index(name) for name in ("sequence", "head", "row"))
    splits = [jnp.int32(split) for split in range(config.splits)] if interpret else [jax.lax.axis_index("split")]
    for index, split in enumerate(splits):
        program = Program(problem, config, refs, scratch, interpret, sequence * config.splits + split)
        leave(program, split, index)
    units = Units(Registers(interpret), config.splits, results, scratch, (sequence, head, row_block))

    def each(act: Any) -> None:
        for split in splits:
            gpu_cluster.each_unit(units.number, split, config.splits, act)

    gpu_cluster.exchange(functools.partial(each, units.finish), functools.partial(each, units.write), interpret)


def leave(program: Program, split: Scalar, index: int) -> None:
    """Computes a split, and stores its part to place `index` of shared memory."""
    registers, scratch, sinks = program.registers, program.scratch, program.refs.sinks
    if sinks is not None:
        rows = pl.ds(program.first_row, program.config.block_rows)
        sinks = registers.load(sinks.at[program.head, rows], OF_COLUMNS, optimized=False)
        sinks = jnp.where(split == 0, sinks, -jnp.inf)
    (out,), lse = online_softmax.finish(program.problem, program.run(), sinks, TOKENS)
    for tile in range(out.shape[0] // TILE):
        registers.store_turned(scratch.parts.at[index, tile], out[tile * TILE : (tile + 1) * TILE])
    registers.store(scratch.part_lse.at[index], lse)


class Units:
    """Units of a block of query rows, `size` rows of 64 features each.

    Args:
      registers: of the program.
      splits: the splits.
      results: what is written.
      scratch: shared memory.
      place: sequence, KV head and block of rows.
    """

    def __init__(
        self,
        registers: Registers,
        splits: int,
        results: Results,
        scratch: Scratch,
        place: tuple[Scalar, Scalar, Scalar],
    ) -> None:
        self.registers, self.splits, self.results, self.scratch = registers, splits, results, scratch
        self.sequence, self.head, row_block = place
        self.tiles, block_rows, _ = scratch.out.shape
        self.first_row = row_block * block_rows
        rows = min(block_rows, results.out.shape[2])  # others are not written
        self.size = gpu_cluster.rows_of_unit(rows, splits, self.tiles)
        self.number = self.tiles * pl.cdiv(rows, self.size)

    def place(self, unit: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the tile of a unit, and its first row in the block."""
        group, tile = divide_with_remainder(unit, self.tiles)
        return tile, group * self.size

    def finish(self, unit: Scalar) -> None:
        """Merges the parts of a unit, writes its lse, and stores its output to shared memory."""
        registers, scratch, layout = self.registers, self.scratch, gpu_cluster.LAYOUTS[self.size]
        of_rows = layout.reduce(0)
        load = functools.partial(gpu_cluster.of_split, interpret=registers.interpret)
        tile, row = self.place(unit)
        rows = pl.ds(row, self.size)
        parts = [
            (
                load(scratch.part_lse, split, (rows,), of_rows),
                load(scratch.parts, split, (tile, rows), layout),
            )
            for split in range(self.splits)
        ]
        merged = Merged(
            registers.constant((self.size,), -jnp.inf, of_rows),
            registers.constant((self.size,), 0, of_rows),
            registers.constant((TILE, self.size), 0, layout),
        ).add(registers, parts, layout)
        out, lse = merged.finish(registers, layout)
        registers.store_turned(scratch.out.at[tile, rows], out.astype(scratch.out.dtype), layout)

        place = self.results.lse.at[self.sequence, self.head, pl.ds(self.first_row + row, self.size)]
        pl.when(tile == 0)(functools.partial(registers.store, place, lse))

    def write(self, unit: Scalar) -> None:
        """Starts the copy of a unit's output to device memory, without rows that the result does not have."""
        tile, row = self.place(unit)
        all_rows = self.results.out.shape[2]

        def copy(rows: int) -> None:
            place = (self.sequence, self.head, pl.ds(self.first_row + row, rows), pl.ds(tile * TILE, TILE))
            plgpu.copy_smem_to_gmem(self.scratch.out.at[tile, pl.ds(row, rows)], self.results.out.at[place])

        if rest := all_rows % self.size:
            is_cut = self.first_row + row + self.size > all_rows
            pl.when(is_cut)(functools.partial(copy, rest))
            pl.when(~is_cut)(functools.partial(copy, self.size))
        else:
            copy(self.size)
