"""Launch of the kernel for many query rows, and its block sizes. See `many_rows.py` for what it computes.

Nothing is copied before or after the kernel where rows are queries of one head: TMA takes them out of the queries and
puts the output between those of other heads. Heads are packed, so that rows are those of all heads of a KV head, where
that saves a fifth of the programs or more: XLA then transposes queries and output, which are few.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.compat import fresh_kernel, gpu_interpreter
from palladion.kernels.decode_attention.mosaic_gpu.config import BLOCKS_KV, MANY_ROWS, Config
from palladion.kernels.decode_attention.mosaic_gpu.kernel import Results
from palladion.kernels.decode_attention.mosaic_gpu.many_rows import kernel
from palladion.kernels.decode_attention.mosaic_gpu.memory import (
    Refs,
    scratch_types,
    shared_bytes,
    sinks_by_rows,
    stage_bytes,
)
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.decode_attention.splits import splits_of
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.integers import round_up
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference import merge_partials

TMA_ROWS: Final = 8
"""Rows that TMA reads and writes together."""

MOST_STAGES: Final = 4

MOST_REGISTERS: Final = {128: 176, 192: 128}
"""Most registers of a thread for the output, the logits of a block, and weights, by rows of a program."""


def rows_as_heads(problem: Problem, block_rows: int) -> Problem:
    """Returns the problem whose KV heads are the heads of programs, and whose `group` is the rows of a query."""
    p = problem
    apart, packed = p.group * pl.cdiv(p.q_len, block_rows), pl.cdiv(p.q_len * p.group, block_rows)
    return p if 4 * apart >= 5 * packed else dataclasses.replace(p, kv_heads=p.q_heads)


def fits(problem: Problem, config: Config) -> bool:
    """Returns whether a program has the registers and the shared memory for block sizes for many rows."""
    registers = problem.head_dim // 2 + config.block_kv // 2 + config.block_kv // 4
    most = gpu_to_plan_for().program_shared_bytes
    return registers <= MOST_REGISTERS[config.block_rows] and shared_bytes(problem, config) <= most


def heuristic(problem: Problem) -> Config | None:
    """Returns block sizes for many rows, and splits with which they fill the chip; None where rows are few.

    That is also the case for one-byte caches, whose codes wgmma cannot take as its right operand.
    """
    p, gpu, block_rows = problem, gpu_to_plan_for(), MANY_ROWS[0]
    if p.has_scales or p.q_len * p.group < block_rows:
        return None
    apart = rows_as_heads(p, block_rows)
    programs = p.batch * apart.kv_heads * pl.cdiv(p.q_len * apart.group, block_rows)
    for block_kv in (128, 64):
        splits = splits_of(p, programs, block_kv, gpu, most_resident=1)
        config = Config(block_kv, block_rows, splits, num_stages=1, ping_pong=True)
        stages = 1 + (gpu.program_shared_bytes - shared_bytes(p, config)) // stage_bytes(p, block_kv)
        config = dataclasses.replace(config, num_stages=max(min(stages, MOST_STAGES), 1))
        if stages > 1 and fits(p, config):
            return config
    return None


def space(problem: Problem, start: Config) -> Space:
    """Returns what the tuner may try for many rows."""
    axes = {
        "splits": [splits for splits in (1, 2, 3, 4, 6, 8, 16) if start.splits <= 2 * splits <= 4 * start.splits],
        "block_rows": MANY_ROWS,
        "block_kv": BLOCKS_KV,
        "num_stages": (2, 3, 4, 6),
        "ping_pong": (False, True),
        "overlaps": (False, True),
    }
    return Space(start, axes, lambda config: fits(problem, config))


def decode_attention(
    problem: Problem, inputs: Inputs, config: Config, interpret: Interpret
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; arguments and results are those of `call.decode_attention`."""
    p = rows_as_heads(problem, config.block_rows)
    rows, row_blocks = p.q_len * p.group, pl.cdiv(p.q_len * p.group, config.block_rows)
    all_rows = row_blocks * config.block_rows
    splits, whole = config.splits, config.splits == 1
    # Only TMA leaves out rows that there are not, and in the interpreter it writes nothing of a block that has some.
    out_rows = round_up(rows, TMA_ROWS) if whole and not interpret else all_rows
    out_dtype = jnp.dtype(p.q_dtype if whole else "float32")
    results = Results(
        jax.ShapeDtypeStruct((splits, p.batch, out_rows, p.kv_heads, p.head_dim), out_dtype),
        jax.ShapeDtypeStruct((splits, p.batch, p.kv_heads, all_rows), jnp.float32),
    )
    (found,) = plgpu.kernel(
        fresh_kernel(kernel, problem=p, config=config, interpret=bool(interpret)),
        out_type=(results,),
        scratch_types=[scratch_types(p, config, whole=True, interpret=bool(interpret))],
        grid=(row_blocks, splits * p.batch, p.kv_heads),
        grid_names=("row", "slot", "head"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        interpret=gpu_interpreter(interpret or False),
        kernel_name=f"decode_attention_r{config.block_rows}_kv{config.block_kv}_s{splits}"
        f"{'_ping_pong' if config.ping_pong else ''}{'_overlaps' if config.overlaps else ''}",
    )(_refs(p, inputs, all_rows))
    out, lse = found[0][:, :, :rows], found[1][..., :rows].swapaxes(2, 3)
    out, lse = (out[0], lse[0]) if whole else merge_partials(out, lse)
    return _by_queries(p, inputs.q.shape, out.astype(p.q_dtype), lse)


def _refs(problem: Problem, inputs: Inputs, all_rows: int) -> Refs:
    """Returns the inputs as the kernel takes them.

    Args:
      problem: the call, whose `group` is the number of rows of a query.
      inputs: the inputs.
      all_rows: rows of all blocks, of which sinks are read.
    """
    p, rows = problem, problem.q_len * problem.group
    q = inputs.q.reshape(p.batch, p.q_len, p.kv_heads, p.group, p.head_dim).swapaxes(2, 3)
    q = q.reshape(p.batch, rows, p.kv_heads, p.head_dim)
    if rows % TMA_ROWS:
        q = jnp.pad(q, ((0, 0), (0, -rows % TMA_ROWS), (0, 0), (0, 0)))
    cache = inputs.k, inputs.v
    if inputs.layer is None:
        cache = inputs.k[None], inputs.v[None]
    layer = None if inputs.layer is None else inputs.layer[None]
    sinks = sinks_by_rows(p, inputs.sinks, all_rows)
    return Refs(layer, inputs.lengths, q, *cache, page_table=inputs.page_table, sinks=sinks)


def _by_queries(
    problem: Problem, shape: tuple[int, ...], out: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns results of rows, `[batch, rows, heads, head_dim]` and without head_dim, in the shape of queries."""
    p = problem
    found = (x.reshape(p.batch, p.q_len, p.group, p.kv_heads, -1).swapaxes(2, 3) for x in (out, lse))
    return next(found).reshape(shape), next(found).reshape(shape[:-1])
