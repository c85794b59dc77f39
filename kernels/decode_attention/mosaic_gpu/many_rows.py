"""The kernel of decode_attention on Hopper for many query rows, as in prefill: queries are wgmma's left operand.

A program has a block of rows of one head: two or three warpgroups with 64 rows each, and one more that only starts
copies. KV blocks come through a ring that TMA fills, and every warpgroup goes through all of them:

    S [64, block_kv]  = Q [64, head_dim] K^T [head_dim, block_kv]      Q and K in shared memory
    O [64, head_dim] += P [64, block_kv] V [block_kv, head_dim]        P in registers, V in shared memory

    resident in registers       m, l, O; of a block: S, which becomes P
    resident in shared memory   q, where the output is put at the end, and the ring

While one warpgroup computes its softmax, the tensor cores multiply for another: with `ping_pong` the two take turns.
With `overlaps` they also multiply for the same one: the weights and values of the block before. Blocks past the causal
diagonal of the rows are not visited, and only those on it, at the edge of a window or at the end are masked.

Grid: (row blocks, slots, heads), the last rows first, since they see the most. A slot is a sequence, or with splits a
share of the KV blocks that the rows see in one (`shares.py`), whose results XLA merges.

Rows are the queries of one head, as they lie in memory; heads that share a KV head read it from the L2 cache. Where
there are few queries, rows are those of all heads of a KV head, query major (`many_rows_call.py`).

Bound by tensor cores: 128 rows and 128 tokens of 128 features take 2,048 cycles, and 16,384 powers of two 1,024.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.decode_attention import online_softmax
from palladion.kernels.decode_attention.mosaic_gpu.config import TILE, Config
from palladion.kernels.decode_attention.mosaic_gpu.kernel import Results
from palladion.kernels.decode_attention.mosaic_gpu.memory import Refs, Ring, Scratch
from palladion.kernels.decode_attention.mosaic_gpu.registers import MATRIX, OF_ROWS, Registers
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.shares import share_of
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref

REGISTERS: Final = {2: (240, 24), 3: (160, 32)}
"""Registers of a thread that computes and of one that starts copies, by the number of warpgroups that compute."""

COLUMNS = 8
"""Columns of a matrix in registers of which a thread has some of each row: weights are summed for every 8th token."""

TOKENS: Final = 1
"""Axis of tokens in products of queries and keys, which are `[rows, tokens]`."""


def tanh(x: jax.Array) -> jax.Array:
    """Returns tanh x to some 20 bits by powers of two and a square root, since `tanh.approx` has only 11 bits."""
    root = jax.lax.rsqrt(1.0 + jnp.exp2(x * (2 * online_softmax.LOG2_E)))
    return 1.0 - 2.0 * root * root


def rescaled(state: online_softmax.State, alpha: jax.Array) -> jax.Array:
    """Returns acc times alpha, `[rows, head_dim]`."""
    (acc,) = state.acc
    return acc * jax.lax.broadcast_in_dim(alpha, acc.shape, (1 - TOKENS,))


class Program:
    """A program's rows and its ring of KV blocks, as one of its warpgroups sees them.

    Args:
      problem: the call; its `group` is the number of rows of a query.
      config: block sizes.
      refs: the inputs.
      scratch: shared memory and barriers.
      interpret: whether the kernel is interpreted.
    """

    def __init__(self, problem: Problem, config: Config, refs: Refs, scratch: Scratch, interpret: bool) -> None:
        self.problem, self.config, self.refs, self.scratch = problem, config, refs, scratch
        self.registers = Registers(interpret)
        self.warpgroup, self.head, slot = (jax.lax.axis_index(name) for name in ("warpgroup", "head", "slot"))
        row_blocks = pl.cdiv(problem.q_len * problem.group, config.block_rows)
        row_block = row_blocks - 1 - jax.lax.axis_index("row")
        self.share = share_of(problem, config, refs.lengths, row_block, slot)
        # Where nothing is visible, a block is visited that is masked.
        self.begin: jax.Array = jnp.asarray(self.share.begin)
        self.end = jnp.maximum(self.share.end, self.begin + 1)
        self.first_row = row_block * config.block_rows + self.warpgroup * TILE
        layer = 0 if refs.layer is None else refs.layer[0]
        kv_head = divide_with_remainder(self.head, problem.kv_heads // refs.k.shape[2])[0]
        self.ring = Ring(problem, config, refs, scratch, self.share, layer, kv_head)

    def position(self, row: Any) -> Any:
        """Returns the position of the query of a row."""
        return self.share.length - self.problem.q_len + divide_with_remainder(row, self.problem.group)[0]

    def copy(self) -> None:
        """Starts the copies of all KV blocks, and waits until all have been multiplied."""
        ring, scratch, num_stages = self.ring, self.scratch, self.config.num_stages

        def step(block: jax.Array, _: None) -> None:
            place, located = ring.place(block), ring.locate(block)
            replaces, exists = block >= self.begin + num_stages, block < self.end
            pl.when(replaces)(lambda: plgpu.barrier_wait(scratch.k_done.at[place]))
            pl.when(exists)(lambda: ring.fetch_keys(block, located))
            pl.when(replaces)(lambda: plgpu.barrier_wait(scratch.v_done.at[place]))
            pl.when(exists)(lambda: ring.fetch_values(block, located))

        jax.lax.fori_loop(self.begin, self.end + num_stages, step, None)

    def take_turn(self) -> None:
        """Waits until the other warpgroup lets this one multiply."""
        if self.config.ping_pong:
            plgpu.barrier_wait(self.scratch.turn.at[self.warpgroup])

    def end_turn(self) -> None:
        """Lets the other warpgroup multiply."""
        if self.config.ping_pong:
            plgpu.barrier_arrive(self.scratch.turn.at[1 - self.warpgroup])

    @property
    def factor(self) -> float | None:
        """The factor of logits when their maximum is subtracted; None if they were multiplied before."""
        p = self.problem
        return None if p.logits_soft_cap is not None or p.scale <= 0 else online_softmax.scale_of_products(p)

    def await_keys(self, block: jax.Array) -> None:
        """Waits for the keys of a KV block, if there is such a block."""
        pl.when(block < self.end)(lambda: plgpu.barrier_wait(self.scratch.k_arrived.at[self.ring.place(block)]))

    def keys(self, block: jax.Array) -> Ref:
        """Returns the keys of a KV block, once they have arrived."""
        place = self.ring.place(block)
        plgpu.barrier_wait(self.scratch.k_arrived.at[place])
        return self.scratch.k.at[place]

    def values(self, block: jax.Array) -> Ref:
        """Returns the values of a KV block, once they have arrived.

        Those that no query of the sequence sees are zero: they may be NaN, and 0 * NaN is NaN. The first warpgroup
        clears them, which never waits for another's turn to end after its own, and the others wait for it.
        """
        p, share, scratch, place = self.problem, self.share, self.scratch, self.ring.place(block)
        plgpu.barrier_wait(scratch.v_arrived.at[place])
        first, last = block * self.config.block_kv, (block + 1) * self.config.block_kv - 1
        first_seen = jnp.int32(0)
        if p.sliding_window is not None:
            first_seen = jnp.maximum(share.length - p.q_len - p.sliding_window + 1, 0)

        def store() -> None:
            for row in range(0, self.config.block_kv, TILE):
                for column in range(0, p.head_dim, TILE):
                    tile = scratch.v.at[place, pl.ds(row, TILE), pl.ds(column, TILE)]
                    token = first + row + self.registers.indices((TILE, TILE), 0)
                    seen = (token >= first_seen) & (token < share.length)
                    values = self.registers.load(tile, MATRIX)
                    self.registers.store(tile, jnp.where(seen, values, jnp.zeros((), values.dtype)))
            self.registers.commit()
            plgpu.barrier_arrive(scratch.v_cleared.at[place])

        def clear_or_wait() -> None:
            pl.when(self.warpgroup == 0)(store)
            pl.when(self.warpgroup > 0)(lambda: plgpu.barrier_wait(scratch.v_cleared.at[place]))

        pl.when((first < first_seen) | (last >= share.length))(clear_or_wait)
        return scratch.v.at[place]

    def release(self, done: Ref, block: jax.Array) -> None:
        """Lets another block take the place of the keys or values of a KV block."""
        self.registers.release(loaded=False)
        plgpu.barrier_arrive(done.at[self.ring.place(block)])

    def softmax(
        self, block: jax.Array, s: jax.Array, state: online_softmax.State
    ) -> tuple[jax.Array, jax.Array, online_softmax.State]:
        """Adds products of queries and keys of a KV block to the online softmax; for results see `update` there."""
        p = self.problem
        if self.factor is None:
            s = online_softmax.logits(p, s, tanh=tanh)
        first, last = block * self.config.block_kv, (block + 1) * self.config.block_kv - 1
        at_edge = last > self.position(self.first_row)
        if p.sliding_window is not None:
            at_edge |= first <= self.position(self.first_row + (TILE - 1)) - p.sliding_window

        def mask(s: jax.Array) -> jax.Array:
            token = first + self.registers.indices(s.shape, TOKENS)
            position = self.position(self.first_row + self.registers.indices(s.shape, 1 - TOKENS))
            return jnp.where(online_softmax.visible_mask(p, token, position), s, -jnp.inf)

        s = jax.lax.cond(at_edge, mask, lambda s: s, s)
        return online_softmax.update(p, state, s, None, TOKENS, self.factor)

    def attend(self, block: jax.Array, state: online_softmax.State) -> online_softmax.State:
        """Adds a KV block to the online softmax; the warpgroup's turn goes from its second product to its first."""
        s = self.registers.multiply(self.queries, self.keys(block), meanwhile=self.end_turn)
        self.release(self.scratch.k_done, block)
        weights, alpha, state = self.softmax(block, s, state)
        weights, acc = weights.astype(self.problem.kv_dtype), rescaled(state, alpha)
        values = self.values(block)
        self.take_turn()
        acc = self.registers.add_product(acc, weights, values, right_turned=True)
        self.release(self.scratch.v_done, block)
        return state._replace(acc=(acc,))

    def attend_overlapped(
        self, block: jax.Array, carry: tuple[online_softmax.State, jax.Array]
    ) -> tuple[online_softmax.State, jax.Array]:
        """Adds a KV block to the online softmax, and the values of the one before it to the output.

        Args:
          block: the KV block.
          carry: the state before it, and the weights of the block before it, whose values it lacks.

        Returns:
          The state without the block's values, and their weights.
        """
        state, weights = carry

        def use(s: jax.Array) -> tuple[jax.Array, jax.Array, online_softmax.State]:
            self.release(self.scratch.k_done, block)
            found = self.softmax(block, s, state._replace(acc=()))
            # A loop at this place keeps the assembler from waiting for the second product before the softmax.
            self.await_keys(block + 1)
            return found

        (acc,) = state.acc
        keys, values = self.scratch.k.at[self.ring.place(block)], self.values(block - 1)
        self.take_turn()
        acc, (next_weights, alpha, state) = self.registers.multiply_and_add(
            self.queries, keys, acc, weights, values, self.end_turn, use
        )
        self.release(self.scratch.v_done, block - 1)
        state = state._replace(acc=(acc,))
        return state._replace(acc=(rescaled(state, alpha),)), next_weights.astype(self.problem.kv_dtype)

    @property
    def queries(self) -> Ref:
        """The queries of the warpgroup's rows."""
        return self.scratch.q.at[self.warpgroup]

    def compute(self) -> online_softmax.State:
        """Returns the state of the warpgroup's rows after all KV blocks."""
        warpgroup, arrived = self.warpgroup, self.scratch.q_arrived.at[self.warpgroup]
        queries = self.refs.q.at[self.share.sequence, pl.ds(self.first_row, TILE), self.head]
        plgpu.copy_gmem_to_smem(queries, self.queries, arrived)
        plgpu.barrier_wait(arrived)
        state = online_softmax.State(
            self.registers.constant((TILE,), -jnp.inf, OF_ROWS),
            self.registers.constant((TILE, COLUMNS), 0),
            (self.registers.constant((TILE, self.problem.head_dim), 0),),
        )
        pl.when(warpgroup == 1)(self.end_turn)  # the first one begins
        self.take_turn()
        if not self.config.overlaps:
            state = jax.lax.fori_loop(self.begin, self.end, self.attend, state)
            pl.when(warpgroup == 0)(self.end_turn)
            return state
        s = self.registers.multiply(self.queries, self.keys(self.begin), meanwhile=self.end_turn)
        self.release(self.scratch.k_done, self.begin)
        weights, _, state = self.softmax(self.begin, s, state)
        self.await_keys(self.begin + 1)
        carry = state, weights.astype(self.problem.kv_dtype)
        state, weights = jax.lax.fori_loop(self.begin + 1, self.end, self.attend_overlapped, carry)
        (acc,), last = state.acc, self.end - 1
        acc = self.registers.add_product(acc, weights, self.values(last), right_turned=True)
        self.release(self.scratch.v_done, last)
        pl.when(warpgroup == 0)(self.take_turn)
        return state._replace(acc=(acc,))

    def sinks(self) -> jax.Array | None:
        """Returns the sinks of the warpgroup's rows, `[64]`, if there are any; only the first split has them."""
        if self.refs.sinks is None:
            return None
        own = self.refs.sinks.at[self.head, pl.ds(self.first_row, TILE)]
        return self.registers.load(own, OF_ROWS, optimized=False) + jnp.where(self.share.split == 0, 0.0, -jnp.inf)

    def write(self, results: Results, out: jax.Array, lse: jax.Array) -> None:
        """Writes the results of the warpgroup's rows; TMA leaves out those past the end of an array's axis."""
        rows, slot = pl.ds(self.first_row, TILE), (self.share.split, self.share.sequence)
        self.registers.store(results.lse.at[*slot, self.head, rows], lse)
        place = results.out.at[*slot, rows, self.head]
        if self.config.splits > 1:
            self.registers.store(place, out)
            return
        staged = self.scratch.q.at[self.warpgroup]
        self.registers.store(staged, out.astype(results.out.dtype))
        self.registers.commit()
        plgpu.copy_smem_to_gmem(staged, place)
        plgpu.wait_smem_to_gmem(0)


def kernel(
    refs: Refs, results: Results, scratch: Scratch, *, problem: Problem, config: Config, interpret: bool
) -> None:
    """Computes attention of a block of query rows of a head.

    Args:
      refs: the inputs.
      results: what is written: out `[splits, batch, rows, heads, head_dim]`, lse `[splits, batch, heads, rows]`.
      scratch: shared memory and barriers.
      problem: the call; its `group` is the number of rows of a query.
      config: block sizes.
      interpret: whether the kernel is interpreted.
    """
    program = Program(problem, config, refs, scratch, interpret)
    most, least = REGISTERS[config.warpgroups]

    def compute() -> None:
        plgpu.set_max_registers(most, action="increase")
        state = program.compute()
        (out,), lse = online_softmax.finish(problem, state, program.sinks(), TOKENS)
        program.write(results, out, lse)

    def copy() -> None:
        plgpu.set_max_registers(least, action="decrease")
        program.copy()

    pl.when(program.warpgroup < config.warpgroups)(compute)
    pl.when(program.warpgroup == config.warpgroups)(copy)
