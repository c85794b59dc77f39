"""decode_attention on a TPU: attention of a few queries over a long dense cache, one pass with a running softmax.

For every sequence b, block i of its queries and block j of the cached tokens that these can see:

    s = softcap(scale * q k^T)            [kv_heads, rows, block_kv]      rows = block_q * group
    m' = max(m, max s)                    l = l exp(m - m') + sum exp(s - m')
    acc = acc exp(m - m') + exp(s - m') v                               out = acc / l, lse = m + log l

Grid: (batch, query blocks, KV blocks), the last one innermost: its steps share q, m, l, acc and the output. A step
takes its tokens of all KV heads at once, for one softmax over all of them: one head at a time, the chip mostly waits.

Resident in VMEM: q, m, l, acc and the output of (b, i); two K and two V blocks, of which the pipeline fills one pair
while the other is worked on. In SMEM, before the grid starts: lengths and layer, from which the index maps take the
blocks to fetch. Grid step j stands for the j-th block that (b, i) sees: blocks outside a window are never visited, and
past the last filled block the index stays, so that nothing is fetched, and the step is skipped.

A head narrower than the 128 lanes of a register would be padded to them, in HBM too. XLA therefore keeps such a cache
with the tokens along the lanes, and the kernel takes it so, as [head_dim, max_len]: the two swapped are the same bytes,
where any other order would have the whole cache copied before every call.

Bound by memory: each number of the cache is read once, for 2 * group * q_len FLOPs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.decode_attention.problem import Inputs, Problem

LANES: Final = 128
SUBLANES: Final = 8
"""An array's last two dimensions are kept in tiles of 8 x 128."""

KV_BLOCK_BYTES: Final = 2 * 2**20
"""Keys and values that a grid step reads: enough that the time to start a transfer (up to 1 µs) does not count."""

VMEM_BYTES: Final = 12 * 2**20
"""What all blocks of a step may take: three quarters of what the smallest TPU has (v4, 16 MB)."""

BLOCK_Q_MULTIPLE: Final = 16
"""Of the tokens in a query block where there are several, so that its rows are whole tiles in every dtype."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_kv: cached tokens of a grid step, a power of two of at least 128.
      block_q: new tokens of a grid step; at least q_len, or a multiple of 16.
    """

    block_kv: int
    block_q: int

    def __post_init__(self) -> None:
        power = self.block_kv >= LANES and self.block_kv & (self.block_kv - 1) == 0
        check(power, "config.block_kv", self.block_kv, f"a power of two of at least {LANES}")
        check(self.block_q >= 1, "config.block_q", self.block_q, "at least 1")


