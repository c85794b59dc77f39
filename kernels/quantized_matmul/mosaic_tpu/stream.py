"""Weights on their way into a TPU's VMEM: a ring of buffers that the kernel fills itself.

A core works on one block of the weight after the other. While it does, the next ones are under way: with two buffers,
as a grid would have them, the memory waits whenever a block is worked on for as long as it takes to arrive.

A block is made of the codes and what belongs to them, for each part of a gated call. All of it is taken from the arrays
as they are, from the layer that is asked for. The last block of channels may be narrower; its buffer then is not full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.tpu_layout import LANES


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a weight is cut into blocks, and in which order these are worked on.

    Attributes:
      first: the first channel.
      channels: of each part.
      parts: that lie next to each other, 2 where gated.
      block_out: channels of a block.
      in_blocks: blocks along `in`, worked on one after the other.
      row_blocks: how often all of it is worked on.
      cores: that share the channels.
    """

    first: int
    channels: int
    parts: int
    block_out: int
    in_blocks: int
    row_blocks: int
    cores: int

    @property
    def out_blocks(self) -> int:
        """Blocks of channels."""
        return pl.cdiv(self.channels, self.block_out)

    @property
    def of_a_core(self) -> int:
        """Blocks of channels that a core works on; where they cannot be shared evenly, the last one is done twice."""
        return pl.cdiv(self.out_blocks, self.cores)

    @property
    def last_width(self) -> int:
        """Channels of the last block."""
        return self.channels - (self.out_blocks - 1) * self.block_out

    def of_all(self, core: Any, j: Any) -> Any:
        """The number of a core's block of channels, among those of all cores."""
        return j if self.cores == 1 else jnp.minimum(core * self.of_a_core + j, self.out_blocks - 1)

    def number(self, i: Any, j: Any, k: Any) -> Any:
        """Which block in a core's order it is."""
        return (i * self.of_a_core + j) * self.in_blocks + k

    def place(self, core: Any, number: Any) -> tuple[Any, Any]:
        """The block of channels, and the one along `in`, that a core works on with that number."""
        several = self.in_blocks > 1
        k = jax.lax.rem(number, self.in_blocks) if several else 0
        j = jax.lax.div(number, self.in_blocks) if several else number
        return self.of_all(core, jax.lax.rem(j, self.of_a_core) if self.row_blocks > 1 else j), k

    @property
    def of_a_core_in_all(self) -> int:
        """Blocks that a core works on, counted as often as it does."""
        return self.row_blocks * self.of_a_core * self.in_blocks


@dataclasses.dataclass(frozen=True)
class Source:
    """An array of which each block has some.

    Attributes:
      ref: in HBM, `[layers, rows, out]`.
      layer: whose matrix is taken.
      along_in: whether blocks along `in` have rows of their own; otherwise all have all of them.
    """

    ref: Any
    layer: Any
    along_in: bool


@dataclasses.dataclass(frozen=True)
class Stream:
    """The blocks of a core on their way.

    Attributes:
      blocks: how the weight is cut.
      core: which one this is.
      sources: of what blocks are made.
      buffers: for each part, for each source: `[buffers, rows, block_out]`.
      arrived: semaphores, `[parts * sources, buffers]`.
    """

    blocks: Blocks
    core: Any
    sources: tuple[Source, ...]
    buffers: tuple[Any, ...]
    arrived: Any

    def begin(self) -> None:
        """Fills all buffers but one."""

        def start(number: Any, carry: int) -> int:
            self._each(number, lambda transfer: transfer.start())
            return carry

        # A loop, so that the compiler leaves these transfers behind those that were started before.
        jax.lax.fori_loop(0, min(self._ahead, self.blocks.of_a_core_in_all), start, 0)

    def take(self, number: Any) -> Any:
        """Waits for a block, the next one in the core's order, and returns the buffer that it is in.

        The buffer of the block before is filled anew.
        """

        @pl.when(number + self._ahead < self.blocks.of_a_core_in_all)
        def _next() -> None:
            self._each(number + self._ahead, lambda transfer: transfer.start())

        self._each(number, lambda transfer: transfer.wait())
        return self._buffer(number)

    @property
    def _ahead(self) -> int:
        return self.arrived.shape[1] - 1

    def _buffer(self, number: Any) -> Any:
        return jax.lax.rem(number, self.arrived.shape[1])

    def _each(self, number: Any, act: Any) -> None:
        """Calls `act` with each transfer of a block."""
        blocks = self.blocks
        j, k = self.blocks.place(self.core, number)

        def of_width(width: int) -> None:
            for transfer in self._transfers(self._buffer(number), j, k, width):
                act(transfer)

        if blocks.last_width == blocks.block_out:
            of_width(blocks.block_out)
        else:
            is_last = j == blocks.out_blocks - 1
            pl.when(is_last)(lambda: of_width(blocks.last_width))
            pl.when(jnp.logical_not(is_last))(lambda: of_width(blocks.block_out))

    def _transfers(self, buffer: Any, j: Any, k: Any, width: int) -> Iterator[Any]:
        blocks = self.blocks
        for number, to in enumerate(self.buffers):
            part, source = divmod(number, len(self.sources))
            origin = self.sources[source]
            first = blocks.first + part * blocks.channels
            channel = first if blocks.out_blocks == 1 else pl.multiple_of(first + j * blocks.block_out, LANES)
            rows = to.shape[1]
            row = pl.multiple_of(k * rows, rows) if origin.along_in else 0
            yield pltpu.make_async_copy(
                origin.ref.at[origin.layer, pl.ds(row, rows), pl.ds(channel, width)],
                to.at[buffer] if width == blocks.block_out else to.at[buffer, :, pl.ds(0, width)],
                self.arrived.at[number, buffer],
            )
