"""The Triton kernel of append_qkv; `call.py` describes the grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.append_kv.destinations import bounded_length, destinations, written_positions
from palladion.kernels.append_qkv.problem import Problem
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref


class KernelInputs(NamedTuple):
    """Inputs of the kernel.

    Attributes:
      layer: int32 `[1]`.
      lengths: int32 `[batch]`.
      new_tokens: int32 `[batch]`; None where all new tokens are real.
      page_table: int32 `[batch, pages_per_seq]`; None for a dense cache.
      qkv: `[batch, q_len, heads, head_dim]`.
      cosine: float32 `[batch, q_len, rotary_dim / 2]`.
      sine: like cosine.
    """

    layer: Ref
    lengths: Ref
    new_tokens: Ref
    page_table: Ref
    qkv: Ref
    cosine: Ref
    sine: Ref


class CacheArrays(NamedTuple):
    """Arrays of the cache.

    Attributes:
      k: `[num_layers, slabs, kv_heads, rows, head_dim]`.
      v: like k.
    """

    k: Ref
    v: Ref


def kernel(
    inputs: KernelInputs,
    _aliased: CacheArrays,
    q: Any,
    cache: CacheArrays,
    *,
    problem: Problem,
    block_rows: int,
) -> None:
    """Rotates a block of rows (heads of new tokens of one sequence) and stores them.

    Args:
      inputs: what is read.
      q: output, `[batch, q_len, q_heads, head_dim]`.
      cache: output, in the memory of the cache that is passed in.
      problem: the call.
      block_rows: rows of a block.
    """
    p, pairs = problem.append, problem.rotary_dim // 2
    b = pl.program_id(0)
    length = bounded_length(p, inputs.lengths[b])
    first, end = written_positions(p, length, None if inputs.new_tokens is None else inputs.new_tokens[b])

    r = pl.program_id(1) * block_rows + jnp.arange(block_rows, dtype=jnp.int32)  # [block_rows]
    exists = r < p.q_len * problem.heads
    token, head = divide_with_remainder(r, problem.heads)
    position = length - p.q_len + token
    slab, row, written = destinations(
        p,
        sequence=b,
        layer=inputs.layer[0],
        position=position,
        written=exists & (position >= first) & (position < end),
        load_page=lambda page, mask: plgpu.load(inputs.page_table.at[b, page], mask=mask, other=0),
    )

    feature = jnp.arange(pl.next_power_of_2(p.head_dim), dtype=jnp.int32)  # [features]
    in_row = exists[:, None] & (feature < p.head_dim)[None, :]  # [block_rows, features]
    # Each rotated feature has an angle and a partner. Values, and features from rotary_dim on, are not rotated.
    angle = jnp.where(feature < pairs, feature, feature - pairs)
    partner = jnp.where(feature < pairs, feature + pairs, feature - pairs)
    key_heads_end = problem.q_heads + p.kv_heads
    rotated = in_row & (head < key_heads_end)[:, None] & (feature < 2 * pairs)[None, :]

    def load(source: Any, features: jax.Array, mask: jax.Array, other: float, *head: jax.Array) -> jax.Array:
        index = source.at[b, token[:, None], *(one[:, None] for one in head), features[None, :]]
        return plgpu.load(index, mask=mask, other=other).astype(jnp.float32)

    x, x_partner = load(inputs.qkv, feature, in_row, 0, head), load(inputs.qkv, partner, rotated, 0, head)
    cosine, sine = load(inputs.cosine, angle, rotated, 1), load(inputs.sine, angle, rotated, 0)
    signed = jnp.where((feature < pairs)[None, :], -x_partner, x_partner)
    heads = (x * cosine + signed * sine).astype(inputs.qkv.dtype)

    is_query = in_row & (head < problem.q_heads)[:, None]
    plgpu.store(q.at[b, token[:, None], head[:, None], feature[None, :]], heads, mask=is_query)
    for target, first_head in ((cache.k, problem.q_heads), (cache.v, key_heads_end)):
        stored = written & (head >= first_head) & (head < first_head + p.kv_heads)
        # The interpreter writes the old number back where the mask is False; out of bounds it writes nothing.
        cache_head = jnp.where(stored, head - first_head, p.kv_heads)
        index = (inputs.layer[0], slab[:, None], cache_head[:, None], row[:, None], feature[None, :])
        plgpu.store(target.at[index], heads.astype(target.dtype), mask=in_row & stored[:, None])
