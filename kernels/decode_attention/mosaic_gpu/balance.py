"""Balanced shares, found by a program that has no vectors of lengths: it looks at the sequences one by one.

The shares are those of `shares.Balance`, which computes them from arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.decode_attention.mosaic_gpu.config import Config
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.shares import (
    Share,
    Slots,
    balanced_size,
    balanced_slots,
    is_balanced,
    share_of,
    span_of,
)
from palladion.kernels.types import Ref, Scalar


class Found(NamedTuple):
    """A sequence that was looked for.

    Attributes:
      sequence: the sequence.
      slots: its slots.
      size: KV blocks of a share.
    """

    sequence: jax.Array
    slots: Slots
    size: jax.Array


def length_of(problem: Problem, lengths: Ref, sequence: Scalar) -> jax.Array:
    """Returns the length of a sequence."""
    return jnp.clip(lengths[sequence], 0, problem.max_len)


def find(
    problem: Problem,
    config: Config,
    lengths: Ref,
    row_block: Scalar,
    is_it: Callable[[int, jax.Array], jax.Array | bool],
) -> Found:
    """Returns the last sequence for which `is_it`, given the sequence and its first slot, is true.

    There is no loop over sequences in the program: their lengths are awaited together.
    """
    sequences = range(problem.batch)
    seen = [length_of(problem, lengths, sequence) for sequence in sequences]
    blocks = [span_of(problem, config, length, row_block).blocks for length in seen]
    size = balanced_size(problem, config, sum(blocks, jnp.int32(0)))
    end = zero = jnp.int32(0)
    found = Found(zero, Slots(zero, zero), size)
    for sequence in sequences:
        count = balanced_slots(blocks[sequence], size)
        here = Found(jnp.int32(sequence), Slots(end, count), size)
        chosen = is_it(sequence, end)
        found = jax.tree.map(lambda new, old, chosen=chosen: jnp.where(chosen, new, old), here, found)
        end = end + count
    return found


def find_share(problem: Problem, config: Config, lengths: Ref, row_block: Scalar, slot: Scalar) -> Share:
    """Returns the share of a slot, for a block of rows."""
    if not is_balanced(problem, config):
        return share_of(problem, config, lengths, row_block, slot)
    found = find(problem, config, lengths, row_block, lambda _, first: first <= slot)
    length = length_of(problem, lengths, found.sequence)
    span = span_of(problem, config, length, row_block)
    return Share.of(found.sequence, length, span, found.size, slot - found.slots.first, found.slots)


def find_slots(problem: Problem, config: Config, lengths: Ref, row_block: Scalar, sequence: Scalar) -> Slots:
    """Returns the slots of a sequence, for a block of rows."""
    if not is_balanced(problem, config):
        return Slots(sequence * config.splits, jnp.int32(config.splits))
    return find(problem, config, lengths, row_block, lambda other, _: other == sequence).slots
