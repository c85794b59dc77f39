"""append_qkv on a GPU: rows of joined heads are rotated, and stored where attention finds them, in one launch.

For every sequence b and token i of q_len, at position lengths[b] - q_len + i:

    q[b, i, head]                              = rotated(qkv[b, i, head])                       the first q_heads
    cache.k[layer, slab, head - q_heads, row]  = rotated(qkv[b, i, head])                       the next kv_heads
    cache.v[…]                                 = qkv[b, i, head]                                the last ones
    rotated(x)[f] = x[f] * cos[f] -/+ x[partner of f] * sin[f]                                  minus in the first half

Grid: (batch, blocks of rows); a row is a token's head, and rows of a sequence lie one after the other. A program reads
a block of them once, each number again as its partner's (from the cache of the multiprocessor), and stores every row to
one of the three places. Two axes leave the third that Triton has for `jax.vmap`.

Where the cache is quantized, XLA rotates and quantizes, and `append_kv` moves what comes of it: codes and scales are
then those of the reference, bit for bit.

Bound by the launch: it takes the place of three, each of which would wait for the one before.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.append_kv.triton import call as append
from palladion.kernels.append_kv.triton.call import Config, bounded_length, place_of, written_tokens
from palladion.kernels.append_qkv.problem import Inputs, Problem, apart
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.tuning import Space
from palladion.reference.caches import QUANTIZED_CACHE_DTYPES, KVCache

BLOCK_BYTES: Final = 4 * 2**10
"""Of a program's rows in float32: 32 bytes for each of 128 threads, so that a token's heads are some programs."""


def heuristic(problem: Problem) -> Config:
    """A few heads of a token, so that even one sequence has several programs."""
    p = problem.append
    if _is_quantized(problem):
        return append.heuristic(p)
    row_bytes = pl.next_power_of_2(p.head_dim) * 4
    rows = min(pl.next_power_of_2(p.q_len * problem.heads), pl.next_power_of_2(max(BLOCK_BYTES // row_bytes, 1)))
    return Config(rows, num_warps=min(max(pl.next_power_of_2(rows * row_bytes // (32 * 32)), 1), 4))


def space(problem: Problem) -> Space:
    """Rows of a program, and its warps."""
    rows = [1 << n for n in range(10) if 1 << n < 2 * problem.append.q_len * problem.heads]
    return Space(heuristic(problem), {"block_rows": rows, "num_warps": (1, 2, 4, 8)})


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    return append.unsupported(problem.append)


def append_qkv(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> tuple[jax.Array, KVCache]:
    """Runs the kernel; see `palladion.append_qkv` for the contract."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    p, cache = problem.append, inputs.cache
    if _is_quantized(problem):
        q, rest = apart(inputs)
        return q, append.append_kv(p, rest, config=config, interpret=interpret)
    held = [cache.k, cache.v] if inputs.layer is not None else [cache.k[None], cache.v[None]]
    arrays = {
        "layer": jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None],
        "lengths": inputs.lengths,
        "new_tokens": inputs.new_tokens,
        "page_table": cache.page_table,
        "qkv": inputs.qkv,
        "cosine": inputs.cosine,
        "sine": inputs.sine,
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    q, k, v = pl.pallas_call(
        fresh_kernel(_kernel, names=(*arrays, "q", "k", "v"), problem=problem, block_rows=config.block_rows),
        grid=(p.batch, pl.cdiv(p.q_len * problem.heads, config.block_rows)),
        out_shape=[
            jax.ShapeDtypeStruct((p.batch, p.q_len, problem.q_heads, p.head_dim), inputs.qkv.dtype),
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in held),
        ],
        input_output_aliases={len(arrays): 1, len(arrays) + 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=problem.flops(), bytes_accessed=problem.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"append_qkv_r{config.block_rows}",
    )(*arrays.values(), *held)
    if inputs.layer is None:
        k, v = k[0], v[0]
    return q, dataclasses.replace(cache, k=k, v=v)


