"""decode_attention on a TPU: attention of a few queries over a long cache, in one pass with an online softmax.

For every sequence b, query block i and KV block j that the queries see:

    s = softcap(scale * k_scale * q k^T)              [kv_heads, rows, block_kv]     rows = block_q * group
    m_next = max(m_prev, max s)                       alpha = exp(m_prev - m_next)
    p = exp(s - m_next)                               l = alpha l + sum p
    acc = alpha acc + (p v_scale) v                   at the end: out = acc / l, lse = m + log l

Grid: (cores, which divide the KV heads or the sequences; batch blocks; query blocks). A grid step goes through the KV
blocks that its queries see, and takes those of all its KV heads at once, with one softmax over all of them: with one
head at a time, the chip mostly waits. KV blocks come out of a DMA ring (`ring.py`) that is filled across grid
steps, so that transfers never pause between sequences.

Resident in VMEM: q, m, l, acc and the output of (b, i); the ring, two to three KV blocks. In SMEM: lengths, page table,
layer, and the state of the ring.

A head narrower than the 128 lanes of a register would be padded to them, in HBM too. XLA therefore keeps such a cache
with its tokens along the lanes, and the kernel reads it in that order, `[head_dim, tokens]` (`tpu_layout.tokens_last`).

The scales of a quantized cache are multiplied with logits and weights, never with keys and values.

Bound by memory: each number of the cache is read once, for 2 * group * q_len FLOPs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.decode_attention.mosaic_tpu.kernel import kernel
from palladion.kernels.decode_attention.mosaic_tpu.products import OPERANDS, QUERY_PIECES, float_dtype, operands_for
from palladion.kernels.decode_attention.mosaic_tpu.refs import Operands, Scalars, Scratch
from palladion.kernels.decode_attention.mosaic_tpu.ring import CURSOR
from palladion.kernels.decode_attention.mosaic_tpu.tiling import (
    Tiling,
    chunk_multiple,
    chunk_of,
    gathers_scales,
    heads_of_core,
    token_bytes,
    tokens_last,
)
from palladion.kernels.decode_attention.mosaic_tpu.visible_range import VisibleRange
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.devices import Chip, target_chip, tpu_chips, vmem_budget
from palladion.kernels.integers import round_up
from palladion.kernels.search_space import Space
from palladion.kernels.tpu_layout import LANES, SUBLANES
from palladion.kernels.types import Interpret, Scalar

MIN_STEP_BYTES: Final = 2 * 2**20
"""Fewest bytes of keys and values that a device processes in a step: with fewer, a step's fixed cost counts."""

MAX_STEP_BYTES: Final = 4 * 2**20
"""Most bytes of keys and values that a device processes in a step; larger steps gain nothing."""

STEPS: Final = 8
"""Steps that the heuristic cuts all caches into, within these bounds: the first and the last overlap with nothing."""

BUFFERS: Final = 3
"""Slots of the ring: one is computed on, one is arriving, and one is already requested."""

MAX_VMEM_BYTES: Final = 48 * 2**20
"""Most VMEM that all blocks may take; also at most three quarters of a chip's VMEM."""

SMEM_BYTES: Final = 512 * 2**10
"""Most SMEM that lengths and page table may take, half of it."""

MAX_DOT_WIDTH: Final = 256
"""Widest operand that heads are joined to: the width of the MXU of v6e and v7x."""

MAX_DOT_ROWS: Final = 16
"""Most rows for which heads are joined: up to here further rows cost nothing beside loading keys and values."""

MAX_STATE_ROWS: Final = 512
"""Most rows, over all sequences that are processed together, whose state is kept in VMEM."""

BLOCK_Q_MULTIPLE: Final = 16
"""Divisor of block_q where there are several query blocks, so that rows are whole tiles in every dtype."""

