"""decode_attention on a GPU: attention of a few queries over a long dense cache, cut along the cache (split-K).

A program takes one sequence, one KV head with a block of the query rows that share it (rows = q_len * group, query
major), and one of several equal shares of the KV blocks that these rows see. Over its share it keeps

    s = softcap(scale * q k^T)            [block_rows, block_kv]
    m' = max(m, max s)                    l = l exp(m - m') + sum exp(s - m')
    acc = acc exp(m - m') + exp(s - m') v                               out = acc / l, lse = m + log l

and `merge_partials` weighs the shares' outs, in float32, by their lse. A single share is the output itself.

Grid: (batch, KV heads * row blocks * splits). One decode step has few sequences and heads and many multiprocessors:
the splits are what fills them. Two axes leave the third that Triton has for `jax.vmap`. The loop runs over the blocks
that are filled and, with a window, in sight: its bounds are read from `lengths` on the chip.

Resident in registers: q, m, l, acc; K and V blocks pass through shared memory, where the compiler keeps `num_stages` of
them in flight. Blocks are powers of two: rows, head_dim and the tail of the cache are padded by masks, so that nothing
past a length is ever read. The layer of a stacked cache is an offset to its pointer.

Bound by memory: each number of the cache is read once, for 2 * group * q_len FLOPs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.reference import merge_partials

MIN_BLOCK: Final = 16
"""The smallest side of a matrix that tensor cores multiply."""

MAX_BLOCK_ROWS: Final = 64
MAX_BLOCK_KV: Final = 128

KV_BLOCK_BYTES: Final = 16 * 2**10
"""Keys of a block; with the values, two stages and two programs at a time that is half of a shared memory."""

MULTIPROCESSORS: Final = 132
"""Of an H100 or H200; other GPUs have about as many."""

MIN_BLOCKS: Final = 4
"""Of the KV blocks in a split: a shorter loop costs more to start and merge than it saves."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_kv: cached tokens of a trip, a power of two of at least 16.
      block_rows: query rows of a program, a power of two of at least 16.
      splits: shares that the cache is cut into.
      num_warps: warps of a program.
      num_stages: blocks that are loaded ahead.
    """

    block_kv: int
    block_rows: int
    splits: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("block_kv", "block_rows"):
            value = getattr(self, name)
            power = value >= MIN_BLOCK and value & (value - 1) == 0
            check(power, f"config.{name}", value, f"a power of two of at least {MIN_BLOCK}")
        for name in ("splits", "num_stages"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")
        check(self.num_warps in (1, 2, 4, 8, 16), "config.num_warps", self.num_warps, "1, 2, 4, 8 or 16")


def heuristic(problem: Problem) -> Config:
    """Blocks that fit into shared memory, and splits that give every multiprocessor two programs."""
    p = problem
    rows = p.q_len * p.group
    # float32 is not multiplied by tensor cores: operands are held in registers, and large blocks would be spilled.
    tensor_cores = p.q_dtype == p.kv_dtype != "float32"
    block_rows = min(max(pl.next_power_of_2(rows), MIN_BLOCK), MAX_BLOCK_ROWS if tensor_cores else MIN_BLOCK)
    block_bytes, number = (KV_BLOCK_BYTES, 2) if tensor_cores else (KV_BLOCK_BYTES // 2, 4)
    block_kv = min(max(block_bytes // (pl.next_power_of_2(p.head_dim) * number), MIN_BLOCK), MAX_BLOCK_KV)
    num_warps = 8 if block_rows == MAX_BLOCK_ROWS or not tensor_cores else 4
    seen = p.max_len if p.sliding_window is None else min(p.max_len, p.sliding_window + p.q_len - 1)
    programs = p.batch * p.kv_heads * pl.cdiv(rows, block_rows)
    # No more programs than run at a time: those of a second round would leave most of the chip idle.
    splits = min(max(2 * MULTIPROCESSORS // programs, 1), pl.cdiv(seen, MIN_BLOCKS * block_kv))
    return Config(block_kv, block_rows, splits, num_warps)


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    if problem.page_size is not None:
        return f"a dense cache is needed, got one in pages of {problem.page_size}"
    if problem.has_scales:
        return f"the cache must be float32, bfloat16 or float16, got {problem.kv_dtype}"
    if problem.head_dim > 256:
        return f"head_dim must be at most 256, got {problem.head_dim}"
    return None


def decode_attention(
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; see `palladion.decode_attention` for the contract.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    p, splits = problem, config.splits
    k, v = (inputs.k[None], inputs.v[None]) if inputs.layer is None else (inputs.k, inputs.v)
    layer = jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None]
    arrays = [layer, inputs.lengths, inputs.q, k, v]
    if inputs.sinks is not None:
        arrays.append(inputs.sinks.astype(jnp.float32))
    row_blocks = pl.cdiv(p.q_len * p.group, config.block_rows)
    out, lse = pl.pallas_call(
        fresh_kernel(_kernel, problem=p, config=config, row_blocks=row_blocks),
        grid=(p.batch, p.kv_heads * row_blocks * splits),
        out_shape=[
            # What is still to be merged stays in float32.
            jax.ShapeDtypeStruct((splits, *inputs.q.shape), inputs.q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, *inputs.q.shape[:3]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=pl.CostEstimate(
            flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=p.flops() // (4 * p.head_dim)
        ),
        interpret=interpret,
        name=f"decode_attention_r{config.block_rows}_kv{config.block_kv}_s{splits}",
    )(*arrays)
    if splits == 1:
        return out[0], lse[0]
    out, lse = merge_partials(out, lse)
    return out.astype(inputs.q.dtype), lse


def _kernel(
    layer_ref: Any,  # [1]
    lengths_ref: Any,  # [batch]
    q_ref: Any,  # [batch, q_len, q_heads, head_dim]
    k_ref: Any,  # [num_layers, batch, kv_heads, max_len, head_dim]
    v_ref: Any,  # the same
    *refs: Any,  # sinks [q_heads] where there are any; out [splits, batch, q_len, q_heads, head_dim] and lse
    problem: Problem,
    config: Config,
    row_blocks: int,
) -> None:
    p, block_rows, block_kv = problem, config.block_rows, config.block_kv
    sinks_ref = refs[0] if p.has_sinks else None
    out_ref, lse_ref = refs[p.has_sinks :]
    b, part = pl.program_id(0), pl.program_id(1)
    split, part = _divide(part, config.splits)[1], _divide(part, config.splits)[0]
    head, row_block = _divide(part, row_blocks)
    layer, length = layer_ref[0], lengths_ref[b]

    rows = p.q_len * p.group
    first_row = row_block * block_rows
    row = first_row + jnp.arange(block_rows, dtype=jnp.int32)  # [block_rows]
    query, member = _divide(row, p.group)
    q_head = head * p.group + member
    width = pl.next_power_of_2(p.head_dim)

    # A number of q, out or the sinks for every row (and column).
    real_row = row < rows
    column = jax.lax.broadcasted_iota(jnp.int32, (block_rows, width), 1)
    real = real_row[:, None] & (column < p.head_dim)
    place = tuple(jnp.broadcast_to(x[:, None], column.shape) for x in (query, q_head))
    q = plgpu.load(q_ref.at[b, *place, column], mask=real, other=0)  # [block_rows, width]
    dtype = q.dtype if q.dtype == k_ref.dtype else jnp.float32

    position = length - p.q_len + query  # [block_rows]
    first_query = length - p.q_len + _divide(first_row, p.group)[0]
    last_row = jnp.minimum(first_row + block_rows, rows) - 1
    last_query = jnp.minimum(length - p.q_len + _divide(last_row, p.group)[0], p.max_len - 1)
    oldest = 0 if p.sliding_window is None else jnp.maximum(first_query - p.sliding_window + 1, 0)
    first_block = _divide(oldest, block_kv)[0]
    blocks = _divide(jnp.maximum(last_query + block_kv, 0), block_kv)[0] - first_block
    share = _divide(blocks + config.splits - 1, config.splits)[0]
    begin = first_block + split * share
    end = first_block + jnp.minimum((split + 1) * share, blocks)

    slot = jax.lax.broadcasted_iota(jnp.int32, (block_kv, width), 0)
    feature = jax.lax.broadcasted_iota(jnp.int32, (block_kv, width), 1)

    def attend(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m, l, acc = state  # noqa: E741
        start = block * block_kv
        token = start + slot  # [block_kv, width]
        # Not what nobody sees: it may be anything, and 0 * NaN is NaN.
        seen = (token >= oldest) & (token <= last_query) & (feature < p.head_dim)
        k = plgpu.load(k_ref.at[layer, b, head, token, feature], mask=seen, other=0).astype(dtype)
        s = _dot(q.astype(dtype), k, 1) * p.scale  # [block_rows, block_kv]
        if p.logits_soft_cap is not None:
            s = p.logits_soft_cap * jnp.tanh(s * (1 / p.logits_soft_cap))
        t = start + jnp.arange(block_kv, dtype=jnp.int32)
        visible = t[None, :] <= jnp.minimum(position, last_query)[:, None]
        if p.sliding_window is not None:
            visible &= t[None, :] > position[:, None] - p.sliding_window
        s = jnp.where(visible, s, -jnp.inf)
        maximum = jnp.maximum(m, jnp.max(s, axis=1))
        # A row that has seen nothing yet: -inf - -inf is NaN.
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights = jnp.exp(s - shift[:, None])
        decay = jnp.exp(m - shift)
        v = plgpu.load(v_ref.at[layer, b, head, token, feature], mask=seen, other=0).astype(dtype)
        acc = acc * decay[:, None] + _dot(weights.astype(dtype), v, 0)
        return maximum, l * decay + jnp.sum(weights, axis=1), acc

    m = jnp.full(block_rows, -jnp.inf, jnp.float32)
    l = jnp.zeros(block_rows, jnp.float32)  # noqa: E741
    if sinks_ref is not None:
        # A sink is a logit without a value: it starts the sum, of one split.
        sinks = plgpu.load(sinks_ref.at[q_head], mask=real_row, other=0.0)
        m = jnp.where(split == 0, sinks, m)
        l = jnp.where(split == 0, 1.0, l)  # noqa: E741
    acc = jnp.zeros((block_rows, width), jnp.float32)
    m, l, acc = jax.lax.fori_loop(begin, end, attend, (m, l, acc))  # noqa: E741

    out = acc / jnp.where(l == 0.0, 1.0, l)[:, None]
    plgpu.store(out_ref.at[split, b, *place, column], out.astype(out_ref.dtype), mask=real)
    plgpu.store(lse_ref.at[split, b, query, q_head], m + jnp.log(l), mask=real_row)


def _divide(a: Any, b: int) -> tuple[Any, Any]:
    """Quotient and remainder of numbers that are not negative: plain integer division, without the care of `//`."""
    if isinstance(a, int):
        return divmod(a, b)
    return jax.lax.div(a, jnp.int32(b)), jax.lax.rem(a, jnp.int32(b))


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Product of matrices in float32, the last axis of a against an axis of b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
