"""Brings blocks of the weight into a TPU's VMEM: a DMA ring that the kernel fills itself.

A core works on one block of the weight after the other while the next ones are in flight. A grid's pipeline has two
buffers, with which memory idles whenever a block takes as long to multiply as to arrive; the ring has more.

A block is made of the codes, scales, zeros, minimums and bias of its channels, for each part of a gated call. All of
them are read from the arrays as they are stored, at the layer that is asked for. The last block of channels may be
narrower, and then leaves the rest of its slot unwritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.quantized_matmul.mosaic_tpu.refs import Weight, present
from palladion.kernels.tpu_layout import LANES
from palladion.kernels.types import Ref, Scalar


@dataclasses.dataclass(frozen=True)
class WeightBlocks:
    """How a weight is cut into blocks, and in which order a core works on them.

    Attributes:
      first_channel: where the first block begins.
      channels: channels of each part.
      parts: parts that lie side by side, 2 where gated.
      block_out: channels of a block.
      in_blocks: blocks along `in`, worked on one after the other.
      row_blocks: how often the whole weight is read.
      cores: cores that share the channels.
    """

    first_channel: int
    channels: int
    parts: int
    block_out: int
    in_blocks: int
    row_blocks: int
    cores: int

    @property
    def out_blocks(self) -> int:
        """Number of blocks of channels."""
        return pl.cdiv(self.channels, self.block_out)

    @property
    def out_blocks_per_core(self) -> int:
        """Blocks of channels of a core; where they cannot be shared evenly, the last one is done twice."""
        return pl.cdiv(self.out_blocks, self.cores)

    @property
    def steps(self) -> int:
        """Number of grid steps of a core."""
        return self.row_blocks * self.out_blocks_per_core * self.in_blocks

    @property
    def last_width(self) -> int:
        """Channels of the last block."""
        return self.channels - (self.out_blocks - 1) * self.block_out

    def out_block(self, core: Scalar, j: Scalar) -> Any:
        """Returns which of all blocks of channels is a core's block j."""
        return j if self.cores == 1 else jnp.minimum(core * self.out_blocks_per_core + j, self.out_blocks - 1)

    def step(self, i: Scalar, j: Scalar, k: Any) -> Any:
        """Returns a core's step from the indices of its row block, its out block and its in block."""
        return (i * self.out_blocks_per_core + j) * self.in_blocks + k

    def block_at(self, core: Scalar, step: Scalar) -> tuple[Any, Any]:
        """Returns the block of channels, and the block along `in`, that a core works on in a step."""
        several = self.in_blocks > 1
        k = jax.lax.rem(step, self.in_blocks) if several else 0
        j = jax.lax.div(step, self.in_blocks) if several else step
        return self.out_block(core, jax.lax.rem(j, self.out_blocks_per_core) if self.row_blocks > 1 else j), k


@dataclasses.dataclass(frozen=True)
class WeightRing:
    """The ring of a core: copies the block of each step into the next slot, `buffers - 1` steps ahead.

    Attributes:
      blocks: how the weight is cut.
      core: index of the core.
      layer: index of the matrix that is read from arrays that are stacked.
      source: the arrays in HBM.
      slots: for each part the arrays in VMEM, `[buffers, rows, block_out]` each.
      arrived: semaphores, `[parts * arrays, buffers]`.
    """

    blocks: WeightBlocks
    core: Scalar
    layer: Any
    source: Weight
    slots: tuple[Weight, ...]
    arrived: Ref

    def prefetch(self) -> None:
        """Starts the copies of the first steps: into all slots but one."""

        def start(step: Scalar, carry: int) -> int:
            self._for_each_copy(step, lambda copy: copy.start())
            return carry

        # A loop, because the compiler keeps its copies behind those that were started before it.
        jax.lax.fori_loop(0, min(self._ahead, self.blocks.steps), start, 0)

    def wait(self, step: Scalar) -> Any:
        """Waits for the block of a step and returns its slot; starts to refill the slot of the step before."""

        @pl.when(step + self._ahead < self.blocks.steps)
        def _refill() -> None:
            self._for_each_copy(step + self._ahead, lambda copy: copy.start())

        self._for_each_copy(step, lambda copy: copy.wait())
        return self._slot(step)

    @property
    def _ahead(self) -> int:
        return self.arrived.shape[1] - 1

    def _slot(self, step: Scalar) -> Any:
        return jax.lax.rem(step, self.arrived.shape[1])

    def _for_each_copy(self, step: Scalar, act: Callable[[Any], None]) -> None:
        """Calls `act` with each DMA of the block of a step."""
        blocks = self.blocks
        j, k = blocks.block_at(self.core, step)

        def copy_width(width: int) -> None:
            for copy in self._copies(self._slot(step), j, k, width):
                act(copy)

        if blocks.last_width == blocks.block_out:
            copy_width(blocks.block_out)
        else:
            is_last = j == blocks.out_blocks - 1
            pl.when(is_last)(lambda: copy_width(blocks.last_width))
            pl.when(jnp.logical_not(is_last))(lambda: copy_width(blocks.block_out))

    def _copies(self, slot: Scalar, j: jax.Array, k: jax.Array, width: int) -> Iterator[Any]:
        """Yields the DMA of each array of each part: `width` channels of out block j, in block k."""
        blocks = self.blocks
        semaphore = 0
        for part, slots in enumerate(self.slots):
            first = blocks.first_channel + part * blocks.channels
            channel = first if blocks.out_blocks == 1 else pl.multiple_of(first + j * blocks.block_out, LANES)
            for source, to in zip(present(self.source), present(slots), strict=True):
                rows = to.shape[1]
                row = 0 if source.shape[1] == rows else pl.multiple_of(k * rows, rows)
                layer = self.layer if source.shape[0] > 1 else 0
                yield pltpu.make_async_copy(
                    source.at[layer, pl.ds(row, rows), pl.ds(channel, width)],
                    to.at[slot] if width == blocks.block_out else to.at[slot, :, pl.ds(0, width)],
                    self.arrived.at[semaphore, slot],
                )
                semaphore += 1
