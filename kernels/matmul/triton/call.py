"""Block sizes and the call of the Triton kernel of matmul."""

from __future__ import annotations

import dataclasses
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.checks import check, check_num_warps, check_power_of_two
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.linear import Inputs
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.matmul.triton.kernel import Refs, kernel, tiling_for
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret

MAX_ROWS: Final = 4
"""Most rows of x that the kernel takes: with more, tensor cores are faster."""

BLOCK_BYTES: Final = (256, 128, 64, 32)
"""Bytes of one row of w in a block, from two cache lines down to one sector, the least that memory delivers."""

REGISTERS: Final = 128
"""Registers per thread, about: 64 for loads in flight, the rest for sums, x and addresses."""

BALANCE: Final = 1.5
"""Accepted load of the busiest multiprocessor, relative to the best balance: it waits for memory for as long anyway."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_out: output channels per program, a power of two of at least 16.
      num_warps: warps per program.
    """

    block_out: int
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_power_of_two("config.block_out", self.block_out, 16)
        check_num_warps("config.num_warps", self.num_warps)


def heuristic(problem: Problem) -> Config:
    """Returns block sizes that spread the channels evenly over the multiprocessors."""
    features, multiprocessors = problem.result_features, gpu_to_plan_for().multiprocessors
    blocks = [max(size // jnp.dtype(problem.w_dtype).itemsize, 16) for size in BLOCK_BYTES]
    block_out = gpu_rows.even_block(features, blocks, multiprocessors, BALANCE)
    programs = gpu_rows.busiest(features, block_out, multiprocessors) // block_out
    num_warps = gpu_rows.warps_for(lambda warps: tiling_for(problem, block_out, warps).trips, programs, REGISTERS)
    return Config(block_out, num_warps)


def space(problem: Problem) -> Space:
    """Returns the block sizes that the tuner may try."""
    return Space(heuristic(problem), {"block_out": (16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8, 16)})


def unsupported(problem: Problem) -> str | None:
    """Returns why the kernel cannot run the problem, or None."""
    if not 1 <= problem.rows <= MAX_ROWS:
        return f"x must have 1 to {MAX_ROWS} rows, got {problem.rows}"
    return None


def matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> jax.Array:
    """Runs the kernel and returns `[rows, result_features]`; `palladion.matmul` has the contract."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    stacked = inputs.layer is not None
    refs = Refs(
        layer=inputs.layer[None] if inputs.layer is not None else jnp.zeros(1, jnp.int32),
        x=inputs.x,
        w=inputs.w if stacked else inputs.w[None],
        bias=inputs.bias,
        norm=inputs.norm,
        residual=inputs.residual,
    )
    result: jax.Array = pl.pallas_call(
        fresh_kernel(
            kernel,
            problem=problem,
            tiling=tiling_for(problem, config.block_out, config.num_warps),
            loads_first=gpu_rows.for_nvidia(interpret),
        ),
        grid=(pl.cdiv(problem.result_features, config.block_out),),
        out_shape=jax.ShapeDtypeStruct((problem.rows, problem.result_features), problem.out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=problem.flops(), bytes_accessed=problem.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"matmul_{problem.w_dtype}_r{problem.rows}_o{config.block_out}",
    )(refs)
    return result
