"""Merging of the parts that the slots of a sequence leave, in a launch of its own.

A program has the rows of one program of attention, and reads its parts as they were in registers, several at a time.
Splits of a cluster are merged without that launch (`cluster_merge.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.decode_attention.mosaic_gpu.balance import find_slots
from palladion.kernels.decode_attention.mosaic_gpu.config import Config
from palladion.kernels.decode_attention.mosaic_gpu.kernel import Results, write
from palladion.kernels.decode_attention.mosaic_gpu.registers import MATRIX, OF_COLUMNS, Registers
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.types import Ref

REGISTERS: Final = 64
"""Registers of a thread that parts take which are read at once."""


class Parts(NamedTuple):
    """The inputs of the merge.

    Attributes:
      parts: what the slots left.
      lengths: int32 `[batch]`.
      sinks: `[kv_heads, rows]`, rows up to a multiple of block_rows, or None.
    """

    parts: Results
    lengths: Ref
    sinks: Any = None


class Merged(NamedTuple):
    """Parts that are merged.

    Attributes:
      m: maxima of their lse, `[rows]`.
      total: sums of exp(lse - m), `[rows]`.
      acc: sums of exp(lse - m) * out, `[features, rows]`.
    """

    m: jax.Array
    total: jax.Array
    acc: jax.Array

    def add(self, registers: Registers, parts: Sequence[tuple[jax.Array, jax.Array]], layout: Any = MATRIX) -> Merged:
        """Adds parts: lse `[rows]` and out `[features, rows]` of each, which is in a layout."""
        m = self.m
        for lse, _ in parts:
            m = jnp.maximum(m, lse)
        shift = jnp.where(m == -jnp.inf, 0.0, m)
        alpha = jnp.exp(self.m - shift)
        total, acc = self.total * alpha, self.acc * registers.across(alpha, self.acc, layout)
        for lse, out in parts:
            weight = jnp.exp(lse - shift)
            total, acc = total + weight, acc + out * registers.across(weight, acc, layout)
        return Merged(m, total, acc)

    def finish(self, registers: Registers, layout: Any = MATRIX) -> tuple[jax.Array, jax.Array]:
        """Returns out and lse of all parts together."""
        divisor = jnp.where(self.total == 0.0, 1.0, self.total)
        return self.acc / registers.across(divisor, self.acc, layout), self.m + jnp.log(self.total)


def merge_kernel(
    inputs: Parts, results: Results, staged: Ref, *, problem: Problem, config: Config, most_slots: int, interpret: bool
) -> None:
    """Merges the parts of a block of rows.

    Args:
      inputs: the parts.
      results: what is written.
      staged: `[block_rows, head_dim]` in shared memory.
      problem: the call.
      config: block sizes.
      most_slots: the largest number of slots of a sequence.
      interpret: whether the kernel is interpreted.
    """
    registers, parts, rows = Registers(interpret), inputs.parts, config.block_rows
    sequence, head, row_block = (jax.lax.axis_index(name) for name in ("sequence", "head", "row"))
    own_rows = pl.ds(row_block * rows, rows)
    slots = find_slots(problem, config, inputs.lengths, row_block, sequence)
    at_once = max(min(REGISTERS // (problem.head_dim // 64 * rows // 2), most_slots), 1)

    def add(step: jax.Array, merged: Merged) -> Merged:
        loaded = []
        for place in range(at_once):
            index = step * at_once + place
            slot = slots.first + jnp.minimum(index, slots.number - 1)
            lse = registers.load(parts.lse.at[slot, head, own_rows], OF_COLUMNS, optimized=False)
            out = registers.load(parts.out.at[slot, head, row_block], MATRIX, optimized=False)
            loaded.append((lse + jnp.where(index < slots.number, 0.0, -jnp.inf), out))
        return merged.add(registers, loaded)

    # A sink is a part without a value.
    m, total = registers.constant((rows,), -jnp.inf, OF_COLUMNS), registers.constant((rows,), 0, OF_COLUMNS)
    if inputs.sinks is not None:
        m = registers.load(inputs.sinks.at[head, own_rows], OF_COLUMNS, optimized=False)
        total = registers.constant((rows,), 1, OF_COLUMNS)
    merged = Merged(m, total, registers.constant((problem.head_dim, rows), 0))
    steps = jax.lax.div(slots.number + (at_once - 1), jnp.int32(at_once))
    out, lse = jax.lax.fori_loop(0, steps, add, merged).finish(registers)
    write(registers, results, staged, (sequence, head, row_block), out, lse)
