"""Merging of splits by the programs of a cluster, out of each other's shared memory, on Hopper.

The programs of all splits of a block of rows are a cluster. A program leaves what it has computed in its shared memory,
as tiles `[rows, 64]`. Then it takes some units, 2, 4 or 8 rows of a tile each, reads them from all programs, merges,
finishes and writes them. With 4 splits and a tile of 8 rows:

                shared memory of split
                0        1        2        3
    rows 0, 1   unit  +  unit  +  unit  +  unit   merged, finished and written by split 0
    rows 2, 3   unit  +  unit  +  unit  +  unit   ... by split 1
    rows 4, 5   unit  +  unit  +  unit  +  unit   ... by split 2
    rows 6, 7   unit  +  unit  +  unit  +  unit   ... by split 3

Order of memory, by the two barriers of the cluster (`exchange`):

1. All threads store what they leave, and arrive (release); none reads before all have arrived (wait, acquire).
2. A thread arrives again when it has read what others left. None ends before all have arrived again: a program that
   has ended has no shared memory. What is read here is never written again, so there is nothing else to order.

Between, threads of a program exchange results through shared memory that no other program reads: `commit_smem` orders
their stores before the copy to device memory.

jax's interpreter knows no shared memory of other programs. Interpreted, one program computes all splits, one after the
other: `of_split` and `_barrier`, which are the exchange itself, are all that it does not see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from palladion.kernels.compat import load_to_registers
from palladion.kernels.types import Ref, Scalar

Merge = Literal["launch", "cluster"]
"""Where splits are merged: in a launch of its own, or by the programs of the splits, which are a cluster."""

MERGES: Final = ("launch", "cluster")

MOST_IN_CLUSTER: Final = 8
"""Programs of a cluster that every Hopper GPU takes."""

WIDTH: Final = 64
"""Columns of a tile."""


def _layout(tiles: Sequence[tuple[int, int]], warps: tuple[int, ...], lanes: tuple[int, ...], numbers: int) -> Any:
    return plgpu.Layout.TILED(plgpu.Tiling(tuple(tiles)), warps, lanes, numbers)


LAYOUTS: Final = {
    8: _layout([(WIDTH, 8), (WIDTH, 2), (4, 1)], (-5,), (-3, -4), -2),
    4: _layout([(WIDTH, 4), (WIDTH, 1), (2, 1)], (-5,), (-4,), -2),
    2: _layout([(WIDTH, 2), (WIDTH // 2, 1)], (-3, -4), (-2,), -1),
}
"""Layouts of units `[64, rows]` by rows: a thread has 16, 8 or 4 bytes, threads that are neighbours those that are."""


def rows_of_unit(rows: int, splits: int, tiles: int = 1) -> int:
    """Returns the rows of a unit: the most with which every split has a unit of some rows of so many tiles."""
    return next((size for size in LAYOUTS if tiles * pl.cdiv(rows, size) >= splits), min(LAYOUTS))


def each_unit(units: int, split: Scalar, splits: int, act: Callable[[Scalar], None]) -> None:
    """Calls a function with the index of each unit that a split merges."""
    for index in range(pl.cdiv(units, splits)):
        unit = split + index * splits
        pl.when(unit < units)(functools.partial(act, unit))


def exchange(finish: Callable[[], None], write: Callable[[], None], interpret: bool) -> None:
    """Merges what the programs of a cluster left in their shared memory.

    Args:
      finish: reads what all programs left, and stores results to the program's own shared memory.
      write: starts the copies of these results to device memory.
      interpret: whether the kernel is interpreted.
    """
    _barrier("arrive.release", interpret)
    _barrier("wait.acquire", interpret)
    finish()
    _barrier("arrive.release", interpret)
    plgpu.commit_smem()
    write()
    plgpu.wait_smem_to_gmem(0)
    _barrier("wait.acquire", interpret)


def of_split(memory: Ref, split: int, place: tuple[Any, ...], layout: Any, interpret: bool) -> jax.Array:
    """Loads what a split left: numbers of rows, or a unit with its axes exchanged, `[64, rows]`.

    Args:
      memory: shared memory, whose first axis is that of the splits if interpreted, and otherwise 1.
      split: the split.
      place: indices along the other axes.
      layout: layout of the result.
      interpret: whether the kernel is interpreted.
    """
    if interpret:
        return memory.at[split, *place][...].T
    of_program = plgpu.cluster_ref(memory.at[0, *place], {"split": split})
    if len(of_program.shape) == 1:  # a number for each row is wanted by several threads
        return load_to_registers(of_program, layout, optimized=False)
    return load_to_registers(of_program.transpose((1, 0)), layout)


def _barrier(half: str, interpret: bool) -> None:
    """Arrives at the barrier of the cluster, or waits for it: all threads of all of its programs."""
    if interpret:
        return

    def emit(_: Any) -> None:
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], f"barrier.cluster.{half}.aligned;", "~{memory}", has_side_effects=True)

    plgpu.inline_mgpu()(emit)()
