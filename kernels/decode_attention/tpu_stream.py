"""Cached tokens on their way into a TPU's VMEM: a ring of buffers that the kernel fills itself.

A kernel works through (sequence, block of queries) pairs, and for each through the blocks of tokens that it sees. Here
these blocks are one long stream: while one is worked on, the next ones, of whatever sequence, are under way. Nothing
waits at the end of a short sequence, and nothing that no query sees is asked for.

A block consists of units that are moved one by one: the pages of a paged cache, or equal parts of a dense one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CURSOR: Final = 5
"""Numbers that describe where a stream is: see `Stream.cursor`."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which cached tokens a block of queries sees; on scalars of the kernel.

    Attributes:
      q_len: new tokens of a sequence.
      block_q: new tokens in a block of queries.
      q_blocks: blocks of queries.
      block_kv: cached tokens in a block.
      unit: tokens of a block that are moved at a time.
      window: tokens that a query sees, or None.
    """

    q_len: int
    block_q: int
    q_blocks: int
    block_kv: int
    unit: int
    window: int | None

    def queries(self, length: Any, i: Any) -> tuple[Any, Any]:
        """Positions of the first and the last query of block i; negative where they are padding."""
        first = length - self.q_len + i * self.block_q
        return first, jnp.minimum(first + self.block_q, length) - 1

    def tokens(self, length: Any, i: Any) -> tuple[Any, Any]:
        """The first and the last token that query block i sees; the last is negative where it sees none."""
        first_query, last_query = self.queries(length, i)
        return (0 if self.window is None else jnp.maximum(first_query - self.window + 1, 0)), last_query

    def blocks(self, length: Any, i: Any) -> tuple[Any, Any]:
        """The first block that query block i sees, and the one after the last; equal where it sees none."""
        first, last = self.tokens(length, i)
        return _divide(first, self.block_kv), _divide(last + self.block_kv, self.block_kv)

    def units(self, length: Any, i: Any, block: Any) -> tuple[Any, Any]:
        """The first unit of a block that query block i sees, and the one after the last."""
        first, last = (token - block * self.block_kv for token in self.tokens(length, i))
        first = 0 if self.window is None else _divide(jnp.maximum(first, 0), self.unit)
        return first, _divide(jnp.minimum(last, self.block_kv - 1) + self.unit, self.unit)

    @property
    def block_units(self) -> int:
        """Units in a block."""
        return self.block_kv // self.unit


def _divide(n: Any, divisor: int) -> Any:
    """n // divisor, in fewer instructions; at most 0 where n is negative."""
    if isinstance(n, int):
        return n // divisor
    return n >> divisor.bit_length() - 1 if divisor & (divisor - 1) == 0 else jax.lax.div(n, jnp.int32(divisor))


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the arrays that a block is made of.

    Attributes:
      source: of a batch index and the number of a unit in its sequence: where in HBM the unit is.
      ring: in VMEM, `[buffers, …]`.
      place: of the number of a unit in its block: the index of its place in a buffer; None where blocks of this array
        are moved in one piece, and `source` takes the number of a block.
      arrived: a semaphore for each buffer.
    """

    source: Callable[[Any, Any], Any]
    ring: Any
    place: Callable[[Any], tuple[Any, ...]] | None
    arrived: Any


@dataclasses.dataclass(frozen=True)
class Stream:
    """The blocks in the order in which a grid over (sequence, block of queries) works on them.

    Attributes:
      sight: which tokens are seen.
      batch: sequences.
      buffers: of the ring; all but the one that is worked on are on their way.
      lengths: in SMEM, `[batch]`.
      cursor: in SMEM: the batch index, query block and block to fetch next, and how many blocks were fetched and taken.
      parts: what a block is made of.
    """

    sight: Sight
    batch: int
    buffers: int
    lengths: Any
    cursor: Any
    parts: tuple[Part, ...]

    def begin(self) -> None:
        """Sets out at the first block of all and fills the ring but for one buffer."""
        self.cursor[3] = 0
        self.cursor[4] = 0
        self._move_to(0, 0)

        def fetch(_: Any, carry: int) -> int:
            self.fetch()
            return carry

        jax.lax.fori_loop(0, self.buffers - 1, fetch, 0)

    def fetch(self) -> None:
        """Starts the next block on its way, if there is one; its buffer must not be in use."""
        b, i, block, fetched = (self.cursor[n] for n in range(4))

        @pl.when(b < self.batch)
        def _fetch() -> None:
            self._start(b, i, block, jax.lax.rem(fetched, self.buffers))
            self.cursor[2] = block + 1
            self.cursor[3] = fetched + 1

            @pl.when(block + 1 >= self.sight.blocks(self.lengths[b], i)[1])
            def _next() -> None:
                self._move_to(*self._after(b, i))

    def take(self, b: Any, i: Any, block: Any) -> Callable[[int], Any]:
        """Takes the next block, which must be this one: returns a function that waits for a part, and returns it."""
        taken = self.cursor[4]
        self.cursor[4] = taken + 1
        buffer = jax.lax.rem(taken, self.buffers)
        first, end = self.sight.units(self.lengths[b], i, block)

        def wait(number: int) -> Any:
            part = self.parts[number]

            def arrives(place: Any) -> None:
                # Semaphores count bytes: how many transfers brought them does not matter.
                pltpu.make_async_copy(place, place, part.arrived.at[buffer]).wait()

            def units(place: Callable[[Any], tuple[Any, ...]]) -> None:
                def one(unit: Any, carry: int) -> int:
                    arrives(part.ring.at[buffer, *place(unit)])
                    return carry

                jax.lax.fori_loop(first, end, one, 0)

            if part.place is None:
                arrives(part.ring.at[buffer])
            else:
                whole = end - first == self.sight.block_units
                pl.when(whole)(lambda: arrives(part.ring.at[buffer]))
                pl.when(~whole)(functools.partial(units, part.place))
            return part.ring.at[buffer]

        return wait

    def _start(self, b: Any, i: Any, block: Any, buffer: Any) -> None:
        """Starts all transfers of a block."""

        def unit_of(number: Any, carry: int) -> int:
            for part in self.parts:
                if part.place is not None:
                    source = part.source(b, block * self.sight.block_units + number)
                    place = part.ring.at[buffer, *part.place(number)]
                    pltpu.make_async_copy(source, place, part.arrived.at[buffer]).start()
            return carry

        jax.lax.fori_loop(*self.sight.units(self.lengths[b], i, block), unit_of, 0)
        for part in self.parts:
            if part.place is None:
                pltpu.make_async_copy(part.source(b, block), part.ring.at[buffer], part.arrived.at[buffer]).start()

    def _after(self, b: Any, i: Any) -> tuple[Any, Any]:
        if self.sight.q_blocks == 1:
            return b + 1, 0
        last = i == self.sight.q_blocks - 1
        return jnp.where(last, b + 1, b), jnp.where(last, 0, i + 1)

    def _move_to(self, b: Any, i: Any) -> None:
        """Points the cursor at the first block of (b, i), or of what comes next where that sees nothing."""

        def blocks(b: Any, i: Any) -> tuple[Any, Any]:
            return self.sight.blocks(self.lengths[jnp.minimum(b, self.batch - 1)], i)

        def sees_nothing(at: tuple[Any, Any]) -> Any:
            first, end = blocks(*at)
            return (at[0] < self.batch) & (first >= end)

        b, i = jax.lax.while_loop(sees_nothing, lambda at: self._after(*at), (jnp.int32(b), jnp.int32(i)))
        self.cursor[0] = b
        self.cursor[1] = i
        self.cursor[2] = blocks(b, i)[0]