def _is_quantized(problem: Problem) -> bool:
    return problem.append.kv_dtype in QUANTIZED_CACHE_DTYPES


class Refs(NamedTuple):
    """Arrays in memory, as the kernel takes them.

    Attributes:
      layer: int32 `[1]`.
      lengths: int32 `[batch]`.
      new_tokens: int32 `[batch]` or None.
      page_table: int32 `[batch, pages_per_seq]` or None.
      qkv: `[batch, q_len, heads, head_dim]`.
      cosine: float32 `[batch, q_len, rotary_dim / 2]`.
      sine: like cosine.
      q: `[batch, q_len, q_heads, head_dim]`.
      k: `[num_layers, slabs, kv_heads, rows, head_dim]`.
      v: like k.
    """

    layer: Any
    lengths: Any
    new_tokens: Any
    page_table: Any
    qkv: Any
    cosine: Any
    sine: Any
    q: Any
    k: Any
    v: Any


def _kernel(*arrays: Any, names: tuple[str, ...], problem: Problem, block_rows: int) -> None:
    # The cache is an input, too, between the other inputs and the outputs, where nobody reads it.
    outputs = 3
    taken = (*arrays[: len(names) - outputs], *arrays[-outputs:])
    ref = Refs(**dict.fromkeys(Refs._fields) | dict(zip(names, taken, strict=True)))
    p, pairs = problem.append, problem.rotary_dim // 2
    b = pl.program_id(0)
    length = bounded_length(p, ref.lengths[b])

    r = pl.program_id(1) * block_rows + jnp.arange(block_rows, dtype=jnp.int32)  # [block_rows]
    real = r < p.q_len * problem.heads
    token, head = jax.lax.div(r, jnp.full_like(r, problem.heads)), jax.lax.rem(r, jnp.full_like(r, problem.heads))
    begin, end = written_tokens(p, length, None if ref.new_tokens is None else ref.new_tokens[b])
    written = real & (token >= begin) & (token < end)
    slab, row, written = place_of(p, b, ref.layer[0], length, token, ref.page_table, written)

    feature = jnp.arange(pl.next_power_of_2(p.head_dim), dtype=jnp.int32)  # [features]
    wide = real[:, None] & (feature < p.head_dim)[None, :]  # [block_rows, features]
    # The angle of a feature, and the one that it is turned with; values and what is past rotary_dim are not turned.
    angle = jnp.where(feature < pairs, feature, feature - pairs)
    partner = jnp.where(feature < pairs, feature + pairs, feature - pairs)
    key_heads = problem.q_heads + p.kv_heads
    turned = wide & (head < key_heads)[:, None] & (feature < 2 * pairs)[None, :]

    def load(source: Any, features: jax.Array, mask: jax.Array, other: float, *head: jax.Array) -> jax.Array:
        place = source.at[b, token[:, None], *(one[:, None] for one in head), features[None, :]]
        return plgpu.load(place, mask=mask, other=other).astype(jnp.float32)

    x, across = load(ref.qkv, feature, wide, 0, head), load(ref.qkv, partner, turned, 0, head)
    cosine, sine = load(ref.cosine, angle, turned, 1), load(ref.sine, angle, turned, 0)
    signed = jnp.where((feature < pairs)[None, :], -across, across)
    heads = (x * cosine + signed * sine).astype(ref.qkv.dtype)

    queries = wide & (head < problem.q_heads)[:, None]
    plgpu.store(ref.q.at[b, token[:, None], head[:, None], feature[None, :]], heads, mask=queries)
    for cache, first in ((ref.k, problem.q_heads), (ref.v, key_heads)):
        mine = written & (head >= first) & (head < first + p.kv_heads)
        # Interpretation puts back what was where nothing is to be stored: past the end there is nothing to put back.
        cache_head = jnp.where(mine, head - first, p.kv_heads)
        place = (ref.layer[0], slab[:, None], cache_head[:, None], row[:, None], feature[None, :])
        plgpu.store(cache.at[place], heads.astype(cache.dtype), mask=wide & mine[:, None])
