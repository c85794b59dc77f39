"""Writing new tokens into a KV cache: the definition.

Every sequence's new tokens end at its new length: token i of q_len goes to position lengths - q_len + i. A token is
not written where its position is below 0 (padding in front of a short prompt) or max_len and more, where it is not one
of the last `new_tokens`, or where its page or its layer does not exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from palladion.reference.bits import from_bits, to_bits
from palladion.reference.caches import KVCache, quantize_kv


def append_kv(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> KVCache:
    """Writes the newest tokens of each sequence; see `palladion.append_kv` for the contract (inputs are valid here).

    Args:
      cache: dense or paged.
      k: `[batch, q_len, kv_heads, head_dim]`.
      v: like k.
      lengths: int32 `[batch]`, tokens in the cache once this call is done.
      new_tokens: int32 `[batch]`, how many of the q_len tokens are real, the last ones; None means all.
      layer: int32 scalar, which entry of caches with a leading `[num_layers]` is meant, or None where they have none.
    """
    batch, q_len = k.shape[:2]
    # Beyond these bounds nothing is written either; within them no position overflows.
    lengths = jnp.clip(lengths, 0, cache.max_len + q_len)
    if new_tokens is None and cache.page_table is None and batch == 1 and q_len == 1:
        return _append_one(cache, k, v, lengths, layer)
    token = jnp.arange(q_len, dtype=jnp.int32)
    position = lengths[:, None] - q_len + token  # [batch, q_len]
    written = (position >= 0) & (position < cache.max_len)
    if new_tokens is not None:
        written &= token >= q_len - jnp.clip(new_tokens, 0, q_len)[:, None]
    if layer is not None:
        written &= (layer >= 0) & (layer < cache.k.shape[0])
    rows = cache.k.shape[-2]
    if cache.page_table is None:
        slab = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], position.shape)
        row = position
    else:
        page = jnp.clip(position // rows, 0, cache.page_table.shape[1] - 1)
        slab = jnp.take_along_axis(cache.page_table, page, axis=1)
        written &= (slab >= 0) & (slab < cache.k.shape[-4])
        row = position % rows
    # An index past the end is dropped by the scatter: what must not be written is sent there.
    row = jnp.where(written, row, rows)

    def write(target: jax.Array, new: jax.Array) -> jax.Array:
        place = (slab, slice(None), row) if layer is None else (layer, slab, slice(None), row)
        return target.at[place].set(new, mode="drop", unique_indices=True)

    return _write_all(cache, k, v, write)


def _append_one(cache: KVCache, k: jax.Array, v: jax.Array, lengths: jax.Array, layer: jax.Array | None) -> KVCache:
    """One token of one sequence: a slice update, which XLA does in place without the loop of a scatter."""
    position = lengths[0] - 1
    row = jnp.clip(position, 0, cache.max_len - 1)
    written = position == row
    if layer is not None:
        written &= (layer >= 0) & (layer < cache.k.shape[0])

    def write(target: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.swapaxes(new, 1, 2)  # [1, kv_heads, 1, ...] as the cache has it
        start = (0, 0, row) + (0,) * (new.ndim - 3)
        if layer is not None:
            new, start = new[None], (layer, *start)
        old = jax.lax.dynamic_slice(target, start, new.shape)
        return jax.lax.dynamic_update_slice(target, jnp.where(written, new, old), start)

    return _write_all(cache, k, v, write)


def _write_all(
    cache: KVCache, k: jax.Array, v: jax.Array, write: Callable[[jax.Array, jax.Array], jax.Array]
) -> KVCache:
    """Quantizes new keys and values as the cache needs them and writes all of its parts."""

    def write_bits(target: jax.Array, new: jax.Array) -> jax.Array:
        return from_bits(write(to_bits(target), to_bits(new)), target)

    k, k_scale = quantize_kv(k, cache.k.dtype)
    v, v_scale = quantize_kv(v, cache.v.dtype)
    return dataclasses.replace(
        cache,
        k=write_bits(cache.k, k),
        v=write_bits(cache.v, v),
        k_scale=None if k_scale is None or cache.k_scale is None else write_bits(cache.k_scale, k_scale),
        v_scale=None if v_scale is None or cache.v_scale is None else write_bits(cache.v_scale, v_scale),
    )
