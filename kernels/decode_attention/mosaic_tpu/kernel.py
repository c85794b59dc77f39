"""The body of the TPU kernel of decode_attention; `call.py` says what it computes and how work is cut into the grid."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.decode_attention.mosaic_tpu.kv_block import BlockReader, CacheSource, HeadBlocks, KVBlock
from palladion.kernels.decode_attention.mosaic_tpu.products import (
    FACTOR,
    QUERY_PIECES,
    WEIGHT_PIECES,
    join,
    multiply,
    split,
)
from palladion.kernels.decode_attention.mosaic_tpu.refs import Operands, Scalars, Scratch
from palladion.kernels.decode_attention.mosaic_tpu.ring import DmaRing
from palladion.kernels.decode_attention.mosaic_tpu.tiling import Tiling
from palladion.kernels.decode_attention.mosaic_tpu.visible_range import Masks, VisibleRange
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.tpu_layout import LANES
from palladion.kernels.types import Ref, Scalar


def kernel(
    scalars: Scalars,
    operands: Operands,
    out_ref: Ref,  # like operands.q
    lse_ref: Ref,  # [block_batch, head_blocks, rows, 1]
    scratch: Scratch,
    *,
    problem: Problem,
    visible: VisibleRange,
    tiling: Tiling,
) -> None:
    """Computes attention of one query block of each sequence of a batch block over all that it sees."""
    core, n, q_block = (pl.program_id(axis) for axis in range(3))
    first_batch_block = 0 if tiling.cores_divide_heads else core * tiling.batch_blocks
    batch_block = first_batch_block + n
    first_head = core * tiling.core_heads if tiling.cores_divide_heads else 0
    source = CacheSource(problem, tiling, visible.chunk, scalars, operands, first_head)
    ring = DmaRing(
        visible,
        tiling.block_batch,
        first=first_batch_block,
        end=first_batch_block + tiling.batch_blocks,
        slots=scratch.k_ring.shape[0],
        lengths=scalars.lengths,
        cursor=scratch.cursor,
        arrays=source.ring_arrays(scratch),
        contiguous=scalars.page_table is None and visible.block_kv <= problem.max_len,
    )
    pl.when((n == 0) & (q_block == 0))(ring.start)

    rows = operands.q.shape[2]
    rows_per_head = rows // tiling.block_heads
    row_head = jax.lax.broadcasted_iota(jnp.int32, (1, rows, 1), 1) // rows_per_head
    load_queries(operands.q, row_head, scratch, tiling)
    reader = BlockReader(problem, tiling, scratch.words, first_head, row_head)
    softmax = OnlineSoftmax(problem, tiling, scratch, reader)
    softmax.start(operands.sinks)
    lengths = (scalars.lengths[batch_block * tiling.block_batch + b] for b in range(tiling.block_batch))
    queries = [visible.queries(length, q_block) for length in lengths]
    blocks = ring.blocks(batch_block, q_block)

    def step(number: Scalar, carry: int) -> int:
        ring.fetch()
        block = KVBlock.in_slot(scratch, ring.take(batch_block, q_block, number))
        # Past a sequence's last block the mask hides everything that the slot holds.
        starts = [(first + number) * visible.block_kv for first, _ in blocks]
        softmax.add(block, Masks(visible, queries, starts, rows_per_head, problem.group))
        return carry

    jax.lax.fori_loop(0, ring.steps(batch_block, q_block), step, 0)
    softmax.finish(out_ref, lse_ref)


def load_queries(q_ref: Ref, row_head: jax.Array, scratch: Scratch, tiling: Tiling) -> None:
    """Writes the queries to scratch memory as operands of the MXU.

    Each row holds its own head's query, and zeros for the other heads of its head block.
    """
    q = q_ref[...].reshape(scratch.m.shape[0], *q_ref.shape[2:])
    heads = range(tiling.block_heads)
    wide = jnp.concatenate([jnp.where(row_head == head, q, jnp.zeros_like(q)) for head in heads], axis=2)
    if tiling.operands == "integers":
        wide = wide.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=2, keepdims=True)
        scratch.q[...], scratch.q_factor[...] = split(wide, largest, QUERY_PIECES)
    else:
        scratch.q[...] = wide.astype(scratch.q.dtype)


@dataclasses.dataclass(frozen=True)
class OnlineSoftmax:
    """The softmax of a query block over the KV blocks so far: m, l and acc in scratch memory.

    Attributes:
      problem: the call.
      tiling: the static layout.
      scratch: queries and state.
      reader: reads KV blocks.
    """

    problem: Problem
    tiling: Tiling
    scratch: Scratch
    reader: BlockReader

    @property
    def _factor(self) -> float:
        """Factor that turns operands into the numbers of the cache."""
        return FACTOR.get(self.tiling.operands, 1.0)

    @property
    def _integers(self) -> bool:
        """True where the MXU multiplies integers."""
        return self.tiling.operands == "integers"

    def start(self, sinks_ref: Ref) -> None:
        """Initializes m, l and acc; a sink is a logit without a value, so it starts the sum."""
        m, head_blocks = self.scratch.m, self.tiling.head_blocks
        m[...] = jnp.full(m.shape, -jnp.inf)
        if sinks_ref is not None:
            for n in range(self.tiling.block_batch):
                sinks = jnp.broadcast_to(sinks_ref[...], (head_blocks, *m.shape[1:]))
                m[n * head_blocks : (n + 1) * head_blocks] = sinks
        self.scratch.l[...] = jnp.full(self.scratch.l.shape, 1.0 if self.problem.has_sinks else 0.0)
        self.scratch.acc[...] = jnp.zeros(self.scratch.acc.shape, jnp.float32)

    def add(self, block: KVBlock, masks: Masks) -> None:
        """Adds a KV block of each sequence."""
        all_visible = masks.all_visible()

        def add_heads(head_blocks: HeadBlocks) -> None:
            pl.when(all_visible)(lambda: self._add(head_blocks, block, None))
            pl.when(~all_visible)(lambda: self._add(head_blocks, block, masks))

        def one(head_block: Scalar, carry: int) -> int:
            add_heads(pl.ds(head_block, 1))
            return carry

        if self.tiling.loop_heads:
            jax.lax.fori_loop(0, self.tiling.head_blocks, one, 0)
        else:
            add_heads(slice(None))

    def _add(self, head_blocks: HeadBlocks, block: KVBlock, masks: Masks | None) -> None:
        """Updates m, l and acc of some head blocks; without masks all tokens are visible."""
        scratch = self.scratch
        s = self._logits(head_blocks, block)
        mask = None if masks is None else masks.for_logits(s.shape)
        if mask is not None:
            s = jnp.where(mask, s, -jnp.inf)
        m_prev = scratch.m[head_blocks]  # [n, rows, LANES], as reductions leave it and products take it
        m_next = jnp.maximum(m_prev, jnp.max(s, axis=2, keepdims=True))
        # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN.
        shift = m_next if masks is None else jnp.where(m_next == -jnp.inf, 0.0, m_next)
        p = jnp.exp(s - broadcast_lanes(shift, s.shape[2]))
        alpha = jnp.exp(m_prev - shift)
        scratch.m[head_blocks] = m_next
        scratch.l[head_blocks] = scratch.l[head_blocks] * alpha + jnp.sum(p, axis=2, keepdims=True)
        values = self._weighted_values(head_blocks, block, p, masks, mask)
        scratch.acc[head_blocks] = scratch.acc[head_blocks] * broadcast_lanes(alpha, values.shape[2]) + values

    def _logits(self, head_blocks: HeadBlocks, block: KVBlock) -> jax.Array:
        """Returns the logits of a KV block, `[n, rows, block_kv]`, before they are masked."""
        width_axis = 1 if self.tiling.tokens_last else 2
        s = multiply(self.scratch.q[head_blocks], self.reader.operand(block.k, head_blocks), width_axis)
        s = join(s, self.scratch.q_factor[head_blocks]) if self._integers else s
        s = s * (self.problem.scale * self._factor)
        if self.problem.has_scales:
            s = s * self.reader.scale(block.k_scale, head_blocks)
        cap = self.problem.logits_soft_cap
        return s if cap is None else cap * jnp.tanh(s * (1 / cap))

    def _weighted_values(
        self, head_blocks: HeadBlocks, block: KVBlock, p: jax.Array, masks: Masks | None, mask: jax.Array | None
    ) -> jax.Array:
        """Returns the product of the weights p and the values of a KV block, `[n, rows, width]`."""
        token_axis = 2 if self.tiling.tokens_last else 1
        v = self.reader.operand(block.v, head_blocks)
        scale = None
        # Values and scales that no query sees may be NaN, and 0 * NaN is NaN.
        if self.problem.has_scales:
            scale = self.reader.scale(block.v_scale, head_blocks)
            scale = scale if mask is None else jnp.where(mask, scale, 0.0)
        if masks is not None and not self._integers:
            v = jnp.where(masks.for_values(v.shape, token_axis), v, jnp.zeros_like(v))
        p = p if scale is None else p * scale
        if scale is None or not self._integers:
            return multiply(p.astype(self.scratch.q.dtype), v, token_axis) * self._factor
        # Weights are at most 1, so the largest scale bounds their products and need not wait for them.
        bound = jnp.broadcast_to(jnp.max(scale, axis=2, keepdims=True), (*p.shape[:2], 1))
        pieces, factor = split(p, bound, WEIGHT_PIECES)
        return join(multiply(pieces, v, token_axis), factor)

    def finish(self, out_ref: Ref, lse_ref: Ref) -> None:
        """Writes out = acc / l and lse = m + log l; of each row the part that belongs to its own head."""
        head_dim, row_head = self.problem.head_dim, self.reader.row_head
        total, acc = self.scratch.l[..., :1], self.scratch.acc[...]
        out = acc[..., :head_dim]
        for head in range(1, self.tiling.block_heads):
            out = jnp.where(row_head == head, acc[..., head * head_dim : (head + 1) * head_dim], out)
        out_ref[...] = (out / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype).reshape(out_ref.shape)
        lse_ref[...] = (self.scratch.m[..., :1] + jnp.log(total)).reshape(lse_ref.shape)


def broadcast_lanes(x: jax.Array, width: int) -> jax.Array:
    """Returns `[..., LANES]`, whose lanes are all equal, as `[..., width]`."""
    if width % LANES == 0:
        return jnp.concatenate([x] * (width // LANES), axis=-1)
    return x[..., :width] if width < LANES else x[..., :1]
