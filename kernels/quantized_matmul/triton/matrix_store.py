"""Stores the products of the tensor-core form: results, or sums of splits that XLA or the last program adds up.

The last program of a block of rows and channels adds up its splits where `Config.merge` is "last": each program counts
itself after it has stored its sums, and the one that finds all others counted reads theirs. Sums are added in the order
of the splits, whoever is last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.gpu_merge import arrive
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton.config import Config
from palladion.kernels.quantized_matmul.triton.refs import Refs, both, finish, read


class Outputs(NamedTuple):
    """The outputs of a call in device memory; None where it has no such array.

    Attributes:
      result: `[rows, result_features]`; None where XLA adds up splits.
      sums: `[splits, parts, rows, result_features]`, float32; None without splits.
      counters: `[blocks]`, int32, programs that have stored their sums; None unless the last one adds them up.
    """

    result: Any = None
    sums: Any = None
    counters: Any = None


class Block(NamedTuple):
    """The rows and channels of a program.

    Attributes:
      number: of the block.
      row: `[block_rows]`.
      channel: `[block_out]`.
      real_row: which of the rows exist; None for all.
      real: which of the channels exist; None for all.
    """

    number: jax.Array
    row: jax.Array
    channel: jax.Array
    real_row: jax.Array | None
    real: jax.Array | None

    @property
    def place(self) -> tuple[jax.Array, jax.Array]:
        """Indices of results, which broadcast to `[block_rows, block_out]`."""
        return self.row[:, None], self.channel[None, :]

    @property
    def mask(self) -> jax.Array | None:
        """Which of the results exist; None for all."""
        rows = None if self.real_row is None else self.real_row[:, None]
        return both(rows, None if self.real is None else self.real[None, :])


def store(
    ref: Refs, out: Outputs, problem: Problem, config: Config, block: Block, products: list[jax.Array], *, native: bool
) -> None:
    """Stores the products of a program.

    Args:
      ref: the inputs.
      out: the outputs.
      problem: the call.
      config: block sizes.
      block: the program's rows and channels.
      products: float32 `[block_rows, block_out]` of every part.
      native: whether the kernel is compiled for an NVIDIA GPU, not interpreted.
    """
    if out.sums is None:
        _store_result(ref, out, problem, block, products)
        return
    if out.counters is None:
        products = finish(ref, problem, products, block.channel, block.real, None, config.splits)
    for part, product in enumerate(products):
        plgpu.store(out.sums.at[pl.program_id(1), part, *block.place], product, mask=block.mask)
    if out.counters is None:
        return
    arrived = arrive(out.counters, (block.number,), jnp.int32(1), native=native)

    @pl.when(arrived == config.splits - 1)
    def _() -> None:
        _store_result(ref, out, problem, block, _added_up(out, problem, config, block))


def _added_up(out: Outputs, problem: Problem, config: Config, block: Block) -> list[jax.Array]:
    """Returns the sums of all splits; the loop is unrolled, so that they are on their way together."""
    totals = []
    for part in range(problem.parts):
        sums = [read(out.sums, (split, part, *block.place), block.mask) for split in range(config.splits)]
        totals.append(_sum(sums))
    return totals


def _sum(numbers: Sequence[jax.Array]) -> jax.Array:
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total


def _store_result(ref: Refs, out: Outputs, problem: Problem, block: Block, products: list[jax.Array]) -> None:
    x_scale = None if ref.x_scale is None else read(ref.x_scale, (block.row,), block.real_row)[:, None]
    (result,) = finish(ref, problem, products, block.channel, block.real, x_scale, 1)
    if ref.residual is not None:
        result = read(ref.residual, block.place, block.mask) + result
    plgpu.store(out.result.at[block.place], result.astype(out.result.dtype), mask=block.mask)
