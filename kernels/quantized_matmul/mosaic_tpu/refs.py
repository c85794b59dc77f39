"""Names the arrays of the kernel: in HBM where the call passes them, in VMEM where a grid step reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from palladion.kernels.types import Ref, Scalar


class Rows(NamedTuple):
    """The rows of x, prepared for the kernel; None where the call needs no such array.

    Shapes are those in HBM. VMEM holds one row block of each, without the leading axis.

    Attributes:
      x: `[row_blocks, in_blocks, stacked_rows, block_in]`, in the order of the operands.
      masks: `[1, masked_copies, words, chunk]` int32, the columns that each stacked row keeps.
      sums: `[row_blocks, sum_blocks, block_rows, groups]` float32, sums of x over each group.
      scales: `[row_blocks, 1, block_rows, 1]` float32, of rows that were quantized.
    """

    x: Ref
    masks: Any = None
    sums: Any = None
    scales: Any = None


class Weight(NamedTuple):
    """The weight and what belongs to it; None where the scheme has no such array.

    Shapes are those in HBM. VMEM holds a ring of blocks of each, `[buffers, rows of a block, block_out]`.

    Attributes:
      codes: `[layers, in or in / 2, out]`.
      scales: `[layers, groups, out]`; their bits where Mosaic does not know the dtype.
      zeros: `[layers, groups, out]`.
      minimums: `[layers, groups, out]`; like scales.
      bias: `[1, 1, out]` float32.
    """

    codes: Ref
    scales: Ref
    zeros: Any = None
    minimums: Any = None
    bias: Any = None

    def at_slot(self, slot: Scalar) -> Weight:
        """Returns views of the block in a slot of the ring, `[1, rows, block_out]` each."""
        return Weight(*(None if ref is None else ref.at[pl.ds(slot, 1)] for ref in self))

    def at_lanes(self, lanes: slice) -> Weight:
        """Returns views of some of the channels, `[1, rows, lanes]` each."""
        return Weight(*(None if ref is None else ref.at[:, :, lanes] for ref in self))


class Scratch(NamedTuple):
    """The memory that the kernel keeps from one grid step to the next.

    Attributes:
      rows: the row block in VMEM.
      weights: a ring of blocks in VMEM for each part: gate and up, or the only one.
      rows_arrived: DMA semaphores `[arrays of rows]`.
      weights_arrived: DMA semaphores `[parts * arrays of a weight, buffers]`.
      accumulators: for each part `[block_rows, block_out]`; empty where a single step takes all of `in`.
    """

    rows: Rows
    weights: tuple[Weight, ...]
    rows_arrived: Ref
    weights_arrived: Ref
    accumulators: tuple[Any, ...]


def present(arrays: Rows | Weight) -> list[Any]:
    """Returns the arrays that are not None, in their order."""
    return [array for array in arrays if array is not None]
