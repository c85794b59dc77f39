"""The TPU kernel of append_kv: copies blocks in, merges new tokens, copies blocks out; `call.py` describes the grid."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.append_kv.destinations import bounded_length, written_positions
from palladion.kernels.append_kv.mosaic_tpu.layout import BlockLayout, BlockLayouts
from palladion.kernels.append_kv.mosaic_tpu.merge import merge, shifted_tokens
from palladion.kernels.append_kv.problem import Problem
from palladion.kernels.integers import divide
from palladion.kernels.types import Ref


class Scalars(NamedTuple):
    """Integers in SMEM that say what is written where.

    Attributes:
      layer: int32 `[1]`.
      lengths: int32 `[batch]`.
      new_tokens: int32 `[batch]`; None where all new tokens are real.
      page_table: int32 `[batch * pages_per_seq]`; None for a dense cache.
    """

    layer: Ref
    lengths: Ref
    new_tokens: Ref
    page_table: Ref


class KeysAndValues(NamedTuple):
    """Two like arrays: keys and values, or their scales.

    Attributes:
      keys: the keys' array.
      values: the values' array.
    """

    keys: Ref
    values: Ref


class CacheArrays(NamedTuple):
    """All arrays of the cache that the kernel writes, or the new tokens or buffers for each of them.

    In HBM, arrays of the cache are `[num_layers, slabs, kv_heads, tokens, head_dim]`, or without head_dim for scales,
    and have two axes swapped if the layout says so. New tokens in HBM are `layout.new_tokens(layout.total_tokens)` with
    all KV heads.

    Attributes:
      kv: keys and values.
      scales: their scales, KeysAndValues; None where the kernel writes none.
    """

    kv: KeysAndValues
    scales: Ref


class Scratch(NamedTuple):
    """Buffers in VMEM, and semaphores.

    Attributes:
      new: new tokens of the group, `layout.new_tokens(layout.buffer_tokens)`.
      blocks: blocks of the cache, `[sequences, max_blocks, *layout.shape(layout.block_tokens)]`.
      block_read: DMA semaphores for the blocks of each sequence that come in, `[sequences]`.
      new_read: DMA semaphore for new tokens.
      block_written: DMA semaphore for all blocks that go out.
    """

    new: CacheArrays
    blocks: CacheArrays
    block_read: Ref
    new_read: Ref
    block_written: Ref


class ArrayRefs(NamedTuple):
    """Everything that belongs to one layout.

    Attributes:
      layout: layout of the blocks.
      new_hbm: new tokens of the batch in HBM.
      cache: arrays of the cache in HBM.
      new: new tokens of the group in VMEM.
      blocks: blocks of the cache in VMEM.
    """

    layout: BlockLayout
    new_hbm: KeysAndValues
    cache: KeysAndValues
    new: KeysAndValues
    blocks: KeysAndValues


class TargetBlock(NamedTuple):
    """A block of the cache that new tokens of a sequence go to, in int32 scalars of the kernel.

    Attributes:
      sequence: index of the sequence in its group.
      slot: index of the block's buffer among the buffers of the sequence.
      slab: index of the slab that contains the block.
      row: index of the block's first token in the slab.
      begin: first token of the block that is new.
      end: the token after the last new one.
      source: index of the block's first new token among the new tokens in VMEM.
    """

    sequence: jax.Array
    slot: jax.Array
    slab: jax.Array
    row: jax.Array
    begin: jax.Array
    end: jax.Array
    source: jax.Array


Action = Callable[[ArrayRefs, TargetBlock], None]


@dataclasses.dataclass(frozen=True)
class GridStep:
    """One step of the grid: a group of sequences, and a share of the KV heads.

    Attributes:
      problem: the call.
      scalars: integers in SMEM.
      scratch: buffers and semaphores.
      heads: index of the KV heads.
      group_size: sequences of a full group.
      first_sequence: first sequence of the group.
      sequences: sequences of this group; 0 where the layer does not exist.
    """

    problem: Problem
    scalars: Scalars
    scratch: Scratch
    heads: Any
    group_size: int
    first_sequence: jax.Array
    sequences: jax.Array

    @classmethod
    def current(cls, problem: Problem, scalars: Scalars, scratch: Scratch, *, heads: int, group_size: int) -> GridStep:
        """Returns the step that the kernel is in."""
        first_head = pl.multiple_of(pl.program_id(0) * heads, heads)
        first_sequence = pl.program_id(1) * group_size
        sequences = jnp.minimum(group_size, problem.batch - first_sequence)
        if problem.num_layers is not None:
            layer = scalars.layer[0]
            sequences = jnp.where((layer >= 0) & (layer < problem.num_layers), sequences, 0)
        return cls(
            problem=problem,
            scalars=scalars,
            scratch=scratch,
            heads=slice(None) if heads == problem.kv_heads else pl.ds(first_head, heads),
            group_size=group_size,
            first_sequence=first_sequence,
            sequences=sequences,
        )

    def new_start(self, layout: BlockLayout) -> Any:
        """Returns the index in HBM of the first new token that is copied to VMEM."""
        if layout.buffer_tokens == layout.total_tokens:
            return 0
        first = self.first_sequence * self.problem.q_len
        tile_start = first - jax.lax.rem(first, layout.tile_tokens)
        return pl.multiple_of(jnp.minimum(tile_start, layout.total_tokens - layout.buffer_tokens), layout.tile_tokens)

    def new_token_copies(self, refs: ArrayRefs) -> list[Any]:
        """Returns the DMAs that read the group's new tokens."""
        layout = refs.layout
        if layout.broadcast:
            index: tuple[Any, ...] = (pl.ds(self.first_sequence, self.group_size), self.heads)
        else:
            index = (self.heads, *layout.token_index(self.new_start(layout), layout.buffer_tokens))
        return [
            pltpu.make_async_copy(hbm.at[index], vmem, self.scratch.new_read)
            for hbm, vmem in zip(refs.new_hbm, refs.new, strict=True)
        ]

    def _slices(self, refs: ArrayRefs, block: TargetBlock) -> list[tuple[Any, Any]]:
        """Returns the slices of HBM and VMEM that hold a block, for both arrays."""
        layer, layout = self.scalars.layer[0], refs.layout
        tokens = layout.token_index(block.row, layout.block_tokens)
        if layout.slabs_follow_heads:
            index = (layer, self.heads, pl.ds(block.slab, 1), tokens[1])
        else:
            index = (layer, block.slab, self.heads, *tokens)
        return [
            (hbm.at[index], vmem.at[block.sequence, block.slot])
            for hbm, vmem in zip(refs.cache, refs.blocks, strict=True)
        ]

    def copies_in(self, refs: ArrayRefs, block: TargetBlock) -> list[Any]:
        """Returns the DMAs that read a block."""
        arrived = self.scratch.block_read.at[block.sequence]
        return [pltpu.make_async_copy(hbm, vmem, arrived) for hbm, vmem in self._slices(refs, block)]

    def copies_out(self, refs: ArrayRefs, block: TargetBlock) -> list[Any]:
        """Returns the DMAs that write a block."""
        written = self.scratch.block_written
        return [pltpu.make_async_copy(vmem, hbm, written) for hbm, vmem in self._slices(refs, block)]

    def for_each_sequence(self, arrays: Sequence[ArrayRefs], *actions: Action) -> None:
        """Calls each action with all blocks of a sequence before the next action, sequence after sequence."""

        def visit(sequence: jax.Array, carry: int) -> int:
            for action in actions:
                for refs in arrays:
                    self._for_each_block(refs.layout, sequence, functools.partial(action, refs))
            return carry

        jax.lax.fori_loop(0, self.sequences, visit, 0)

    def _for_each_block(self, layout: BlockLayout, sequence: jax.Array, action: Callable[[TargetBlock], None]) -> None:
        """Calls an action with each block that new tokens of a sequence go to."""
        p, scalars, b = self.problem, self.scalars, self.first_sequence + sequence
        length = bounded_length(p, scalars.lengths[b])
        first, end = written_positions(p, length, None if scalars.new_tokens is None else scalars.new_tokens[b])
        first_source = b * p.q_len - self.new_start(layout) - (length - p.q_len)  # index of position 0
        first_block = divide(first, layout.block_tokens)

        def visit(index: jax.Array) -> None:
            origin = index * layout.block_tokens
            page, row = index, jnp.int32(0)
            if layout.block_tokens != layout.slab_tokens:
                page = divide(origin, layout.slab_tokens)
                row = pl.multiple_of(origin - page * layout.slab_tokens, layout.block_tokens)
            pages = p.max_len // layout.slab_tokens
            slab = b if scalars.page_table is None else scalars.page_table[b * pages + page]
            begin = jnp.maximum(first, origin)
            block = TargetBlock(
                sequence=sequence,
                slot=index - first_block,
                slab=slab,
                row=row,
                begin=begin - origin,
                end=jnp.minimum(end - origin, layout.block_tokens),
                source=first_source + begin,
            )
            if p.num_pages is None:
                action(block)
            else:
                pl.when((slab >= 0) & (slab < p.num_pages))(lambda: action(block))

        def visit_in_loop(index: jax.Array, carry: int) -> int:
            visit(index)
            return carry

        if layout.max_blocks == 1:
            pl.when(first < end)(lambda: visit(first_block))
        else:
            stop = divide(end + (layout.block_tokens - 1), layout.block_tokens)
            jax.lax.fori_loop(first_block, jnp.where(first < end, stop, first_block), visit_in_loop, 0)


