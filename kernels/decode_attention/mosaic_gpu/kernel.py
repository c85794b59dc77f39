"""The kernel of decode_attention on Hopper: TMA brings keys and values, wgmma multiplies them. See `call.py`."""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.decode_attention import online_softmax
from palladion.kernels.decode_attention.mosaic_gpu.balance import find_share
from palladion.kernels.decode_attention.mosaic_gpu.config import TILE, Config
from palladion.kernels.decode_attention.mosaic_gpu.memory import Refs, Ring, Scratch, value_dtype
from palladion.kernels.decode_attention.mosaic_gpu.registers import MATRIX, OF_COLUMNS, OF_ROWS, Registers
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.shares import is_balanced
from palladion.kernels.gpu_codes import recipe
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref, Scalar

TOKENS: Final = 0
"""Axis of tokens in products of keys and queries, which are `[tokens, rows]`."""


class Results(NamedTuple):
    """Results of attention, or parts of them that are merged.

    Attributes:
      out: `[batch, kv_heads, rows, head_dim]`; parts are float32 and turned, as they are in registers, `[slots,
        kv_heads, row blocks, head_dim, block_rows]`.
      lse: float32 `[batch or slots, kv_heads, rows]`, rows up to a multiple of block_rows.
    """

    out: Ref
    lse: Ref


class Program:
    """A program's share of the cache, and its online softmax.

    Args:
      problem: the call.
      config: block sizes.
      refs: the inputs.
      scratch: shared memory and barriers.
      interpret: whether the kernel is interpreted.
      slot: the program's slot.
    """

    def __init__(
        self, problem: Problem, config: Config, refs: Refs, scratch: Scratch, interpret: bool, slot: Scalar
    ) -> None:
        self.problem, self.config, self.refs, self.scratch = problem, config, refs, scratch
        self.registers = Registers(interpret)
        self.slot, self.head, self.row_block = slot, jax.lax.axis_index("head"), jax.lax.axis_index("row")
        self.share = find_share(problem, config, refs.lengths, self.row_block, self.slot)
        layer = 0 if refs.layer is None else refs.layer[0]
        self.ring = Ring(problem, config, refs, scratch, self.share, layer, self.head)
        self.first_row = self.row_block * config.block_rows

    def scale(self, ref: Any, place: jax.Array) -> jax.Array | None:
        """Loads the scales of a KV block, `[block_kv]`, if there are any."""
        return None if ref is None else self.registers.load(ref.at[place], OF_ROWS, optimized=False)

    def visible(self, block: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns which tokens of a KV block each row sees, `[block_kv, block_rows]`."""
        p = self.problem
        token = block * self.config.block_kv + self.registers.indices(shape, TOKENS)
        query: Any = 0
        if p.q_len > 1:
            row = self.first_row + self.registers.indices(shape, 1 - TOKENS)
            query = divide_with_remainder(row, p.group)[0]
        return online_softmax.visible_mask(p, token, self.share.length - p.q_len + query)

    def values(self, block: Scalar, stored: Ref) -> Ref | jax.Array:
        """Returns the values of a block as an operand of a product with weights.

        Values that no row sees become zeros where they may be NaN, since 0 * NaN is NaN. Of codes, only those of
        float8_e5m2, which has the exponents of float16, become NaN.
        """
        p, config, span = self.problem, self.config, self.share.span
        first, last = block * config.block_kv, (block + 1) * config.block_kv - 1

        def clear(values: jax.Array, first: Scalar, tokens: int) -> jax.Array:
            token = first + self.registers.indices(values.shape, tokens)
            seen = (token >= span.first_token) & (token <= span.last_token)
            return jnp.where(seen, values, jnp.zeros((), values.dtype))

        if p.has_scales:
            turned = self.registers.floats_turned(stored, p.kv_dtype, value_dtype(p))
            return clear(turned, first, 1 - TOKENS) if p.kv_dtype == "float8_e5m2" else turned

        def clear_stored() -> None:
            for start in range(0, p.head_dim, TILE):
                tile = stored.at[:, pl.ds(start, TILE)]
                self.registers.store(tile, clear(self.registers.load(tile, MATRIX), first, TOKENS))
            self.registers.commit()

        pl.when((first < span.first_token) | (last > span.last_token))(clear_stored)
        return stored

    def attend(self, block: jax.Array, state: online_softmax.State) -> online_softmax.State:
        """Adds a KV block to the online softmax."""
        p, config, share, scratch, ring = self.problem, self.config, self.share, self.scratch, self.ring
        place, ahead = ring.place(block), block + config.num_stages
        located = ring.locate(ahead)  # long before it is needed: page numbers are awaited
        plgpu.barrier_wait(scratch.k_arrived.at[place])
        keys = scratch.k.at[place]
        operand = self.registers.numbers(keys, p.kv_dtype, p.q_dtype) if p.has_scales else keys
        products = self.registers.multiply(operand, scratch.q)
        k_scale, v_scale = self.scale(scratch.k_scale, place), self.scale(scratch.v_scale, place)
        visible = self.visible(block, products.shape)
        s = online_softmax.masked_logits(p, products, k_scale, visible, TOKENS)
        weights, alpha, state = online_softmax.update(p, state, s, v_scale, TOKENS)
        if v_scale is not None:  # that of a token which no row sees may be NaN
            factor = v_scale * recipe(p.kv_dtype, value_dtype(p)).factor
            weights = weights * jax.lax.broadcast_in_dim(factor, weights.shape, (TOKENS,))
            weights = jnp.where(visible, weights, 0.0)
        self.registers.store_turned(scratch.weights, weights.astype(value_dtype(p)))
        plgpu.barrier_wait(scratch.v_arrived.at[place])
        self.registers.commit()
        (acc,) = state.acc  # [head_dim, block_rows]
        acc = acc * jax.lax.broadcast_in_dim(alpha, acc.shape, (1 - TOKENS,))
        acc = self.registers.add_product(
            acc, self.values(block, scratch.v.at[place]), scratch.weights, turned=not p.has_scales
        )
        self.registers.release(loaded=p.has_scales)
        pl.when(ahead < share.end)(functools.partial(ring.fetch, ahead, located))
        return state._replace(acc=(acc,))

    def run(self) -> online_softmax.State:
        """Returns the state after all KV blocks of the program's share."""
        p, config, share, scratch, ring = self.problem, self.config, self.share, self.scratch, self.ring
        queries = self.refs.q.at[share.sequence, self.head, pl.ds(self.first_row, config.block_rows)]
        plgpu.copy_gmem_to_smem(queries, scratch.q, scratch.q_arrived)
        for stage in range(config.num_stages):
            block = share.begin + stage
            located = ring.locate(block)
            pl.when(block < share.end)(functools.partial(ring.fetch, block, located))
        plgpu.barrier_wait(scratch.q_arrived)
        state = online_softmax.State(
            self.registers.constant((config.block_rows,), -jnp.inf, OF_COLUMNS),
            self.registers.constant((config.block_kv, config.block_rows), 0),
            (self.registers.constant((p.head_dim, config.block_rows), 0),),
        )
        state = jax.lax.fori_loop(share.begin, share.end, self.attend, state)
        return state._replace(acc=(self.registers.in_order(*state.acc),)) if p.has_scales else state


def write(
    registers: Registers, results: Results, staged: Ref, place: tuple[Scalar, Scalar, Scalar], out: jax.Array, lse: Any
) -> None:
    """Writes the results of some rows.

    Args:
      registers: of the program.
      results: the arrays.
      staged: `[block_rows, head_dim]` in shared memory.
      place: sequence, KV head and block of rows.
      out: `[head_dim, block_rows]`.
      lse: `[block_rows]`.
    """
    sequence, head, row_block = place
    rows = pl.ds(row_block * staged.shape[0], staged.shape[0])
    # A row too many would be the next head's: what is contiguous goes without TMA's tiles, which end with an axis.
    exist = min(staged.shape[0], results.out.shape[2])
    for start in range(0, out.shape[0], TILE):
        part = out[start : start + TILE].astype(staged.dtype)
        registers.store_turned(staged.at[:, pl.ds(start, TILE)], part)
    registers.store(results.lse.at[sequence, head, rows], lse)
    registers.commit()
    places = results.out.at[sequence, head, pl.ds(row_block * staged.shape[0], exist)]
    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, exist)], places)
    plgpu.wait_smem_to_gmem(0)


