"""Cached tokens on their way into a TPU's VMEM: a ring of buffers that the kernel fills itself.

A kernel works through (sequence, block of queries) pairs, and for each through the blocks of tokens that it sees. Here
these blocks are one long stream: while one is worked on, the next ones, of whatever sequence, are under way. Nothing
waits at the end of a short sequence, and nothing that no query sees is asked for. Where sequences are so short that a
block of one is over in no time, a few of them make up a team, whose blocks come together.

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
      max_len: tokens that a sequence has room for: a length outside of 0 to max_len counts as the nearest of these.
      q_len: new tokens of a sequence.
      block_q: new tokens in a block of queries.
      q_blocks: blocks of queries.
      block_kv: cached tokens in a block.
      unit: tokens of a block that are moved at a time.
      window: tokens that a query sees, or None.
    """

    max_len: int
    q_len: int
    block_q: int
    q_blocks: int
    block_kv: int
    unit: int
    window: int | None

    def queries(self, length: Any, i: Any) -> tuple[Any, Any]:
        """Positions of the first and the last query of block i; negative where they are padding."""
        length = jnp.clip(length, 0, self.max_len)
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
      place: of a buffer, a member, a token of the block and a number of tokens: where in the ring they belong.
      arrived: a semaphore for each buffer.
      units: whether this array moves unit by unit; otherwise a block of it always moves in one piece.
    """

    source: Callable[[Any, Any, int], Any]
    place: Callable[[Any, int, Any, int], Any]
    arrived: Any
    units: bool = True


@dataclasses.dataclass(frozen=True)
class Stream:
    """The blocks in the order in which a grid over (team of sequences, block of queries) works on them.

    A step takes the next block of each member that has one left.

    Attributes:
      sight: which tokens are seen.
      members: sequences of a team.
      first: the team that it begins with.
      end: the one after the last.
      buffers: of the ring; all but the one that is worked on are on their way.
      lengths: in SMEM, `[batch]`.
      cursor: in SMEM: the team, query block and step to fetch next, and how many steps were fetched and taken.
      parts: what a block is made of.
      contiguous: whether the units of a block lie next to each other in HBM.
    """

    sight: Sight
    members: int
    first: Any
    end: Any
    buffers: int
    lengths: Any
    cursor: Any
    parts: tuple[Part, ...]
    contiguous: bool

    def blocks(self, team: Any, i: Any) -> list[tuple[Any, Any]]:
        """For each member the first block that query block i sees, and the one after the last."""
        return [self.sight.blocks(self.lengths[team * self.members + n], i) for n in range(self.members)]

    def steps(self, team: Any, i: Any) -> Any:
        """How many steps query block i of a team takes: as many as the member with the most blocks."""
        counts = [end - first for first, end in self.blocks(team, i)]
        return functools.reduce(jnp.maximum, counts)

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
        """Starts the blocks of the next step on their way, if there is one; their buffer must not be in use."""
        team, i, step, fetched = (self.cursor[n] for n in range(4))

        @pl.when(team < self.end)
        def _fetch() -> None:
            self._start(team, i, step, jax.lax.rem(fetched, self.buffers))
            self.cursor[2] = step + 1
            self.cursor[3] = fetched + 1

            @pl.when(step + 1 >= self.steps(team, i))
            def _next() -> None:
                self._move_to(*self._after(team, i))

    def take(self, team: Any, i: Any, step: Any) -> Any:
        """Waits for the blocks of the next step, which must be this one, and returns their buffer."""
        taken = self.cursor[4]
        self.cursor[4] = taken + 1
        buffer = jax.lax.rem(taken, self.buffers)

        def arrives(part: Part, member: int, _: Any, token: Any, tokens: int) -> None:
            # Semaphores count bytes: how many transfers brought them does not matter.
            place = part.place(buffer, member, token, tokens)
            pltpu.make_async_copy(place, place, part.arrived.at[buffer]).wait()

        self._each_block(team, i, step, arrives, contiguous=True)
        return buffer

    def _start(self, team: Any, i: Any, step: Any, buffer: Any) -> None:
        """Starts all transfers of a step."""

        def start(part: Part, member: int, block: Any, token: Any, tokens: int) -> None:
            source = part.source(team * self.members + member, block * self.sight.block_kv + token, tokens)
            place = part.place(buffer, member, token, tokens)
            pltpu.make_async_copy(source, place, part.arrived.at[buffer]).start()

        self._each_block(team, i, step, start, self.contiguous)

    def _each_block(
        self, team: Any, i: Any, step: Any, act: Callable[[Part, int, Any, Any, int], None], contiguous: bool
    ) -> None:
        """Calls `act` with the pieces of a step that are seen: part, member, block, token and number of tokens."""
        for member, (first, end) in enumerate(self.blocks(team, i)):
            block = first + step
            length = self.lengths[team * self.members + member]

            def pieces(member: int = member, block: Any = block, length: Any = length) -> None:
                def act_on(part: Part, token: Any, tokens: int) -> None:
                    act(part, member, block, token, tokens)

                self._each_piece(self.sight.units(length, i, block), act_on, contiguous)

            if self.members == 1:
                pieces()  # a step has at least one block
            else:
                pl.when(block < end)(pieces)

    def _each_piece(self, seen: tuple[Any, Any], act: Callable[[Part, Any, int], None], contiguous: bool) -> None:
        """Calls `act` with the pieces of a block of which some units are seen: part, token and number of tokens."""
        unit, block_kv = self.sight.unit, self.sight.block_kv
        first, end = seen

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

    def _after(self, team: Any, i: Any) -> tuple[Any, Any]:
        if self.sight.q_blocks == 1:
            return team + 1, 0
        last = i == self.sight.q_blocks - 1
        return jnp.where(last, team + 1, team), jnp.where(last, 0, i + 1)

    def _move_to(self, team: Any, i: Any) -> None:
        """Points the cursor at the first step of (team, i), or of what comes next where that sees nothing."""

        def sees_nothing(at: tuple[Any, Any]) -> Any:
            team, i = at
            return (team < self.end) & (self.steps(jnp.minimum(team, self.end - 1), i) <= 0)

        team, i = jax.lax.while_loop(sees_nothing, lambda at: self._after(*at), (jnp.int32(team), jnp.int32(i)))
        self.cursor[0] = team
        self.cursor[1] = i
        self.cursor[2] = 0
