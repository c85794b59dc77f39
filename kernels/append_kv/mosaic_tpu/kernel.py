"""The body of the TPU kernel of append_kv; what it does and how work is cut stands in `call.py`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.append_kv.problem import Problem
from palladion.kernels.tpu_layout import LANES, SUBLANES, round_up


@dataclasses.dataclass(frozen=True)
class Part:
    """Two arrays of the cache that are alike, keys and values or their scales, and how their tokens are moved.

    A slab is the dense cache of a sequence, or a page.

    Attributes:
      shape: of one token, with a 1 where tokens are: `[heads, 1, head_dim]`, `[heads, head_dim, 1]` or `[heads, 1]`,
        and `[heads, 1, 1]` where slabs follow the heads.
      axis: of the tokens in it.
      swapped: the two axes of the array, layers first, that the kernel takes in the other order; None for no such.
      dtype: of the numbers.
      rows: tokens of a slab.
      block: tokens in a block, which divides `rows`.
      blocks: how many a sequence's new tokens touch at most.
      spread: whether the only new token of each sequence comes in words that it fills, for each place in a block.
      unit: others are taken out of the window by the tile: tokens in one.
      taken: and this many for a block: its own are among them, and they fill it.
      window: new tokens in VMEM: those of a group of sequences, and what fills them up.
      total: new tokens in HBM: those of the batch, and what fills them up.
    """

    shape: tuple[int, ...]
    axis: int
    swapped: tuple[int, int] | None
    dtype: Any
    rows: int
    block: int
    blocks: int
    spread: bool
    unit: int
    taken: int
    window: int
    total: int

    @property
    def pack(self) -> int:
        """Tokens that share a 32-bit word."""
        return 1 if self.axis == len(self.shape) - 1 else 4 // jnp.dtype(self.dtype).itemsize

    @property
    def heads(self) -> int:
        """KV heads of a grid step."""
        return self.shape[0]

    def sized(self, tokens: int) -> tuple[int, ...]:
        """The shape of that many tokens."""
        return (*self.shape[: self.axis], tokens, *self.shape[self.axis + 1 :])

    def new(self, tokens: int) -> jax.ShapeDtypeStruct:
        """What that many new tokens come as: like the cache, or spread, `[tokens, heads, width of a block]`."""
        if self.spread:
            return jax.ShapeDtypeStruct((tokens, self.heads, self.sized(self.block)[-1]), jnp.int32)
        return jax.ShapeDtypeStruct(self.sized(tokens), self.dtype)

    def along(self, start: Any, tokens: int) -> tuple[Any, ...]:
        """The index of that many tokens in all axes but that of the heads."""
        index: list[Any] = [slice(None)] * (len(self.shape) - 1)
        index[self.axis - 1] = pl.ds(start, tokens)
        return tuple(index)

    def vmem_bytes(self, sequences: int) -> int:
        """What blocks and windows of both arrays take."""
        blocks = sequences * self.blocks * _padded_bytes(self.sized(self.block), self.dtype)
        window = self.new(self.window)
        return 2 * (blocks + _padded_bytes(window.shape, window.dtype))


def _padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    *rows, width = shape
    return round_up(math.prod(rows), SUBLANES) * round_up(width, LANES) * jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Touched:
    """A block that new tokens of a sequence go to; on scalars of the kernel.

    Attributes:
      member: the sequence's number in its group.
      slot: the block's number among those of the sequence.
      slab: where the block is.
      row: its first token there.
      begin: the first token of the block that is new.
      end: the one after the last.
      source: where the first one is in the window.
    """

    member: Any
    slot: Any
    slab: Any
    row: Any
    begin: Any
    end: Any
    source: Any


def kernel(
    # In SMEM: layer [1], lengths [batch], new_tokens [batch] and page_table [batch * pages_per_seq] where there are
    # any. In HBM, for every part: two arrays of new tokens, `Part.new(total)`; two of the cache, [layers, slabs,
    # kv_heads, tokens, head_dim] or without head_dim, two axes swapped; both once more as results. Scratch, for every
    # part: two windows, `Part.new(window)`, and blocks of two arrays, [sequences, blocks, *Part.sized(block)].
    # Semaphores [sequences] and [2].
    *refs: Any,
    problem: Problem,
    parts: tuple[Part, ...],
    sequences: int,
) -> None:
    """Writes the new tokens of a group of sequences, in a share of the heads.

    Args:
      refs: what the comment above lists.
      problem: what was asked.
      parts: what is written.
      sequences: of a group.
    """
    p, left = problem, iter(refs)
    layer_ref, lengths_ref = next(left), next(left)
    new_tokens_ref = next(left) if p.has_new_tokens else None
    table_ref = None if p.page_size is None else next(left)

    def pairs() -> list[tuple[Any, Any]]:
        return [(next(left), next(left)) for _ in parts]

    new, _, cache, windows, blocks = pairs(), pairs(), pairs(), pairs(), pairs()
    arrived, done = left
    heads = parts[0].heads
    share = slice(None) if heads == p.kv_heads else pl.ds(pl.multiple_of(pl.program_id(0) * heads, heads), heads)
    first_sequence = pl.program_id(1) * sequences
    members = jnp.minimum(sequences, p.batch - first_sequence)
    if p.num_layers is not None:
        members = jnp.where((layer_ref[0] >= 0) & (layer_ref[0] < p.num_layers), members, 0)

    def window_start(part: Part) -> Any:
        """The first new token in the window."""
        if part.window == part.total:
            return 0
        first = first_sequence * p.q_len
        tile = jnp.minimum(first - jax.lax.rem(first, part.unit), part.total - part.window)
        return pl.multiple_of(tile, part.unit)

    def fetches() -> list[Any]:
        """The transfers of the windows."""
        found = []
        for part, sources, targets in zip(parts, new, windows, strict=True):
            index = (share, *part.along(window_start(part), part.window))
            if part.spread:
                index = (pl.ds(first_sequence, sequences), share)
            found += [pltpu.make_async_copy(sources[n].at[index], targets[n], done.at[0]) for n in range(2)]
        return found

    def for_blocks(part: Part, member: Any, do: Callable[[Touched], None]) -> None:
        """Calls `do` for each block of a sequence that its new tokens go to."""
        b = first_sequence + member
        # A length beyond these bounds writes nothing either; within them no position overflows.
        length = jnp.clip(lengths_ref[b], 0, p.max_len + p.q_len)
        start = length - p.q_len
        first = start
        if new_tokens_ref is not None:
            first = length - jnp.clip(new_tokens_ref[b], 0, p.q_len)
        first, end = jnp.maximum(first, 0), jnp.minimum(length, p.max_len)
        begin = jax.lax.div(first, part.block)

        def visit(index: Any) -> None:
            origin = index * part.block
            page = index if part.block == part.rows else jax.lax.div(origin, part.rows)
            slab = b if table_ref is None else table_ref[b * (p.max_len // part.rows) + page]
            row = 0 if part.block == part.rows else pl.multiple_of(origin - page * part.rows, part.block)
            written = jnp.maximum(first, origin)
            source = b * p.q_len - window_start(part) + written - start
            last = jnp.minimum(end - origin, part.block)
            touched = Touched(member, index - begin, slab, row, written - origin, last, source)
            if table_ref is None:
                do(touched)
            else:
                pl.when((slab >= 0) & (slab < p.num_pages))(lambda: do(touched))

        def one(index: Any, carry: int) -> int:
            visit(index)
            return carry

        if part.blocks == 1:
            pl.when(first < end)(lambda: visit(begin))
        else:
            stop = jax.lax.div(end + (part.block - 1), part.block)
            jax.lax.fori_loop(begin, jnp.where(first < end, stop, begin), one, 0)

    def transfers(number: int, at: Touched, out: bool) -> list[Any]:
        """Those of a block from the cache, or out to it."""
        part, found = parts[number], []
        tokens = part.along(at.row, part.block)
        index = (layer_ref[0], at.slab, share, *tokens)
        if len(part.shape) == 3 and part.swapped == (1, 2):
            index = (layer_ref[0], share, pl.ds(at.slab, 1), tokens[1])
        for array, held in zip(cache[number], blocks[number], strict=True):
            place, buffer = array.at[index], held.at[at.member, at.slot]
            ends = (buffer, place, done.at[1]) if out else (place, buffer, arrived.at[at.member])
            found.append(pltpu.make_async_copy(*ends))
        return found

    def bring(number: int, at: Touched, wait: bool) -> None:
        """Starts to bring a block in, or waits for it; one that is all new is not needed."""

        @pl.when(at.end - at.begin < parts[number].block)
        def _bring() -> None:
            for copy in transfers(number, at, out=False):
                copy.wait() if wait else copy.start()

    def merge(number: int, at: Touched) -> None:
        """Puts new tokens into their places in a block and sends it out."""
        part = parts[number]
        for window, held in zip(windows[number], blocks[number], strict=True):
            buffer = held.at[at.member, at.slot]
            old = _words(buffer[...])
            if part.spread:
                fresh = window[at.member].reshape(old.shape)
            else:
                fresh = _taken(window, at, part)
            mask = _mask(at.begin, at.end, old.shape, part)
            buffer[...] = pltpu.bitcast((fresh & mask) | (old & ~mask), buffer.dtype)
        for copy in transfers(number, at, out=True):
            copy.start()

    def leave(number: int, at: Touched) -> None:
        """Waits until a block is in the cache."""
        for copy in transfers(number, at, out=True):
            copy.wait()

    def for_members(*steps: Callable[[int, Touched], None]) -> None:
        """Sequence after sequence, takes each step with all of its blocks before the next."""

        def one(member: Any, carry: int) -> int:
            for step in steps:
                for number, part in enumerate(parts):
                    for_blocks(part, member, functools.partial(step, number))
            return carry

        jax.lax.fori_loop(0, members, one, 0)

    for copy in fetches():
        copy.start()
    for_members(functools.partial(bring, wait=False))
    for copy in fetches():
        copy.wait()
    for_members(functools.partial(bring, wait=True), merge)
    for_members(leave)


def _words(x: jax.Array) -> jax.Array:
    """The same bits in 32-bit words: narrower numbers share a word with those in the rows below."""
    return pltpu.bitcast(x, jnp.int32)


def _taken(window: Any, at: Touched, part: Part) -> jax.Array:
    """New tokens from the window in the words of a block, each in its place."""
    tile = jnp.minimum(at.source - jax.lax.rem(at.source, part.unit), part.window - part.taken)
    words = _words(window[:, *part.along(pl.multiple_of(tile, part.unit), part.taken)])
    shift = at.begin - (at.source - tile)
    shift = jnp.where(shift < 0, shift + part.taken, shift)
    rolled = pltpu.roll(words, jax.lax.div(shift, part.pack), part.axis)
    if part.pack > 1:
        # A shift by part of a word: what leaves a word comes into the next.
        before = pltpu.roll(rolled, 1, part.axis)
        bits = jax.lax.rem(shift, part.pack) * (32 // part.pack)
        left, right = (jnp.broadcast_to(n, words.shape) for n in (bits, 32 - bits))
        moved = jax.lax.shift_left(rolled, left) | jax.lax.shift_right_logical(before, right)
        rolled = jnp.where(bits == 0, rolled, moved)
    return jax.lax.slice_in_dim(rolled, 0, part.block // part.pack, axis=part.axis)


def _mask(begin: Any, end: Any, shape: tuple[int, ...], part: Part) -> jax.Array:
    """Words of a block whose bits are set where tokens `begin` to `end` are."""
    token = jax.lax.broadcasted_iota(jnp.int32, shape, part.axis) * part.pack
    width = 32 // part.pack
    mask = jnp.zeros(shape, jnp.int32)
    for n in range(part.pack):
        bits = jnp.uint32(((1 << width) - 1) << (n * width)).view(jnp.int32)
        mask |= jnp.where((token + n >= begin) & (token + n < end), bits, 0)
    return mask
