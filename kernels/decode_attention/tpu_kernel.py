"""The body of the TPU kernel of decode_attention; what it computes and how work is cut stands in `mosaic_tpu.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.tpu_stream import Part, Sight, Stream


@dataclasses.dataclass(frozen=True)
class View:
    """How the cache lies in memory.

    Attributes:
      tokens_last: whether keys and values are `[…, head_dim, tokens]` instead of `[…, tokens, head_dim]`.
      gathered: whether the scales of a paged cache come without pages, `[1, batch, kv_heads, tokens]`.
      shared: whether the KV heads are divided between the cores.
    """

    tokens_last: bool
    gathered: bool
    shared: bool


def kernel(
    # In SMEM: layer [1], lengths [batch], and page_table [batch * pages_per_seq] where there is one. Then
    # q [1, heads, rows, head_dim]; in HBM k and v [layers, batch or num_pages, kv_heads, tokens, head_dim] or the last
    # two swapped, and their scales [layers, batch or num_pages, kv_heads, tokens] where there are any; sinks
    # [heads, rows, 1] where there are any. out [1, heads, rows, head_dim]; lse [1, heads, rows, 1]. Scratch: m, l
    # [heads, rows, 1]; acc [heads, rows, head_dim]; the stream's cursor; semaphores [2 or 4, buffers]; rings
    # [buffers, …] of k, v and their scales.
    *refs: Any,
    problem: Problem,
    sight: Sight,
    view: View,
) -> None:
    """Attends from one block of queries of one sequence to all that it sees.

    Args:
      refs: what the comment above lists.
      problem: what was asked.
      sight: which tokens are seen.
      view: how the cache lies in memory.
    """
    p, left = problem, iter(refs)
    layer_ref, lengths_ref = next(left), next(left)
    table_ref = None if p.page_size is None else next(left)
    q_ref = next(left)
    cache = [next(left) for _ in range(4 if p.has_scales else 2)]
    sinks_ref = next(left) if p.has_sinks else None
    out_ref, lse_ref, m_ref, l_ref, acc_ref, cursor, arrived, *rings = left
    part, b, i = (pl.program_id(axis) for axis in range(3))
    heads = q_ref.shape[1]
    first_head = part * heads if view.shared else 0

    def keys_or_values(number: int) -> Part:
        def source(b: Any, unit: Any) -> Any:
            slab, start = (b, unit * sight.unit) if table_ref is None else (table_ref[_page(b, unit)], 0)
            return cache[number].at[layer_ref[0], slab, pl.ds(first_head, heads), *along(start)]

        def along(start: Any) -> tuple[Any, ...]:
            tokens = _aligned(start, sight.unit)
            return (slice(None), tokens) if view.tokens_last else (tokens, slice(None))

        return Part(source, rings[number], lambda unit: (slice(None), *along(unit * sight.unit)), arrived.at[number])

    def scales(number: int) -> Part:
        # Heads are sublanes here, which cannot be divided: every core takes all of them.
        def source(b: Any, unit: Any) -> Any:
            if view.gathered:
                return cache[number].at[0, b, :, _aligned(unit * sight.block_kv, sight.block_kv)]
            slab, start = (b, unit * sight.unit) if table_ref is None else (table_ref[_page(b, unit)], 0)
            return cache[number].at[layer_ref[0], slab, :, _aligned(start, sight.unit)]

        def place(unit: Any) -> tuple[Any, ...]:
            return slice(None), _aligned(unit * sight.unit, sight.unit)

        return Part(source, rings[number], None if view.gathered else place, arrived.at[number])

    def _page(b: Any, unit: Any) -> Any:
        return b * (p.max_len // sight.unit) + unit

    parts = [keys_or_values(0), keys_or_values(1)]
    if p.has_scales:
        parts += [scales(2), scales(3)]
    stream = Stream(sight, p.batch, rings[0].shape[0], lengths_ref, cursor, tuple(parts))

    pl.when((b == 0) & (i == 0))(stream.begin)

    # A sink is a logit without a value: it starts the sum.
    m_ref[...] = jnp.full(m_ref.shape, -jnp.inf) if sinks_ref is None else sinks_ref[...]
    l_ref[...] = jnp.full(l_ref.shape, 1.0 if p.has_sinks else 0.0)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    token_axis, width_axis = (2, 1) if view.tokens_last else (1, 2)
    first_query, last_query = sight.queries(lengths_ref[b], i)

    def attend(start: Any, arrive: Any, masked: bool) -> None:
        """Adds the block of tokens from `start` on to m, l and acc."""
        q, k = q_ref[0], arrive(0)[...]
        dtype = _dot_dtype(q.dtype, k.dtype)
        s = _dot(q.astype(dtype), k.astype(dtype), width_axis) * p.scale  # [heads, rows, block_kv]
        if p.has_scales:
            s = s * scale_of(arrive(2))
        if p.logits_soft_cap is not None:
            s = p.logits_soft_cap * jnp.tanh(s * (1 / p.logits_soft_cap))
        if masked:
            position = start + jax.lax.broadcasted_iota(jnp.int32, s.shape, 2)
            query = first_query
            if sight.block_q > 1:
                query += jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) // p.group
            visible = position <= jnp.minimum(query, last_query)
            if sight.window is not None:
                visible &= position > query - sight.window
            s = jnp.where(visible, s, -jnp.inf)
        m = m_ref[...]  # [heads, rows, 1]
        maximum = jnp.maximum(m, jnp.max(s, axis=2, keepdims=True))
        # A row that has seen nothing yet: -inf - -inf is NaN.
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum) if masked else maximum
        weights = jnp.exp(s - shift)
        decay = jnp.exp(m - shift)
        m_ref[...] = maximum
        l_ref[...] = l_ref[...] * decay + jnp.sum(weights, axis=2, keepdims=True)
        v = arrive(1)[...]
        if p.has_scales:
            weights = weights * scale_of(arrive(3))
        if masked:
            # What no query sees may be anything, NaN included, and 0 * NaN is NaN.
            weights = jnp.where(visible, weights, 0.0) if p.has_scales else weights
            token = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, token_axis)
            seen = token <= last_query
            if sight.window is not None:
                seen &= token > first_query - sight.window
            v = jnp.where(seen, v, jnp.zeros_like(v))
        acc_ref[...] = acc_ref[...] * decay + _dot(weights.astype(dtype), v.astype(dtype), token_axis)

    def scale_of(ref: Any) -> jax.Array:
        """`[kv_heads, block_kv]` to `[heads, 1, block_kv]`."""
        return ref[pl.ds(first_head, heads)][:, None]

    def step(block: Any, carry: int) -> int:
        stream.fetch()
        arrive = stream.take(b, i, block)
        start = block * sight.block_kv
        # Every query sees all of an inner block: nothing to mask.
        inner = start + sight.block_kv - 1 <= first_query
        if sight.window is not None:
            inner &= start > last_query - sight.window
        pl.when(inner)(lambda: attend(start, arrive, masked=False))
        pl.when(~inner)(lambda: attend(start, arrive, masked=True))
        return carry

    jax.lax.fori_loop(*sight.blocks(lengths_ref[b], i), step, 0)
    total = l_ref[...]
    out_ref[0] = (acc_ref[...] / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype)
    lse_ref[0] = m_ref[...] + jnp.log(total)


def _aligned(start: Any, size: int) -> Any:
    """A slice that begins at a multiple of its size, which the compiler is told."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, size), size)


def _dot_dtype(q_dtype: Any, kv_dtype: Any) -> Any:
    """In what keys and values are multiplied: that of the queries, which holds one-byte numbers exactly."""
    narrower = jnp.dtype(kv_dtype).itemsize == 1 or q_dtype == kv_dtype
    return q_dtype if narrower else jnp.float32


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Products of matrices in float32, head by head: the last axis of a against an axis of b."""
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
