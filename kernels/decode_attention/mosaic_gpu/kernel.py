"""The kernel of decode_attention on Hopper: TMA brings keys and values, wgmma multiplies them. See `call.py`."""

from __future__ import annotations

import functools
import math
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.compat import load_to_registers, store_from_registers
from palladion.kernels.decode_attention import online_softmax
from palladion.kernels.decode_attention.mosaic_gpu.config import TILE, Config
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.shares import share_of
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref, Scalar

TOKENS: Final = 0
"""Axis of tokens in products of keys and queries, which are `[tokens, rows]`."""


class Refs(NamedTuple):
    """The inputs, in device memory; None where the call has no such array.

    Attributes:
      layer: `[1]`, or None for the cache of one layer.
      lengths: `[batch]`.
      q: `[batch, kv_heads, rows, head_dim]`.
      k: `[num_layers, batch or num_pages, kv_heads, max_len or page_size, head_dim]`.
      v: like k.
    """

    layer: Any
    lengths: Ref
    q: Ref
    k: Ref
    v: Ref


class Scratch(NamedTuple):
    """Shared memory of a program, and the barriers that TMA arrives at.

    Attributes:
      q: queries, `[block_rows, head_dim]`.
      k: ring of keys, `[num_stages, block_kv, head_dim]`.
      v: ring of values, like k.
      p: weights, `[block_rows, block_kv]`.
      out: what is written, `[block_rows, head_dim]`.
      q_arrived: the queries have arrived.
      k_arrived: a block of keys has arrived, one barrier for each place of the ring.
      v_arrived: a block of values has arrived.
    """

    q: Ref
    k: Ref
    v: Ref
    p: Ref
    out: Ref
    q_arrived: Ref
    k_arrived: Ref
    v_arrived: Ref


def chunk_of(problem: Problem, block_kv: int) -> int:
    """Returns the tokens of a block that one transfer brings: they lie on one page."""
    return block_kv if problem.page_size is None else math.gcd(problem.page_size, block_kv)


def scratch_types(problem: Problem, config: Config, out_dtype: Any, interpret: bool) -> Scratch:
    """Returns the types of `Scratch`."""
    p, c = problem, config
    swizzled = () if interpret else (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))

    def operand(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.dtype(p.q_dtype), transforms=swizzled)

    copies = c.block_kv // chunk_of(p, c.block_kv)
    arrivals = plgpu.Barrier(num_arrivals=copies, num_barriers=c.num_stages)
    return Scratch(
        q=operand(c.block_rows, p.head_dim),
        k=operand(c.num_stages, c.block_kv, p.head_dim),
        v=operand(c.num_stages, c.block_kv, p.head_dim),
        p=operand(c.block_rows, c.block_kv),
        out=plgpu.SMEM((c.block_rows, p.head_dim), out_dtype),
        q_arrived=plgpu.Barrier(),
        k_arrived=arrivals,
        v_arrived=arrivals,
    )


