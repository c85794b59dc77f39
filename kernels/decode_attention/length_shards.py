"""Attention over a dense cache whose tokens are sharded over devices.

Device r has the part of the cache from token r * part on. It counts lengths from there, L = lengths - r * part, and
attends to its part alone; all devices then merge their results by the log-sum-exps, which one all-gather brings.

L is below 0 where a sequence ends before the part, and above `part` where it goes on behind it, perhaps with some of
the new tokens. Query i has position L - q_len + i, and there are two kinds:

    position < part     it sees the part up to its own position, as in a cache of min(L, part) tokens. The queries
                        behind the part, the last L - part, have no place in such a cache: those before move up
    position >= part    it sees the whole part, as one new token of a full cache does: the queries are heads of that one

So there are two calls for several new tokens. In each of them a sequence without such queries has length 0, and is not
read: only a part in which the new tokens begin, and do not end, is read twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from palladion.kernels.sharding import Share
from palladion.reference.decode_attention import merge_partials

Attention = tuple[jax.Array, jax.Array]
"""Outputs `[batch, q_len, q_heads, head_dim]` and log-sum-exps `[batch, q_len, q_heads]`."""


def attend_to_part(problem: Any, run: Callable[[Any, Any], Any], inputs: Any, share: Share) -> Attention:
    """Attends to a device's part of a cache, and merges the results of all devices.

    Args:
      problem: the call for this device's sequences and heads, with all tokens of their caches.
      run: runs a problem with its inputs.
      inputs: this device's shares of the inputs.
      share: how the call is sharded; the cache is, along max_len.
    """
    part = share.of(problem.max_len, "max_len")
    lengths = jnp.clip(inputs.lengths, 0, problem.max_len) - share.index("max_len") * part
    sinks, inputs = inputs.sinks, inputs._replace(sinks=None, lengths=lengths)
    local = dataclasses.replace(problem, max_len=part, has_sinks=False)
    if problem.q_len == 1:
        out, lse = run(local, inputs._replace(lengths=jnp.clip(lengths, 0, part)))
    else:
        out, lse = _attend_with_several(local, run, inputs)
    partial = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    partials = jax.lax.all_gather(partial, share.axes["max_len"])  # [devices, batch, q_len, q_heads, head_dim + 1]
    if sinks is not None:  # one more part, whose only logit has no value
        sink = jnp.zeros_like(partial).at[..., -1].set(sinks.astype(jnp.float32))
        partials = jnp.concatenate([partials, sink[None]])
    merged, lse = merge_partials(partials[..., :-1], partials[..., -1])
    return merged.astype(out.dtype), lse


def _attend_with_several(problem: Any, run: Callable[[Any, Any], Any], inputs: Any) -> Attention:
    """Attends with several new tokens, some of which may stand before or behind the part."""
    p, q, lengths = problem, inputs.q, inputs.lengths
    behind = jnp.clip(lengths - p.max_len, 0, p.q_len)[:, None]  # new tokens behind the part, [batch, 1]
    query = jnp.arange(p.q_len, dtype=jnp.int32)

    def pick(x: jax.Array, index: jax.Array) -> jax.Array:
        index = jnp.clip(index, 0, p.q_len - 1)
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    inside = jnp.where(behind[:, 0] < p.q_len, jnp.clip(lengths, 0, p.max_len), 0)
    moved = run(p, inputs._replace(q=pick(q, query - behind), lengths=inside))

    heads = jnp.moveaxis(q.reshape(p.batch, p.q_len, p.kv_heads, p.group, p.head_dim), 1, 2)
    one = dataclasses.replace(p, q_len=1, q_heads=p.q_heads * p.q_len)
    full = jnp.where(behind[:, 0] > 0, p.max_len, 0)
    joined = run(one, inputs._replace(q=heads.reshape(p.batch, 1, -1, p.head_dim), lengths=full))

    def choose(moved: jax.Array, joined: jax.Array) -> jax.Array:
        rest = joined.shape[3:]
        apart = jnp.moveaxis(joined.reshape(p.batch, p.kv_heads, p.q_len, p.group, *rest), 2, 1)
        is_behind = query + behind >= p.q_len
        return jnp.where(
            is_behind.reshape(*is_behind.shape, *(1,) * (moved.ndim - 2)),
            apart.reshape(moved.shape),
            pick(moved, query + behind),
        )

    out, lse = jax.tree.map(choose, tuple(moved), tuple(joined))
    return out, lse
