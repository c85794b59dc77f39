"""append_qkv on a GPU: rotates queries and keys and stores all heads, in one launch.

For every sequence b and token i of q_len, at position lengths[b] - q_len + i:

    q[b, i, head]                              = rotated(qkv[b, i, head])                       the first q_heads
    cache.k[layer, slab, head - q_heads, row]  = rotated(qkv[b, i, head])                       the next kv_heads
    cache.v[…]                                 = qkv[b, i, head]                                the last kv_heads
    rotated(x)[f] = x[f] * cos[f] -/+ x[partner of f] * sin[f]                                  minus in the first half

Grid: (batch, blocks of rows). A row is one head of one token; rows of a sequence are contiguous. Each program reads a
block of rows, and each number a second time as its partner's (an L1 hit), and stores each row to one of three arrays.
Triton grids have three axes; the third one stays free for `jax.vmap`.

For a quantized cache XLA rotates and quantizes, and append_kv's kernel writes: codes and scales are the reference's,
bit for bit.

Bound by launch latency: one launch replaces three that would wait for each other.
"""

from __future__ import annotations

import dataclasses
from typing import Final, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.append_kv.row_blocks import Config as Config
from palladion.kernels.append_qkv.problem import Inputs, Problem
from palladion.kernels.append_qkv.triton.kernel import CacheArrays, KernelInputs, kernel
from palladion.kernels.append_qkv.xla_rotation import RotationInXla
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference.caches import KVCache

BLOCK_BYTES: Final = 4 * 2**10
"""Bytes of a program's rows in float32: 32 for each of 128 threads, so that the heads of one token fill programs."""

IN_XLA: Final = RotationInXla("triton")
"""Runs calls with a quantized cache."""


def heuristic(problem: Problem) -> Config:
    """Returns block sizes of a few heads per program, so that even one token has several programs."""
    p = problem.append
    if problem.quantized:
        return cast(Config, IN_XLA.heuristic(problem))
    row_bytes = pl.next_power_of_2(p.head_dim) * 4
    rows = min(pl.next_power_of_2(p.q_len * problem.heads), pl.next_power_of_2(max(BLOCK_BYTES // row_bytes, 1)))
    return Config(rows, num_warps=min(max(pl.next_power_of_2(rows * row_bytes // (32 * 32)), 1), 4))


def space(problem: Problem) -> Space:
    """Returns the rows and warps per program that the tuner may try."""
    rows = [1 << n for n in range(10) if 1 << n < 2 * problem.append.q_len * problem.heads]
    return Space(heuristic(problem), {"block_rows": rows, "num_warps": (1, 2, 4, 8)})


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    return IN_XLA.unsupported(problem)


def append_qkv(
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret
) -> tuple[jax.Array, KVCache]:
    """Runs the kernel; see `palladion.append_qkv` for the contract."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    if problem.quantized:
        return IN_XLA.run(problem, inputs, config=config, interpret=interpret)
    p, cache = problem.append, inputs.cache
    read = KernelInputs(
        layer=jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None],
        lengths=inputs.lengths,
        new_tokens=inputs.new_tokens,
        page_table=cache.page_table,
        qkv=inputs.qkv,
        cosine=inputs.cosine,
        sine=inputs.sine,
    )
    old = CacheArrays(cache.k, cache.v) if inputs.layer is not None else CacheArrays(cache.k[None], cache.v[None])
    first_alias = len(jax.tree.leaves(read))
    q, written = pl.pallas_call(
        fresh_kernel(kernel, problem=problem, block_rows=config.block_rows),
        grid=(p.batch, pl.cdiv(p.q_len * problem.heads, config.block_rows)),
        out_shape=(
            jax.ShapeDtypeStruct((p.batch, p.q_len, problem.q_heads, p.head_dim), inputs.qkv.dtype),
            jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), old),
        ),
        input_output_aliases={first_alias: 1, first_alias + 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=problem.flops(), bytes_accessed=problem.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"append_qkv_r{config.block_rows}",
    )(read, old)
    k, v = written if inputs.layer is not None else (written.k[0], written.v[0])
    return q, dataclasses.replace(cache, k=k, v=v)
