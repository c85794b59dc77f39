"""append_kv on a GPU: stores the rows of new tokens at their positions in the cache and touches nothing else.

For every sequence b and token i of q_len, in every KV head:

    cache[layer, slab, head, row] = new[b, i, head]     position = lengths[b] - q_len + i
                                                        slab, row = b, position                          dense
                                                                    page of the position, offset in it   paged

Grid: (batch, blocks of rows). A row is one head of one token; rows of a sequence are contiguous in the new keys and
values. Each program copies a block of rows: keys, values, and their scales if there are any. Triton grids have three
axes; the third one stays free for `jax.vmap`.

The cache is passed as an input that is never read and is aliased with the output, so that a donated cache is updated
in place. Tokens that must not be written are not stored, and their page table entries, whose values are arbitrary, are
not read. XLA quantizes, in the fusion that computes keys and values: codes and scales are the reference's, bit for bit,
and the kernel copies numbers of any dtype unchanged.

Bound by launch latency: a decoding step moves a kilobyte for each key and value of a head.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.append_kv.problem import Inputs, Problem
from palladion.kernels.append_kv.row_blocks import Config as Config
from palladion.kernels.append_kv.triton.kernel import CacheArrays, Control, kernel
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, offsets_wrap
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference.caches import KVCache, quantize_kv

BLOCK_BYTES: Final = 8 * 2**10
"""Bytes of keys in a block: four loads of 16 bytes for each of 128 threads. Values take as many again."""


def heuristic(problem: Problem) -> Config:
    """Returns block sizes that keep the heads of a token together, with as many tokens as fill a program."""
    p = problem
    row_bytes = pl.next_power_of_2(p.head_dim) * jnp.dtype(p.kv_dtype).itemsize
    most_rows = max(BLOCK_BYTES // row_bytes, 1)
    rows = min(pl.next_power_of_2(p.q_len * p.kv_heads), 1 << (most_rows.bit_length() - 1))
    # 16 bytes per thread, and fewer warps where there are fewer rows.
    return Config(rows, num_warps=min(max(pl.next_power_of_2(rows * row_bytes // (16 * 32)), 1), 4))


def space(problem: Problem) -> Space:
    """Returns the rows and warps per program that the tuner may try."""
    p, start = problem, heuristic(problem)
    rows = [1 << n for n in range(10) if 1 << n < 2 * p.q_len * p.kv_heads]
    return Space(start, {"block_rows": rows, "num_warps": (1, 2, 4, 8)})


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    p = problem
    if jnp.dtype(p.kv_dtype).itemsize == 1:
        tokens = p.batch * p.max_len if p.num_pages is None else p.num_pages * (p.page_size or 1)
        size = math.prod((p.num_layers or 1, tokens, p.kv_heads, p.head_dim))
        if offsets_wrap(size):
            return f"keys of a {p.kv_dtype} cache must take up to 2 GiB, or more than 4, got {size} bytes"
    return None


def append_kv(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> KVCache:
    """Runs the kernel; see `palladion.append_kv` for the contract."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    p, cache = problem, inputs.cache
    k, k_scale = quantize_kv(inputs.k, cache.k.dtype)
    v, v_scale = quantize_kv(inputs.v, cache.v.dtype)
    control = Control(
        layer=jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None],
        lengths=inputs.lengths,
        new_tokens=inputs.new_tokens,
        page_table=cache.page_table,
    )
    new = CacheArrays(k, v, k_scale, v_scale)
    old = CacheArrays(cache.k, cache.v, cache.k_scale, cache.v_scale)
    if inputs.layer is None:
        old = jax.tree.map(lambda array: array[None], old)
    first_alias = len(jax.tree.leaves((control, new)))
    (written,) = pl.pallas_call(
        fresh_kernel(kernel, problem=p, block_rows=config.block_rows),
        grid=(p.batch, pl.cdiv(p.q_len * p.kv_heads, config.block_rows)),
        out_shape=(jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), old),),
        input_output_aliases={first_alias + n: n for n in range(len(jax.tree.leaves(old)))},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"append_kv_r{config.block_rows}",
    )(control, new, old)
    if inputs.layer is None:
        written = jax.tree.map(lambda array: array[0], written)
    return dataclasses.replace(cache, **written._asdict())