def kernel(
    scalars: Scalars,
    new: CacheArrays,
    _aliased: CacheArrays,
    cache: CacheArrays,
    scratch: Scratch,
    *,
    problem: Problem,
    layouts: BlockLayouts,
    group_size: int,
) -> None:
    """Writes the new tokens of a group of sequences, in a share of the KV heads."""
    step = GridStep.current(problem, scalars, scratch, heads=layouts.kv.heads, group_size=group_size)
    arrays = [ArrayRefs(layouts.kv, new.kv, cache.kv, scratch.new.kv, scratch.blocks.kv)]
    if layouts.scales is not None:
        arrays.append(ArrayRefs(layouts.scales, new.scales, cache.scales, scratch.new.scales, scratch.blocks.scales))

    def copy_in(refs: ArrayRefs, block: TargetBlock, *, wait: bool) -> None:
        @pl.when(block.end - block.begin < refs.layout.block_tokens)  # a block that is all new is not read
        def _copy() -> None:
            for copy in step.copies_in(refs, block):
                copy.wait() if wait else copy.start()

    def merge_and_copy_out(refs: ArrayRefs, block: TargetBlock) -> None:
        layout = refs.layout
        for new_tokens, blocks in zip(refs.new, refs.blocks, strict=True):
            if layout.broadcast:
                words = new_tokens[block.sequence]
            else:
                words = shifted_tokens(new_tokens, block.source, block.begin, layout)
            merge(blocks.at[block.sequence, block.slot], words, block.begin, block.end, layout)
        for copy in step.copies_out(refs, block):
            copy.start()

    def wait_for_copies_out(refs: ArrayRefs, block: TargetBlock) -> None:
        for copy in step.copies_out(refs, block):
            copy.wait()

    new_token_copies = [copy for refs in arrays for copy in step.new_token_copies(refs)]
    for copy in new_token_copies:
        copy.start()
    step.for_each_sequence(arrays, functools.partial(copy_in, wait=False))
    for copy in new_token_copies:
        copy.wait()
    step.for_each_sequence(arrays, functools.partial(copy_in, wait=True), merge_and_copy_out)
    step.for_each_sequence(arrays, wait_for_copies_out)
