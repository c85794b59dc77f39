"""Attention over a KV cache in blocks, with an online softmax.

The loop runs from the first block that any sequence's window reaches to the last that any sequence fills: a step costs
what the longest sequence has, not what the cache has room for. Source: Milakov & Gimelshein, arXiv 1805.02867.

    m_next = max(m_prev, max_t s_t)         p_t = exp(s_t - m_next)         alpha = exp(m_prev - m_next)
    l_next = alpha * l_prev + sum_t p_t     acc_next = alpha * acc_prev + sum_t p_t * v_scale_t * v_t
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.reference.bits import from_bits, to_bits
from palladion.reference.caches import KVCache
from palladion.reference.decode_attention.definition import dot, join_pages, visible_range, zero_unseen
from palladion.reference.varying import vary_over, varying_axes

BLOCK: Final = 128
"""Cached tokens that one iteration of the loop reads, where nothing else is asked for."""

Attend = Callable[
    [jax.Array, KVCache, jax.Array, jax.Array | None, jax.Array | None],
    tuple[jax.Array, jax.Array],
]
"""Computes out and lse from q, cache, lengths, sinks and layer."""

Weigh = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Sums values `[batch, kv_heads, tokens, head_dim]` by weights `[batch, kv_heads, rows, tokens]`, in float32.

The third argument, bool `[batch, tokens]`, says which tokens are seen; the values of the others may be NaN, their
weights are 0.
"""


class _State(NamedTuple):
    """Online softmax of the blocks read so far; rows are the queries that share a KV head.

    Attributes:
      m: `[batch, kv_heads, rows]`, the maximum logit.
      l: `[batch, kv_heads, rows]`, the sum of exponentials.
      acc: `[batch, kv_heads, rows, head_dim]`, the weighted values, not normalized.
    """

    m: jax.Array
    l: jax.Array  # noqa: E741
    acc: jax.Array


