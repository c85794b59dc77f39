"""Attention over a KV cache in a few large operations, for XLA on a GPU.

Every operation is a launch of one microsecond or more, and a loop waits on the host for its condition: in blocks of 128
tokens, 8192 take 2.2 ms where their bytes take 8 us. So all tokens are one block of `blocked.py`, about ten launches:

    s = q k^T          a product, batched over sequences and heads
    p = exp(s - m)     two reductions, with which scales, soft cap and mask are fused
    o = p v            a product, batched over chunks of tokens too: the heads of one sequence would be few programs

The cost follows max_len, or the window where that is much shorter. It is bound by the bytes of the cache, each of which
is read once: products convert codes to bfloat16, or narrow floats to float32, as they read them (float8 from sm_90 on;
before, XLA writes a copy). A 16-bit cache is multiplied by 16-bit queries, whose products are exact in float32, and by
weights that are rounded to 16 bits.

Tokens that no query sees may be NaN, and 0 * NaN is NaN. XLA fuses a conversion into a product, but no selection: it
would write a copy of v. So chunks of tokens are summed separately, and a chunk's sum counts only if all of its tokens
are seen. Chunks that are seen in part, where the visible range begins and ends, are copied without their other tokens
and summed by products of their own.

XLA copies what it cannot multiply in place: pages, windows, and one layer of a stack. Where such copies and the logits
take more than `MOST_BYTES`, for prompts and long caches in pages, a loop reads blocks of as many tokens as take that,
from the first that any sequence sees to the last.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from palladion.reference.caches import QUANTIZED_CACHE_DTYPES, KVCache
from palladion.reference.decode_attention import blocked
from palladion.reference.decode_attention.definition import dot, join_pages

CHUNK: Final = 512
"""Most tokens of a chunk, whose values are summed by a product of its own."""

FEWEST: Final = 128
"""Fewest tokens of a chunk; shorter ones would write as many bytes of sums as they read of values."""

MOST_BYTES: Final = 2**29
"""Most bytes of copies, logits and weights of a block; a GPU moves them in several times what a loop's wait takes."""

