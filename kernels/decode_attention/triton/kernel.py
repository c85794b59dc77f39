"""The body of decode_attention on a GPU, in Triton: what a program loads, multiplies and stores. See `call.py`."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.decode_attention import online_softmax
from palladion.kernels.decode_attention.online_softmax import divide
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.triton import products as gpu_products
from palladion.reference import merge_partials

MIN_WIDTH: Final = 32
"""Of a part of a head: of narrower ones, four warps would all multiply the same."""


class Refs(NamedTuple):
    """Arrays in memory, as the kernel takes them.

    Attributes:
      layer: int32 `[1]`.
      lengths: int32 `[batch]`.
      q: `[batch, q_len, q_heads, head_dim]`.
      k: `[num_layers, batch or num_pages, kv_heads, max_len or page_size, head_dim]`.
      v: like k.
      page_table: int32 `[batch, pages_per_seq]` or None.
      k_scale: k without head_dim, float32, or None.
      v_scale: like k_scale.
      sinks: float32 `[q_heads]` or None.
      out: `[splits, batch, q_len, q_heads, head_dim]`.
      lse: float32 `[splits, batch, q_len, q_heads]`.
    """

    layer: Any
    lengths: Any
    q: Any
    k: Any
    v: Any
    page_table: Any
    k_scale: Any
    v_scale: Any
    sinks: Any
    out: Any
    lse: Any


class Part(NamedTuple):
    """Features of a head that are loaded together: a power of two of them, from the first on."""

    first: int
    width: int


def parts_of(head_dim: int) -> tuple[Part, ...]:
    """A head's features in powers of two, the largest first; the last part may reach past the end, and is masked.

    Triton's arrays have sides of powers of two. A head of 192 is one of 128 and one of 64: nothing is loaded or
    multiplied that is not there. Where no more than a quarter is missing, as of 112, one part costs less than three.
    """
    parts, first = [], 0
    while first < head_dim:
        left = head_dim - first
        width = max(pl.next_power_of_2(left), MIN_WIDTH)
        if left <= width * 3 // 4 and width > MIN_WIDTH:
            width //= 2
        parts.append(Part(first, width))
        first += width
    return tuple(parts)


def kernel(*arrays: Any, names: tuple[str, ...], problem: Problem, config: Any, row_blocks: int) -> None:
    """A program: one sequence, one KV head, a block of the query rows that share it, one share of what they see.

    Args:
      arrays: references to memory, inputs and outputs.
      names: which of `Refs` they are.
      problem: what is computed.
      config: block sizes.
      row_blocks: blocks of query rows.
    """
    refs = Refs(**dict.fromkeys(Refs._fields) | dict(zip(names, arrays, strict=True)))
    p, block_rows, block_kv = problem, config.block_rows, config.block_kv
    parts = parts_of(p.head_dim)
    b, place = pl.program_id(0), pl.program_id(1)
    place, split = divide(place, config.splits)
    head, row_block = divide(place, row_blocks)
    layer, length = refs.layer[0], jnp.clip(refs.lengths[b], 0, p.max_len)

    rows = p.q_len * p.group
    first_row = row_block * block_rows
    row = first_row + jnp.arange(block_rows, dtype=jnp.int32)  # [block_rows]
    query, member = divide(row, p.group)
    q_head = head * p.group + member
    real_row = row < rows
    position = length - p.q_len + query  # [block_rows]
    last_row = jnp.minimum(first_row + block_rows, rows) - 1
    span = online_softmax.span_of(p, length, first_row, last_row, block_kv, split, config.splits)

    def feature(part: Part) -> jax.Array:
        return part.first + jnp.arange(part.width, dtype=jnp.int32)

    def of_rows(part: Part) -> tuple[tuple[Any, ...], jax.Array]:
        """Where the rows' features stand in q and out, and which of them are there."""
        features = feature(part)
        index = (query[:, None], q_head[:, None], features[None, :])
        return index, real_row[:, None] & (features < p.head_dim)[None, :]

    loaded = []
    for part in parts:
        index, mask = of_rows(part)
        loaded.append(plgpu.load(refs.q.at[b, *index], mask=mask, other=0))  # [block_rows, width]
    queries = gpu_products.queries_of(p, loaded, integers=config.integers)

    def attend(block: jax.Array, state: online_softmax.State) -> online_softmax.State:
        first = block * block_kv
        token = first + jnp.arange(block_kv, dtype=jnp.int32)  # [block_kv]
        # What nobody sees may be anything, and 0 * NaN is NaN; so may the page table be past a sequence's end. Where a
        # block reaches past what is seen, the outermost token is read again: it costs less than to mask what is read.
        there = jnp.clip(token, span.oldest, span.newest)
        slab, within = jnp.asarray(b), there  # [block_kv]
        if p.page_size is not None:
            if p.page_size % block_kv == 0:
                page, _ = divide(first, p.page_size)
                slab = refs.page_table[b, page]
                within = there - page * p.page_size
            else:
                page, within = divide(there, p.page_size)
                slab = plgpu.load(refs.page_table.at[b, page])  # [block_kv]
            # A page that does not exist is read as the nearest that does.
            slab = jnp.clip(slab, 0, refs.k.shape[1] - 1)

        def load(ref: Any, part: Part, dtype: Any) -> jax.Array:
            """A part of the block's keys or values as operands of a dtype, `[block_kv, width]`."""
            # Codes that become other numbers do so in the order in which they are loaded, 16 of a thread, and not in
            # that of operands, where Triton would gather them byte by byte: its layouts do not pass a reduction, and
            # one along an axis of 1 is nothing else.
            held = p.has_scales and dtype != ref.dtype
            axes = (slice(None), None, None) if held else (slice(None), None)
            features = feature(part)
            across = (None, slice(None), None) if held else (None, slice(None))
            place = ref.at[layer, slab[axes] if slab.ndim else slab, head, within[axes], features[across]]
            mask = other = None
            if part.first + part.width > p.head_dim:
                mask, other = jnp.broadcast_to((features < p.head_dim)[across], place.shape), jnp.zeros((), ref.dtype)
            numbers = gpu_products.operand(plgpu.load(place, mask=mask, other=other), dtype)
            return jnp.max(numbers, axis=2) if held else numbers

        def load_scale(ref: Any) -> jax.Array | None:
            return None if ref is None else plgpu.load(ref.at[layer, slab, head, within])  # [block_kv]

        keys = [load(refs.k, part, x[0].dtype) for x, part in zip(queries.operands, parts, strict=True)]
        products = gpu_products.multiply_keys(queries, keys)  # [block_rows, block_kv]
        logits = online_softmax.logits_of(
            p, products, load_scale(refs.k_scale), online_softmax.visible(p, token, position)
        )
        weights, decay, state = online_softmax.weigh(p, state, logits)
        operands = gpu_products.weights_of(p, weights, load_scale(refs.v_scale))
        values = tuple(
            old * decay[:, None] + gpu_products.multiply_values(operands, load(refs.v, part, operands[0].dtype))
            for old, part in zip(state.values, parts, strict=True)
        )
        return state._replace(values=values)

    sinks = None
    if refs.sinks is not None:
        # A sink counts in one of the splits.
        sinks = plgpu.load(refs.sinks.at[q_head], mask=real_row, other=0.0)
        sinks = jnp.where(split == 0, sinks, -jnp.inf)
    state = online_softmax.start(p, block_rows, tuple(part.width for part in parts), sinks)
    state = jax.lax.fori_loop(span.begin, span.end, attend, state)

    outs, lse = online_softmax.finish(p, state)
    for part, out in zip(parts, outs, strict=True):
        index, mask = of_rows(part)
        plgpu.store(refs.out.at[split, b, *index], out.astype(refs.out.dtype), mask=mask)
    plgpu.store(refs.lse.at[split, b, query, q_head], lse, mask=real_row)


