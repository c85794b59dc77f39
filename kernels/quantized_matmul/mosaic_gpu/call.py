"""quantized_matmul on Hopper and Blackwell: TMA brings codes, registers convert them, tensor cores multiply them.

Splits write float32 sums, which XLA adds up, together with bias, activation, gate and residual; where there is one
split, or the programs of all splits are a cluster that merges them (`cluster_merge.py`), the kernel does all of it. x
is normalized in a launch of its own (`gpu_norm.py`), and XLA quantizes it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels import gpu_norm
from palladion.kernels.checks import check
from palladion.kernels.compat import INTERPRETS_CLUSTERS, fresh_kernel, gpu_interpreter
from palladion.kernels.devices import target_gpu
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.mosaic_gpu import tensor_memory
from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import (
    BLACKWELL,
    CHANNELS,
    FEW_ROWS,
    Config,
    finishes,
    heuristic,
    least_unit,
    merges,
    on_blackwell,
    operand_dtype,
    takes_many_rows,
    total_dtype,
)
from palladion.kernels.quantized_matmul.mosaic_gpu.kernel import kernel
from palladion.kernels.quantized_matmul.mosaic_gpu.program import Refs
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.types import Interpret
from palladion.reference.quantization import quantize_rows
from palladion.reference.scheme import PACK_BLOCK

HOPPER: Final = 90
"""Compute capability whose tensor cores take the left operand out of registers, by wgmma."""

TMA_ROWS: Final = 8
"""Rows that TMA reads together: channels, and rows of x beyond these, must be multiples of them."""

PREFERRED_ROWS: Final = range(5, 256 + 1)
"""Rows of x that this kernel is preferred for where nothing was measured."""


def preferred(problem: Problem) -> bool:
    """Returns whether rows are multiplied on a GPU on whose like the kernel was right, and as many as it was fast with.

    On an H200, Triton took less time for one row, and more for 16; at 256 rows XLA's product took 1.4 to 1.8 times as
    long (docs/gpu.md).
    """
    gpu = target_gpu()
    return problem.rows in PREFERRED_ROWS and gpu is not None and "quantized_matmul" in gpu.mosaic_gpu


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    p, gpu = problem, target_gpu()
    if gpu is not None and gpu.compute_capability not in (HOPPER, BLACKWELL):
        return f"needs wgmma or tcgen05, which sm_{HOPPER} and sm_{BLACKWELL} have, got sm_{gpu.compute_capability}"
    if (reason := p.order_unsupported("out_in")) is not None:
        return reason
    if p.quantize_x is None and p.x_dtype == "float32":
        return "x must be bfloat16 or float16, or quantized (quantize_x=), got float32"
    if p.scale_dtype not in ("float32", "bfloat16", "float16", "float8_e8m0fnu"):
        return f"scales must be float32, bfloat16, float16 or float8_e8m0fnu, got {p.scale_dtype}"
    if p.result_features < CHANNELS or p.result_features % TMA_ROWS:
        return f"channels of the result must be a multiple of {TMA_ROWS}, at least {CHANNELS}, got {p.result_features}"
    unit = max(least_unit(p), 32)
    if p.scheme.packed:
        unit = 2 * PACK_BLOCK
    if p.in_features % unit:
        return f"in must be a multiple of {unit}, got {p.in_features}: rows of codes are read by 32 bytes"
    if p.group_size % least_unit(p):
        return f"groups must be multiples of {least_unit(p)} for {operand_dtype(p)} operands, got {p.group_size}"
    return tensor_memory.unsupported(p) if on_blackwell() else None


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_gpu.Config or None")
    config = config or heuristic(problem.planned())
    if config.tensor_memory:
        reason = tensor_memory.unsupported(problem)
        check(reason is None, "config.tensor_memory", True, f"False: {reason}")
    if not interpret:
        check(config.tensor_memory == on_blackwell(), "config.tensor_memory", config.tensor_memory, f"{on_blackwell()}")
    if interpret and not INTERPRETS_CLUSTERS:
        config = dataclasses.replace(config, multicast=1)
    residual = inputs.residual
    p, inputs = problem.plain(inputs, functools.partial(gpu_norm.rms_norm, interpret=bool(interpret)))
    check(config.block_out <= p.result_features, "config.block_out", config.block_out, f"up to {p.result_features}")
    right = config.warpgroups == 1 or takes_many_rows(p)
    check(right, "config.block_rows", config.block_rows, f"up to {FEW_ROWS[-1]} for {p}")
    whole, in_cluster, rows = finishes(p, config), merges(p, config), p.rows
    row_blocks = pl.cdiv(rows, config.block_rows)
    refs = _refs(p, inputs, row_blocks * config.block_rows)
    x_scale = refs.x_scale
    if interpret:
        rows = row_blocks * config.block_rows  # the interpreter writes nothing of a block that reaches over the end
    if whole:
        result = jax.ShapeDtypeStruct((rows, p.result_features), p.out_dtype)
    else:
        # Rows come first: a copy to what lies contiguously in device memory is only cut at the end of the array.
        result = jax.ShapeDtypeStruct((rows, config.splits, p.parts, p.result_features), jnp.float32)
        refs = refs._replace(x_scale=None, bias=None)
    # The residual waits where the result will be, in the same dtype.
    fused = whole and residual is not None and residual.dtype == p.out_dtype
    if fused:
        refs, residual = refs._replace(residual=residual), None
    barrier = plgpu.Barrier(num_barriers=config.warpgroups) if fused else None
    width = config.block_out // config.warpgroups
    staged = plgpu.SMEM((config.warpgroups, 1 if whole else p.parts, config.block_rows, width), result.dtype)
    of_splits = (config.splits if interpret else 1, p.parts, config.block_rows, width)
    sums = plgpu.SMEM(of_splits, total_dtype(p)) if in_cluster else None
    threads: dict[str, Any] = (
        {"num_threads": config.warpgroups + 1, "thread_name": "warpgroup"} if config.warpgroups > 1 else {}
    )
    grid = {"out": pl.cdiv(p.result_features, config.block_out * config.multicast), "split": config.splits}
    if in_cluster:
        del grid["split"]  # an axis of the cluster then
    grid["row"] = row_blocks
    clusters = {"multicast": config.multicast} if config.multicast > 1 else {}
    if in_cluster and not interpret:
        clusters = {"split": config.splits}
    out = plgpu.kernel(
        fresh_kernel(kernel, problem=p, config=config, whole=whole, interpret=bool(interpret)),
        out_type=result,
        scratch_types=[staged, sums, barrier],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(clusters.values()),
        cluster_names=tuple(clusters),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=gpu_interpreter(interpret or False),
        kernel_name=_name(p, config),
        **threads,
    )(refs)
    if whole:
        return p.add(residual, out[: p.rows])
    products = [jnp.sum(out[: p.rows, :, part], axis=1) for part in range(p.parts)]
    if x_scale is not None:
        products = [product * x_scale[: p.rows, None] for product in products]
    if inputs.bias is not None:
        biases = jnp.split(inputs.bias.astype(jnp.float32)[None], p.parts, axis=1)
        products = [product + bias for product, bias in zip(products, biases, strict=True)]
    return p.add(residual, p.finish(products))


def _refs(problem: Problem, inputs: Inputs, rows: int) -> Refs:
    """Returns the inputs as the kernel takes them, the parts of the weight `[num_layers, out, ...]`.

    Args:
      problem: what is computed.
      inputs: the inputs, without norm and residual.
      rows: rows of all blocks, of which scales of x are read.
    """
    w, layer, x, x_scale = inputs.w, inputs.layer, inputs.x, None
    if problem.quantize_x is not None:
        x, x_scale = quantize_rows(x, problem.quantize_x)
        x = x.astype(operand_dtype(problem))
        x_scale = jnp.pad(x_scale, (0, rows - len(x_scale)))
    if problem.rows > TMA_ROWS and problem.rows % TMA_ROWS:
        x = jnp.pad(x, ((0, -problem.rows % TMA_ROWS), (0, 0)))
    stacked = w if layer is not None else jax.tree.map(lambda part: part[None], w)
    is_e8m0 = stacked.scales.dtype == jnp.float8_e8m0fnu
    return Refs(
        layer=None if layer is None else layer[None],
        x=x,
        codes=stacked.values,
        scales=jax.lax.bitcast_convert_type(stacked.scales, jnp.uint8) if is_e8m0 else stacked.scales,
        zeros=stacked.zeros,
        minimums=stacked.minimums,
        x_scale=x_scale,
        bias=inputs.bias,
    )


def _name(problem: Problem, config: Config) -> str:
    blocks = f"r{config.block_rows}_o{config.block_out}_i{config.block_in}_s{config.splits}"
    if merges(problem, config):
        blocks += "_cluster"
    return f"quantized_matmul_{problem.scheme}_{blocks}".replace("-", "_")
