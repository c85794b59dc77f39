"""Block sizes and the call of the Triton kernel of matmul, for one to four rows of x and a weight `[out, in]`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_norm, gpu_rows
from palladion.kernels.checks import check, check_num_warps, check_power_of_two
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.linear import Inputs
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.matmul.triton.kernel import Refs, kernel, per_thread
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret

CHANNELS: Final = 4
"""Channels whose loads, of 16 bytes each, a thread has in flight together."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_out: output channels per program, a power of two.
      num_warps: warps per program.
    """

    block_out: int
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_power_of_two("config.block_out", self.block_out)
        check_num_warps("config.num_warps", self.num_warps)


def heuristic(problem: Problem) -> Config:
    """Returns block sizes that keep the memory busy."""
    block_out = gpu_rows.block_for(problem, CHANNELS // problem.parts)
    return Config(block_out, gpu_rows.warps_for(problem, per_thread(problem)))


def space(problem: Problem) -> Space:
    """Returns the block sizes that the tuner may try."""
    return Space(heuristic(problem), {"block_out": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8, 16)})


def matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> jax.Array:
    """Runs the kernel and returns `[rows, result_features]`; `palladion.matmul` has the contract."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    residual = inputs.residual
    problem, inputs = problem.plain(inputs, functools.partial(gpu_norm.rms_norm, interpret=interpret))
    stacked = inputs.layer is not None
    refs = Refs(
        layer=inputs.layer[None] if inputs.layer is not None else jnp.zeros(1, jnp.int32),
        x=inputs.x,
        w=inputs.w if stacked else inputs.w[None],
        bias=inputs.bias,
        residual=residual,
    )
    result: jax.Array = pl.pallas_call(
        fresh_kernel(kernel, problem=problem, block_out=config.block_out, num_warps=config.num_warps),
        grid=(pl.cdiv(problem.result_features, config.block_out),),
        out_shape=jax.ShapeDtypeStruct((problem.rows, problem.result_features), problem.out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=problem.flops(), bytes_accessed=problem.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"matmul_{problem.w_dtype}_r{problem.rows}_o{config.block_out}",
    )(refs)
    return result
