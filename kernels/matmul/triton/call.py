"""matmul on a GPU: a row of activations, or a few, times a dense weight, in one launch with what stands around it.

    y = sum_i x[r, i] * norm[i] * w[i, o] / rms(x[r])        result = residual + finish(y + bias)

Grid: (blocks of channels); `gpu_rows.py` draws a block. A program goes through all of `in`, so that its sums are whole:
there are no splits to be added by somebody else. Weights become float32 in registers, and are multiplied by one number
of x for each row; a row more costs a multiply-add a weight. Squares of x are summed beside the products, and the root
of their mean divides the result: nobody has to wait for a norm.

Resident in registers: the sums, `[lanes, block_out]` for each row and part (gate and up), and 16 bytes of each of a
chunk's rows. At the end lanes are added up through shared memory.

Bound by memory: each weight is read once, for 2 * rows FLOPs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.linear import Inputs
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.tuning import Space

MAX_ROWS: Final = 4
"""Of x: with more, tensor cores take less time."""

BLOCK_BYTES: Final = (256, 128, 64, 32)
"""Of a row of a program's block: two cache lines, down to one sector, the least that is read."""

REGISTERS: Final = 128
"""Of a thread: 64 for what is on its way, the rest for sums, x and addresses."""

EVEN: Final = 1.5
"""Times the channels that the busiest multiprocessor may have: it has time for as much while it waits for memory."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_out: output channels of a program, a power of two of at least 16.
      num_warps: warps of a program.
    """

    block_out: int
    num_warps: int = 4

    def __post_init__(self) -> None:
        size = self.block_out
        check(size >= 16 and size & (size - 1) == 0, "config.block_out", size, "a power of two of at least 16")
        check(self.num_warps in (1, 2, 4, 8, 16), "config.num_warps", self.num_warps, "1, 2, 4, 8 or 16")


