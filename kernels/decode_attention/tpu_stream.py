"""Cached tokens on their way into a TPU's VMEM: a ring of buffers that the kernel fills itself.

A kernel works through (sequence, block of queries) pairs, and for each through the blocks of tokens that it sees. Here
these blocks are one long stream: while one is worked on, the next ones, of whatever sequence, are under way. Nothing
waits at the end of a short sequence, and nothing that no query sees is asked for.

A block consists of units that are moved one by one: the pages of a paged cache, or equal parts of a dense one.
"""

from __future__ import annotations

import dataclasses
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
        return divide(first, self.block_kv), divide(last + self.block_kv, self.block_kv)

    def units(self, length: Any, i: Any, block: Any) -> tuple[Any, Any]:
        """The first unit of a block that query block i sees, and the one after the last."""
        first, last = (token - block * self.block_kv for token in self.tokens(length, i))
        first = 0 if self.window is None else divide(jnp.maximum(first, 0), self.unit)
        return first, divide(jnp.minimum(last, self.block_kv - 1) + self.unit, self.unit)

    @property
    def block_units(self) -> int:
        """Units in a block."""
        return self.block_kv // self.unit


def divide(n: Any, divisor: int) -> Any:
    """n // divisor of scalars, in fewer instructions; at most 0 where n is negative."""
    if isinstance(n, int):
        return n // divisor
    return n >> divisor.bit_length() - 1 if divisor & (divisor - 1) == 0 else jax.lax.div(n, jnp.int32(divisor))


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the arrays that a block is made of.

    Attributes:
      source: of a batch index, a token of its sequence and a number of tokens: where in HBM these are.
      place: of a buffer, a token of the block and a number of tokens: where in the ring they belong.
      arrived: a semaphore for each buffer.
      units: whether this array moves unit by unit; otherwise a block of it always moves in one piece.
    """

    source: Callable[[Any, Any, int], Any]
    place: Callable[[Any, Any, int], Any]
    arrived: Any
    units: bool = True


@dataclasses.dataclass(frozen=True)
class Stream:
    """The blocks in the order in which a grid over (sequence, block of queries) works on them.

    Attributes:
      sight: which tokens are seen.
      first: the sequence that it begins with.
      end: the one after the last.
      buffers: of the ring; all but the one that is worked on are on their way.
      lengths: in SMEM, `[batch]`.
      cursor: in SMEM: the batch index, query block and block to fetch next, and how many blocks were fetched and taken.
      parts: what a block is made of.
      contiguous: whether the units of a block lie next to each other in HBM.
    """

    sight: Sight
    first: Any
    end: Any
    buffers: int
    lengths: Any
    cursor: Any
    parts: tuple[Part, ...]
    contiguous: bool

    def begin(self) -> None:
        """Sets out at the first block of all and fills the ring but for one buffer."""
        self.cursor[3] = 0
        self.cursor[4] = 0
        self._move_to(self.first, 0)

        def fetch(_: Any, carry: int) -> int:
            self.fetch()
            return carry

        jax.lax.fori_loop(0, self.buffers - 1, fetch, 0)

    def fetch(self) -> None:
        """Starts the next block on its way, if there is one; its buffer must not be in use."""
        b, i, block, fetched = (self.cursor[n] for n in range(4))

        @pl.when(b < self.end)
        def _fetch() -> None:
            self._start(b, i, block, jax.lax.rem(fetched, self.buffers))
            self.cursor[2] = block + 1
            self.cursor[3] = fetched + 1

            @pl.when(block + 1 >= self.sight.blocks(self.lengths[b], i)[1])
            def _next() -> None:
                self._move_to(*self._after(b, i))

    def take(self, b: Any, i: Any, block: Any) -> Any:
        """Waits for the next block, which must be this one, and returns its buffer."""
        taken = self.cursor[4]
        self.cursor[4] = taken + 1
        buffer = jax.lax.rem(taken, self.buffers)

        def arrives(part: Part, token: Any, tokens: int) -> None:
            # Semaphores count bytes: how many transfers brought them does not matter.
            place = part.place(buffer, token, tokens)
            pltpu.make_async_copy(place, place, part.arrived.at[buffer]).wait()

        self._each_piece(b, i, block, arrives, contiguous=True)
        return buffer

    def _start(self, b: Any, i: Any, block: Any, buffer: Any) -> None:
        """Starts all transfers of a block."""

        def start(part: Part, token: Any, tokens: int) -> None:
            source = part.source(b, block * self.sight.block_kv + token, tokens)
            pltpu.make_async_copy(source, part.place(buffer, token, tokens), part.arrived.at[buffer]).start()

        self._each_piece(b, i, block, start, self.contiguous)

    def _each_piece(self, b: Any, i: Any, block: Any, act: Callable[[Part, Any, int], None], contiguous: bool) -> None:
        """Calls `act` with the pieces of a block that are seen: each part, a token and a number of tokens."""
        unit, block_kv = self.sight.unit, self.sight.block_kv
        first, end = self.sight.units(self.lengths[b], i, block)

        def whole() -> None:
            for part in self.parts:
                if part.units:
                    act(part, 0, block_kv)

        def one(number: Any, carry: int) -> int:
            for part in self.parts:
                if part.units:
                    act(part, pl.multiple_of(number * unit, unit), unit)
            return carry

        def units() -> None:
            jax.lax.fori_loop(first, end, one, 0)

        if contiguous:
            is_whole = end - first == self.sight.block_units
            pl.when(is_whole)(whole)
            pl.when(jnp.logical_not(is_whole))(units)
        else:
            units()
        for part in self.parts:
            if not part.units:
                act(part, 0, block_kv)

    def _after(self, b: Any, i: Any) -> tuple[Any, Any]:
        if self.sight.q_blocks == 1:
            return b + 1, 0
        last = i == self.sight.q_blocks - 1
        return jnp.where(last, b + 1, b), jnp.where(last, 0, i + 1)

    def _move_to(self, b: Any, i: Any) -> None:
        """Points the cursor at the first block of (b, i), or of what comes next where that sees nothing."""

        def blocks(b: Any, i: Any) -> tuple[Any, Any]:
            return self.sight.blocks(self.lengths[jnp.minimum(b, self.end - 1)], i)

        def sees_nothing(at: tuple[Any, Any]) -> Any:
            first, end = blocks(*at)
            return (at[0] < self.end) & (first >= end)

        b, i = jax.lax.while_loop(sees_nothing, lambda at: self._after(*at), (jnp.int32(b), jnp.int32(i)))
        self.cursor[0] = b
        self.cursor[1] = i
        self.cursor[2] = blocks(b, i)[0]
