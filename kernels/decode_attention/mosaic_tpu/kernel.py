"""The body of the TPU kernel of decode_attention; what it computes and how work is cut stands in `call.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.decode_attention.mosaic_tpu.products import (
    FACTOR,
    QUERY_PIECES,
    WEIGHT_PIECES,
    as_operand,
    from_words,
    join,
    multiply,
    split,
)
from palladion.kernels.decode_attention.mosaic_tpu.stream import Part, Sight, Stream, divide
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.tpu_layout import LANES


@dataclasses.dataclass(frozen=True)
class View:
    """How the cache lies in memory.

    Attributes:
      tokens_last: whether keys and values are `[…, head_dim, tokens]` instead of `[…, tokens, head_dim]`.
      gathered: whether the scales of a paged cache come without pages, `[1, batch, kv_heads, tokens]`.
      shared: whether the KV heads are divided between the cores.
      share: sequences of a core, which are divided between the cores where the heads are not.
      members: sequences that are worked on together.
      pack: KV heads that are multiplied at a time.
      one_by_one: whether packs are worked on one after the other, or all at once.
      operands: one of `tpu_products.OPERANDS`.
    """

    tokens_last: bool
    gathered: bool
    shared: bool
    share: int
    members: int
    pack: int
    one_by_one: bool
    operands: str


def kernel(
    # In SMEM: layer [1], lengths [batch], and page_table [batch * pages_per_seq] where there is one. Then
    # q [members, packs, rows, head_dim]; in HBM k and v [layers, batch or num_pages, kv_heads, tokens, head_dim] or the
    # last two swapped, and their scales [layers, batch or num_pages, kv_heads, tokens] where there are any; sinks
    # [packs, rows, 1] where there are any. out like q, lse [members, packs, rows, 1]. Scratch, where the first axis is
    # members * packs: wide q [_, pieces * rows, width] and its factors [_, rows, 1]; m, l [_, rows, LANES];
    # acc [_, rows, width]. The stream's cursor; semaphores [2 or 4, buffers]; rings [buffers, members, heads, …] of k,
    # v and their scales; room for bfloat16 numbers that are made of words. A pack are the heads that are multiplied at
    # a time: rows = pack * block_q * group, width = pack * head_dim.
    *refs: Any,
    problem: Problem,
    sight: Sight,
    view: View,
) -> None:
    """Attends from one block of queries of one sequence to all that it sees.

    Args:
      refs: what the comment above lists.
      problem: what was asked.
      sight: which tokens are seen.
      view: how the cache lies in memory.
    """
    p, left = problem, iter(refs)
    layer_ref, lengths_ref = next(left), next(left)
    table_ref = None if p.page_size is None else next(left)
    q_ref = next(left)
    cache = [next(left) for _ in range(4 if p.has_scales else 2)]
    sinks_ref = next(left) if p.has_sinks else None
    out_ref, lse_ref, wide_ref, factor_ref, m_ref, l_ref, acc_ref, cursor, arrived, *rings = left
    part, number, i = (pl.program_id(axis) for axis in range(3))
    teams = view.share // view.members  # of this core
    first_team = 0 if view.shared else part * teams
    team = first_team + number
    packs, rows = q_ref.shape[1:3]
    heads = packs * view.pack
    integers = view.operands == "integers"
    factor = FACTOR.get(view.operands, 1.0)
    room_ref = rings.pop() if view.operands == "words" else None
    first_head = part * heads if view.shared else 0

    def keys_or_values(number: int) -> Part:
        def along(token: Any, tokens: int) -> tuple[Any, ...]:
            those = pl.ds(token, tokens)
            return (slice(None), those) if view.tokens_last else (those, slice(None))

        def source(b: Any, token: Any, tokens: int) -> Any:
            slab, start = slab_of(b, token)
            return cache[number].at[layer_ref[0], slab, pl.ds(first_head, heads), *along(start, tokens)]

        def place(buffer: Any, member: int, token: Any, tokens: int) -> Any:
            return rings[number].at[buffer, member, :, *along(token, tokens)]

        return Part(source, place, arrived.at[number])

    def scales(number: int) -> Part:
        # Heads are sublanes here, which cannot be divided: every core takes all of them.
        def source(b: Any, token: Any, tokens: int) -> Any:
            layer, (slab, start) = (0, (b, token)) if view.gathered else (layer_ref[0], slab_of(b, token))
            return cache[number].at[layer, slab, :, pl.ds(start, tokens)]

        def place(buffer: Any, member: int, token: Any, tokens: int) -> Any:
            return rings[number].at[buffer, member, :, pl.ds(token, tokens)]

        return Part(source, place, arrived.at[number], units=not view.gathered)

    def slab_of(b: Any, token: Any) -> tuple[Any, Any]:
        """Where a token is: its sequence and the token, or its page and the beginning of that."""
        if table_ref is None:
            return b, pl.multiple_of(token, sight.unit)
        page = table_ref[b * (p.max_len // sight.unit) + divide(token, sight.unit)]
        # A page that does not exist is read as the last or the first one, as the reference does.
        return jnp.clip(page, 0, cache[0].shape[1] - 1), 0

    parts = [keys_or_values(0), keys_or_values(1)]
    if p.has_scales:
        parts += [scales(2), scales(3)]
    buffers = rings[0].shape[0]
    contiguous = table_ref is None and sight.block_kv <= p.max_len
    stream = Stream(
        sight, view.members, first_team, first_team + teams, buffers, lengths_ref, cursor, tuple(parts), contiguous
    )

    pl.when((number == 0) & (i == 0))(stream.begin)

    # Rows of a pack see the head that they are of: the rest of its width meets zeros.
    of_head = jax.lax.broadcasted_iota(jnp.int32, (1, rows, 1), 1) // (rows // view.pack)
    q = q_ref[...].reshape(view.members * packs, rows, p.head_dim)
    wide = jnp.concatenate([jnp.where(of_head == n, q, jnp.zeros_like(q)) for n in range(view.pack)], axis=2)
    if integers:
        wide = wide.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=2, keepdims=True)
        wide_ref[...], factor_ref[...] = split(wide, largest, QUERY_PIECES)
    else:
        wide_ref[...] = wide.astype(wide_ref.dtype)
    # A sink is a logit without a value: it starts the sum.
    m_ref[...] = jnp.full(m_ref.shape, -jnp.inf)
    if sinks_ref is not None:
        for member in range(view.members):
            m_ref[member * packs : (member + 1) * packs] = jnp.broadcast_to(sinks_ref[...], (packs, rows, LANES))
    l_ref[...] = jnp.full(l_ref.shape, 1.0 if p.has_sinks else 0.0)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    token_axis, width_axis = (2, 1) if view.tokens_last else (1, 2)
    queries = [sight.queries(lengths_ref[team * view.members + n], i) for n in range(view.members)]

    def is_inner(start: Any, asked: tuple[Any, Any]) -> Any:
        """Whether every query of a member sees all of a block, so that there is nothing to mask."""
        first_query, last_query = asked
        inner = start + sight.block_kv - 1 <= first_query
        return inner if sight.window is None else inner & (start > last_query - sight.window)

    def attend(those: Any, starts: list[Any], block: list[Any], masked: bool) -> None:
        """Adds blocks of tokens, one of each member, to m, l and acc of those packs."""
        s = multiply(wide_ref[those], operand(block[0], those), width_axis)  # [packs, pieces * rows, block_kv]
        s = (join(s, factor_ref[those]) if integers else s) * (p.scale * factor)  # [packs, rows, block_kv]
        if p.has_scales:
            s = s * scale_of(block[2], those)
        if p.logits_soft_cap is not None:
            s = p.logits_soft_cap * jnp.tanh(s * (1 / p.logits_soft_cap))
        if masked:
            visible = of_members(lambda *member: is_visible(s.shape, *member), starts)
            s = jnp.where(visible, s, -jnp.inf)
        m = m_ref[those]  # [packs, rows, LANES], all lanes alike: as reductions leave it, and products take it
        maximum = jnp.maximum(m, jnp.max(s, axis=2, keepdims=True))
        # A row that has seen nothing yet: -inf - -inf is NaN.
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum) if masked else maximum
        weights = jnp.exp(s - along(shift, s.shape[2]))
        decay = jnp.exp(m - shift)
        m_ref[those] = maximum
        l_ref[those] = l_ref[those] * decay + jnp.sum(weights, axis=2, keepdims=True)
        v = operand(block[1], those)
        scale = scale_of(block[3], those) if p.has_scales else None
        if masked:
            # What no query sees may be anything, NaN included, and 0 * NaN is NaN.
            scale = None if scale is None else jnp.where(visible, scale, 0.0)
            if not integers:
                v = jnp.where(of_members(lambda *member: is_seen(v.shape, *member), starts), v, jnp.zeros_like(v))
        weights = weights if scale is None else weights * scale
        if scale is not None and integers:
            # Weights are 1 at most: what bounds them times their scales is known before they are.
            bound = jnp.broadcast_to(jnp.max(scale, axis=2, keepdims=True), (*m.shape[:2], 1))
            pieces, factors = split(weights, bound, WEIGHT_PIECES)
            values = join(multiply(pieces, v, token_axis), factors)
        else:
            values = multiply(weights.astype(wide_ref.dtype), v, token_axis) * factor
        acc_ref[those] = acc_ref[those] * along(decay, values.shape[2]) + values

    def of_members(mask: Callable[..., jax.Array], starts: list[Any]) -> jax.Array:
        """A mask for each member from the beginning of its block and its first and last query, one after the other."""
        masks = [mask(start, *asked) for start, asked in zip(starts, queries, strict=True)]
        return masks[0] if len(masks) == 1 else jnp.concatenate(masks)

    def is_visible(shape: tuple[int, ...], start: Any, first_query: Any, last_query: Any) -> jax.Array:
        """Which tokens each query of a member sees: `[packs, rows, block_kv]`."""
        shape = (shape[0] // view.members, *shape[1:])
        position = start + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        query = first_query
        if sight.block_q > 1:
            query += jax.lax.broadcasted_iota(jnp.int32, shape, 1) % (rows // view.pack) // p.group
        visible = position <= jnp.minimum(query, last_query)
        return visible if sight.window is None else visible & (position > query - sight.window)

    def is_seen(shape: tuple[int, ...], start: Any, first_query: Any, last_query: Any) -> jax.Array:
        """Which tokens any query of a member sees, as its values lie."""
        shape = (shape[0] // view.members, *shape[1:])
        token = start + jax.lax.broadcasted_iota(jnp.int32, shape, token_axis)
        seen = token <= last_query
        return seen if sight.window is None else seen & (token > first_query - sight.window)

    def operand(ref: Any, those: Any) -> jax.Array:
        """Keys or values of packs as they are multiplied."""
        array = ref[:, heads_of(those)]
        array = array.reshape(-1, *array.shape[2:])
        if room_ref is not None:
            return packed(from_words(array, room_ref))
        return as_operand(packed(array), q_ref.dtype, view.operands)

    def heads_of(those: Any, first: Any = 0) -> Any:
        """Packs as heads of an array that begins with this one."""
        if isinstance(those, slice):
            return pl.ds(first, heads)
        return pl.ds(first + those.start * view.pack, view.pack)

    def packed(array: jax.Array) -> jax.Array:
        """`[heads, tokens, head_dim]` to `[packs, tokens, width]`, or with the last two swapped: registers stay."""
        if view.pack == 1:
            return array
        if view.tokens_last:
            return array.reshape(-1, view.pack * array.shape[1], array.shape[2])
        by_pack = array.reshape(-1, view.pack, *array.shape[1:])
        return jnp.concatenate([by_pack[:, n] for n in range(view.pack)], axis=2)

    def scale_of(ref: Any, those: Any) -> jax.Array:
        """`[kv_heads, block_kv]` to `[packs, rows, block_kv]`."""
        scales = ref[:, heads_of(those)]
        for other in range(heads, p.kv_heads, heads):
            scales = jnp.where(first_head == other, ref[:, heads_of(those, other)], scales)
        by_pack = scales.reshape(-1, view.pack, scales.shape[2])
        scale = by_pack[:, :1]
        for n in range(1, view.pack):
            scale = jnp.where(of_head == n, by_pack[:, n : n + 1], scale)
        return scale

    blocks = stream.blocks(team, i)

    def step(number: Any, carry: int) -> int:
        stream.fetch()
        buffer = stream.take(team, i, number)
        arrays = [ring.at[buffer] for ring in rings]
        # A member that has no block left is at one that it sees nothing of.
        starts = [(first + number) * sight.block_kv for first, _ in blocks]
        inner = functools.reduce(jnp.logical_and, map(is_inner, starts, queries))

        def attend_to(those: Any) -> None:
            pl.when(inner)(lambda: attend(those, starts, arrays, masked=False))
            pl.when(~inner)(lambda: attend(those, starts, arrays, masked=True))

        def one(pack: Any, carry: int) -> int:
            attend_to(pl.ds(pack, 1))
            return carry

        if view.one_by_one:
            return jax.lax.fori_loop(0, packs, one, carry)
        attend_to(slice(None))
        return carry

    jax.lax.fori_loop(0, stream.steps(team, i), step, 0)
    total, acc = l_ref[..., :1], acc_ref[...]
    out = acc[..., : p.head_dim]
    for n in range(1, view.pack):
        out = jnp.where(of_head == n, acc[..., n * p.head_dim : (n + 1) * p.head_dim], out)
    out_ref[...] = (out / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype).reshape(out_ref.shape)
    lse_ref[...] = (m_ref[..., :1] + jnp.log(total)).reshape(lse_ref.shape)


def along(x: jax.Array, width: int) -> jax.Array:
    """`[..., LANES]`, where all lanes are alike, as `[..., width]`."""
    if width % LANES == 0:
        return jnp.concatenate([x] * (width // LANES), axis=-1)
    return x[..., :width] if width < LANES else x[..., :1]
