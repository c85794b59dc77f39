"""Attention of the newest tokens over a KV cache, in the form that is fastest.

`definition.py` says what it is. `blocked.py` computes the same on every platform, at a cost that follows the longest
sequence; `gpu.py` has it read large blocks in narrow floats. The derivatives are those of the definition.
"""

from __future__ import annotations

import functools

import jax

from palladion.reference.caches import KVCache
from palladion.reference.decode_attention import blocked, definition, gpu
from palladion.reference.decode_attention.definition import merge_partials
from palladion.reference.derivatives import with_derivatives_of
from palladion.reference.platforms import target_platform

__all__ = ["decode_attention", "merge_partials"]


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
      logits_soft_cap: bound of the logits, c of the formula, or None.
      sinks: `[q_heads]` or None.
      k_scale: the shape of k without head_dim, or None.
      v_scale: the shape of v without head_dim, or None.
      layer: int32 scalar, which layer of caches with a leading `[num_layers]` to read, or None where they have none.
      batch_invariant: whether each sequence is attended to by itself, so that the others cannot change its bits; its
        part of a dense cache is copied for that.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    define = functools.partial(
        definition.decode_attention, scale=scale, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap
    )
    form = gpu.decode_attention if target_platform() == "gpu" else blocked.decode_attention
    attend: blocked.Attend = functools.partial(
        form, scale=scale, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap
    )
    if batch_invariant:
        attend = functools.partial(blocked.one_by_one, attend)
    cache = KVCache(k, v, k_scale, v_scale, page_table)
    return with_derivatives_of(define, attend)(q, cache, lengths, sinks, layer)