def kernel(
    refs: Refs, results: Results, scratch: Scratch, *, problem: Problem, config: Config, interpret: bool
) -> None:
    """Computes attention of a block of query rows, which share a sequence and KV head, over a share of the cache.

    Args:
      refs: the inputs.
      results: what is written: a part for each slot, where there are several for a sequence.
      scratch: shared memory and barriers.
      problem: the call.
      config: block sizes.
      interpret: whether the kernel is interpreted.
    """
    program = Program(problem, config, refs, scratch, interpret, jax.lax.axis_index("slot"))
    registers, head, row_block = program.registers, program.head, program.row_block

    def attend() -> None:
        state = program.run()
        rows = pl.ds(program.first_row, config.block_rows)
        sinks = None if refs.sinks is None else registers.load(refs.sinks.at[head, rows], OF_COLUMNS, optimized=False)
        (out,), lse = online_softmax.finish(problem, state, sinks, TOKENS)
        if scratch.out is not None:
            write(registers, results, scratch.out, (program.share.sequence, head, row_block), out, lse)
        else:
            registers.store(results.out.at[program.slot, head, row_block], out)
            registers.store(results.lse.at[program.slot, head, rows], lse)

    if is_balanced(problem, config):  # then slots are left over, which come last
        pl.when(program.share.works)(attend)
    else:
        attend()
