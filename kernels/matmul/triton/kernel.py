"""The Triton kernel of matmul: a few rows of activations times a dense weight, in one launch with what surrounds it.

    y[r, o] = sum_i x[r, i] * norm[i] * w[i, o] / rms(x[r])        result = residual + finish(y + bias)

Grid: (blocks of channels); `gpu_rows.py` draws a block. A program reads all of `in` for its channels, so its sums are
complete and no split-K reduction follows. Weights are converted to float32 in registers and multiplied by one scalar of
x for each row, so one more row costs one more multiply-add per weight. Squares of x are summed alongside the products,
and the result is divided by the root of their mean: the norm needs no launch of its own.

In registers: the sums, `[lanes, block_out]` for each row and each of gate and up, and 16 bytes of each row of a chunk.
At the end the lanes are added up through shared memory.

Bound by memory: each weight is read once, for 2 * rows FLOPs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.types import Ref

Sums = tuple[tuple[jax.Array, ...], ...]
"""Running sums of a program: for each row its products, one each for gate and up; then the rows' sums of squares."""


class Refs(NamedTuple):
    """Inputs of the kernel in global memory.

    Attributes:
      layer: int32 `[1]`.
      x: `[rows, in]`.
      w: `[num_layers, in, out]`.
      bias: `[out]` or None.
      norm: `[in]` or None.
      residual: `[rows, result_features]` or None.
    """

    layer: Ref
    x: Ref
    w: Ref
    bias: Ref
    norm: Ref
    residual: Ref


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a program walks over the weight.

    Attributes:
      block_out: output channels per program.
      chunk_rows: rows of w that a thread loads at a time.
      chunks: chunks that make up `in`.
      lanes: chunks that a program works on at the same time.
    """

    block_out: int
    chunk_rows: int
    chunks: int
    lanes: int

    @property
    def trips(self) -> int:
        """Iterations of a program's loop."""
        return pl.cdiv(self.chunks, self.lanes)


def tiling_for(problem: Problem, block_out: int, num_warps: int) -> Tiling:
    """Returns the tiling of a problem for given block sizes."""
    chunk_rows = math.gcd(problem.in_features, gpu_rows.chunk_rows(num_warps, problem.parts))
    lanes = gpu_rows.lanes(block_out * jnp.dtype(problem.w_dtype).itemsize, num_warps)
    return Tiling(block_out, chunk_rows, problem.in_features // chunk_rows, lanes)


def _read(ref: Ref, index: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """Loads entries of an array as float32, 0 where masked."""
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0).astype(jnp.float32)


def kernel(refs: Refs, out: Any, *, problem: Problem, tiling: Tiling, loads_first: bool) -> None:
    """Computes `block_out` channels of the result.

    Args:
      refs: the inputs.
      out: `[rows, result_features]`.
      problem: shapes and options.
      tiling: how the program walks over the weight.
      loads_first: whether all loads of an iteration are issued before the first use, by an instruction of NVIDIA's.
    """
    p, features = problem, problem.result_features
    channel = pl.program_id(0) * tiling.block_out + jnp.arange(tiling.block_out, dtype=jnp.int32)
    in_result = None if features % tiling.block_out == 0 else channel < features
    zeros = (jnp.zeros((tiling.lanes, tiling.block_out), jnp.float32),) * p.parts
    zero_squares = (jnp.zeros(tiling.lanes, jnp.float32),) * (p.rows if refs.norm is not None else 0)

    def body(trip: jax.Array, sums: Sums) -> Sums:
        return _accumulate(refs, trip, sums, channel, in_result, p, tiling, loads_first)

    *totals, squares = jax.lax.fori_loop(0, tiling.trips, body, (*((zeros,) * p.rows), zero_squares))
    for m in range(p.rows):
        products = [jnp.sum(total, axis=0) for total in totals[m]]
        if p.norm_eps is not None:
            factor = gpu_rows.inverse_root(jnp.sum(squares[m]), p.in_features, p.norm_eps)
            products = [product * factor for product in products]
        if refs.bias is not None:
            products = [
                product + _read(refs.bias, (channel + index * features,), in_result)
                for index, product in enumerate(products)
            ]
        result = p.finish(products)
        if refs.residual is not None:
            result = result + _read(refs.residual, (m, channel), in_result)
        plgpu.store(out.at[m, channel], result.astype(out.dtype), mask=in_result)


def _accumulate(
    refs: Refs,
    trip: jax.Array,
    sums: Sums,
    channel: jax.Array,
    in_result: jax.Array | None,
    p: Problem,
    tiling: Tiling,
    loads_first: bool,
) -> Sums:
    """Adds the products of `lanes` chunks of w to the sums.

    Args:
      refs: the inputs.
      trip: the iteration.
      sums: running sums.
      channel: int32 `[block_out]`, channels of the program.
      in_result: bool `[block_out]`, which of them exist; None where all do.
      p: shapes and options.
      tiling: how the program walks over the weight.
      loads_first: as for `kernel`.
    """
    *totals, squares = [list(row) for row in sums]
    layer = refs.layer[0]
    chunk = trip * tiling.lanes + jnp.arange(tiling.lanes, dtype=jnp.int32)
    in_weight = None if tiling.chunks % tiling.lanes == 0 else chunk < tiling.chunks
    mask = None if in_weight is None else in_weight[:, None]
    if in_result is not None:
        mask = in_result[None, :] if mask is None else mask & in_result[None, :]
    feature = [chunk * tiling.chunk_rows + row for row in range(tiling.chunk_rows)]  # [lanes] each

    # All loads from memory are issued before the first use; x is in a cache and arrives sooner.
    weights = [
        plgpu.load(
            refs.w.at[layer, rows[:, None], (channel + index * p.result_features)[None, :]],
            mask=mask,
            other=None if mask is None else 0,
        )
        for rows in feature
        for index in range(p.parts)
    ]
    weights = gpu_rows.together(weights) if loads_first else weights
    x = [[_read(refs.x, (m, rows), in_weight) for rows in feature] for m in range(p.rows)]
    norms = None if refs.norm is None else [_read(refs.norm, (rows,), in_weight) for rows in feature]
    for m in range(p.rows):
        for row, factor in enumerate(x[m]):
            if norms is not None:
                squares[m] = squares[m] + factor * factor
            scaled = factor if norms is None else factor * norms[row]
            for index in range(p.parts):
                product = scaled[:, None] * weights[row * p.parts + index].astype(jnp.float32)
                totals[m][index] = totals[m][index] + product
    return (*map(tuple, totals), tuple(squares))
