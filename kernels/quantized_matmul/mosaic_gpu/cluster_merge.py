"""Splits that the programs of a cluster add up, out of each other's shared memory. See `gpu_cluster.py`.

The programs that have a share of `in` each, for the same tile of the result, are a cluster. A program leaves its sums
`[block_rows, block_out]` in its shared memory. Then it adds up the sums of all programs for some of the rows, a unit of
2, 4 or 8 at a time, finishes them and writes them. The residual has arrived before: each thread awaits it itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels import gpu_cluster
from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import CHANNELS, Config
from palladion.kernels.quantized_matmul.mosaic_gpu.program import Ends, Program, Tile
from palladion.kernels.types import Ref, Scalar


def rows_of_unit(config: Config) -> int:
    """Returns the rows that a program adds up at a time."""
    return gpu_cluster.rows_of_unit(config.block_rows, config.splits)


def layout_of(config: Config) -> Any:
    """Returns the layout of the rows that a program adds up at a time."""
    return gpu_cluster.LAYOUTS[rows_of_unit(config)]


def leave(program: Program, totals: Sequence[jax.Array], sums: Ref) -> None:
    """Stores the sums of a program's tiles, `[64, block_rows]` each, to `[parts, block_rows, block_out]`."""
    for (part, start), total in zip(program.tiles, totals, strict=True):
        program.stage(sums.at[part, :, pl.ds(start, CHANNELS)], total)


def merge(programs: Sequence[Program], ends: dict[Tile, Ends], sums: Ref, result: Ref, staged: Ref) -> None:
    """Adds up what the programs of a cluster left, and writes the result.

    Args:
      programs: the program; those of all splits where the kernel is interpreted.
      ends: what the sums of each tile are finished with.
      sums: `[1, or splits if interpreted, parts, block_rows, block_out]` in shared memory.
      result: `[rows, result_features]`.
      staged: `[block_rows, block_out]` in shared memory: the residual, then what is written.
    """
    size = rows_of_unit(programs[0].config)

    def finish() -> None:
        for program in programs:
            _each_unit(program, size, functools.partial(_finish_unit, program, size, ends, sums, staged))

    def write() -> None:
        for program in programs:
            _each_unit(program, size, functools.partial(write_unit, program))

    def write_unit(program: Program, row: Scalar) -> None:
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, size)], result.at[program.place(row, size)])

    gpu_cluster.exchange(finish, write, programs[0].interpret)


def _each_unit(program: Program, size: int, act: Callable[[Scalar], None]) -> None:
    """Calls a function with the first row of each unit of a program that has rows of x."""
    config = program.config

    def act_if_it_exists(unit: Scalar) -> None:
        exists = program.row * config.block_rows + unit * size < program.problem.rows
        pl.when(exists)(functools.partial(act, unit * size))

    gpu_cluster.each_unit(config.block_rows // size, program.split, config.splits, act_if_it_exists)


def _finish_unit(program: Program, size: int, ends: dict[Tile, Ends], sums: Ref, staged: Ref, row: Scalar) -> None:
    """Adds up the rows of a unit, `[64, size]` of each tile, and stores the result to shared memory."""
    p, splits, layout, rows = program.problem, program.config.splits, gpu_cluster.LAYOUTS[size], pl.ds(row, size)
    for start in range(0, program.width, CHANNELS):
        channels, found = pl.ds(start, CHANNELS), []
        for part in range(p.parts):
            place = (part, rows, channels)
            each = [gpu_cluster.of_split(sums, split, place, layout, program.interpret) for split in range(splits)]
            found.append(program.finish(functools.reduce(operator.add, each), ends[part, start], layout, row))
        adds = program.refs.residual is not None
        program.stage(staged.at[rows, channels], p.finish(found), layout, adds)
