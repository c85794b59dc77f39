"""Merging of the partial results that the slots of a sequence leave, in float32.

A second kernel does it, with programs for each query of each head; or, in the same launch, the last of the programs of
a sequence, KV head and block of rows: each counts itself after its results, and the one that finds all others counted
reads theirs.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.decode_attention import shares
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.shares import Slots
from palladion.kernels.decode_attention.triton.config import Config
from palladion.kernels.decode_attention.triton.rows import Rows, Tile
from palladion.kernels.gpu_merge import arrive
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref, Scalar

WIDTH: Final = 32
"""Features that a program of the merge kernel has."""

AT_ONCE: Final = 64
"""Most slots that a program of the merge kernel reads at once: 2048 numbers, 64 for each thread of a warp."""

BALANCED_AT_ONCE: Final = 2
"""The same for balanced shares, in parts of the mean number of slots: few sequences have more."""

REGISTERS: Final = 64
"""Numbers that a thread of the last program reads at once."""


class Attention(NamedTuple):
    """Results, as arrays or references.

    Attributes:
      out: `[batch or slots, q_len, q_heads, head_dim]`.
      lse: `[batch or slots, q_len, q_heads]`, float32.
    """

    out: Ref
    lse: Ref


def slots_at_once(problem: Problem, config: Config) -> int:
    """Returns the slots of a sequence that a program of the merge kernel reads at once, a power of two."""
    most = shares.most_slots(problem, config)
    if shares.is_balanced(problem, config):
        most = min(most, BALANCED_AT_ONCE * config.splits)
    return min(pl.next_power_of_2(most), AT_ONCE)


def merge_warps(problem: Problem, config: Config) -> int:
    """Returns the warps of a program of the merge kernel: one, unless a warp's registers are too few."""
    many_slots = slots_at_once(problem, config) > 16
    many_lengths = shares.is_balanced(problem, config) and problem.batch > 1024
    return 4 if many_slots or many_lengths else 1


def merge_kernel(
    lengths: Ref,  # int32 [batch]
    partial: Attention,  # [slots, ...]
    merged: Attention,  # [batch, ...]
    *,
    problem: Problem,
    config: Config,
) -> None:
    """Merges the partial results of one query of one head, `WIDTH` features in each program."""
    p = problem
    b, row_of_sequence = divide_with_remainder(pl.program_id(0), p.q_len * p.q_heads)
    head, row = divide_with_remainder(row_of_sequence, p.q_len * p.group)
    row_block, _ = divide_with_remainder(row, config.block_rows)
    slots = shares.slots_of_sequence(p, config, lengths, row_block, b)
    rows = Rows.of(p, head, row, 1)
    tile = Tile(pl.program_id(1) * WIDTH, WIDTH)
    # All programs of a query compute the same lse.
    merge(p, partial, merged, b, slots, rows, (tile,), slots_at_once(p, config))


def merge_if_last(
    problem: Problem,
    config: Config,
    partial: Attention,
    merged: Attention,
    counters: Ref,
    share: shares.Share,
    head: Scalar,
    row_block: Scalar,
    tiles: tuple[Tile, ...],
    *,
    native: bool,
) -> None:
    """Merges the partial results of a sequence, once all of its programs have stored theirs.

    Args:
      problem: the call.
      config: block sizes.
      partial: partial results, `[slots, ...]`, those of this program stored.
      merged: results, `[batch, ...]`.
      counters: int32 `[batch, kv_heads, row blocks]`, zero before the first program.
      share: what this program worked on.
      head: its KV head.
      row_block: its block of rows.
      tiles: tiles of head_dim.
      native: whether the kernel is compiled for an NVIDIA GPU, not interpreted.
    """
    place = (share.sequence, head, row_block)
    arrived = arrive(counters, place, share.works.astype(jnp.int32), native=native)

    @pl.when(share.works & (arrived == share.slots.number - 1))
    def _() -> None:
        count = min(config.block_rows, pl.next_power_of_2(problem.q_len * problem.group))
        rows = Rows.of(problem, head, row_block * config.block_rows, count)
        sums = count * pl.next_power_of_2(sum(tile.width for tile in tiles))
        at_once = max(REGISTERS * 32 * config.num_warps // sums, 1)
        at_once = min(at_once, pl.next_power_of_2(shares.most_slots(problem, config)))
        merge(problem, partial, merged, share.sequence, share.slots, rows, tiles, at_once)


def merge(
    problem: Problem,
    partial: Attention,
    merged: Attention,
    sequence: Scalar,
    slots: Slots,
    rows: Rows,
    tiles: tuple[Tile, ...],
    at_once: int,
) -> None:
    """Merges the partial results of some rows, those of `at_once` slots at a time, a power of two."""
    head_dim = problem.head_dim

    def add(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m, total, *accs = state
        index = step * at_once + jnp.arange(at_once, dtype=jnp.int32)
        exists, slot = index < slots.number, slots.first + index
        mask = exists[:, None] & rows.exists[None, :]
        window = partial.lse.at[slot[:, None], rows.query[None, :], rows.q_head[None, :]]
        lse = plgpu.load(window, mask=mask, other=-jnp.inf)  # [slots, rows]
        outs = []
        for tile in tiles:
            (query, q_head, feature), there = rows.tile_index(tile, head_dim)
            window = partial.out.at[slot[:, None, None], query[None], q_head[None], feature[None]]
            mask = exists[:, None, None] & there[None]
            outs.append(plgpu.load(window, mask=mask, other=0.0))  # [slots, rows, width]
        m_next = jnp.maximum(m, jnp.max(lse, axis=0))
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)
        weights, alpha = jnp.exp(lse - shift[None, :]), jnp.exp(m - shift)
        accs = [
            acc * alpha[:, None] + jnp.sum(weights[:, :, None] * out, axis=0)
            for acc, out in zip(accs, outs, strict=True)
        ]
        return m_next, total * alpha + jnp.sum(weights, axis=0), *accs

    count = rows.query.shape[0]
    state = (
        jnp.full(count, -jnp.inf, jnp.float32),
        jnp.zeros(count, jnp.float32),
        *(jnp.zeros((count, tile.width), jnp.float32) for tile in tiles),
    )
    steps = divide_with_remainder(slots.number + (at_once - 1), at_once)[0]
    m, total, *accs = jax.lax.fori_loop(0, steps, add, state)
    divisor = jnp.where(total == 0.0, 1.0, total)[:, None]
    for tile, acc in zip(tiles, accs, strict=True):
        index, there = rows.tile_index(tile, head_dim)
        plgpu.store(merged.out.at[sequence, *index], (acc / divisor).astype(merged.out.dtype), mask=there)
    plgpu.store(merged.lse.at[sequence, rows.query, rows.q_head], m + jnp.log(total), mask=rows.exists)
