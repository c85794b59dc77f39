"""The dense weight `[out, in]` of matmul, as threads read and multiply it: `gpu_rows.py` has the kernel.

A thread's 16 bytes of a channel are 8 weights of 16 bits, or 4 of 32. They become float32 and meet as many numbers of
x; 16 bytes take about 28 instructions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels import gpu_rows
from palladion.kernels.gpu_rows import LOAD_BYTES, Share, add_up, columns, load, read
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.types import Ref


class Refs(NamedTuple):
    """Inputs of the kernel in global memory.

    Attributes:
      layer: int32 `[1]`.
      x: `[rows, in]`.
      w: `[num_layers, out, in]`.
      bias: `[out]` or None.
      residual: `[rows, result_features]` or None.
    """

    layer: Ref
    x: Ref
    w: Ref
    bias: Ref
    residual: Ref


@dataclasses.dataclass(frozen=True)
class Dense:
    """The weight of `gpu_rows.multiply`.

    Attributes:
      ref: inputs of the kernel.
      per_thread: weights of a channel that a thread multiplies in a trip.
    """

    ref: Refs
    per_thread: int

    @property
    def run(self) -> int:
        """Weights that meet numbers of x side by side: all of a thread's."""
        return self.per_thread

    def load(self, share: Share, channels: Sequence[jax.Array]) -> list[jax.Array]:
        """Loads the threads' weights of channels, `[threads * per_thread]` each."""
        place = share.places(self.per_thread, self.per_thread)
        mask = share.exist(place, share.in_features)
        return [load(self.ref.w, (self.ref.layer[0], channel, place), mask) for channel in channels]

    def operand(self, runs: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns the numbers of x for each of a thread's weights, float32 `[threads]`."""
        (run,) = runs
        return columns(run, self.per_thread)

    def products(self, loaded: jax.Array, operands: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
        """Returns the sum of a thread's products for each row of x."""
        weights = columns(loaded.astype(jnp.float32), self.per_thread)
        return [
            add_up([weight * number for weight, number in zip(weights, operand, strict=True)]) for operand in operands
        ]


def per_thread(problem: Problem) -> int:
    """Returns the weights of a channel that a thread multiplies in a trip: 16 bytes of them."""
    return LOAD_BYTES // jnp.dtype(problem.w_dtype).itemsize


def kernel(refs: Refs, out: Ref, *, problem: Problem, block_out: int, num_warps: int) -> None:
    """Computes a block of channels.

    Args:
      refs: the inputs.
      out: `[rows, result_features]`.
      problem: shapes and options.
      block_out: channels of the block.
      num_warps: warps of the program.
    """
    p = problem

    def finish(m: int, products: list[jax.Array], channel: jax.Array, real: jax.Array | None) -> jax.Array:
        if refs.bias is not None:
            columns_of = [channel + part * p.result_features for part in range(p.parts)]
            products = [x + read(refs.bias, (place,), real) for x, place in zip(products, columns_of, strict=True)]
        result = p.finish(products)
        return result if refs.residual is None else result + read(refs.residual, (m, channel), real)

    weight = Dense(refs, per_thread(p))
    gpu_rows.multiply(refs.x, out, weight, finish, problem=p, block_out=block_out, num_warps=num_warps)
