"""A DMA ring: slots in VMEM that the kernel fills with KV blocks itself, ahead of the computation.

The kernel works through pairs of (batch block, query block), and for each through the KV blocks that are visible. The
ring treats all of them as one sequence of steps: while one step is computed, the blocks of the next ones are being
transferred, across the borders of sequences. So nothing waits at the end of a short sequence, and no block is
transferred that no query sees. A batch block has several sequences where they are short; a step then transfers one KV
block of each.

A KV block consists of chunks that are transferred one by one: pages of a paged cache, or equal parts of a dense one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.decode_attention.mosaic_tpu.visible_range import VisibleRange
from palladion.kernels.types import Ref, Scalar

CURSOR: Final = 5
"""Scalars that hold the state of a ring; see `DmaRing.cursor`."""


@dataclasses.dataclass(frozen=True)
class RingArray:
    """One of the arrays that a KV block consists of: keys, values, or the scales of either.

    Attributes:
      source: maps (sequence, first token, number of tokens) to the reference in HBM.
      destination: maps (slot, sequence of the batch block, first token of the KV block, number of tokens) to the
        reference in VMEM.
      semaphores: a DMA semaphore for each slot.
      chunked: whether the array is transferred chunk by chunk; otherwise a KV block of it is always one transfer.
    """

    source: Callable[[Scalar, Scalar, int], Any]
    destination: Callable[[Scalar, int, Scalar, int], Any]
    semaphores: Ref
    chunked: bool = True


@dataclasses.dataclass(frozen=True)
class DmaRing:
    """Transfers KV blocks in the order in which a grid over (batch block, query block) works on them.

    A step transfers the next KV block of each sequence of the batch block that has one left.

    Attributes:
      visible: the visible ranges.
      block_batch: sequences in a batch block.
      first: the first batch block.
      end: the batch block after the last.
      slots: slots of the ring; all but the one that is computed on are in flight.
      lengths: in SMEM, `[batch]`.
      cursor: in SMEM: batch block, query block and step to fetch next, and how many steps were fetched and taken.
      arrays: the arrays of a KV block.
      contiguous: whether the chunks of a KV block lie next to each other in HBM.
    """

    visible: VisibleRange
    block_batch: int
    first: Scalar
    end: Scalar
    slots: int
    lengths: Any
    cursor: Ref
    arrays: tuple[RingArray, ...]
    contiguous: bool

    def blocks(self, batch_block: Scalar, q_block: Scalar) -> list[tuple[Scalar, Scalar]]:
        """Returns the range of visible KV blocks of each sequence."""
        lengths = (self.lengths[batch_block * self.block_batch + n] for n in range(self.block_batch))
        return [self.visible.blocks(length, q_block) for length in lengths]

    def steps(self, batch_block: Scalar, q_block: Scalar) -> Scalar:
        """Returns the number of steps that a query block takes: the largest number of visible KV blocks."""
        counts = [end - first for first, end in self.blocks(batch_block, q_block)]
        return functools.reduce(jnp.maximum, counts)

    def start(self) -> None:
        """Moves the cursor to the first step and fills all slots but one."""
        self.cursor[3] = 0
        self.cursor[4] = 0
        self._move_to(self.first, 0)

        def fetch(_: Scalar, carry: int) -> int:
            self.fetch()
            return carry

        jax.lax.fori_loop(0, self.slots - 1, fetch, 0)

    def fetch(self) -> None:
        """Starts the transfers of the next step, if there is one; its slot must be free."""
        batch_block, q_block, step, fetched = (self.cursor[n] for n in range(4))

        @pl.when(batch_block < self.end)
        def _fetch() -> None:
            self._start_transfers(batch_block, q_block, step, jax.lax.rem(fetched, self.slots))
            self.cursor[2] = step + 1
            self.cursor[3] = fetched + 1

            @pl.when(step + 1 >= self.steps(batch_block, q_block))
            def _next() -> None:
                self._move_to(*self._after(batch_block, q_block))

    def take(self, batch_block: Scalar, q_block: Scalar, step: Scalar) -> Scalar:
        """Waits for the transfers of the next step, which must be this one, and returns its slot."""
        taken = self.cursor[4]
        self.cursor[4] = taken + 1
        slot = jax.lax.rem(taken, self.slots)

        def wait(array: RingArray, sequence: int, _: Scalar, token: Scalar, tokens: int) -> None:
            # Semaphores count bytes, so it does not matter how many transfers brought them.
            destination = array.destination(slot, sequence, token, tokens)
            pltpu.make_async_copy(destination, destination, array.semaphores.at[slot]).wait()

        self._for_each_block(batch_block, q_block, step, wait, contiguous=True)
        return slot

    def _start_transfers(self, batch_block: Scalar, q_block: Scalar, step: Scalar, slot: Scalar) -> None:
        """Starts all transfers of a step."""

        def start(array: RingArray, sequence: int, block: Scalar, token: Scalar, tokens: int) -> None:
            batch_index = batch_block * self.block_batch + sequence
            source = array.source(batch_index, block * self.visible.block_kv + token, tokens)
            destination = array.destination(slot, sequence, token, tokens)
            pltpu.make_async_copy(source, destination, array.semaphores.at[slot]).start()

        self._for_each_block(batch_block, q_block, step, start, self.contiguous)

    def _for_each_block(
        self,
        batch_block: Scalar,
        q_block: Scalar,
        step: Scalar,
        act: Callable[[RingArray, int, Scalar, Scalar, int], None],
        contiguous: bool,
    ) -> None:
        """Calls `act(array, sequence, block, token, tokens)` for each visible piece of a step's KV blocks."""
        for sequence, (first, end) in enumerate(self.blocks(batch_block, q_block)):
            block = first + step
            length = self.lengths[batch_block * self.block_batch + sequence]

            def pieces(sequence: int = sequence, block: Scalar = block, length: Scalar = length) -> None:
                def act_on(array: RingArray, token: Scalar, tokens: int) -> None:
                    act(array, sequence, block, token, tokens)

                self._for_each_piece(self.visible.chunks(length, q_block, block), act_on, contiguous)

            if self.block_batch == 1:
                pieces()  # a step has at least one block
            else:
                pl.when(block < end)(pieces)

    def _for_each_piece(
        self, chunks: tuple[Scalar, Scalar], act: Callable[[RingArray, Scalar, int], None], contiguous: bool
    ) -> None:
        """Calls `act(array, token, tokens)` for each transfer of a KV block whose visible chunks are given."""
        chunk, block_kv = self.visible.chunk, self.visible.block_kv
        first, end = chunks
        chunked = [array for array in self.arrays if array.chunked]

        def whole_block() -> None:
            for array in chunked:
                act(array, 0, block_kv)

        def one_chunk(n: jax.Array, carry: int) -> int:
            for array in chunked:
                act(array, pl.multiple_of(n * chunk, chunk), chunk)
            return carry

        def each_chunk() -> None:
            jax.lax.fori_loop(first, end, one_chunk, 0)

        if contiguous:
            is_whole = end - first == self.visible.chunks_per_block
            pl.when(is_whole)(whole_block)
            pl.when(jnp.logical_not(is_whole))(each_chunk)
        else:
            each_chunk()
        for array in self.arrays:
            if not array.chunked:
                act(array, 0, block_kv)

    def _after(self, batch_block: Scalar, q_block: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the batch block and query block that follow."""
        if self.visible.q_blocks == 1:
            return batch_block + 1, 0
        last = q_block == self.visible.q_blocks - 1
        return jnp.where(last, batch_block + 1, batch_block), jnp.where(last, 0, q_block + 1)

    def _move_to(self, batch_block: Scalar, q_block: Scalar) -> None:
        """Moves the cursor to the first step of a query block, or of the next one that sees anything."""

        def sees_nothing(at: tuple[Scalar, Scalar]) -> Scalar:
            batch_block, q_block = at
            return (batch_block < self.end) & (self.steps(jnp.minimum(batch_block, self.end - 1), q_block) <= 0)

        start = (jnp.int32(batch_block), jnp.int32(q_block))
        position = jax.lax.while_loop(sees_nothing, lambda at: self._after(*at), start)
        self.cursor[0], self.cursor[1] = position
        self.cursor[2] = 0