MORE_IN_VMEM: Final = 2
"""Largest ring that the tuner tries, as a multiple of the heuristic's; the compiler refuses larger ones anyway."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the TPU kernel.

    Attributes:
      block_kv: cached tokens of a KV block: whole pages of a paged cache, a multiple of 8 to 128 tokens that divides
        max_len of a dense one.
      block_q: new tokens of a query block; at least q_len, or a multiple of 16.
      buffers: slots of the DMA ring.
      cores: cores of a device that divide the KV heads, or the sequences where the heads are not divisible.
      block_batch: sequences that are processed together, a KV block of each; divides the sequences of a core.
      block_heads: KV heads that are multiplied together; divides those of a core.
      loop_heads: whether head blocks are processed one after the other instead of all at once: slower while rows are
        few, but it takes less VMEM, so that more queries share what is read.
      operands: how keys and values are multiplied, one of `products.OPERANDS`.
    """

    block_kv: int
    block_q: int
    buffers: int = BUFFERS
    cores: int = 1
    block_batch: int = 1
    block_heads: int = 1
    loop_heads: bool = False
    operands: str = "floats"

    def __post_init__(self) -> None:
        for name in ("block_kv", "block_q", "buffers", "cores", "block_batch", "block_heads"):
            least = 2 if name == "buffers" else 1
            check(getattr(self, name) >= least, f"config.{name}", getattr(self, name), f"at least {least}")
        check(self.operands in OPERANDS, "config.operands", self.operands, ", ".join(OPERANDS))


def _chip() -> Chip:
    """Returns the TPU that is being traced for, or the smallest one."""
    return target_chip() or tpu_chips()["v4"]


def _vmem_bytes() -> int:
    """Returns the VMEM that all blocks may take on the chip that is being traced for."""
    return min(vmem_budget(target_chip()), MAX_VMEM_BYTES)