def merge_kernel(
    outs_ref: Any,  # [splits, batch, q_len, q_heads, head_dim], float32
    lses_ref: Any,  # [splits, batch, q_len, q_heads]
    out_ref: Any,  # [batch, q_len, q_heads, head_dim]
    lse_ref: Any,  # [batch, q_len, q_heads]
    *,
    problem: Problem,
    splits: int,
    width: int,
) -> None:
    """Merges the splits of one query of one head, `width` features in a program."""
    p = problem
    place, q_head = divide(pl.program_id(0), p.q_heads)
    place, query = divide(place, p.q_len)
    index = (place, query, q_head)
    split = jnp.arange(pl.next_power_of_2(splits), dtype=jnp.int32)
    features = pl.program_id(1) * width + jnp.arange(width, dtype=jnp.int32)
    there, real = split < splits, features < p.head_dim
    lses = plgpu.load(lses_ref.at[split, *index], mask=there, other=-jnp.inf)  # [splits]
    mask = there[:, None] & real[None, :]
    outs = plgpu.load(outs_ref.at[split[:, None], *index, features[None, :]], mask=mask, other=0.0)  # [splits, width]
    out, lse = merge_partials(outs, lses)
    plgpu.store(out_ref.at[*index, features], out.astype(out_ref.dtype), mask=real)
    # The programs of one query all find the same.
    plgpu.store(lse_ref.at[*index], lse)
