"""Block sizes and the call of the TPU kernel of matmul."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.linear import Inputs
from palladion.kernels.matmul.mosaic_tpu.kernel import Refs, kernel
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.search_space import Space
from palladion.kernels.tpu_layout import LANES
from palladion.kernels.types import Interpret

MOST_BYTES: Final = 8 * 2**20
"""Bytes of VMEM that x, the result, and two blocks of w may take; every chip has more."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_out: output channels of a step, a multiple of 128.
    """

    block_out: int

    def __post_init__(self) -> None:
        check(
            self.block_out > 0 and self.block_out % LANES == 0, "config.block_out", self.block_out, "a multiple of 128"
        )


def unsupported(problem: Problem) -> str | None:
    """Returns why the kernel cannot run a problem, or None."""
    if reason := problem.order_unsupported("in_out"):
        return reason
    if problem.gated:
        return "gated=True is not fused"
    if problem.num_layers is not None:
        return f"w must be a single matrix, got a stack of {problem.num_layers}"
    if "float16" in (problem.x_dtype, problem.w_dtype, problem.out_dtype):
        return "float16 is not for TPUs; use bfloat16"
    if not fits(problem, Config(LANES)):
        return f"x, its result and w must fit into VMEM, got {problem.rows} rows and {problem.in_features} columns"
    return None


def heuristic(problem: Problem) -> Config:
    """Returns block sizes where nothing was tuned: the largest blocks, whose transfers are the most efficient."""
    return next(
        config for config in map(Config, (1024, 512, 256, 128)) if config.block_out == LANES or fits(problem, config)
    )


def space(problem: Problem) -> Space:
    """Returns the block sizes that the tuner may try."""
    return Space(heuristic(problem), {"block_out": (128, 256, 512, 1024)}, lambda config: fits(problem, config))


def fits(problem: Problem, config: Config) -> bool:
    """Returns whether the blocks of a problem fit into VMEM."""
    x = problem.rows * problem.in_features * jnp.dtype(problem.x_dtype).itemsize
    w = problem.in_features * config.block_out * jnp.dtype(problem.w_dtype).itemsize
    return x + 2 * w + 2 * 4 * problem.rows * config.block_out <= MOST_BYTES


def matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> jax.Array:
    """Runs the kernel and returns `[rows, result_features]`; `palladion.matmul` has the contract."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    config = config or heuristic(problem)
    plain, plain_inputs = problem.plain(inputs)  # XLA normalizes before the kernel, and adds the residual after it
    rows, features, block = plain.rows, plain.in_features, config.block_out
    bias = None if inputs.bias is None else inputs.bias.astype(jnp.float32)[None]
    refs = Refs(x=plain_inputs.x, w=plain_inputs.w, bias=bias)
    specs: Any = Refs(
        x=pl.BlockSpec((rows, features), lambda i: (0, 0)),
        w=pl.BlockSpec((features, block), lambda i: (0, i)),
        bias=None if bias is None else pl.BlockSpec((1, block), lambda i: (0, i)),
    )
    # The product becomes out_dtype after the residual is added.
    out_dtype = "float32" if problem.has_residual else problem.out_dtype
    out = pl.pallas_call(
        fresh_kernel(kernel, problem=plain),
        grid=(pl.cdiv(plain.result_features, block),),
        in_specs=(specs,),
        out_specs=pl.BlockSpec((rows, block), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((rows, plain.result_features), out_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=plain.flops(), bytes_accessed=plain.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"matmul_{plain.w_dtype}_o{block}",
    )(refs)
    return problem.add(inputs.residual, out) if problem.has_residual else out
