"""The body of decode_attention on a GPU, in Triton: what a program loads, multiplies and stores. See `call.py`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from palladion.kernels.decode_attention import online_softmax
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.shares import share_of
from palladion.kernels.decode_attention.triton import products
from palladion.kernels.decode_attention.triton.config import Config
from palladion.kernels.decode_attention.triton.merge import Attention, merge_if_last
from palladion.kernels.decode_attention.triton.rows import Rows, Tile, tiles_of
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref, Scalar


class Operands(NamedTuple):
    """Arrays that the kernel reads, as arrays outside of it and as references inside.

    Attributes:
      layer: int32 `[1]`.
      lengths: int32 `[batch]`.
      q: `[batch, q_len, q_heads, head_dim]`.
      k: `[num_layers, batch or num_pages, kv_heads, max_len or page_size, head_dim]`.
      v: like k.
      k_scale: k without head_dim, float32, or None.
      v_scale: like k_scale.
      page_table: int32 `[batch, pages_per_seq]`, or None.
      sinks: float32 `[q_heads]`, or None.
    """

    layer: Ref
    lengths: Ref
    q: Ref
    k: Ref
    v: Ref
    k_scale: Ref
    v_scale: Ref
    page_table: Ref
    sinks: Ref


class Results(NamedTuple):
    """Arrays that the kernel writes.

    Attributes:
      partial: results of each slot, float32 where they are merged.
      merged: results of each sequence, where the last program merges, or None.
      counters: int32 `[batch, kv_heads, row blocks]`, programs that are done, or None.
    """

    partial: Attention
    merged: Attention | None
    counters: Ref


@dataclasses.dataclass(frozen=True)
class KVBlock:
    """Location of the tokens of a KV block in the cache.

    Attributes:
      problem: the call.
      layer: layer of the cache.
      slab: sequence, or page: a scalar, or `[block_kv]` where a block has tokens of several pages.
      head: KV head.
      token: tokens within the slab, `[block_kv]`.
      native: whether the kernel is compiled for an NVIDIA GPU, not interpreted.
    """

    problem: Problem
    layer: Any
    slab: jax.Array
    head: Scalar
    token: jax.Array
    native: bool

    def load(self, ref: Ref, tile: Tile, dtype: DTypeLike) -> jax.Array:
        """Loads a tile of keys or values as operands of a dtype, `[block_kv, width]`."""
        # Codes are converted in the order in which they are loaded, 16 by each thread, and not in that of operands,
        # where Triton would gather them byte by byte: its layouts do not pass a reduction, and a maximum along an
        # axis of length 1 changes nothing else.
        reduced = self.problem.has_scales and dtype != ref.dtype
        down = (slice(None), None, None) if reduced else (slice(None), None)
        features, head_dim = tile.features, self.problem.head_dim
        across = (None, slice(None), None) if reduced else (None, slice(None))
        slab = self.slab[down] if self.slab.ndim else self.slab
        window = ref.at[self.layer, slab, self.head, self.token[down], features[across]]
        mask = other = None
        if tile.first + tile.width > head_dim:
            mask, other = jnp.broadcast_to((features < head_dim)[across], window.shape), jnp.zeros((), ref.dtype)
        numbers = products.to_operand(plgpu.load(window, mask=mask, other=other), dtype, native=self.native)
        return jnp.max(numbers, axis=2) if reduced else numbers

    def load_scale(self, ref: Ref) -> jax.Array | None:
        """Loads the scales of keys or values, `[block_kv]`, if there are any."""
        return None if ref is None else plgpu.load(ref.at[self.layer, self.slab, self.head, self.token])


def locate(
    problem: Problem,
    operands: Operands,
    b: Scalar,
    layer: Any,
    head: Scalar,
    first: Scalar,
    token: jax.Array,
    *,
    native: bool,
) -> KVBlock:
    """Returns the location of `token`, `[block_kv]`, the tokens of a KV block of sequence b that begins at `first`."""
    p, slab, within = problem, jnp.asarray(b), token
    if p.page_size is None:
        return KVBlock(p, layer, slab, head, within, native)
    if p.page_size % token.shape[0] == 0:
        page, _ = divide_with_remainder(first, p.page_size)
        slab = operands.page_table[b, page]
        within = token - page * p.page_size
    else:
        page, within = divide_with_remainder(token, p.page_size)
        slab = plgpu.load(operands.page_table.at[b, page])  # [block_kv]
    # A page that does not exist is read as the nearest that does.
    return KVBlock(p, layer, jnp.clip(slab, 0, operands.k.shape[1] - 1), head, within, native)


def kernel(
    operands: Operands,
    counters: Ref,  # the same memory as results.counters
    results: Results,
    *,
    problem: Problem,
    config: Config,
    row_blocks: int,
    native: bool,
) -> None:
    """Computes attention of a block of query rows, which share a sequence and KV head, over a share of the cache."""
    del counters
    p, tiles = problem, tiles_of(problem.head_dim)
    slot, head_and_rows = divide_with_remainder(pl.program_id(0), p.kv_heads * row_blocks)
    head, row_block = divide_with_remainder(head_and_rows, row_blocks)
    share = share_of(p, config, operands.lengths, row_block, slot)
    b, layer, span = share.sequence, operands.layer[0], share.span
    rows = Rows.of(p, head, row_block * config.block_rows, config.block_rows)
    rows = rows._replace(exists=rows.exists & share.works)
    position = share.length - p.q_len + rows.query

    loaded = []
    for tile in tiles:
        index, mask = rows.tile_index(tile, p.head_dim)
        loaded.append(plgpu.load(operands.q.at[b, *index], mask=mask, other=0))  # [block_rows, width]
    queries = products.prepare_queries(p, loaded, integers=config.integers)

    def attend(block: jax.Array, state: online_softmax.State) -> online_softmax.State:
        first = block * config.block_kv
        token = first + jnp.arange(config.block_kv, dtype=jnp.int32)
        # Tokens that no row sees may be NaN, and 0 * NaN is NaN; page-table entries past a sequence's end may be
        # anything. Instead of them the outermost visible token is read again, which costs less than masked loads.
        visible_token = jnp.clip(token, span.first_token, span.last_token)
        kv = locate(p, operands, b, layer, head, first, visible_token, native=native)
        keys = [kv.load(operands.k, tile, x[0].dtype) for x, tile in zip(queries.operands, tiles, strict=True)]
        qk = products.multiply_keys(queries, keys)  # [block_rows, block_kv]
        k_scale, v_scale = kv.load_scale(operands.k_scale), kv.load_scale(operands.v_scale)
        s = online_softmax.masked_logits(
            p, qk, k_scale, online_softmax.visible_mask(p, token[None, :], position[:, None])
        )
        bounded = v_scale if products.uses_tensor_cores(p) else None
        p_block, alpha, state = online_softmax.update(p, state, s, bounded)
        weights = products.prepare_weights(p, p_block, v_scale)
        acc = tuple(
            old * alpha[:, None] + products.multiply_values(weights, kv.load(operands.v, tile, weights.dtype))
            for old, tile in zip(state.acc, tiles, strict=True)
        )
        return state._replace(acc=acc)

    state = online_softmax.initial_state(config.block_rows, config.block_kv, tuple(tile.width for tile in tiles))
    state = jax.lax.fori_loop(share.begin, share.end, attend, state)

    sinks = None
    if operands.sinks is not None:
        sinks = plgpu.load(operands.sinks.at[rows.q_head], mask=rows.exists, other=0.0)
        # A sink counts in one of the splits.
        sinks = jnp.where(share.split == 0, sinks, -jnp.inf)
    outs, lse = online_softmax.finish(p, state, sinks)
    out_ref, lse_ref = results.partial
    for tile, out in zip(tiles, outs, strict=True):
        index, mask = rows.tile_index(tile, p.head_dim)
        plgpu.store(out_ref.at[slot, *index], out.astype(out_ref.dtype), mask=mask)
    plgpu.store(lse_ref.at[slot, rows.query, rows.q_head], lse, mask=rows.exists)
    if results.merged is not None:
        merge_if_last(
            p, config, results.partial, results.merged, results.counters, share, head, row_block, tiles, native=native
        )
