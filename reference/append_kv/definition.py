"""Writing new tokens into a KV cache: the definition.

Every sequence's new tokens end at its new length: token i of q_len goes to position lengths - q_len + i. A token is
not written where its position is below 0 (padding in front of a short prompt) or max_len and more, where it is not one
of the last `new_tokens`, or where its page or its layer does not exist.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from palladion.reference.caches import KVCache, quantize_kv


def append_kv(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> KVCache:
    """Writes the newest tokens of each sequence; `palladion.reference.append_kv` documents the arguments."""
    return write(cache, quantize_tokens(cache, k, v), lengths, new_tokens, layer)


def quantize_tokens(cache: KVCache, k: jax.Array, v: jax.Array) -> KVCache:
    """Returns new keys and values `[batch, q_len, kv_heads, head_dim]` as the cache stores them, with their scales."""
    (k, k_scale), (v, v_scale) = quantize_kv(k, cache.k.dtype), quantize_kv(v, cache.v.dtype)
    return KVCache(k, v, k_scale, v_scale)


def write(
    cache: KVCache,
    tokens: KVCache,
    lengths: jax.Array,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> KVCache:
    """Scatters tokens in the dtypes of the cache, `[batch, q_len, kv_heads, ...]`, to their positions."""
    batch, q_len = tokens.k.shape[:2]
    page_table, rows = cache.page_table, cache.k.shape[-2]
    token = jnp.arange(q_len, dtype=jnp.int32)
    # Beyond these bounds nothing is written either; within them no position overflows.
    lengths = jnp.clip(lengths, 0, cache.max_len + q_len)
    position = lengths[:, None] - q_len + token  # [batch, q_len]
    written = (position >= 0) & (position < cache.max_len)
    if new_tokens is not None:
        written &= token >= q_len - jnp.clip(new_tokens, 0, q_len)[:, None]
    if layer is not None:
        written &= (layer >= 0) & (layer < cache.k.shape[0])
    if page_table is None:
        slab = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], position.shape)
        row = position
    else:
        page = jnp.clip(position // rows, 0, page_table.shape[1] - 1)
        slab = jnp.take_along_axis(page_table, page, axis=1)
        written &= (slab >= 0) & (slab < cache.k.shape[-4])
        row = position % rows
    # The scatter drops indices past the end: tokens that must not be written go there.
    row = jnp.where(written, row, rows)

    def scatter(part: jax.Array, new: jax.Array) -> jax.Array:
        index = (slab, slice(None), row) if layer is None else (layer, slab, slice(None), row)
        return part.at[index].set(new, mode="drop", unique_indices=True)

    updated = jax.tree.map(scatter, dataclasses.replace(cache, page_table=None), tokens)
    return dataclasses.replace(updated, page_table=page_table)
