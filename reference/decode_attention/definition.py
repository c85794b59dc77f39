"""Attention of the newest tokens over a KV cache: the definition.

Query i of q_len stands at position p = lengths - q_len + i. Over every cached token t that it sees
(t <= p, and t > p - sliding_window where there is a window):

    s_t = softcap(scale * k_scale_t * (q_i . k_t))        softcap(s) = c * tanh(s / c)
    out_i = sum_t exp(s_t) * v_scale_t * v_t / Z          Z = sum_t exp(s_t) + exp(sink)
    lse_i = log Z

A length below 0 counts as 0 and one above max_len as max_len; a page that does not exist is read as the nearest that
does. Tokens that no query sees may hold anything, NaN included.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from palladion.reference.caches import QUANTIZED_CACHE_DTYPES, KVCache


def decode_attention(
    q: jax.Array,
    cache: KVCache,
    lengths: jax.Array,
    sinks: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    scale: float,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends over the whole cache at once; `palladion.reference.decode_attention` documents the arguments."""
    batch, q_len, q_heads, head_dim = q.shape
    cache = _gather(cache, layer)
    kv_heads, max_len = cache.k.shape[1:3]
    position = jnp.arange(max_len, dtype=jnp.int32)
    visible = visible_range(jnp.clip(lengths, 0, max_len), q_len, position, sliding_window)  # [batch, q_len, max_len]

    # What takes part in nothing is 0: it may be NaN, and 0 * NaN is NaN, here and in the derivatives.
    q = jnp.where(jnp.any(visible, axis=2)[..., None, None], q, 0)
    cache = jax.tree.map(lambda part: zero_unseen(part, jnp.any(visible, axis=1)), cache)

    queries = q.astype(jnp.float32).reshape(batch, q_len, kv_heads, -1, head_dim)
    logits = scale * dot("bqhgd,bhtd->bhgqt", queries, cache.k)
    if cache.k_scale is not None:
        logits = logits * cache.k_scale[:, :, None, None]
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    # A sink is a logit without a value.
    sink = jnp.full((kv_heads, 1, 1), -jnp.inf) if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, -1, 1)

    maximum = jnp.maximum(jnp.max(logits, axis=-1), sink)  # [batch, kv_heads, group, q_len]
    # A query that sees nothing has a maximum of -inf, and -inf - -inf is NaN.
    maximum = jax.lax.stop_gradient(jnp.where(maximum == -jnp.inf, 0.0, maximum))
    weights = jnp.exp(logits - maximum[..., None])
    total = jnp.sum(weights, axis=-1) + jnp.exp(sink - maximum)
    nonzero = jnp.where(total == 0, 1.0, total)
    lse = jnp.where(total == 0, -jnp.inf, maximum + jnp.log(nonzero))
    weights = weights / nonzero[..., None]
    if cache.v_scale is not None:
        weights = weights * cache.v_scale[:, :, None, None]
    out = dot("bhgqt,bhtd->bqhgd", weights, cache.v)
    return out.reshape(q.shape).astype(q.dtype), jnp.moveaxis(lse, 3, 1).reshape(batch, q_len, q_heads)


def _gather(cache: KVCache, layer: jax.Array | None) -> KVCache:
    """Returns one layer of a cache in float32, dense: pages are joined."""

    def gather(part: jax.Array) -> jax.Array:
        if layer is not None:
            part = jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
        if cache.page_table is not None:
            pages = part[jnp.clip(cache.page_table, 0, len(part) - 1)]  # [batch, pages, kv_heads, page_size, ...]
            part = join_pages(pages)
        # Codes are constants to differentiation, their scales are not.
        part = jax.lax.stop_gradient(part) if part.dtype.name in QUANTIZED_CACHE_DTYPES else part
        return part.astype(jnp.float32)

    return jax.tree.map(gather, dataclasses.replace(cache, page_table=None))


def join_pages(pages: jax.Array) -> jax.Array:
    """Returns pages `[batch, pages, kv_heads, page_size, ...]` as `[batch, kv_heads, pages * page_size, ...]`."""
    batch, count, kv_heads, page_size, *rest = pages.shape
    return jnp.moveaxis(pages, 1, 2).reshape(batch, kv_heads, count * page_size, *rest)


def visible_range(lengths: jax.Array, q_len: int, position: jax.Array, sliding_window: int | None) -> jax.Array:
    """Returns whether each query sees the token at each `position` `[tokens]`: bool `[batch, q_len, tokens]`."""
    query_position = (lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32))[..., None]
    visible = position <= query_position
    return visible if sliding_window is None else visible & (position > query_position - sliding_window)


def zero_unseen(part: jax.Array, seen: jax.Array) -> jax.Array:
    """Zeroes the tokens of `[batch, kv_heads, tokens, ...]` where `seen` `[batch, tokens]` is False."""
    return jnp.where(seen.reshape(seen.shape[0], 1, -1, *(1,) * (part.ndim - 3)), part, 0.0)


def dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns an einsum of float32 operands in full precision: a TPU's default for them is bfloat16."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def merge_partials(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges attention over disjoint parts of a cache into attention over all of it, exactly up to rounding.

    Args:
      outs: `[parts, ..., head_dim]`, the outputs over each part.
      lses: float32 `[parts, ...]`, their log-sum-exps; -inf where a part is empty. A sink counts in one part only.

    Returns:
      out `[..., head_dim]` in the dtype of `outs`, and lse float32 `[...]`.
    """
    maximum = jnp.max(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(maximum == -jnp.inf, 0.0, maximum))
    total = jnp.sum(weights, axis=0)
    out = jnp.sum(weights[..., None] * outs.astype(jnp.float32), axis=0)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return out.astype(outs.dtype), maximum + jnp.log(total)