COPYING: Final = 3
"""Times that a token moves where it is copied before it is multiplied."""


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
    """Attends to all tokens at once, or to large blocks; `palladion.reference.decode_attention` has the arguments."""
    batch, q_len, q_heads, head_dim = q.shape
    kv_heads, max_len = cache.k.shape[-3], cache.max_len
    lengths = jnp.clip(lengths, 0, max_len)
    low = None
    copied = cache.page_table is not None or layer is not None
    token_bytes = 8 * batch * q_len * q_heads  # of logits and weights
    if copied:
        token_bytes += 2 * batch * kv_heads * head_dim * cache.k.dtype.itemsize
    block = FEWEST if is_symbolic_dim(token_bytes) else max(MOST_BYTES // token_bytes, FEWEST)
    if sliding_window is not None:
        span = sliding_window + q_len - 1
        low = jnp.maximum(lengths - span, 0)
        if COPYING * span <= max_len:
            copied = True
            cache, start = _copy_window(cache, layer, low, span)
            lengths, layer = lengths - start, None
    return blocked.decode_attention(
        q,
        cache,
        lengths,
        sinks,
        layer,
        scale=scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        block=block,
        operands=_operands(q.dtype, cache.k.dtype),
        weigh=None if copied or block < max_len else functools.partial(_weigh_in_place, low=low, high=lengths),
    )


def _operands(q_dtype: Any, cache_dtype: Any) -> Any:
    """Returns the dtype of both products' operands; only weights are rounded to it, all else is exact."""
    if jnp.dtype(cache_dtype).name in QUANTIZED_CACHE_DTYPES:
        # Every code is a bfloat16. A weight times the scale of a value may be too small for a float16.
        return jnp.bfloat16 if q_dtype == jnp.bfloat16 else jnp.float32
    return q_dtype if q_dtype == cache_dtype else jnp.float32


def _copy_window(cache: KVCache, layer: jax.Array | None, low: jax.Array, span: int) -> tuple[KVCache, jax.Array]:
    """Copies `span` tokens of each sequence, from `low` on, or whole pages that hold them.

    Returns:
      A dense cache of one layer, and the position of its first tokens, int32 `[batch]`.
    """
    table = cache.page_table
    page_size = 1 if table is None else cache.k.shape[-2]
    pages = min(span if table is None else (span - 2) // page_size + 2, cache.max_len // page_size)
    first = jnp.minimum(low // page_size, cache.max_len // page_size - pages)
    index = first[:, None] + jnp.arange(pages, dtype=jnp.int32)  # of tokens, or of pages

    def copy(part: jax.Array) -> jax.Array:
        layers, number = (part[None], 0) if layer is None else (part, layer)
        if table is not None:
            held = jnp.clip(jnp.take_along_axis(table, index, axis=1), 0, layers.shape[1] - 1)
            return join_pages(layers[number, held])
        sequence = jnp.arange(len(index), dtype=jnp.int32)[:, None]
        # [batch, tokens, kv_heads, ...] -> [batch, kv_heads, tokens, ...]
        return jnp.moveaxis(layers[number, sequence, :, index], 2, 1)

    parts = jax.tree.map(copy, dataclasses.replace(cache, page_table=None))
    return parts, first * page_size


def _weigh_in_place(
    weights: jax.Array, values: jax.Array, seen: jax.Array, *, low: jax.Array | None, high: jax.Array
) -> jax.Array:
    """Sums values by weights without a copy of the values; see `blocked.Weigh`.

    Args:
      weights: `[batch, kv_heads, rows, tokens]`.
      values: `[batch, kv_heads, tokens, head_dim]`.
      seen: bool `[batch, tokens]`, which is low <= token < high.
      low: int32 `[batch]`, the first token that is seen; None where all before `high` are.
      high: int32 `[batch]`, the token after the last.
    """
    batch, kv_heads, rows, tokens = weights.shape
    size = math.gcd(tokens, CHUNK)
    # A chunk's sums, in float32, are written and read, as a copy of its values would be.
    if size < FEWEST or rows * 4 > size * values.dtype.itemsize:
        return blocked.weigh_zeroed(weights, values, seen)
    # [batch, kv_heads, chunks, ...]
    weights = jnp.moveaxis(weights.reshape(batch, kv_heads, rows, -1, size), 3, 2)
    values = values.reshape(batch, kv_heads, -1, size, values.shape[-1])
    sums = dot("bhcrt,bhctd->bhcrd", weights, values.astype(weights.dtype))
    if jnp.issubdtype(values.dtype, jnp.integer):  # never NaN
        return jnp.sum(sums, axis=2)
    start = jnp.arange(0, tokens, size, dtype=jnp.int32)

    def choose(chosen: jax.Array, sums: jax.Array, others: jax.Array | float) -> jax.Array:
        return jnp.where(chosen[:, None, :, None, None], sums, others)

    whole, ends = start + size <= high[:, None], [high - 1]
    if low is not None:
        whole, ends = whole & (start >= low[:, None]), [low, high - 1]
    sums = choose(whole, sums, 0.0)
    for end in ends:
        chunk = jnp.clip(end // size, 0, len(start) - 1)

        def own(part: jax.Array, axis: int, chunk: jax.Array = chunk) -> jax.Array:
            return jax.vmap(functools.partial(jax.lax.dynamic_index_in_dim, axis=axis, keepdims=False))(part, chunk)

        partial = blocked.weigh_zeroed(own(weights, 1), own(values, 1), own(seen.reshape(batch, -1, size), 0))
        sums = choose(start == size * chunk[:, None], partial[:, :, None], sums)
    return jnp.sum(sums, axis=2)