class Program:
    """A program's place in the grid, its transfers and its products.

    Args:
      problem: the call.
      config: block sizes.
      refs: the inputs.
      scratch: shared memory and barriers.
      interpret: whether the kernel is interpreted: arrays have no layouts then, and products are those of jax.numpy.
    """

    def __init__(self, problem: Problem, config: Config, refs: Refs, scratch: Scratch, interpret: bool) -> None:
        self.problem, self.config, self.refs, self.scratch, self.interpret = problem, config, refs, scratch, interpret
        self.slot, self.head, self.row_block = (jax.lax.axis_index(name) for name in ("slot", "head", "row"))
        self.share = share_of(problem, config, refs.lengths, self.row_block, self.slot)
        self.layer = 0 if refs.layer is None else refs.layer[0]
        self.first_row = self.row_block * config.block_rows

    def constant(self, shape: tuple[int, ...], value: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
        """Returns a constant float32 array in registers of a layout."""
        array = jnp.full(shape, value, jnp.float32)
        return array if self.interpret else plgpu.layout_cast(array, layout)

    def indices(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Returns the indices along an axis of a matrix, in registers of products."""
        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def load(self, ref: Ref, layout: Any) -> jax.Array:
        """Loads a reference to registers of a layout."""
        return ref[...] if self.interpret else load_to_registers(ref, layout)

    def fetch(self, block: Scalar) -> None:
        """Starts the transfers of a KV block to its place in the ring."""
        p, config, share, scratch = self.problem, self.config, self.share, self.scratch
        place = jax.lax.rem(block - share.begin, jnp.int32(config.num_stages))
        chunk = chunk_of(p, config.block_kv)
        for start in range(0, config.block_kv, chunk):
            slab, token = share.sequence, block * config.block_kv + start
            source = (self.layer, slab, self.head, pl.ds(token, chunk))
            target = (place, pl.ds(start, chunk))
            plgpu.copy_gmem_to_smem(self.refs.k.at[source], scratch.k.at[target], scratch.k_arrived.at[place])
            plgpu.copy_gmem_to_smem(self.refs.v.at[source], scratch.v.at[target], scratch.v_arrived.at[place])

    def multiply(self, left: Ref, right: Ref, *, turned: bool) -> jax.Array:
        """Multiplies two operands in shared memory, float32 `[m, rows]`.

        Args:
          left: `[m, depth]`, or `[depth, m]` where `turned`.
          right: `[rows, depth]`.
          turned: whether the left operand lies with its depth along the first axis.
        """
        if self.interpret:
            a, b = left[...], right[...]
            return jnp.dot(a.T if turned else a, b.T, preferred_element_type=jnp.float32)
        left = left.transpose((1, 0)) if turned else left

        def on_tensor_cores(sums: Ref) -> jax.Array:
            plgpu.wgmma(sums, left, right.transpose((1, 0)))
            return sums[...]

        shape = (left.shape[0], right.shape[0])
        result: jax.Array = pl.run_scoped(on_tensor_cores, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        return result

    def store_turned(self, ref: Ref, value: jax.Array) -> None:
        """Stores a matrix in registers to shared memory, turned."""
        if self.interpret:
            ref[...] = value.T
        else:
            store_from_registers(ref.transpose((1, 0)), plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED))

    def commit(self) -> None:
        """Makes what was stored to shared memory visible to tensor cores and TMA."""
        if not self.interpret:
            plgpu.commit_smem()

    def clear_unseen(self, values: Ref, first_token: Scalar) -> None:
        """Replaces values of a block that no row sees by zeros: they may be NaN, and 0 * NaN is NaN."""
        span = self.share.span
        for start in range(0, self.problem.head_dim, TILE):
            tile = values.at[:, pl.ds(start, TILE)]
            loaded = self.load(tile, plgpu.Layout.WGMMA)
            token = first_token + self.indices(loaded.shape, TOKENS)
            seen = (token >= span.first_token) & (token <= span.last_token)
            tile[...] = jnp.where(seen, loaded, jnp.zeros((), loaded.dtype))
        self.commit()

    def attend(self, block: jax.Array, state: online_softmax.State) -> online_softmax.State:
        """Adds a KV block to the online softmax."""
        p, config, share, scratch = self.problem, self.config, self.share, self.scratch
        place = jax.lax.rem(block - share.begin, jnp.int32(config.num_stages))
        plgpu.barrier_wait(scratch.k_arrived.at[place])
        products = self.multiply(scratch.k.at[place], scratch.q, turned=False)  # [block_kv, block_rows]
        token = block * config.block_kv + self.indices(products.shape, TOKENS)
        query = divide_with_remainder(self.first_row + self.indices(products.shape, 1 - TOKENS), p.group)[0]
        visible = online_softmax.visible_mask(p, token, share.length - p.q_len + query)
        s = online_softmax.masked_logits(p, products, None, visible, TOKENS)
        weights, alpha, state = online_softmax.update(p, state, s, None, TOKENS)
        self.store_turned(scratch.p, weights.astype(p.q_dtype))
        self.commit()
        plgpu.barrier_wait(scratch.v_arrived.at[place])
        first, last = block * config.block_kv, (block + 1) * config.block_kv - 1
        pl.when((first < share.span.first_token) | (last > share.span.last_token))(
            lambda: self.clear_unseen(scratch.v.at[place], first)
        )
        (acc,) = state.acc
        added = self.multiply(scratch.v.at[place], scratch.p, turned=True)  # [head_dim, block_rows]
        acc = acc * jax.lax.broadcast_in_dim(alpha, acc.shape, (1 - TOKENS,)) + added

        @pl.when(block + config.num_stages < share.end)
        def _() -> None:
            self.fetch(block + config.num_stages)

        return state._replace(acc=(acc,))

    def run(self) -> online_softmax.State:
        """Returns the state after all KV blocks of the program's share."""
        p, config, share, scratch = self.problem, self.config, self.share, self.scratch
        queries = self.refs.q.at[share.sequence, self.head, pl.ds(self.first_row, config.block_rows)]
        plgpu.copy_gmem_to_smem(queries, scratch.q, scratch.q_arrived)
        for stage in range(config.num_stages):
            block = share.begin + stage
            pl.when(block < share.end)(functools.partial(self.fetch, block))
        plgpu.barrier_wait(scratch.q_arrived)
        rows = plgpu.Layout.WGMMA.reduce(0)
        state = online_softmax.State(
            self.constant((config.block_rows,), -jnp.inf, rows),
            self.constant((config.block_kv, config.block_rows), 0),
            (self.constant((p.head_dim, config.block_rows), 0),),
        )
        return jax.lax.fori_loop(share.begin, share.end, self.attend, state)


def kernel(
    refs: Refs, out: Ref, lse: Ref, scratch: Scratch, *, problem: Problem, config: Config, interpret: bool
) -> None:
    """Computes attention of a block of query rows, which share a sequence and KV head, over a share of the cache.

    Args:
      refs: the inputs.
      out: `[slots, kv_heads, rows, head_dim]`.
      lse: `[slots, kv_heads, row blocks * block_rows]`.
      scratch: shared memory and barriers.
      problem: the call.
      config: block sizes.
      interpret: whether the kernel is interpreted.
    """
    program = Program(problem, config, refs, scratch, interpret)
    (found,), lse_of_rows = online_softmax.finish(problem, program.run(), None, TOKENS)
    staged, rows = scratch.out, pl.ds(program.first_row, config.block_rows)
    for start in range(0, problem.head_dim, TILE):
        part = found[start : start + TILE].astype(staged.dtype)
        program.store_turned(staged.at[:, pl.ds(start, TILE)], part)
    store_from_registers(lse.at[program.slot, program.head, rows], lse_of_rows)
    program.commit()
    plgpu.copy_smem_to_gmem(staged, out.at[program.slot, program.head, rows])
    plgpu.wait_smem_to_gmem(0)
