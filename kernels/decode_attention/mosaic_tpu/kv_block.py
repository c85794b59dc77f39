"""KV blocks of the TPU kernel: their location in HBM and in the ring, and their form as operands of the MXU."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.decode_attention.mosaic_tpu.products import as_operand, from_words
from palladion.kernels.decode_attention.mosaic_tpu.refs import Operands, Scalars, Scratch
from palladion.kernels.decode_attention.mosaic_tpu.ring import RingArray
from palladion.kernels.decode_attention.mosaic_tpu.tiling import Tiling
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.integers import divide
from palladion.kernels.types import Ref, Scalar

HeadBlocks = Any
"""Which head blocks are processed: `slice(None)`, all of them, or `pl.ds(n, 1)`."""


@dataclasses.dataclass(frozen=True)
class CacheSource:
    """The cache in HBM, as a source of KV blocks.

    Attributes:
      problem: the call.
      tiling: the static layout.
      chunk: tokens that are transferred at a time.
      scalars: layer and page table.
      operands: the cache.
      first_head: the first KV head of this core.
    """

    problem: Problem
    tiling: Tiling
    chunk: int
    scalars: Scalars
    operands: Operands
    first_head: Scalar

    def ring_arrays(self, scratch: Scratch) -> tuple[RingArray, ...]:
        """Returns the arrays of a KV block: keys, values and, where the cache has them, their scales."""
        cache, semaphores = self.operands, scratch.semaphores
        arrays = [
            self._keys_or_values(cache.k, scratch.k_ring, semaphores.at[0]),
            self._keys_or_values(cache.v, scratch.v_ring, semaphores.at[1]),
        ]
        if self.problem.has_scales:
            arrays += [
                self._scales(cache.k_scale, scratch.k_scale_ring, semaphores.at[2]),
                self._scales(cache.v_scale, scratch.v_scale_ring, semaphores.at[3]),
            ]
        return tuple(arrays)

    def _keys_or_values(self, cache: Any, ring: Ref, semaphores: Ref) -> RingArray:
        heads = pl.ds(self.first_head, self.tiling.core_heads)

        def last_axes(token: Scalar, tokens: int) -> tuple[Any, Any]:
            window = pl.ds(token, tokens)
            return (slice(None), window) if self.tiling.tokens_last else (window, slice(None))

        def source(b: Scalar, token: Scalar, tokens: int) -> Any:
            slab, start = self._locate(b, token)
            return cache.at[self.scalars.layer[0], slab, heads, *last_axes(start, tokens)]

        def destination(slot: Scalar, sequence: int, token: Scalar, tokens: int) -> Any:
            return ring.at[slot, sequence, :, *last_axes(token, tokens)]

        return RingArray(source, destination, semaphores)

    def _scales(self, scales: Any, ring: Ref, semaphores: Ref) -> RingArray:
        # Heads lie along the sublanes, which a transfer cannot divide: every core takes all of them.
        gathered = self.tiling.scales_gathered

        def source(b: Scalar, token: Scalar, tokens: int) -> Any:
            layer, (slab, start) = (0, (b, token)) if gathered else (self.scalars.layer[0], self._locate(b, token))
            return scales.at[layer, slab, :, pl.ds(start, tokens)]

        def destination(slot: Scalar, sequence: int, token: Scalar, tokens: int) -> Any:
            return ring.at[slot, sequence, :, pl.ds(token, tokens)]

        return RingArray(source, destination, semaphores, chunked=not gathered)

    def _locate(self, b: Scalar, token: Scalar) -> tuple[Scalar, Scalar]:
        """Returns where a chunk begins in the cache: a sequence and a token, or a page and its first token."""
        if self.scalars.page_table is None:
            return b, pl.multiple_of(cast(jax.Array, token), self.chunk)
        page = self.scalars.page_table[b * (self.problem.max_len // self.chunk) + divide(token, self.chunk)]
        # A page that does not exist is read as the last or the first one, as in the reference.
        return jnp.clip(page, 0, self.operands.k.shape[1] - 1), 0


class KVBlock(NamedTuple):
    """References to one slot of the rings: a KV block of each sequence of the batch block.

    Attributes:
      k: `[block_batch, heads, block_kv, head_dim]`, or with the last two axes swapped.
      v: like k.
      k_scale: `[block_batch, kv_heads, block_kv]`, or None.
      v_scale: like k_scale.
    """

    k: Ref
    v: Ref
    k_scale: Ref
    v_scale: Ref

    @classmethod
    def in_slot(cls, scratch: Scratch, slot: Scalar) -> KVBlock:
        """Returns the KV block in a slot of the rings."""
        rings = (scratch.k_ring, scratch.v_ring, scratch.k_scale_ring, scratch.v_scale_ring)
        return cls(*(None if ring is None else ring.at[slot] for ring in rings))


@dataclasses.dataclass(frozen=True)
class BlockReader:
    """Reads KV blocks from VMEM in the form in which they are multiplied.

    Attributes:
      problem: the call.
      tiling: the static layout.
      words: scratch memory of `from_words`, or None.
      first_head: the first KV head of this core.
      row_head: int32 `[1, rows, 1]`, which head of its head block each row belongs to.
    """

    problem: Problem
    tiling: Tiling
    words: Any
    first_head: Scalar
    row_head: jax.Array

    def operand(self, ref: Ref, head_blocks: HeadBlocks) -> jax.Array:
        """Returns keys or values as operands, `[n, block_kv, width]` or with the last two axes swapped."""
        array = ref[:, self._heads(head_blocks)]
        array = array.reshape(-1, *array.shape[2:])
        if self.words is not None:
            return self._join_heads(from_words(array, self.words))
        return as_operand(self._join_heads(array), jnp.dtype(self.problem.q_dtype), self.tiling.operands)

    def scale(self, ref: Ref, head_blocks: HeadBlocks) -> jax.Array:
        """Returns the scales of each row's head, `[n, rows or 1, block_kv]`."""
        scales = ref[:, self._heads(head_blocks)]
        # A core takes the scales of all heads: the ones of its own begin at `first_head`, a multiple of its heads.
        core_heads = self.tiling.core_heads
        for other in range(core_heads, self.problem.kv_heads, core_heads):
            scales = jnp.where(self.first_head == other, ref[:, self._heads(head_blocks, other)], scales)
        by_block = scales.reshape(-1, self.tiling.block_heads, scales.shape[2])
        scale = by_block[:, :1]
        for head in range(1, self.tiling.block_heads):
            scale = jnp.where(self.row_head == head, by_block[:, head : head + 1], scale)
        return scale

    def _heads(self, head_blocks: HeadBlocks, first: int = 0) -> Any:
        """Returns the KV heads of head blocks as an index, counted from `first`."""
        if isinstance(head_blocks, slice):
            return pl.ds(first, self.tiling.core_heads)
        return pl.ds(first + head_blocks.start * self.tiling.block_heads, self.tiling.block_heads)

    def _join_heads(self, array: jax.Array) -> jax.Array:
        """Lays the heads of each head block side by side along head_dim; no register changes."""
        heads = self.tiling.block_heads
        if heads == 1:
            return array
        if self.tiling.tokens_last:
            return array.reshape(-1, heads * array.shape[1], array.shape[2])
        by_block = array.reshape(-1, heads, *array.shape[1:])
        return jnp.concatenate([by_block[:, n] for n in range(heads)], axis=2)
