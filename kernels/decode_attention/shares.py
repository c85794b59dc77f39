"""The share of the cache that each program works on.

For every KV head and block of rows there is a fixed number of slots, and a program for each. A slot has a share of the
KV blocks that these rows see in one sequence:

  by sequence    `splits` slots for each sequence, whose KV blocks they share equally; what a slot does depends on its
                 own sequence alone, as `batch_invariant` demands
  balanced       shares of one size for all sequences, the mean divided by `splits`: a long sequence has more slots than
                 a short one, each at least one, and what is left over, at most one slot a sequence, has nothing to do

A balanced slot finds its share from all lengths, which every program reads. Slots are numbered sequence by sequence.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.decode_attention.online_softmax import VisibleSpan, visible_span
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref, Scalar


class Blocks(Protocol):
    """Block sizes of a backend, as far as shares depend on them."""

    @property
    def block_kv(self) -> int:
        """Cached tokens of a KV block."""

    @property
    def block_rows(self) -> int:
        """Query rows of a program."""

    @property
    def splits(self) -> int:
        """Shares of a sequence; the mean over all sequences where they are balanced."""

    @property
    def balanced(self) -> bool:
        """Whether shares have one size for all sequences."""


def last_row(problem: Problem, config: Blocks, row_block: Scalar) -> Scalar:
    """Returns the last row of a block of rows that exists."""
    return jnp.minimum((row_block + 1) * config.block_rows, problem.q_len * problem.group) - 1


def is_balanced(problem: Problem, config: Blocks) -> bool:
    """Returns whether shares have one size for all sequences."""
    return config.balanced and problem.batch > 1 and not problem.batch_invariant


def slots_of(problem: Problem, config: Blocks) -> int:
    """Returns the number of slots of a KV head and block of rows."""
    return problem.batch * (config.splits + is_balanced(problem, config))


def most_slots(problem: Problem, config: Blocks) -> int:
    """Returns the largest number of slots of a sequence."""
    if not is_balanced(problem, config):
        return config.splits
    return min(slots_of(problem, config), max(pl.cdiv(problem.max_len, config.block_kv), 1))


class Slots(NamedTuple):
    """The slots of a sequence: `number` of them, from `first` on."""

    first: Scalar
    number: Scalar


class Share(NamedTuple):
    """The KV blocks that a slot works on.

    Attributes:
      sequence: the sequence.
      length: its length.
      span: the tokens that the rows see in it.
      split: index of the slot among those of its sequence.
      begin: the first KV block of the share.
      end: the KV block after its last.
      slots: all slots of the sequence.
      works: whether the slot is one of them; if not, its share is empty.
    """

    sequence: Scalar
    length: Scalar
    span: VisibleSpan
    split: Scalar
    begin: Scalar
    end: Scalar
    slots: Slots
    works: jax.Array

    @classmethod
    def of(
        cls, sequence: Scalar, length: Scalar, span: VisibleSpan, size: jax.Array, split: Scalar, slots: Slots
    ) -> Share:
        """Returns share number `split`, of `size` KV blocks, of what rows see in a sequence."""
        begin = span.first_block + split * size
        end = jnp.minimum(begin + size, span.first_block + span.blocks)
        return cls(sequence, length, span, split, begin, end, slots, jnp.less(split, slots.number))


def share_of(problem: Problem, config: Blocks, lengths: Ref, row_block: Scalar, slot: Scalar) -> Share:
    """Returns the share of a slot, for a block of rows."""
    p = problem
    if is_balanced(p, config):
        return Balance.of(p, config, padded(p, lengths), row_block).share(slot)
    sequence, split = divide_with_remainder(slot, config.splits)
    length = jnp.clip(lengths[sequence], 0, p.max_len)
    span = span_of(p, config, length, row_block)
    size = divide_with_remainder(span.blocks + (config.splits - 1), config.splits)[0]
    return Share.of(sequence, length, span, size, split, Slots(slot - split, config.splits))


def slots_of_sequence(problem: Problem, config: Blocks, lengths: Ref, row_block: Scalar, sequence: Scalar) -> Slots:
    """Returns the slots of a sequence, for a block of rows."""
    if is_balanced(problem, config):
        return Balance.of(problem, config, padded(problem, lengths), row_block).slots(sequence)
    return Slots(sequence * config.splits, config.splits)


def span_of(problem: Problem, config: Blocks, length: jax.Array, row_block: Scalar) -> VisibleSpan:
    """Returns what a block of rows sees, for a length or an array of lengths."""
    first = row_block * config.block_rows
    return visible_span(problem, length, first, last_row(problem, config, row_block), config.block_kv)


def padded(problem: Problem, lengths: Ref) -> jax.Array:
    """Reads the lengths of all sequences, and -1 for as many more as make their number a power of two."""
    sequence = jnp.arange(pl.next_power_of_2(problem.batch), dtype=jnp.int32)
    exists = sequence < problem.batch
    filled = plgpu.load(lengths.at[sequence], mask=exists, other=0)
    return jnp.where(exists, jnp.clip(filled, 0, problem.max_len), -1)


def balanced_size(problem: Problem, config: Blocks, blocks: jax.Array) -> jax.Array:
    """Returns the KV blocks of a balanced share, given those of all sequences."""
    shares = problem.batch * config.splits
    return jnp.maximum(divide_with_remainder(blocks + (shares - 1), shares)[0], 1)


def balanced_slots(blocks: jax.Array, size: jax.Array) -> jax.Array:
    """Returns the slots of a sequence with so many KV blocks, or of several, given the size of a share."""
    return jnp.maximum(jax.lax.div(blocks + (size - 1), jnp.full_like(blocks, size)), 1)


class Balance(NamedTuple):
    """Shares of one size for all sequences; arrays are `[batch]`, padded to a power of two.

    Attributes:
      problem: the call.
      config: block sizes.
      row_block: the block of rows.
      lengths: length of each sequence.
      size: KV blocks of a share.
      counts: slots of each sequence.
      ends: sums of the counts up to each sequence, its own included.
    """

    problem: Problem
    config: Blocks
    row_block: Scalar
    lengths: jax.Array
    size: jax.Array
    counts: jax.Array
    ends: jax.Array

    @classmethod
    def of(cls, problem: Problem, config: Blocks, lengths: jax.Array, row_block: Scalar) -> Balance:
        """Shares out what a block of rows sees in all sequences; -1 is the length of a sequence that there is not.

        With n blocks in a sequence and N in all, and S = ceil(N / (batch * splits)) blocks in a share, sequences have
        max(ceil(n / S), 1) slots, which are at most batch * splits + batch in all.
        """
        exists = lengths >= 0
        blocks = jnp.where(exists, span_of(problem, config, lengths, row_block).blocks, 0)
        size = balanced_size(problem, config, jnp.sum(blocks))
        counts = jnp.where(exists, balanced_slots(blocks, size), 0)
        return cls(problem, config, row_block, lengths, size, counts, jnp.cumsum(counts))

    def share(self, slot: Scalar) -> Share:
        """Returns the share of a slot."""
        before = jnp.sum((self.ends <= slot).astype(jnp.int32))
        sequence = jnp.minimum(before, self.problem.batch - 1)
        slots, length = self.slots(sequence), self._at(self.lengths, sequence)
        span = span_of(self.problem, self.config, length, self.row_block)
        return Share.of(sequence, length, span, self.size, slot - slots.first, slots)

    def slots(self, sequence: Scalar) -> Slots:
        """Returns the slots of a sequence."""
        return Slots(self._at(self.ends - self.counts, sequence), self._at(self.counts, sequence))

    def _at(self, values: jax.Array, sequence: Scalar) -> jax.Array:
        """Returns the value of a sequence; registers have no index."""
        return jnp.sum(jnp.where(jnp.arange(values.shape[0], dtype=jnp.int32) == sequence, values, 0))
