"""The references that the TPU kernel is given, by name; absent ones are None.

Dimensions: a core works on `heads` KV heads, in `head_blocks` blocks of `block_heads`;
rows = block_heads * block_q * group; width = block_heads * head_dim; n = block_batch * head_blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from palladion.kernels.types import Ref


class Scalars(NamedTuple):
    """Prefetched scalars, in SMEM.

    Attributes:
      layer: int32 `[1]`, the layer of the cache that is read.
      lengths: int32 `[batch]`.
      page_table: int32 `[batch * pages_per_seq]`, or None.
    """

    layer: Ref
    lengths: Ref
    page_table: Ref


class Operands(NamedTuple):
    """Arrays: the cache in HBM, blocks of the others in VMEM.

    Attributes:
      q: `[block_batch, head_blocks, rows, head_dim]`.
      k: `[num_layers, batch or num_pages, kv_heads, tokens, head_dim]`, or with the last two axes swapped.
      v: like k.
      k_scale: float32 `[num_layers, batch or num_pages, kv_heads, tokens]`, or None.
      v_scale: like k_scale.
      sinks: float32 `[head_blocks, rows, 1]`, or None.
    """

    q: Ref
    k: Ref
    v: Ref
    k_scale: Ref
    v_scale: Ref
    sinks: Ref


class Scratch(NamedTuple):
    """Memory of the kernel's own, kept from one grid step to the next.

    Attributes:
      q: `[n, pieces * rows, width]`, the queries as operands of the MXU.
      q_factor: float32 `[n, rows, 1]`, the factors of queries in fixed point.
      m: float32 `[n, rows, LANES]`, maxima of the logits, the same in all lanes.
      l: float32 `[n, rows, LANES]`, sums of exp(s - m), the same in all lanes.
      acc: float32 `[n, rows, width]`, sums of exp(s - m) v.
      cursor: int32 `[CURSOR]` in SMEM, the state of the DMA ring.
      semaphores: `[2 or 4, slots]`, for keys, values, and the scales of either.
      k_ring: `[slots, block_batch, heads, block_kv, head_dim]`, or with the last two axes swapped.
      v_ring: like k_ring.
      k_scale_ring: float32 `[slots, block_batch, kv_heads, block_kv]`, or None.
      v_scale_ring: like k_scale_ring.
      words: int32, where `from_words` puts bfloat16 numbers together, or None.
    """

    q: Ref
    q_factor: Ref
    m: Ref
    l: Any  # noqa: E741, the usual name
    acc: Ref
    cursor: Ref
    semaphores: Ref
    k_ring: Ref
    v_ring: Ref
    k_scale_ring: Ref
    v_scale_ring: Ref
    words: Ref
