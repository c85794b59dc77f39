"""decode_attention on Hopper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, gpu_interpreter
from palladion.kernels.decode_attention.mosaic_gpu.config import Config as Config
from palladion.kernels.decode_attention.mosaic_gpu.kernel import Refs, kernel, scratch_types
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.decode_attention.shares import slots_of
from palladion.kernels.types import Interpret


def decode_attention(
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; see `palladion.decode_attention` for the contract."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_gpu.Config or None")
    config = config or Config(64, 8, 2)
    p, slots = problem, slots_of(problem, config)
    rows = p.q_len * p.group
    row_blocks = pl.cdiv(rows, config.block_rows)
    q = inputs.q.reshape(p.batch, p.q_len, p.kv_heads, p.group, p.head_dim)
    q = q.swapaxes(1, 2).reshape(p.batch, p.kv_heads, rows, p.head_dim)
    if rows > 8 and rows % 8:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, -rows % 8), (0, 0)))
    merges = slots > p.batch
    padded = row_blocks * config.block_rows
    out_dtype = jnp.dtype(jnp.float32 if merges else p.q_dtype)
    out_rows = padded if interpret else q.shape[2]
    k, v = inputs.k, inputs.v
    if inputs.layer is None:
        k, v = k[None], v[None]
    out, lse = plgpu.kernel(
        fresh_kernel(kernel, problem=p, config=config, interpret=bool(interpret)),
        out_type=(
            jax.ShapeDtypeStruct((slots, p.kv_heads, out_rows, p.head_dim), out_dtype),
            jax.ShapeDtypeStruct((slots, p.kv_heads, padded), jnp.float32),
        ),
        scratch_types=[scratch_types(p, config, out_dtype, bool(interpret))],
        grid=(slots, p.kv_heads, row_blocks),
        grid_names=("slot", "head", "row"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=gpu_interpreter(interpret or False),
        kernel_name="decode_attention",
    )(Refs(None if inputs.layer is None else inputs.layer[None], inputs.lengths, q, k, v))
    out, lse = out[:, :, :rows], lse[:, :, :rows]
    if merges:
        out = out.reshape(p.batch, config.splits, *out.shape[1:])
        lse = lse.reshape(p.batch, config.splits, *lse.shape[1:])
        m = jnp.max(lse, axis=1, keepdims=True)
        w = jnp.exp(lse - jnp.where(m == -jnp.inf, 0, m))
        total = jnp.sum(w, axis=1)
        out = jnp.sum(w[..., None] * out, axis=1) / jnp.where(total == 0, 1, total)[..., None]
        lse = m[:, 0] + jnp.log(total)
        out = out.astype(p.q_dtype)
    out = out.reshape(p.batch, p.kv_heads, p.q_len, p.group, p.head_dim).swapaxes(1, 2)
    lse = lse.reshape(p.batch, p.kv_heads, p.q_len, p.group).swapaxes(1, 2)
    return out.reshape(inputs.q.shape), lse.reshape(inputs.q.shape[:-1])
