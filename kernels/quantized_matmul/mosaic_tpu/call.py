"""Runs quantized_matmul on a TPU: a few rows of activations times a wide weight of 8- or 4-bit codes.

    y = sum_g (x_g @ (code_g - zero_g)) * scale_g + sum(x_g) * minimum_g        result = finish(y + bias)

Grid: (cores, row blocks, out blocks of a core, in blocks). A step takes a block of output channels with all of `in`, as
long as that is no more than a few MB; otherwise several steps share the channels and add up. Inside, chunks of `in` are
dequantized one after the other and multiplied at once: wide weights exist in registers and in VMEM only.

Codes stay in their stored order, and are not converted where the matrix unit takes their bits (`dequantize.py`).
Instead, before the kernel, the columns of x are put in the order of the codes and float32 is split into bfloat16
pieces; sums of x over each group correct for offsets. `kernel.py` says how products are scaled.

Resident in VMEM: x of the row block; three blocks each of codes, scales, zeros, minimums, one in use while the others
are in flight (`ring.py`). A gated call has all but x twice, gate and up, from the same arrays. A stacked weight is read
at the blocks of one layer: no layer is copied.

Bound by memory up to about a hundred rows: each code is read once for 2 * rows FLOPs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.float_bits import bfloat16_pieces
from palladion.kernels.quantized_matmul.mosaic_tpu.block_sizes import (
    Config,
    check_config,
    fits,
    heuristic,
    kernel_problem,
    make_plan,
    space,
    unsupported,
    vmem_limit,
)
from palladion.kernels.quantized_matmul.mosaic_tpu.kernel import bits_dtype, kernel
from palladion.kernels.quantized_matmul.mosaic_tpu.plan import Plan
from palladion.kernels.quantized_matmul.mosaic_tpu.refs import Rows, Scratch, Weight, present
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.tpu_layout import LANES, minor_axes
from palladion.kernels.types import Interpret
from palladion.reference.quantization import quantize_rows

__all__ = ["Config", "check_config", "fits", "heuristic", "quantized_matmul", "space", "unsupported"]


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    if problem.norm_eps is not None or problem.has_residual:
        plain, plain_inputs = problem.plain(inputs)
        out = quantized_matmul(plain, plain_inputs, config=config, interpret=interpret)
        return problem.add(inputs.residual, out)
    p = kernel_problem(problem)
    if p is not problem:
        y = quantized_matmul(p, inputs, config=config, interpret=interpret)
        return problem.finish(jnp.split(y, 2, axis=1)).astype(problem.out_dtype)
    config = config or heuristic(p)
    check_config(p, config)
    plan = make_plan(p, config)
    whole_tiles = p.result_features // LANES * LANES
    if plan.block_out == p.result_features or whole_tiles == p.result_features:
        out = _run(plan, inputs, 0, interpret)
    else:
        # A DMA may end within a tile only where its buffer does: the last channels take a call of their own.
        widths = {0: whole_tiles, whole_tiles: p.result_features - whole_tiles}
        plans = {
            first: make_plan(dataclasses.replace(p, out_features=width), config) for first, width in widths.items()
        }
        out = jnp.concatenate([_run(plan, inputs, first, interpret) for first, plan in plans.items()], axis=1)
    return out[: p.rows].astype(p.out_dtype)


def _run(plan: Plan, inputs: Inputs, first_channel: int, interpret: Interpret) -> jax.Array:
    """Computes the channels of the plan's problem, from `first_channel` on: `[rows of all row blocks, channels]`."""
    p, blocks = plan.problem, plan.weight_blocks(first_channel)
    x = jnp.pad(inputs.x, ((0, blocks.row_blocks * plan.block_rows - p.rows), (0, 0)))
    rows = _prepare_rows(plan, x.reshape(blocks.row_blocks, plan.block_rows, p.in_features))
    weight = _prepare_weight(inputs)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        fresh_kernel(kernel, plan=plan, first_channel=first_channel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks.cores, blocks.row_blocks, blocks.out_blocks_per_core, plan.in_blocks),
            in_specs=jax.tree.map(lambda _: in_hbm, (rows, weight)),
            out_specs=pl.BlockSpec(
                (plan.block_rows, plan.block_out), lambda core, i, j, *_: (i, blocks.out_block(core, j))
            ),
            scratch_shapes=(_scratch(plan, rows, weight),),
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], p.result_features), _stored_dtype(p.out_dtype)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit() // 6 * 7,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"quantized_matmul_{p.scheme}_{plan.dequantizer_name}".replace("-", "_"),
    )(jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None], rows, weight)


