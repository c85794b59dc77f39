"""The cached tokens that a block of queries sees, as ranges and as masks inside the TPU kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from palladion.kernels.integers import divide
from palladion.kernels.types import Scalar


@dataclasses.dataclass(frozen=True)
class VisibleRange:
    """Computes which tokens, KV blocks and chunks the queries of a block see.

    A range is the first index and the one after the last, but for `queries` and `tokens`, which include the last.

    Attributes:
      max_len: tokens that a sequence has room for; lengths outside 0 to max_len are clamped.
      q_len: new tokens of a sequence.
      block_q: new tokens in a query block.
      q_blocks: query blocks.
      block_kv: cached tokens in a KV block.
      chunk: tokens of a KV block that are transferred at a time.
      window: tokens that a query sees, or None.
    """

    max_len: int
    q_len: int
    block_q: int
    q_blocks: int
    block_kv: int
    chunk: int
    window: int | None

    def queries(self, length: Scalar, q_block: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the positions of the first and the last query of a block; negative positions are padding."""
        length = jnp.clip(length, 0, self.max_len)
        first = length - self.q_len + q_block * self.block_q
        return first, jnp.minimum(first + self.block_q, length) - 1

    def tokens(self, length: Scalar, q_block: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the first and the last visible token; the last is negative where nothing is visible."""
        first_query, last_query = self.queries(length, q_block)
        return (0 if self.window is None else jnp.maximum(first_query - self.window + 1, 0)), last_query

    def blocks(self, length: Scalar, q_block: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the range of visible KV blocks, which may be empty."""
        first, last = self.tokens(length, q_block)
        return divide(first, self.block_kv), divide(last + self.block_kv, self.block_kv)

    def chunks(self, length: Scalar, q_block: Scalar, block: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the range of visible chunks in a KV block."""
        first, last = (token - block * self.block_kv for token in self.tokens(length, q_block))
        first = 0 if self.window is None else divide(jnp.maximum(first, 0), self.chunk)
        return first, divide(jnp.minimum(last, self.block_kv - 1) + self.chunk, self.chunk)

    @property
    def chunks_per_block(self) -> int:
        """Chunks in a KV block."""
        return self.block_kv // self.chunk


@dataclasses.dataclass(frozen=True)
class Masks:
    """Masks of the KV blocks of a step, one block for each sequence of a batch block.

    Attributes:
      visible: the visible ranges.
      queries: positions of the first and the last query of each sequence.
      starts: the first token of each sequence's KV block.
      rows_per_head: rows of one KV head in a head block, block_q * group.
      group: query heads that share a KV head.
    """

    visible: VisibleRange
    queries: list[tuple[Scalar, Scalar]]
    starts: list[Scalar]
    rows_per_head: int
    group: int

    def all_visible(self) -> Scalar:
        """Returns whether every query sees the whole of its KV block, so that no mask is needed."""

        def one(start: Scalar, queries: tuple[Scalar, Scalar]) -> Scalar:
            first_query, last_query = queries
            inner = start + self.visible.block_kv - 1 <= first_query
            window = self.visible.window
            return inner if window is None else inner & (start > last_query - window)

        return functools.reduce(jnp.logical_and, map(one, self.starts, self.queries))

    def for_logits(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns which tokens each query sees, for logits `[block_batch * head_blocks, rows, block_kv]`."""

        def one(shape: tuple[int, ...], start: Scalar, first_query: Scalar, last_query: Scalar) -> jax.Array:
            token = start + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
            query = first_query
            if self.visible.block_q > 1:
                query += jax.lax.broadcasted_iota(jnp.int32, shape, 1) % self.rows_per_head // self.group
            mask = token <= jnp.minimum(query, last_query)
            return mask if self.visible.window is None else mask & (token > query - self.visible.window)

        return self._concatenate(one, shape)

    def for_values(self, shape: tuple[int, ...], token_axis: int) -> jax.Array:
        """Returns which tokens any query sees, for values whose tokens lie along `token_axis`."""

        def one(shape: tuple[int, ...], start: Scalar, first_query: Scalar, last_query: Scalar) -> jax.Array:
            token = start + jax.lax.broadcasted_iota(jnp.int32, shape, token_axis)
            mask = token <= last_query
            return mask if self.visible.window is None else mask & (token > first_query - self.visible.window)

        return self._concatenate(one, shape)

    def _concatenate(self, mask: Callable[..., jax.Array], shape: tuple[int, ...]) -> jax.Array:
        """Returns the masks of all sequences, concatenated along the first axis."""
        shape = (shape[0] // len(self.starts), *shape[1:])
        masks = [mask(shape, start, *queries) for start, queries in zip(self.starts, self.queries, strict=True)]
        return masks[0] if len(masks) == 1 else jnp.concatenate(masks)
