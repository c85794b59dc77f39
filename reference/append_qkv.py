"""The steps between a joined qkv projection and attention: the definition.

Queries and keys are rotated by their positions; keys and values are written into the cache.
"""

from __future__ import annotations

import jax

from palladion.reference.append_kv import append_kv
from palladion.reference.caches import KVCache
from palladion.reference.rotary import rotate


def split_qkv(
    qkv: jax.Array, cosine: jax.Array, sine: jax.Array, kv_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits joined heads into rotated queries, rotated keys, and values.

    Args:
      qkv: `[batch, q_len, q_heads + 2 * kv_heads, head_dim]`: queries, then keys, then values.
      cosine: float32 `[batch, q_len, rotary_dim / 2]`.
      sine: like cosine.
      kv_heads: key/value heads.
    """
    q_heads = qkv.shape[2] - 2 * kv_heads
    rotated = rotate(qkv[:, :, : q_heads + kv_heads], cosine, sine)
    return rotated[:, :, :q_heads], rotated[:, :, q_heads:], qkv[:, :, q_heads + kv_heads :]


def append_qkv(
    cache: KVCache,
    qkv: jax.Array,
    lengths: jax.Array,
    cosine: jax.Array,
    sine: jax.Array,
    *,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Rotates queries and keys, writes keys and values; see `palladion.append_qkv` for the contract (inputs are valid).

    Args:
      cache: dense or paged.
      qkv: `[batch, q_len, q_heads + 2 * kv_heads, head_dim]`.
      lengths: int32 `[batch]`.
      cosine: float32 `[batch, q_len, rotary_dim / 2]`.
      sine: like cosine.
      new_tokens: int32 `[batch]` or None.
      layer: int32 scalar or None.

    Returns:
      The queries `[batch, q_len, q_heads, head_dim]`, and the cache.
    """
    q, k, v = split_qkv(qkv, cosine, sine, cache.k.shape[-3])
    return q, append_kv(cache, k, v, lengths, new_tokens=new_tokens, layer=layer)