def heuristic(problem: Problem) -> Config:
    """Blocks that keep the memory busy and fit into the VMEM of every generation."""
    p = problem
    token = _token_bytes(p)
    block_kv = LANES
    while block_kv * 2 * token <= KV_BLOCK_BYTES and block_kv < p.max_len:
        block_kv *= 2
    # A query's logits and weights; itself and its output in two buffers each, and its accumulator.
    query = p.q_heads * 4 * (3 * block_kv + 5 * _round_up(p.head_dim, LANES))
    block_q = max((VMEM_BYTES - 2 * block_kv * token) // query, BLOCK_Q_MULTIPLE)
    return Config(block_kv, min(block_q // BLOCK_Q_MULTIPLE * BLOCK_Q_MULTIPLE, p.q_len))


def _round_up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple


def _tokens_last(problem: Problem) -> bool:
    """Whether XLA keeps the cache with its tokens along the lanes, which it does where that takes less padding."""
    n, d = problem.max_len, problem.head_dim
    return _round_up(d, SUBLANES) * _round_up(n, LANES) < _round_up(n, SUBLANES) * _round_up(d, LANES)


def _token_bytes(problem: Problem) -> int:
    """What a token's keys and values take in VMEM."""
    width = problem.head_dim if _tokens_last(problem) else _round_up(problem.head_dim, LANES)
    return 2 * problem.kv_heads * width * jnp.dtype(problem.kv_dtype).itemsize


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    if problem.page_size is not None:
        return f"a dense cache is needed, got one in pages of {problem.page_size}"
    for name, dtype in (("q", problem.q_dtype), ("the cache", problem.kv_dtype)):
        if dtype not in ("float32", "bfloat16"):
            return f"{name} must be float32 or bfloat16, got {dtype}"
    if problem.head_dim % SUBLANES:
        return f"head_dim must be a multiple of {SUBLANES}, got {problem.head_dim}"
    least = 2 * LANES * _token_bytes(problem)
    if least > VMEM_BYTES:
        heads = f"{problem.kv_heads} KV heads of {problem.head_dim} in {problem.kv_dtype}"
        return f"two blocks of {LANES} tokens must fit {VMEM_BYTES >> 20} MiB, with {heads} they take {least >> 20}"
    return None


def decode_attention(
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; see `palladion.decode_attention` for the contract.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    config = config or heuristic(problem)
    p, group = problem, problem.group
    block_kv, block_q = min(config.block_kv, p.max_len), min(config.block_q, p.q_len)
    whole = block_q == p.q_len or block_q % BLOCK_Q_MULTIPLE == 0
    check(whole, "config.block_q", block_q, f"at least q_len = {p.q_len}, or a multiple of {BLOCK_Q_MULTIPLE}")
    rows = block_q * group
    kv_blocks, q_blocks = pl.cdiv(p.max_len, block_kv), pl.cdiv(p.q_len, block_q)
    sight = _Sight(p.q_len, block_q, block_kv, kv_blocks, p.sliding_window)

    # [batch, q_len, kv_heads, group, head_dim] -> [batch, kv_heads, q_len * group, head_dim]
    q = inputs.q.reshape(p.batch, p.q_len, p.kv_heads, group, p.head_dim)
    q = jnp.moveaxis(q, 1, 2).reshape(p.batch, p.kv_heads, p.q_len * group, p.head_dim)
    k, v = (inputs.k[None], inputs.v[None]) if inputs.layer is None else (inputs.k, inputs.v)
    layer = jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None]
    tokens_last = _tokens_last(p)
    if tokens_last:
        k, v = jnp.swapaxes(k, 3, 4), jnp.swapaxes(v, 3, 4)
    arrays = [q, k, v]

    def at_queries(b: Any, i: Any, j: Any, layer: Any, lengths: Any) -> tuple[Any, ...]:
        del j, layer, lengths
        return b, 0, i, 0

    def at_tokens(b: Any, i: Any, j: Any, layer: Any, lengths: Any) -> tuple[Any, ...]:
        first, last = sight.blocks(lengths[b], i)
        block = jnp.minimum(first + j, jnp.maximum(last, 0))
        return (layer[0], b, 0, 0, block) if tokens_last else (layer[0], b, 0, block, 0)

    queries = pl.BlockSpec((1, p.kv_heads, rows, p.head_dim), at_queries)
    slab = (p.head_dim, block_kv) if tokens_last else (block_kv, p.head_dim)
    tokens = pl.BlockSpec((1, 1, p.kv_heads, *slab), at_tokens)
    in_specs = [queries, tokens, tokens]
    if inputs.sinks is not None:
        sinks = inputs.sinks.astype(jnp.float32).reshape(p.kv_heads, 1, group)
        arrays.append(jnp.broadcast_to(sinks, (p.kv_heads, block_q, group)).reshape(p.kv_heads, rows, 1))
        in_specs.append(pl.BlockSpec((p.kv_heads, rows, 1), lambda *_: (0, 0, 0)))
    kernel = fresh_kernel(_kernel, problem=p, sight=sight, tokens_last=tokens_last)
    state = (p.kv_heads, rows, 1)
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(p.batch, q_blocks, sight.steps),
            in_specs=in_specs,
            out_specs=[queries, pl.BlockSpec((1, p.kv_heads, rows, 1), at_queries)],
            scratch_shapes=[
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM((p.kv_heads, rows, p.head_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=p.flops() // (4 * p.head_dim)
        ),
        interpret=interpret,
        name=f"decode_attention_q{block_q}_kv{block_kv}",
    )(layer, inputs.lengths, *arrays)
    # [batch, kv_heads, q_len * group, ...] -> [batch, q_len, kv_heads, group, ...] -> [batch, q_len, q_heads, ...]
    out, lse = (
        jnp.moveaxis(x.reshape(p.batch, p.kv_heads, p.q_len, group, x.shape[-1]), 2, 1).reshape(*shape)
        for x, shape in ((out, inputs.q.shape), (lse, inputs.q.shape[:3]))
    )
    return out, lse


@dataclasses.dataclass(frozen=True)
class _Sight:
    """Which cached tokens a block of queries sees; used by index maps and kernel alike, on scalars."""

    q_len: int
    block_q: int
    block_kv: int
    kv_blocks: int
    window: int | None

    @property
    def steps(self) -> int:
        """The most KV blocks that a query block sees."""
        if self.window is None:
            return self.kv_blocks
        # The union of the windows may begin with the last token of a block.
        return min(self.kv_blocks, pl.cdiv(self.window + self.block_q - 2, self.block_kv) + 1)

    def queries(self, length: Any, i: Any) -> tuple[Any, Any]:
        """Positions of the first and the last query of block i; negative where they are padding."""
        first = length - self.q_len + i * self.block_q
        return first, jnp.minimum(first + self.block_q, length) - 1

    def blocks(self, length: Any, i: Any) -> tuple[Any, Any]:
        """The first and the last KV block that query block i sees; the last is -1 where it sees none."""
        first_query, last_query = self.queries(length, i)
        # A division by shifting: the compiler turns an index map with // into a slow one. One block needs none.
        shift = self.block_kv.bit_length() - 1 if self.kv_blocks > 1 else 31
        first = 0 if self.window is None else jnp.maximum(first_query - self.window + 1, 0) >> shift
        return first, jnp.minimum(last_query >> shift, self.kv_blocks - 1)


def _kernel(
    layer_ref: Any,  # [1] in SMEM, as the next
    lengths_ref: Any,  # [batch]
    q_ref: Any,  # [1, kv_heads, rows, head_dim]
    k_ref: Any,  # [1, 1, kv_heads, block_kv, head_dim], or the last two swapped
    v_ref: Any,  # the same
    *refs: Any,  # sinks [kv_heads, rows, 1] where there are any; the outputs and the state, as below
    problem: Problem,
    sight: _Sight,
    tokens_last: bool,
) -> None:
    del layer_ref  # for the index maps
    sinks_ref = refs[0] if problem.has_sinks else None
    # [1, kv_heads, rows, head_dim]; [1, kv_heads, rows, 1]; [kv_heads, rows, 1] twice; [kv_heads, rows, head_dim]
    out_ref, lse_ref, m_ref, l_ref, acc_ref = refs[problem.has_sinks :]
    token_axis, width_axis = (2, 1) if tokens_last else (1, 2)
    soft_cap = problem.logits_soft_cap
    b, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length = lengths_ref[b]
    first_query, last_query = sight.queries(length, i)
    first_block, last_block = sight.blocks(length, i)
    block = first_block + j
    start = block * sight.block_kv
    # Every query sees all of an inner block: nothing to mask.
    inner = start + sight.block_kv - 1 <= first_query
    if sight.window is not None:
        inner &= start > last_query - sight.window

    @pl.when(j == 0)
    def _begin() -> None:
        # A sink is a logit without a value: it starts the sum.
        m_ref[...] = jnp.full(m_ref.shape, -jnp.inf) if sinks_ref is None else sinks_ref[...]
        l_ref[...] = jnp.full(l_ref.shape, 1.0 if problem.has_sinks else 0.0)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def attend(masked: bool) -> None:
        q, k, v = q_ref[0], k_ref[0, 0], v_ref[0, 0]
        dtype = q.dtype if q.dtype == k.dtype else jnp.float32
        s = _dot(q.astype(dtype), k.astype(dtype), width_axis) * problem.scale  # [kv_heads, rows, block_kv]
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s * (1 / soft_cap))
        if masked:
            # In a block past the end of the cache stands anything, NaN included, and 0 * NaN is NaN.
            token = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, token_axis)
            seen = token <= last_query
            position = start + jax.lax.broadcasted_iota(jnp.int32, s.shape, 2)
            query = first_query
            if sight.block_q > 1:
                query += jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) // problem.group
            visible = position <= jnp.minimum(query, last_query)
            if sight.window is not None:
                seen &= token > first_query - sight.window
                visible &= position > query - sight.window
            s = jnp.where(visible, s, -jnp.inf)
            v = jnp.where(seen, v, jnp.zeros_like(v))
        m = m_ref[...]  # [kv_heads, rows, 1]
        maximum = jnp.maximum(m, jnp.max(s, axis=2, keepdims=True))
        # A row that has seen nothing yet: -inf - -inf is NaN.
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum) if masked else maximum
        weights = jnp.exp(s - shift)
        decay = jnp.exp(m - shift)
        m_ref[...] = maximum
        l_ref[...] = l_ref[...] * decay + jnp.sum(weights, axis=2, keepdims=True)
        acc_ref[...] = acc_ref[...] * decay + _dot(weights.astype(dtype), v.astype(dtype), token_axis)

    pl.when((block <= last_block) & inner)(lambda: attend(masked=False))
    pl.when((block <= last_block) & ~inner)(lambda: attend(masked=True))

    @pl.when(j == sight.steps - 1)
    def _end() -> None:
        total = l_ref[...]
        out_ref[0] = (acc_ref[...] / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype)
        lse_ref[0] = m_ref[...] + jnp.log(total)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Products of matrices in float32, head by head: the last axis of a against an axis of b."""
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
