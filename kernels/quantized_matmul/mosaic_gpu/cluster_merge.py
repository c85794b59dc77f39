"""Splits that the programs of a cluster add up, out of each other's shared memory.

The programs that have a share of `in` each, for the same tile of the result, are a cluster. A program leaves its sums
`[block_rows, block_out]` in its shared memory. Then it adds up the sums of all programs for some of the rows, a unit of
2, 4 or 8 at a time, finishes them and writes them. With 4 splits of 8 rows:

                shared memory of split
                0        1        2        3
    rows 0, 1   sums  +  sums  +  sums  +  sums   added up, finished and written by split 0
    rows 2, 3   sums  +  sums  +  sums  +  sums   ... by split 1
    rows 4, 5   sums  +  sums  +  sums  +  sums   ... by split 2
    rows 6, 7   sums  +  sums  +  sums  +  sums   ... by split 3

Order of memory, by the two barriers of the cluster:

1. All threads store their sums, and arrive (release); none reads before all have arrived (wait, acquire).
2. A thread arrives again when it has read the sums of others. None ends before all have arrived again: a program that
   has ended has no shared memory. What is read here is never written again, so there is nothing else to order.

Between, threads of a program exchange results through shared memory that no other program reads: `commit_smem` orders
their stores before the copy to device memory, and the barrier of the residual its arrival before they read it.

jax's interpreter knows no shared memory of other programs. Interpreted, one program has the sums of all splits, one
after the other: `of_split` and `_barrier`, which are the exchange itself, are all that it does not see.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import CHANNELS, Config
from palladion.kernels.quantized_matmul.mosaic_gpu.program import Ends, Program, Tile
from palladion.kernels.types import Ref, Scalar


def _layout(tiles: Sequence[tuple[int, int]], warps: tuple[int, ...], lanes: tuple[int, ...], numbers: int) -> Any:
    return plgpu.Layout.TILED(plgpu.Tiling(tuple(tiles)), warps, lanes, numbers)


LAYOUTS: Final = {
    8: _layout([(CHANNELS, 8), (CHANNELS, 2), (4, 1)], (-5,), (-3, -4), -2),
    4: _layout([(CHANNELS, 4), (CHANNELS, 1), (2, 1)], (-5,), (-4,), -2),
    2: _layout([(CHANNELS, 2), (CHANNELS // 2, 1)], (-3, -4), (-2,), -1),
}
"""Layouts of `[64, rows]` by rows: a thread has 16, 8 or 4 bytes, threads that are neighbours those that are so."""


def rows_of_unit(config: Config) -> int:
    """Returns the rows that a program adds up at a time: the most of which every split has some."""
    return next((rows for rows in LAYOUTS if config.block_rows // rows >= config.splits), min(LAYOUTS))


def layout_of(config: Config) -> Any:
    """Returns the layout of the rows that a program adds up at a time."""
    return LAYOUTS[rows_of_unit(config)]


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
    interpret, size = programs[0].interpret, rows_of_unit(programs[0].config)
    _barrier("arrive.release", interpret)
    _barrier("wait.acquire", interpret)
    for program in programs:
        _each_unit(program, size, functools.partial(_finish_unit, program, size, ends, sums, staged))
    _barrier("arrive.release", interpret)
    plgpu.commit_smem()

    def write(program: Program, row: Scalar) -> None:
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, size)], result.at[program.place(row, size)])

    for program in programs:
        _each_unit(program, size, functools.partial(write, program))
    plgpu.wait_smem_to_gmem(0)
    _barrier("wait.acquire", interpret)


def _each_unit(program: Program, size: int, act: Callable[[Scalar], None]) -> None:
    """Calls a function with the first row of each unit of a program that has rows of x."""
    config = program.config
    units = config.block_rows // size
    for index in range(pl.cdiv(units, config.splits)):
        unit = program.split + index * config.splits
        first = unit * size
        exists = (unit < units) & (program.row * config.block_rows + first < program.problem.rows)
        pl.when(exists)(functools.partial(act, first))


def _finish_unit(program: Program, size: int, ends: dict[Tile, Ends], sums: Ref, staged: Ref, row: Scalar) -> None:
    """Adds up the rows of a unit, `[64, size]` of each tile, and stores the result to shared memory."""
    p, layout, rows = program.problem, LAYOUTS[size], pl.ds(row, size)
    for start in range(0, program.width, CHANNELS):
        channels, found = pl.ds(start, CHANNELS), []
        for part in range(p.parts):
            each = [
                of_split(program, sums, split, (part, rows, channels), layout) for split in range(program.config.splits)
            ]
            found.append(program.finish(functools.reduce(operator.add, each), ends[part, start], layout, row))
        adds = program.refs.residual is not None
        program.stage(staged.at[rows, channels], p.finish(found), layout, adds)


def of_split(program: Program, sums: Ref, split: int, place: tuple[Any, ...], layout: Any) -> jax.Array:
    """Loads the sums of a split `[64, rows]`, from the shared memory of its program."""
    if program.interpret:
        return sums.at[split, *place][...].T
    return program.load(plgpu.cluster_ref(sums.at[0, *place], {"split": split}).transpose((1, 0)), layout)


def _barrier(half: str, interpret: bool) -> None:
    """Arrives at the barrier of the cluster, or waits for it: all threads of all of its programs."""
    if interpret:
        return

    def emit(_: Any) -> None:
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], f"barrier.cluster.{half}.aligned;", "~{memory}", has_side_effects=True)

    plgpu.inline_mgpu()(emit)()
