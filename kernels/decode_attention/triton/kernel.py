"""The body of decode_attention on a GPU, in Triton: what a program loads, multiplies and stores. See `call.py`."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from palladion.kernels.decode_attention import online_softmax
from palladion.kernels.decode_attention.online_softmax import VisibleSpan
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.triton import products
from palladion.kernels.decode_attention.triton.config import Config
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref, Scalar
from palladion.reference import merge_partials

MIN_WIDTH: Final = 32
"""Least width of a tile of head_dim; with narrower ones, all four warps would multiply the same numbers."""


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


class Tile(NamedTuple):
    """Features of a head that are loaded together: `width`, a power of two, from `first` on."""

    first: int
    width: int

    @property
    def features(self) -> jax.Array:
        """Indices of the features, int32 `[width]`."""
        return self.first + jnp.arange(self.width, dtype=jnp.int32)


def tiles_of(head_dim: int) -> tuple[Tile, ...]:
    """Returns the tiles of a head, widest first; the last may reach past head_dim and is masked.

    Triton's arrays have sides of powers of two. A head of 192 is one tile of 128 and one of 64, so that nothing
    absent is loaded or multiplied. Where at most a quarter is missing, as with 112, one tile costs less than three.
    """
    tiles, first = [], 0
    while first < head_dim:
        left = head_dim - first
        width = max(pl.next_power_of_2(left), MIN_WIDTH)
        if left <= width * 3 // 4 and width > MIN_WIDTH:
            width //= 2
        tiles.append(Tile(first, width))
        first += width
    return tuple(tiles)


class Rows(NamedTuple):
    """The query rows of a program.

    Attributes:
      query: index of each row's query, `[block_rows]`.
      q_head: query head of each row, `[block_rows]`.
      exists: whether each row is one, `[block_rows]`; the others fill the block.
      position: position of each row's query in its sequence, `[block_rows]`.
      span: the tokens and KV blocks that they see.
    """

    query: jax.Array
    q_head: jax.Array
    exists: jax.Array
    position: jax.Array
    span: VisibleSpan

    def tile_index(self, tile: Tile, head_dim: int) -> tuple[tuple[Any, ...], jax.Array]:
        """Returns the index of the rows' features in q or out, and which of them exist."""
        features = tile.features
        index = (self.query[:, None], self.q_head[:, None], features[None, :])
        return index, self.exists[:, None] & (features < head_dim)[None, :]


def rows_of_program(
    problem: Problem, config: Config, length: Scalar, head: Scalar, row_block: Scalar, split: Scalar
) -> Rows:
    """Returns the query rows of a program, and the split of the cache that they attend to."""
    p, count = problem, problem.q_len * problem.group
    first_row = row_block * config.block_rows
    row = first_row + jnp.arange(config.block_rows, dtype=jnp.int32)
    query, head_in_group = divide_with_remainder(row, p.group)
    q_head = head * p.group + head_in_group
    exists = row < count
    position = length - p.q_len + query
    last_row = jnp.minimum(first_row + config.block_rows, count) - 1
    span = online_softmax.visible_span(p, length, first_row, last_row, config.block_kv, split, config.splits)
    return Rows(query, q_head, exists, position, span)


@dataclasses.dataclass(frozen=True)
class KVBlock:
    """Location of the tokens of a KV block in the cache.

    Attributes:
      problem: the call.
      layer: layer of the cache.
      slab: sequence, or page: a scalar, or `[block_kv]` where a block has tokens of several pages.
      head: KV head.
      token: tokens within the slab, `[block_kv]`.
    """

    problem: Problem
    layer: Any
    slab: jax.Array
    head: Scalar
    token: jax.Array

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
        numbers = products.to_operand(plgpu.load(window, mask=mask, other=other), dtype)
        return jnp.max(numbers, axis=2) if reduced else numbers

    def load_scale(self, ref: Ref) -> jax.Array | None:
        """Loads the scales of keys or values, `[block_kv]`, if there are any."""
        return None if ref is None else plgpu.load(ref.at[self.layer, self.slab, self.head, self.token])


def locate(
    problem: Problem, operands: Operands, b: Scalar, layer: Any, head: Scalar, first: Scalar, token: jax.Array
) -> KVBlock:
    """Returns the location of `token`, `[block_kv]`, the tokens of a KV block of sequence b that begins at `first`."""
    p, slab, within = problem, jnp.asarray(b), token
    if p.page_size is None:
        return KVBlock(p, layer, slab, head, within)
    if p.page_size % token.shape[0] == 0:
        page, _ = divide_with_remainder(first, p.page_size)
        slab = operands.page_table[b, page]
        within = token - page * p.page_size
    else:
        page, within = divide_with_remainder(token, p.page_size)
        slab = plgpu.load(operands.page_table.at[b, page])  # [block_kv]
    # A page that does not exist is read as the nearest that does.
    return KVBlock(p, layer, jnp.clip(slab, 0, operands.k.shape[1] - 1), head, within)


