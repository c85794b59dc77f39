"""The Triton kernel of append_kv; `call.py` describes the grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.append_kv.destinations import bounded_length, destinations, written_positions
from palladion.kernels.append_kv.problem import Problem
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref


class Control(NamedTuple):
    """Integers that say what is written where.

    Attributes:
      layer: int32 `[1]`.
      lengths: int32 `[batch]`.
      new_tokens: int32 `[batch]`; None where all new tokens are real.
      page_table: int32 `[batch, pages_per_seq]`; None for a dense cache.
    """

    layer: Ref
    lengths: Ref
    new_tokens: Ref
    page_table: Ref


class CacheArrays(NamedTuple):
    """Arrays of the cache, or the new tokens for each of them.

    Attributes:
      k: keys, `[num_layers, slabs, kv_heads, rows, head_dim]`; new ones `[batch, q_len, kv_heads, head_dim]`.
      v: values, like k.
      k_scale: scales of the keys, like k without head_dim; None where the cache is not quantized.
      v_scale: scales of the values, like k_scale.
    """

    k: Ref
    v: Ref
    k_scale: Ref
    v_scale: Ref


def kernel(
    control: Control,
    new: CacheArrays,
    _aliased: CacheArrays,
    cache: CacheArrays,
    *,
    problem: Problem,
    block_rows: int,
) -> None:
    """Copies a block of rows (heads of new tokens of one sequence) into the cache."""
    p = problem
    b = pl.program_id(0)
    length = bounded_length(p, control.lengths[b])
    start = length - p.q_len
    first, end = written_positions(p, length, None if control.new_tokens is None else control.new_tokens[b])
    begin, end = first - start, end - start  # tokens among the new ones

    first_row = pl.program_id(1) * block_rows
    token, head = divide_with_remainder(first_row + jnp.arange(block_rows, dtype=jnp.int32), p.kv_heads)
    # Where some of a block's rows are written, the other rows repeat the nearest written token, so that one scalar
    # decides about all rows.
    any_written = (begin < end) & (first_row < end * p.kv_heads) & (first_row + block_rows > begin * p.kv_heads)
    token = jnp.clip(jnp.clip(token, begin, end - 1), 0, p.q_len - 1)
    slab, row, written = destinations(
        p,
        sequence=b,
        layer=control.layer[0],
        position=start + token,
        written=jnp.broadcast_to(any_written, token.shape),
        load_page=lambda page, mask: plgpu.load(control.page_table.at[b, page], mask=mask, other=0),
    )

    feature = jnp.arange(pl.next_power_of_2(p.head_dim), dtype=jnp.int32)[None, :]
    written_features = written[:, None] & (feature < p.head_dim)

    def copy(source: Any, target: Any, mask: jax.Array) -> None:
        plgpu.store(target, plgpu.load(source, mask=mask), mask=mask)

    for source, target in ((new.k, cache.k), (new.v, cache.v)):
        copy(
            source.at[b, token[:, None], head[:, None], feature],
            target.at[control.layer[0], slab[:, None], head[:, None], row[:, None], feature],
            written_features,
        )
    for source, target in ((new.k_scale, cache.k_scale), (new.v_scale, cache.v_scale)):
        if source is not None:
            copy(source.at[b, token, head], target.at[control.layer[0], slab, head, row], written)