def heuristic(problem: Problem) -> Config:
    """Blocks that spread channels evenly over the multiprocessors."""
    p, multiprocessors = problem, gpu_to_plan_for().multiprocessors
    blocks = [max(size // jnp.dtype(p.w_dtype).itemsize, 16) for size in BLOCK_BYTES]
    block_out = gpu_rows.even_block(p.result_features, blocks, multiprocessors, EVEN)
    programs = gpu_rows.busiest(p.result_features, block_out, multiprocessors) // block_out
    num_warps = gpu_rows.warps_for(
        lambda warps: pl.cdiv(_chunks(p, warps), _lanes(p, Config(block_out, warps))), programs, REGISTERS
    )
    return Config(block_out, num_warps)


def space(problem: Problem) -> Space:
    """Channels of a program, and its warps."""
    return Space(heuristic(problem), {"block_out": (16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8, 16)})


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    if not 1 <= problem.rows <= MAX_ROWS:
        return f"x must have 1 to {MAX_ROWS} rows, got {problem.rows}"
    return None


def _chunk_rows(problem: Problem, num_warps: int) -> int:
    """Rows of a chunk, a power of two that divides `in`."""
    return math.gcd(problem.in_features, gpu_rows.chunk_rows(num_warps, problem.parts))


def _chunks(problem: Problem, num_warps: int) -> int:
    return problem.in_features // _chunk_rows(problem, num_warps)


def _lanes(problem: Problem, config: Config) -> int:
    return gpu_rows.lanes(config.block_out * jnp.dtype(problem.w_dtype).itemsize, config.num_warps)


def matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> jax.Array:
    """Runs the kernel; see `palladion.matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config, p = config or heuristic(problem), problem
    arrays = {
        "layer": jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None],
        "x": inputs.x,
        "w": inputs.w if inputs.layer is not None else inputs.w[None],
        "bias": inputs.bias,
        "norm": inputs.norm,
        "residual": inputs.residual,
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    result: jax.Array = pl.pallas_call(
        fresh_kernel(
            _kernel,
            names=(*arrays, "out"),
            problem=p,
            config=config,
            ahead=gpu_rows.for_nvidia(interpret),
        ),
        grid=(pl.cdiv(p.result_features, config.block_out),),
        out_shape=jax.ShapeDtypeStruct((p.rows, p.result_features), p.out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"matmul_{p.w_dtype}_r{p.rows}_o{config.block_out}",
    )(*arrays.values())
    return result


class Refs(NamedTuple):
    """Arrays in memory, as the kernel takes them.

    Attributes:
      layer: int32 `[1]`.
      x: `[rows, in]`.
      w: `[num_layers, in, out]`.
      bias: `[out]` or None.
      norm: `[in]` or None.
      residual: `[rows, result_features]` or None.
      out: `[rows, result_features]`.
    """

    layer: Any
    x: Any
    w: Any
    bias: Any
    norm: Any
    residual: Any
    out: Any


def _kernel(*arrays: Any, names: tuple[str, ...], problem: Problem, config: Config, ahead: bool) -> None:
    ref = Refs(**dict.fromkeys(Refs._fields) | dict(zip(names, arrays, strict=True)))
    p, rows, lanes = problem, _chunk_rows(problem, config.num_warps), _lanes(problem, config)
    chunks, layer = _chunks(p, config.num_warps), ref.layer[0]
    channel = pl.program_id(0) * config.block_out + jnp.arange(config.block_out, dtype=jnp.int32)
    real = None if p.result_features % config.block_out == 0 else channel < p.result_features

    def read(source: Any, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
        return plgpu.load(source.at[place], mask=mask, other=None if mask is None else 0).astype(jnp.float32)

    def trip(index: jax.Array, sums: tuple[tuple[jax.Array, ...], ...]) -> tuple[tuple[jax.Array, ...], ...]:
        totals, squares = [list(of_row) for of_row in sums[:-1]], list(sums[-1])
        chunk = index * lanes + jnp.arange(lanes, dtype=jnp.int32)
        there = None if chunks % lanes == 0 else chunk < chunks
        mask = None if there is None else there[:, None]
        if real is not None:
            mask = real[None, :] if mask is None else mask & real[None, :]
        places = [chunk * rows + row for row in range(rows)]  # [lanes] each

        def weight(place: jax.Array, part: int) -> jax.Array:
            columns = channel + part * p.result_features
            other = None if mask is None else 0
            return plgpu.load(ref.w.at[layer, place[:, None], columns[None, :]], mask=mask, other=other)

        # All that a trip takes from memory is asked for before any of it is used; x is in a cache, and there sooner.
        weights = [weight(place, part) for place in places for part in range(p.parts)]
        weights = gpu_rows.together(weights) if ahead else weights
        xs = [[read(ref.x, (m, place), there) for place in places] for m in range(p.rows)]
        norms = None if ref.norm is None else [read(ref.norm, (place,), there) for place in places]
        for m in range(p.rows):
            for row, x in enumerate(xs[m]):
                if norms is not None:
                    squares[m] = squares[m] + x * x
                    x = x * norms[row]
                for part in range(p.parts):
                    product = x[:, None] * weights[row * p.parts + part].astype(jnp.float32)
                    totals[m][part] = totals[m][part] + product
        return (*map(tuple, totals), tuple(squares))

    nothing = (jnp.zeros((lanes, config.block_out), jnp.float32),) * p.parts
    no_squares = (jnp.zeros(lanes, jnp.float32),) * (p.rows if ref.norm is not None else 0)
    sums = jax.lax.fori_loop(0, pl.cdiv(chunks, lanes), trip, ((nothing,) * p.rows) + (no_squares,))

    for m in range(p.rows):
        products = [jnp.sum(total, axis=0) for total in sums[m]]
        if p.norm_eps is not None:
            factor = gpu_rows.inverse_root(jnp.sum(sums[-1][m]), p.in_features, p.norm_eps)
            products = [product * factor for product in products]
        if ref.bias is not None:
            products = [
                product + read(ref.bias, (channel + part * p.result_features,), real)
                for part, product in enumerate(products)
            ]
        result = p.finish(products)
        if ref.residual is not None:
            result = result + read(ref.residual, (m, channel), real)
        plgpu.store(ref.out.at[m, channel], result.astype(ref.out.dtype), mask=real)