def kernel(
    operands: Operands,
    out_ref: Ref,  # [splits, batch, q_len, q_heads, head_dim]
    lse_ref: Ref,  # float32 [splits, batch, q_len, q_heads]
    *,
    problem: Problem,
    config: Config,
    row_blocks: int,
) -> None:
    """Computes attention of a block of query rows, which share a sequence and KV head, over a split of the cache."""
    p, tiles = problem, tiles_of(problem.head_dim)
    b, program = pl.program_id(0), pl.program_id(1)
    head_and_rows, split = divide_with_remainder(program, config.splits)
    head, row_block = divide_with_remainder(head_and_rows, row_blocks)
    layer, length = operands.layer[0], jnp.clip(operands.lengths[b], 0, p.max_len)
    rows = rows_of_program(p, config, length, head, row_block, split)

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
        visible_token = jnp.clip(token, rows.span.first_token, rows.span.last_token)
        kv = locate(p, operands, b, layer, head, first, visible_token)
        keys = [kv.load(operands.k, tile, x[0].dtype) for x, tile in zip(queries.operands, tiles, strict=True)]
        qk = products.multiply_keys(queries, keys)  # [block_rows, block_kv]
        k_scale = kv.load_scale(operands.k_scale)
        s = online_softmax.masked_logits(p, qk, k_scale, online_softmax.visible_mask(p, token, rows.position))
        weights, alpha, state = online_softmax.update(p, state, s)
        weight_operands = products.prepare_weights(p, weights, kv.load_scale(operands.v_scale))
        dtype = weight_operands[0].dtype
        acc = tuple(
            old * alpha[:, None] + products.multiply_values(weight_operands, kv.load(operands.v, tile, dtype))
            for old, tile in zip(state.acc, tiles, strict=True)
        )
        return state._replace(acc=acc)

    sinks = None
    if operands.sinks is not None:
        sinks = plgpu.load(operands.sinks.at[rows.q_head], mask=rows.exists, other=0.0)
        # A sink counts in one of the splits.
        sinks = jnp.where(split == 0, sinks, -jnp.inf)
    state = online_softmax.initial_state(p, config.block_rows, tuple(tile.width for tile in tiles), sinks)
    state = jax.lax.fori_loop(rows.span.begin, rows.span.end, attend, state)

    outs, lse = online_softmax.finish(p, state)
    for tile, out in zip(tiles, outs, strict=True):
        index, mask = rows.tile_index(tile, p.head_dim)
        plgpu.store(out_ref.at[split, b, *index], out.astype(out_ref.dtype), mask=mask)
    plgpu.store(lse_ref.at[split, b, rows.query, rows.q_head], lse, mask=rows.exists)


def merge_kernel(
    outs_ref: Ref,  # [splits, batch, q_len, q_heads, head_dim], float32
    lses_ref: Ref,  # [splits, batch, q_len, q_heads]
    out_ref: Ref,  # [batch, q_len, q_heads, head_dim]
    lse_ref: Ref,  # [batch, q_len, q_heads]
    *,
    problem: Problem,
    splits: int,
    width: int,
) -> None:
    """Merges the splits of one query of one head, `width` features in each program."""
    p = problem
    query_of_batch, q_head = divide_with_remainder(pl.program_id(0), p.q_heads)
    b, query = divide_with_remainder(query_of_batch, p.q_len)
    index = (b, query, q_head)
    split = jnp.arange(pl.next_power_of_2(splits), dtype=jnp.int32)
    features = pl.program_id(1) * width + jnp.arange(width, dtype=jnp.int32)
    split_exists, feature_exists = split < splits, features < p.head_dim
    lses = plgpu.load(lses_ref.at[split, *index], mask=split_exists, other=-jnp.inf)  # [splits]
    mask = split_exists[:, None] & feature_exists[None, :]
    outs = plgpu.load(outs_ref.at[split[:, None], *index, features[None, :]], mask=mask, other=0.0)  # [splits, width]
    out, lse = merge_partials(outs, lses)
    plgpu.store(out_ref.at[*index, features], out.astype(out_ref.dtype), mask=feature_exists)
    # All programs of a query compute the same lse.
    plgpu.store(lse_ref.at[*index], lse)
