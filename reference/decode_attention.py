"""Attention of the newest tokens over a KV cache: the definition, in plain XLA.

For query i of q_len, standing at position p = lengths - q_len + i, and every cached position t that it may see
(t <= p, and t > p - sliding_window where there is a window):

    s_t = softcap(scale * k_scale_t * (q_i . k_t))        softcap(s) = c * tanh(s / c)
    out_i = sum_t exp(s_t) * v_scale_t * v_t / Z          Z = sum_t exp(s_t) + exp(sink)
    lse_i = log Z

A length below 0 counts as 0, one above max_len as max_len; a page that does not exist is read as the nearest that does.

The cache is read in blocks with a running maximum (Milakov & Gimelshein, arXiv 1805.02867), from the first block that
any sequence's window reaches to the last that any sequence fills: a step costs what the longest sequence has, not what
the cache has room for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palladion.reference.bits import from_bits, to_bits

BLOCK = 128
"""Cached tokens that one trip of the loop reads."""


class _Partial(NamedTuple):
    """The softmax of the blocks read so far: maximum logit, sum of exponentials and weighted values, unnormalized."""

    maximum: jax.Array  # [batch, kv_heads, rows]
    total: jax.Array  # [batch, kv_heads, rows]
    values: jax.Array  # [batch, kv_heads, rows, head_dim]


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    page_table: jax.Array | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | None = None,
    batch_invariant: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends; see `palladion.decode_attention` for the contract (inputs are valid and defaults resolved here).

    Args:
      q: `[batch, q_len, q_heads, head_dim]`.
      k: `[batch, kv_heads, max_len, head_dim]`, or `[num_pages, kv_heads, page_size, head_dim]` with a page table.
      v: like k.
      lengths: int32 `[batch]`.
      scale: factor of the logits.
      page_table: int32 `[batch, pages_per_seq]` or None.
      sliding_window: tokens a query sees, itself included, or None.
      logits_soft_cap: c of the formula, or None.
      sinks: `[q_heads]` or None.
      k_scale: the shape of k without head_dim, or None.
      v_scale: the shape of v without head_dim, or None.
      layer: int32 scalar, which entry of caches with a leading `[num_layers]` is meant, or None where they have none.
      batch_invariant: whether each sequence is attended to by itself, as if there were no other; its part of a dense
        cache is copied for that.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    if batch_invariant:
        return _one_by_one(
            q,
            {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale},
            lengths,
            page_table,
            layer,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
        )
    batch, q_len, q_heads, head_dim = q.shape
    kv_heads, page_size = k.shape[-3:-1]
    group = q_heads // kv_heads
    rows = q_len * group  # the queries that share a KV head
    max_len = page_size * (1 if page_table is None else page_table.shape[1])
    lengths = jnp.clip(lengths, 0, max_len)
    if page_table is not None:
        page_table = jnp.clip(page_table, 0, k.shape[-4] - 1)

    # [batch, q_len, kv_heads, group, head_dim] -> [batch, kv_heads, rows, head_dim]
    queries = jnp.moveaxis(q.reshape(batch, q_len, kv_heads, group, head_dim), 1, 2)
    queries = queries.reshape(batch, kv_heads, rows, head_dim).astype(jnp.float32) * scale
    query_position = lengths[:, None] - q_len + jnp.arange(rows, dtype=jnp.int32) // group  # [batch, rows]

    # Blocks of a paged cache are whole pages.
    pages = max(1, min(BLOCK // page_size, max_len // page_size))
    block = min(BLOCK, max_len) if page_table is None else pages * page_size

    def read(cache: jax.Array, index: jax.Array) -> jax.Array:
        """Block `index` of a part of the cache as `[batch, kv_heads, block, ...]` in float32."""
        bits = to_bits(cache)
        layers, this = (bits[None], 0) if layer is None else (bits, layer)
        rest = layers.shape[4:]  # head_dim, or nothing for scales
        if page_table is None:
            start = (this, 0, 0, index * block) + (0,) * len(rest)
            part = jax.lax.dynamic_slice(layers, start, (1, batch, kv_heads, block, *rest))[0]
        else:
            table = jax.lax.dynamic_slice_in_dim(page_table, index * pages, pages, axis=1)
            part = layers[this, table]  # [batch, pages, kv_heads, page_size, ...]
            part = jnp.moveaxis(part, 1, 2).reshape(batch, kv_heads, block, *rest)
        return from_bits(part, cache).astype(jnp.float32)

    def attend(index: jax.Array, state: _Partial) -> _Partial:
        # The last block is read as far back as it takes to be whole; what an earlier block has seen is masked.
        position = jnp.minimum(index * block, max_len - block) + jnp.arange(block, dtype=jnp.int32)
        visible = (position >= index * block) & (position <= query_position[..., None])  # [batch, rows, block]
        if sliding_window is not None:
            visible &= position > query_position[..., None] - sliding_window
        visible = visible[:, None]  # for all KV heads
        logits = _dot("bhrd,bhtd->bhrt", queries, read(k, index))
        if k_scale is not None:
            logits = logits * read(k_scale, index)[:, :, None]
        if logits_soft_cap is not None:
            logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        logits = jnp.where(visible, logits, -jnp.inf)
        maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=-1))
        # Before the first visible token the maximum is -inf, and -inf - -inf is NaN.
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights = jnp.exp(logits - shift[..., None])
        decay = jnp.exp(state.maximum - shift)
        total = state.total * decay + jnp.sum(weights, axis=-1)
        # What no query sees may be anything, NaN included, and 0 * NaN is NaN.
        values = jnp.where(jnp.any(visible, axis=2)[..., None], read(v, index), 0.0)
        if v_scale is not None:
            weights = weights * jnp.where(jnp.any(visible, axis=2), read(v_scale, index), 0.0)[:, :, None]
        values = state.values * decay[..., None] + _dot("bhrt,bhtd->bhrd", weights, values)
        return _Partial(maximum, total, values)

    shape = (batch, kv_heads, rows)
    if sinks is None:
        state = _Partial(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    else:
        # A sink is a logit without a value: it starts the sum.
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), q_len)
        state = _Partial(jnp.broadcast_to(sink, shape), jnp.ones(shape), jnp.zeros((*shape, head_dim)))
    if block == max_len:
        state = attend(jnp.int32(0), state)
    else:
        last = (jnp.max(lengths) + block - 1) // block
        first = jnp.int32(0)
        if sliding_window is not None:
            first = jnp.maximum(jnp.min(lengths) - q_len - sliding_window + 1, 0) // block
        state = jax.lax.fori_loop(first, last, attend, state)

    total = state.total[..., None]
    out = state.values / jnp.where(total == 0, 1.0, total)
    lse = state.maximum + jnp.log(state.total)
    out = jnp.moveaxis(out.reshape(batch, kv_heads, q_len, group, head_dim), 2, 1)
    lse = jnp.moveaxis(lse.reshape(batch, kv_heads, q_len, group), 2, 1)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, q_len, q_heads)


def _one_by_one(
    q: jax.Array,
    cache: dict[str, jax.Array | None],
    lengths: jax.Array,
    page_table: jax.Array | None,
    layer: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attends to one sequence after the other: arguments and results are those of `decode_attention`."""

    def attend(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_sequence(array: jax.Array, axis: int = 0) -> jax.Array:
            return from_bits(jax.lax.dynamic_slice_in_dim(to_bits(array), b, 1, axis), array)

        axis = 0 if layer is None else 1
        own = {
            name: array if array is None or page_table is not None else of_sequence(array, axis)
            for name, array in cache.items()
        }
        table = None if page_table is None else of_sequence(page_table)
        arrays = {"lengths": of_sequence(lengths), "page_table": table, "layer": layer}
        out, lse = decode_attention(of_sequence(q), **own, **arrays, **options)  # type: ignore[arg-type]
        return out[0], lse[0]

    out, lse = jax.lax.map(attend, jnp.arange(len(q), dtype=jnp.int32))
    return out, lse


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


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