def heuristic(problem: Problem) -> Config:
    """Returns block sizes that keep the memory busy and fit into VMEM, and operands that suit the chip's MXU."""
    p, chip = problem, _chip()
    cores = next(n for n in (chip.cores, 1) if p.kv_heads % n == 0 or p.batch % n == 0)
    kv_heads = heads_of_core(p, cores)
    core_batch = p.batch if cores == 1 or kv_heads < p.kv_heads else p.batch // cores
    bytes_per_token = token_bytes(p) // p.kv_heads * kv_heads
    step_bytes = min(max(p.batch * p.max_len * token_bytes(p) // STEPS, MIN_STEP_BYTES), MAX_STEP_BYTES) // cores
    # Half of the VMEM for the ring, the rest for a block's logits and weights.
    step_bytes = min(step_bytes, _vmem_bytes() // 2 // BUFFERS)
    heads, rows = kv_heads * p.group, p.q_len * p.group
    most_batch = MAX_STATE_ROWS // (heads * p.q_len)
    # At least two sequences together, if possible: a step has a fixed cost, however short they are.
    least_batch = 2 if core_batch % 2 == 0 and most_batch >= 2 else 1
    block_kv = _block_kv(p, step_bytes // least_batch // bytes_per_token)
    ring_bytes = BUFFERS * block_kv * bytes_per_token
    room = _vmem_bytes() - ring_bytes
    if room < p.q_len * _query_bytes(p, block_kv, heads, heads):
        fitting = room // _query_bytes(p, block_kv, heads, p.group) // BLOCK_Q_MULTIPLE
        q_blocks = pl.cdiv(p.q_len, max(fitting, 1) * BLOCK_Q_MULTIPLE)
        block_q = min(round_up(pl.cdiv(p.q_len, q_blocks), BLOCK_Q_MULTIPLE), p.q_len)
        operands = operands_for(p.q_dtype, p.kv_dtype, block_q * p.group, chip)
        return Config(block_kv, block_q, BUFFERS, cores, loop_heads=True, operands=operands)
    sizes = range(1, min(MAX_DOT_WIDTH // p.head_dim, MAX_DOT_ROWS // rows) + 1)
    block_heads = max((n for n in sizes if kv_heads % n == 0), default=1)
    sequence_bytes = ring_bytes + p.q_len * _query_bytes(p, block_kv, heads, heads)
    most_batch = min(most_batch, step_bytes // (block_kv * bytes_per_token), _vmem_bytes() // sequence_bytes)
    block_batch = max((n for n in range(1, most_batch + 1) if core_batch % n == 0), default=1)
    operands = operands_for(p.q_dtype, p.kv_dtype, block_heads * rows, chip)
    return Config(block_kv, p.q_len, BUFFERS, cores, block_batch, block_heads, operands=operands)


def _block_kv(problem: Problem, most: int) -> int:
    """Returns the tokens of a KV block: about `most`, such that blocks divide a cache evenly."""
    p = problem
    # Whole registers of logits, where a cache consists of whole registers.
    multiple = math.lcm(chunk_of(p), LANES if p.max_len % LANES == 0 else 1)
    blocks = max(round(p.max_len / max(most, 1)), 1)
    block_kv = round_up(pl.cdiv(p.max_len, blocks), multiple)
    if p.sliding_window is None:
        return block_kv
    # One block has room for everything in a window, wherever that begins.
    return min(block_kv, round_up(2 * (p.sliding_window + p.q_len), multiple))


def _query_bytes(problem: Problem, block_kv: int, heads: int, heads_at_once: int) -> int:
    """Returns the VMEM that a new token takes: the state of `heads` query heads, the logits of `heads_at_once`."""
    width, itemsize = round_up(problem.head_dim, LANES), jnp.dtype(problem.q_dtype).itemsize
    # q and its output, double-buffered, and q as an operand; the accumulator; m, l and the like, a register each.
    state = 5 * width * itemsize + 4 * width + 5 * 4 * LANES
    return heads * state + heads_at_once * 3 * 4 * block_kv


def space(problem: Problem) -> Space:
    """Returns what the tuner may try: KV block sizes, slots of the ring, and sequences that share a step."""
    p, start = problem, heuristic(problem)
    # Whole pages, or whole tiles of a dense cache that consists of whole tiles.
    least = LANES if p.page_size is None else p.page_size
    sizes = [least << n for n in range(8) if p.max_len % (least << n) == 0]
    cores = start.cores if p.kv_heads % start.cores else 1
    core_batch = p.batch // cores
    batches = [n for n in (1, 2, 4, 8) if core_batch % n == 0 and (n == 1 or not start.loop_heads)]

    def ring_tokens(config: Config) -> int:
        return config.buffers * config.block_kv * config.block_batch

    def fits(config: Config) -> bool:
        return ring_tokens(config) <= MORE_IN_VMEM * ring_tokens(start)

    return Space(start, {"block_kv": sizes, "block_batch": batches, "buffers": (2, 3, 4)}, fits)


def unsupported(problem: Problem) -> str | None:
    """Returns why this kernel cannot run a problem, or None."""
    p = problem
    if p.q_dtype == "float16" or p.kv_dtype == "float16":
        return "float16 is not supported on TPUs, use bfloat16 or float32"
    if p.head_dim % SUBLANES:
        return f"head_dim must be a multiple of {SUBLANES}, got {p.head_dim}"
    chunk = chunk_of(p)
    if chunk == 0:
        name, given = ("max_len", p.max_len) if p.page_size is None else ("page_size", p.page_size)
        cache = f"a cache with head_dim = {p.head_dim} in {p.kv_dtype}"
        return f"{name} must be a multiple of {chunk_multiple(p)} for {cache}, got {given}"
    table = 0 if p.page_size is None else p.batch * (p.max_len // p.page_size) * 4
    if table > SMEM_BYTES:
        return f"the page table must fit into {SMEM_BYTES >> 10} KiB, got {table >> 10}; larger pages make it smaller"
    least, most = BUFFERS * chunk * token_bytes(p), _vmem_bytes()
    if least > most:
        heads = f"{p.kv_heads} KV heads of {p.head_dim} in {p.kv_dtype}"
        return f"{BUFFERS} times {chunk} tokens must fit into {most >> 20} MiB, with {heads} they take {least >> 20}"
    return None


def decode_attention(
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; see `palladion.decode_attention` for the contract.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    p, config = problem, config or heuristic(problem)
    visible, tiling = _layout(p, config)
    operands = _operands(p, inputs, visible, tiling)
    scalars = Scalars(
        layer=jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None],
        lengths=inputs.lengths,
        page_table=None if inputs.page_table is None else inputs.page_table.reshape(-1),
    )
    out, lse = pl.pallas_call(
        fresh_kernel(kernel, problem=p, visible=visible, tiling=tiling),
        grid_spec=_grid_spec(p, config, operands, visible, tiling),
        out_shape=[
            jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
            jax.ShapeDtypeStruct((*operands.q.shape[:3], 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_chip().vmem_bytes,
            # The kernel clamps page numbers itself; checking each transfer takes as long as starting it.
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=p.flops() // (4 * p.head_dim)
        ),
        interpret=interpret,
        name=f"decode_attention_q{visible.block_q}_kv{config.block_kv}",
    )(scalars, operands)
    # Back from [batch, kv_heads / block_heads, block_heads * q_len * group, ...] to the shape of q.
    out, lse = (
        jnp.moveaxis(x.reshape(p.batch, p.kv_heads, p.q_len, p.group, x.shape[-1]), 2, 1).reshape(*shape)
        for x, shape in ((out, inputs.q.shape), (lse, inputs.q.shape[:3]))
    )
    return out, lse


def _layout(problem: Problem, config: Config) -> tuple[VisibleRange, Tiling]:
    """Returns how a problem is cut by a config; raises ValueError where the two do not go together."""
    p, chunk = problem, chunk_of(problem, config.block_kv)
    multiple = p.page_size or chunk_multiple(p)
    check(chunk > 0, "config.block_kv", config.block_kv, f"a multiple of {multiple} for this cache")
    fits = config.operands == "floats" or p.kv_dtype in OPERANDS[config.operands]
    check(fits, "config.operands", config.operands, f"'floats', or what multiplies {p.kv_dtype}")
    divides = p.kv_heads % config.cores == 0 or p.batch % config.cores == 0
    check(divides, "config.cores", config.cores, f"a divisor of {p.kv_heads} KV heads or of {p.batch} sequences")
    heads, batch, block_batch = heads_of_core(p, config.cores), p.batch, config.block_batch
    if heads == p.kv_heads:
        batch //= config.cores
    check(batch % block_batch == 0, "config.block_batch", block_batch, f"a divisor of the {batch} sequences of a core")
    check(block_batch == 1 or not config.loop_heads, "config.block_batch", block_batch, "1 where loop_heads is set")
    divides = heads % config.block_heads == 0
    check(divides, "config.block_heads", config.block_heads, f"a divisor of the {heads} KV heads of a core")
    block_q = min(config.block_q, p.q_len)
    whole = block_q == p.q_len or block_q % BLOCK_Q_MULTIPLE == 0
    check(whole, "config.block_q", block_q, f"at least q_len = {p.q_len}, or a multiple of {BLOCK_Q_MULTIPLE}")
    q_blocks = pl.cdiv(p.q_len, block_q)
    one = config.block_heads == 1 or q_blocks == 1
    accepted = f"1 where q_len = {p.q_len} is more than block_q = {block_q}"
    check(one, "config.block_heads", config.block_heads, accepted)
    tiling = Tiling(
        tokens_last=tokens_last(p),
        scales_gathered=gathers_scales(p),
        cores_divide_heads=heads < p.kv_heads,
        core_batch=batch,
        core_heads=heads,
        block_batch=block_batch,
        block_heads=config.block_heads,
        loop_heads=config.loop_heads,
        operands=config.operands,
    )
    return VisibleRange(p.max_len, p.q_len, block_q, q_blocks, config.block_kv, chunk, p.sliding_window), tiling


def _operands(problem: Problem, inputs: Inputs, visible: VisibleRange, tiling: Tiling) -> Operands:
    """Returns the arrays in the shapes that the kernel takes; the cache is not copied."""
    p, block_heads = problem, tiling.block_heads
    # From the shape of q to [batch, kv_heads / block_heads, block_heads * q_len * group, head_dim].
    q = jnp.moveaxis(inputs.q.reshape(p.batch, p.q_len, p.kv_heads, p.group, p.head_dim), 1, 2)
    q = q.reshape(p.batch, p.kv_heads // block_heads, block_heads * p.q_len * p.group, p.head_dim)
    k, v = (x if inputs.layer is not None else x[None] for x in (inputs.k, inputs.v))
    if tiling.tokens_last:
        k, v = jnp.swapaxes(k, 3, 4), jnp.swapaxes(v, 3, 4)
    k_scale, v_scale = _scales(p, inputs, visible.block_kv)
    sinks = None
    if inputs.sinks is not None:
        rows = block_heads * visible.block_q * p.group
        sinks = inputs.sinks.astype(jnp.float32).reshape(p.kv_heads, 1, p.group)
        sinks = jnp.broadcast_to(sinks, (p.kv_heads, visible.block_q, p.group)).reshape(-1, rows, 1)
    return Operands(q, k, v, k_scale, v_scale, sinks)


def _scales(problem: Problem, inputs: Inputs, block_kv: int) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """Returns the scales of keys and values as `[layers, batch or num_pages, kv_heads, tokens]`, if there are any."""
    p, layer = problem, inputs.layer
    if inputs.k_scale is None or inputs.v_scale is None:
        return None, None
    if not gathers_scales(p):
        k_scale, v_scale = (x if layer is not None else x[None] for x in (inputs.k_scale, inputs.v_scale))
        return k_scale, v_scale
    # A page that does not exist is read as the nearest that does, as in the kernel.
    table = jnp.clip(inputs.page_table, 0, (p.num_pages or 1) - 1)

    def gather(scale: jax.Array) -> jax.Array:
        one = scale if layer is None else jax.lax.dynamic_index_in_dim(scale, layer, 0, keepdims=False)
        pages = jnp.moveaxis(one[table], 1, 2)  # [batch, kv_heads, pages, page_size]
        tokens = pages.reshape(p.batch, p.kv_heads, p.max_len)
        return jnp.pad(tokens, ((0, 0), (0, 0), (0, -p.max_len % block_kv)))[None]

    return gather(inputs.k_scale), gather(inputs.v_scale)


def _grid_spec(
    problem: Problem, config: Config, operands: Operands, visible: VisibleRange, tiling: Tiling
) -> pltpu.PrefetchScalarGridSpec:
    """Returns the grid, the blocks of operands and results, and the scratch memory of the kernel."""
    p, block_batch, head_blocks = problem, tiling.block_batch, tiling.head_blocks
    rows, n = tiling.block_heads * visible.block_q * p.group, block_batch * head_blocks
    width = tiling.block_heads * p.head_dim
    cores_divide_batch = config.cores > 1 and not tiling.cores_divide_heads

    def query_block(core: Scalar, batch_block: Scalar, q_block: Scalar, *_: Any) -> tuple[Any, ...]:
        if cores_divide_batch:
            return core * tiling.batch_blocks + batch_block, 0, q_block, 0
        return batch_block, core, q_block, 0

    queries, hbm = (
        pl.BlockSpec((block_batch, head_blocks, rows, p.head_dim), query_block),
        pl.BlockSpec(memory_space=pltpu.HBM),
    )
    scales = hbm if p.has_scales else None
    sinks = pl.BlockSpec((head_blocks, rows, 1), lambda core, *_: (0 if cores_divide_batch else core, 0, 0))
    last_axes = (p.head_dim, visible.block_kv) if tiling.tokens_last else (visible.block_kv, p.head_dim)
    ring = pltpu.VMEM((config.buffers, block_batch, tiling.core_heads, *last_axes), operands.k.dtype)
    scale_ring = pltpu.VMEM((config.buffers, block_batch, p.kv_heads, visible.block_kv), jnp.float32)
    q_operand = pltpu.VMEM((n, rows, width), float_dtype(operands.q.dtype, p.kv_dtype))
    if tiling.operands == "integers":
        q_operand = pltpu.VMEM((n, QUERY_PIECES * rows, width), jnp.int8)
    words = None
    if tiling.operands == "words":
        heads = tiling.block_heads if tiling.loop_heads else block_batch * tiling.core_heads
        words = pltpu.VMEM((last_axes[1] // LANES, heads, last_axes[0] // 2, LANES), jnp.int32)
    scratch = Scratch(
        q=q_operand,
        q_factor=pltpu.VMEM((n, rows, 1), jnp.float32),
        m=pltpu.VMEM((n, rows, LANES), jnp.float32),
        l=pltpu.VMEM((n, rows, LANES), jnp.float32),
        acc=pltpu.VMEM((n, rows, width), jnp.float32),
        cursor=pltpu.SMEM((CURSOR,), jnp.int32),
        semaphores=pltpu.SemaphoreType.DMA((4 if p.has_scales else 2, config.buffers)),
        k_ring=ring,
        v_ring=ring,
        k_scale_ring=scale_ring if p.has_scales else None,
        v_scale_ring=scale_ring if p.has_scales else None,
        words=words,
    )
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,  # the tuple of scalars
        grid=(config.cores, tiling.batch_blocks, visible.q_blocks),
        in_specs=[Operands(queries, hbm, hbm, scales, scales, sinks if p.has_sinks else None)],
        out_specs=[queries, pl.BlockSpec((block_batch, head_blocks, rows, 1), query_block)],
        scratch_shapes=[scratch],
    )