class _Options(NamedTuple):
    """Parts of the formula that all blocks share; see `decode_attention`."""

    scale: float
    logits_soft_cap: float | None
    operands: Any
    weigh: Weigh


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
    block: int = BLOCK,
    operands: Any = jnp.float32,
    weigh: Weigh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends block by block; `palladion.reference.decode_attention` documents the other arguments.

    Args:
      block: about as many tokens are read at a time.
      operands: dtype to which queries, keys, weights and values are converted before they are multiplied.
      weigh: sums values; None means one product with values that are 0 where they are not seen.
    """
    batch, q_len, q_heads, head_dim = q.shape
    kv_heads, max_len = cache.k.shape[-3], cache.max_len
    group = q_heads // kv_heads
    block = _block_size(cache, block)
    lengths = jnp.clip(lengths, 0, max_len)
    if cache.page_table is not None:
        cache = dataclasses.replace(cache, page_table=jnp.clip(cache.page_table, 0, cache.k.shape[-4] - 1))

    # [batch, q_len, kv_heads, group, head_dim] -> [batch, kv_heads, rows, head_dim]
    queries = jnp.moveaxis(q.reshape(batch, q_len, kv_heads, group, head_dim), 1, 2)
    queries = queries.reshape(batch, kv_heads, q_len * group, head_dim).astype(operands)
    options = _Options(scale, logits_soft_cap, operands, weigh or weigh_zeroed)

    def step(index: jax.Array, state: _State) -> _State:
        # The last block starts early enough to be whole; tokens that an earlier block has read are masked.
        start = jnp.minimum(index * block, max_len - block)
        position = start + jnp.arange(block, dtype=jnp.int32)
        visible = visible_range(lengths, q_len, position, sliding_window) & (position >= index * block)

        def read(part: jax.Array) -> jax.Array:
            return _read_block(part, cache.page_table, layer, start, block)

        return _update(state, queries, cache, read, visible, options)

    state = vary_over(_initial(queries, sinks, q_len), varying_axes((q, cache, lengths, sinks, layer)))
    if block == max_len:
        state = step(jnp.int32(0), state)
    else:
        last = (jnp.max(lengths) + block - 1) // block
        first = jnp.int32(0)
        if sliding_window is not None:
            first = jnp.maximum(jnp.min(lengths) - q_len - sliding_window + 1, 0) // block
        state = jax.lax.fori_loop(first, last, step, state)

    out = state.acc / jnp.where(state.l == 0, 1.0, state.l)[..., None]
    lse = state.m + jnp.log(state.l)
    out = jnp.moveaxis(out.reshape(batch, kv_heads, q_len, group, head_dim), 2, 1)
    lse = jnp.moveaxis(lse.reshape(batch, kv_heads, q_len, group), 2, 1)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, q_len, q_heads)


def one_by_one(
    attend: Attend,
    q: jax.Array,
    cache: KVCache,
    lengths: jax.Array,
    sinks: jax.Array | None,
    layer: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to each sequence by itself, so that the others cannot change its bits; its dense cache is copied."""

    def attend_to(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        def own(array: jax.Array, axis: int = 0) -> jax.Array:
            return from_bits(jax.lax.dynamic_slice_in_dim(to_bits(array), b, 1, axis), array)

        if cache.page_table is None:
            own_cache = jax.tree.map(lambda part: own(part, 0 if layer is None else 1), cache)
        else:
            own_cache = dataclasses.replace(cache, page_table=own(cache.page_table))
        out, lse = attend(own(q), own_cache, own(lengths), sinks, layer)
        return out[0], lse[0]

    out, lse = jax.lax.map(attend_to, jnp.arange(q.shape[0], dtype=jnp.int32))
    return out, lse


def _block_size(cache: KVCache, block: int) -> int:
    """Returns the tokens of a block: `block`, or whole pages, and no more than the cache has."""
    if cache.page_table is None:
        return min(block, cache.max_len)
    page_size = cache.k.shape[-2]
    return page_size * max(1, min(block, cache.max_len) // page_size)


def _read_block(
    part: jax.Array, page_table: jax.Array | None, layer: jax.Array | None, start: jax.Array, block: int
) -> jax.Array:
    """Reads `block` tokens from position `start` on, of one layer: `[batch, kv_heads, block, ...]`."""
    bits = to_bits(part)
    layers, index = (bits[None], 0) if layer is None else (bits, layer)
    rest = layers.shape[4:]  # head_dim, or nothing for scales
    if page_table is None:
        sizes = (1, *layers.shape[1:3], block, *rest)
        tokens = jax.lax.dynamic_slice(layers, (index, 0, 0, start) + (0,) * len(rest), sizes)[0]
    else:
        page_size = layers.shape[3]
        pages = jax.lax.dynamic_slice_in_dim(page_table, start // page_size, block // page_size, axis=1)
        tokens = join_pages(layers[index, pages])
    return from_bits(tokens, part)


def _initial(queries: jax.Array, sinks: jax.Array | None, q_len: int) -> _State:
    """Returns the state before the first block: empty, or a sink, which is a logit without a value."""
    shape = queries.shape[:3]
    if sinks is None:
        return _State(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(queries.shape))
    sink = jnp.tile(sinks.astype(jnp.float32).reshape(shape[1], -1), q_len)
    return _State(jnp.broadcast_to(sink, shape), jnp.ones(shape), jnp.zeros(queries.shape))


def weigh_zeroed(weights: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """Sums values by weights in one product; see `Weigh`."""
    numbers = values.astype(weights.dtype)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        # Tokens that no query sees may hold anything, NaN included, and 0 * NaN is NaN.
        numbers = zero_unseen(numbers, seen)
    return dot("bhrt,bhtd->bhrd", weights, numbers)


def _update(
    state: _State,
    queries: jax.Array,
    cache: KVCache,
    read: Callable[[jax.Array], jax.Array],
    visible: jax.Array,
    options: _Options,
) -> _State:
    """Adds a block of tokens to the online softmax.

    Args:
      state: the blocks before.
      queries: `[batch, kv_heads, rows, head_dim]`.
      cache: keys, values and their scales.
      read: returns the block's tokens of one of these arrays, `[batch, kv_heads, block, ...]`.
      visible: bool `[batch, q_len, block]`.
      options: how logits and values are multiplied.
    """
    m_prev, l_prev, acc_prev = state
    logits = options.scale * dot("bhrd,bhtd->bhrt", queries, read(cache.k).astype(options.operands))
    if cache.k_scale is not None:
        logits = logits * read(cache.k_scale)[:, :, None]
    if options.logits_soft_cap is not None:
        logits = options.logits_soft_cap * jnp.tanh(logits / options.logits_soft_cap)
    group = queries.shape[2] // visible.shape[1]
    logits = jnp.where(jnp.repeat(visible, group, axis=1)[:, None], logits, -jnp.inf)
    m_next = jnp.maximum(m_prev, jnp.max(logits, axis=-1))
    # Before the first visible token the maximum is -inf, and -inf - -inf is NaN.
    shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)
    p = jnp.exp(logits - shift[..., None])
    alpha = jnp.exp(m_prev - shift)
    l_next = l_prev * alpha + jnp.sum(p, axis=-1)
    seen = jnp.any(visible, axis=1)
    if cache.v_scale is not None:
        p = p * zero_unseen(read(cache.v_scale), seen)[:, :, None]
    acc_next = acc_prev * alpha[..., None] + options.weigh(p.astype(options.operands), read(cache.v), seen)
    return _State(m_next, l_next, acc_next)