def _scratch(plan: Plan, rows: Rows, weight: Weight) -> Scratch:
    """Returns the shapes of the kernel's memory for arrays as they lie in HBM."""

    def ring(array: jax.Array) -> Any:
        block_rows = array.shape[1] // (plan.in_blocks if array.shape[1] > 1 else 1)
        return pltpu.VMEM((plan.buffers, block_rows, plan.block_out), array.dtype)

    parts = plan.problem.parts
    accumulator = pltpu.VMEM((plan.block_rows, plan.block_out), plan.accumulator_dtype)
    return Scratch(
        rows=jax.tree.map(lambda array: pltpu.VMEM(array.shape[1:], array.dtype), rows),
        weights=(jax.tree.map(ring, weight),) * parts,
        rows_arrived=pltpu.SemaphoreType.DMA((len(present(rows)),)),
        weights_arrived=pltpu.SemaphoreType.DMA((parts * len(present(weight)), plan.buffers)),
        accumulators=(accumulator,) * parts if plan.in_blocks > 1 else (),
    )


def _stored_dtype(dtype: str) -> str:
    """Returns the dtype in which the kernel writes a result: Mosaic has no float16."""
    return "float32" if dtype == "float16" else dtype


def _prepare_rows(plan: Plan, x: jax.Array) -> Rows:
    """Returns what the kernel reads of x `[row_blocks, block_rows, in]`: operands, masks, sums and scales."""
    p = plan.problem
    row_blocks, block_rows, _ = x.shape
    scales = sums = None
    if p.quantize_x is not None:
        x, row_scales = quantize_rows(x, p.quantize_x)
        scales = row_scales[:, None, :, None]
    wide = x.astype(jnp.float32)
    if plan.needs_sums:
        group_sums = wide.reshape(row_blocks, block_rows, plan.sum_blocks, plan.groups, -1).sum(axis=4)
        sums = group_sums.transpose(0, 2, 1, 3)
    pieces = list(bfloat16_pieces(wide, plan.pieces)) if plan.pieces > 1 else [x]
    operands = jnp.stack([piece.astype(plan.x_operand) for piece in pieces] * plan.groups_per_tile, axis=1)
    operands = plan.dequantizer.reorder(operands, plan.chunk).reshape(row_blocks, -1, plan.in_blocks, plan.block_in)
    operands = jnp.pad(operands, ((0, 0), (0, plan.stacked_rows - operands.shape[1]), (0, 0), (0, 0)))
    masks = jnp.asarray(plan.masks())[None] if plan.groups_per_chunk > 1 else None
    return Rows(operands.transpose(0, 2, 1, 3), masks, sums, scales)


def _prepare_weight(inputs: Inputs) -> Weight:
    """Returns the arrays of the weight, and the bias, as the kernel reads them."""
    w, layer = inputs.w, inputs.layer

    def stacked(array: jax.Array | None) -> jax.Array | None:
        """Returns an array as `[layers, rows, out]`, with one layer where the kernel cannot reach into the stack."""
        if array is None:
            return None
        dtype = bits_dtype(array.dtype.name)
        bits = array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, jnp.dtype(dtype))
        if layer is None:
            return bits[None]
        if minor_axes(bits.shape, bits.dtype)[0] == 0:
            # XLA interleaves the layers of such a stack, so that no block belongs to one layer.
            return jax.lax.dynamic_index_in_dim(bits, layer, 0)
        return bits

    bias = None if inputs.bias is None else inputs.bias.astype(jnp.float32)[None, None]
    return Weight(stacked(w.values), stacked(w.scales), stacked(w.zeros), stacked(w.minimums), bias)
