"""decode_attention on a TPU: attention of a few queries over a long cache, one pass with a running softmax.

For every sequence b, block i of its queries and block j of the cached tokens that these can see:

    s = softcap(scale * k_scale * q k^T)      [kv_heads, rows, block_kv]      rows = block_q * group
    m' = max(m, max s)                        l = l exp(m - m') + sum exp(s - m')
    acc = acc exp(m - m') + (exp(s - m') v_scale) v                   out = acc / l, lse = m + log l

Grid: (shares of the KV heads, one for each core; batch; query blocks). A grid step walks through the blocks of tokens
that its queries see, and takes them of all its KV heads at once, for one softmax over all of them: one head at a time,
the chip mostly waits. Blocks come out of a ring of buffers (`stream.py`) that is filled across grid steps: what
comes next is under way whatever sequence it is of.

Resident in VMEM: q, m, l, acc and the output of (b, i); the ring, two to three blocks of keys and values. In SMEM:
lengths, page table, layer, and where the ring is.

A head narrower than the 128 lanes of a register would be padded to them, in HBM too. XLA therefore keeps such a cache
with the tokens along the lanes, and the kernel takes it so, as [head_dim, tokens] (`tpu_layout.tokens_last`).

Scales of a quantized cache are applied to the logits and to the weights, never to keys and values.

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
from palladion.kernels.decode_attention.mosaic_tpu.kernel import View, kernel
from palladion.kernels.decode_attention.mosaic_tpu.products import OPERANDS, QUERY_PIECES, float_dtype, operands_for
from palladion.kernels.decode_attention.mosaic_tpu.stream import CURSOR, Sight
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.devices import Chip, target_chip, tpu_chips
from palladion.kernels.tpu_layout import LANES, SUBLANES, round_up, tile_rows
from palladion.kernels.tuning import Space

KV_BLOCK_BYTES: Final = (2 * 2**20, 4 * 2**20)
"""Keys and values that a device works on at a time: an eighth of all there is room for, but at least so much that what
a block costs besides its tokens does not count, and no more than is any use. The first one is waited for, and nothing
arrives any more while the last one is worked on."""

BLOCKS: Final = 8

UNIT_BYTES: Final = 2**20
"""Keys and values of a dense cache that are moved at a time, at most: a sequence's last unit is moved whole."""

BUFFERS: Final = 3
"""Blocks in the ring: one is worked on, one arrives, and one is asked for already."""

MAX_VMEM_BYTES: Final = 48 * 2**20
"""What all blocks may take, and three quarters of a chip's VMEM at most."""

SMEM_BYTES: Final = 512 * 2**10
"""What lengths and page table may take: half of it all."""

PACK_WIDTH: Final = 256
PACK_ROWS: Final = 16
"""Heads are multiplied together up to this width and so many rows: what fills a matrix unit of v6e and v7x, and what
costs nothing beside it."""

MAX_TEAM_ROWS: Final = 512
"""Rows of all packs of the sequences that are worked on together, whose state is in VMEM."""

BLOCK_Q_MULTIPLE: Final = 16
"""Of the tokens in a query block where there are several, so that its rows are whole tiles in every dtype."""


MORE_IN_VMEM: Final = 2
"""Times what the heuristic puts into VMEM: what is more is refused by the compiler anyway."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_kv: cached tokens that are worked on at a time: whole pages of a paged cache, a multiple of 8 to 128 tokens
        that divides max_len of a dense one.
      block_q: new tokens of a grid step; at least q_len, or a multiple of 16.
      buffers: blocks in VMEM.
      cores: over how many cores of a device the KV heads are divided, or the sequences where the heads cannot be.
      members: sequences that are worked on together, a block of each: a divisor of those of a core.
      pack: KV heads that are multiplied at a time.
      one_by_one: whether these packs are worked on one after the other instead of all at once: slower while rows are
        few, but it takes less VMEM, and lets more queries share what is read.
      operands: one of `tpu_products.OPERANDS`, how a one-byte cache is multiplied.
    """

    block_kv: int
    block_q: int
    buffers: int = BUFFERS
    cores: int = 1
    members: int = 1
    pack: int = 1
    one_by_one: bool = False
    operands: str = "floats"

    def __post_init__(self) -> None:
        for name, least in (("block_kv", 1), ("block_q", 1), ("buffers", 2), ("cores", 1), ("members", 1), ("pack", 1)):
            check(getattr(self, name) >= least, f"config.{name}", getattr(self, name), f"at least {least}")
        check(self.operands in OPERANDS, "config.operands", self.operands, ", ".join(OPERANDS))


def _chip() -> Chip:
    """The TPU that is being traced for; the smallest one where there is none."""
    return target_chip() or tpu_chips()["v4"]


def _vmem_bytes() -> int:
    """What all blocks may take on the chip that is being traced for."""
    return min(_chip().vmem_bytes * 3 // 4, MAX_VMEM_BYTES)


def heuristic(problem: Problem) -> Config:
    """Blocks that keep the memory busy and fit into the chip's VMEM, and what its matrix unit is fed with."""
    p, chip = problem, _chip()
    cores = next(n for n in (chip.cores, 1) if p.kv_heads % n == 0 or p.batch % n == 0)
    kv_heads = _heads_of_a_core(p, cores)
    share = p.batch if cores == 1 or kv_heads < p.kv_heads else p.batch // cores
    token = _token_bytes(p) // p.kv_heads * kv_heads
    least, most = KV_BLOCK_BYTES
    block_bytes = min(max(p.batch * p.max_len * _token_bytes(p) // BLOCKS, least), most) // cores
    # Half of the VMEM for the ring, the rest for a block's logits and what becomes of them.
    block_bytes = min(block_bytes, _vmem_bytes() // 2 // BUFFERS)
    most_members = MAX_TEAM_ROWS // (kv_heads * p.group * p.q_len)
    # Two sequences at least, where they can be: a step takes its time, however short they are.
    halves = 2 if share % 2 == 0 and most_members >= 2 else 1
    block_kv = _block_kv(p, block_bytes // halves // token)
    room = _vmem_bytes() - BUFFERS * block_kv * token
    heads = kv_heads * p.group
    if room < p.q_len * _query_bytes(p, block_kv, heads, heads):
        fitting = room // _query_bytes(p, block_kv, heads, p.group) // BLOCK_Q_MULTIPLE
        blocks = pl.cdiv(p.q_len, max(fitting, 1) * BLOCK_Q_MULTIPLE)
        block_q = min(round_up(pl.cdiv(p.q_len, blocks), BLOCK_Q_MULTIPLE), p.q_len)
        operands = operands_for(p.q_dtype, p.kv_dtype, block_q * p.group, chip)
        return Config(block_kv, block_q, BUFFERS, cores, one_by_one=True, operands=operands)
    rows = p.q_len * p.group
    packs = range(1, min(PACK_WIDTH // p.head_dim, PACK_ROWS // rows) + 1)
    pack = max((n for n in packs if kv_heads % n == 0), default=1)
    sequence = BUFFERS * block_kv * token + p.q_len * _query_bytes(p, block_kv, heads, heads)
    most_members = min(most_members, block_bytes // (block_kv * token), _vmem_bytes() // sequence)
    members = max((n for n in range(1, most_members + 1) if share % n == 0), default=1)
    operands = operands_for(p.q_dtype, p.kv_dtype, pack * rows, chip)
    return Config(block_kv, p.q_len, BUFFERS, cores, members, pack, operands=operands)


def _block_kv(problem: Problem, most: int) -> int:
    """About so many tokens, in equal parts of what there is."""
    p = problem
    # Whole registers of logits, where the cache consists of such.
    unit = math.lcm(_unit(p), LANES if p.max_len % LANES == 0 else 1)
    blocks = max(round(p.max_len / max(most, 1)), 1)
    block_kv = round_up(pl.cdiv(p.max_len, blocks), unit)
    # Room for what is seen through a window, wherever it begins.
    return block_kv if p.sliding_window is None else min(block_kv, round_up(2 * (p.sliding_window + p.q_len), unit))


def _heads_of_a_core(problem: Problem, cores: int) -> int:
    return problem.kv_heads // cores if problem.kv_heads % cores == 0 else problem.kv_heads


def _query_bytes(problem: Problem, block_kv: int, heads: int, at_once: int) -> int:
    """What a new token takes in VMEM, which has so many query heads, with the logits of so many `at_once`."""
    width, itemsize = round_up(problem.head_dim, LANES), jnp.dtype(problem.q_dtype).itemsize
    # q and its output in two buffers each, and q as an operand; the accumulator; m, l and the like, a register each.
    state = 5 * width * itemsize + 4 * width + 5 * 4 * LANES
    return heads * state + at_once * 3 * 4 * block_kv


def _tokens_last(problem: Problem) -> bool:
    """Whether tokens are lanes; see `tpu_layout.tokens_last`, of which no other case is supported."""
    return problem.head_dim % LANES != 0


def _grain(problem: Problem) -> int:
    """Of how many tokens the unit of a transfer must be a multiple: what a tile holds."""
    if _tokens_last(problem) or (problem.has_scales and not _gathers_scales(problem)):
        return LANES
    return SUBLANES if problem.page_size is not None else tile_rows(problem.kv_dtype)


def _gathers_scales(problem: Problem) -> bool:
    """Whether pages are too short for their scales to be moved by the page: XLA gathers them for the kernel."""
    return problem.has_scales and problem.page_size is not None and problem.page_size % LANES != 0


def _unit(problem: Problem, block_kv: int = 0) -> int:
    """The most tokens that can be moved at a time and make up such blocks; 0 where there is no such number."""
    p, grain = problem, _grain(problem)
    if p.page_size is not None:
        whole = p.page_size % grain == 0 and block_kv % p.page_size == 0
        return p.page_size if whole else 0
    most = UNIT_BYTES // _token_bytes(p)
    if p.sliding_window is not None:
        # Both ends of what is seen are moved by whole units.
        most = min(most, p.sliding_window // 4)
    most = max(most, grain)
    return max((n for n in range(grain, most + 1, grain) if math.gcd(p.max_len, block_kv) % n == 0), default=0)


def _token_bytes(problem: Problem) -> int:
    """What a token's keys and values take in VMEM."""
    width = problem.head_dim if _tokens_last(problem) else round_up(problem.head_dim, LANES)
    return 2 * problem.kv_heads * (width * jnp.dtype(problem.kv_dtype).itemsize + (4 if problem.has_scales else 0))


def space(problem: Problem) -> Space:
    """Blocks of tokens, how many of them, and how many sequences share a step."""
    p, start = problem, heuristic(problem)
    grain = LANES if p.page_size is None else p.page_size
    rows = p.max_len
    # Whole tiles of a dense cache that consists of such; whole pages.
    sizes = [grain << n for n in range(8) if rows % (grain << n) == 0 and rows % grain == 0]
    cores = start.cores if p.kv_heads % start.cores else 1
    share = p.batch // cores
    members = [n for n in (1, 2, 4, 8) if share % n == 0 and (n == 1 or not start.one_by_one)]
    taken = start.buffers * start.block_kv * start.members

    def fits(config: Config) -> bool:
        return config.buffers * config.block_kv * config.members <= MORE_IN_VMEM * taken

    return Space(start, {"block_kv": sizes, "members": members, "buffers": (2, 3, 4)}, fits)


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    p = problem
    if p.q_dtype == "float16" or p.kv_dtype == "float16":
        return "float16 is not for TPUs: float32 and bfloat16 are"
    if p.head_dim % SUBLANES:
        return f"head_dim must be a multiple of {SUBLANES}, got {p.head_dim}"
    if _unit(p) == 0:
        name, given = ("max_len", p.max_len) if p.page_size is None else ("page_size", p.page_size)
        cache = f"head_dim = {p.head_dim} in {p.kv_dtype}"
        return f"{name} must be a multiple of {_grain(p)} where the cache has {cache}, got {given}"
    table = 0 if p.page_size is None else p.batch * (p.max_len // p.page_size) * 4
    if table > SMEM_BYTES:
        return f"a page table must fit into {SMEM_BYTES >> 10} KiB, got {table >> 10}; larger pages make it smaller"
    least = BUFFERS * _unit(p) * _token_bytes(p)
    if least > _vmem_bytes():
        heads = f"{p.kv_heads} KV heads of {p.head_dim} in {p.kv_dtype}"
        room = f"{BUFFERS} times {_unit(p)} tokens must fit {_vmem_bytes() >> 20} MiB"
        return f"{room}, with {heads} they take {least >> 20}"
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
    p, group, unit = problem, problem.group, _unit(problem, config.block_kv)
    grain = p.page_size or _grain(p)
    check(unit > 0, "config.block_kv", config.block_kv, f"a multiple of {grain} for this cache")
    fits = config.operands == "floats" or p.kv_dtype in OPERANDS[config.operands]
    check(fits, "config.operands", config.operands, f"'floats', or what multiplies {p.kv_dtype}")
    divides = p.kv_heads % config.cores == 0 or p.batch % config.cores == 0
    check(divides, "config.cores", config.cores, f"a divisor of {p.kv_heads} KV heads or of {p.batch} sequences")
    heads = _heads_of_a_core(p, config.cores)
    by_heads = heads < p.kv_heads or config.cores == 1
    share = p.batch if by_heads else p.batch // config.cores
    members = config.members
    check(share % members == 0, "config.members", members, f"a divisor of the {share} sequences of a core")
    apart = members == 1 or not config.one_by_one
    check(apart, "config.members", members, "1 where heads are worked on one by one")
    check(heads % config.pack == 0, "config.pack", config.pack, f"a divisor of the {heads} KV heads of a core")
    block_q = min(config.block_q, p.q_len)
    whole = block_q == p.q_len or block_q % BLOCK_Q_MULTIPLE == 0
    check(whole, "config.block_q", block_q, f"at least q_len = {p.q_len}, or a multiple of {BLOCK_Q_MULTIPLE}")
    packs, rows = heads // config.pack, config.pack * block_q * group
    q_blocks = pl.cdiv(p.q_len, block_q)
    sight = Sight(p.max_len, p.q_len, block_q, q_blocks, config.block_kv, unit, p.sliding_window)

    one = config.pack == 1 or q_blocks == 1
    check(one, "config.pack", config.pack, f"1 where q_len = {p.q_len} is more than block_q = {block_q}")
    # [batch, q_len, kv_heads, group, head_dim] -> [batch, kv_heads / pack, pack * q_len * group, head_dim]
    q = inputs.q.reshape(p.batch, p.q_len, p.kv_heads, group, p.head_dim)
    q = jnp.moveaxis(q, 1, 2).reshape(p.batch, p.kv_heads // config.pack, config.pack * p.q_len * group, p.head_dim)
    view = View(
        tokens_last=_tokens_last(p),
        gathered=_gathers_scales(p),
        shared=heads < p.kv_heads,
        share=share,
        members=members,
        pack=config.pack,
        one_by_one=config.one_by_one,
        operands=config.operands,
    )
    stacked = inputs.layer is not None
    cache = [array if stacked else array[None] for array in (inputs.k, inputs.v)]
    if _tokens_last(p):
        cache = [jnp.swapaxes(array, 3, 4) for array in cache]
    cache += _scales(p, inputs, config.block_kv)
    scalars = [jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None], inputs.lengths]
    if inputs.page_table is not None:
        scalars.append(inputs.page_table.reshape(-1))

    def at_queries(part: Any, b: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return (b, part, i, 0) if by_heads else (part * (share // members) + b, 0, i, 0)

    queries = pl.BlockSpec((members, packs, rows, p.head_dim), at_queries)
    arrays, in_specs = [q, *cache], [queries, *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(cache)]
    if inputs.sinks is not None:
        sinks = inputs.sinks.astype(jnp.float32).reshape(p.kv_heads, 1, group)
        arrays.append(jnp.broadcast_to(sinks, (p.kv_heads, block_q, group)).reshape(-1, rows, 1))
        in_specs.append(pl.BlockSpec((packs, rows, 1), lambda part, *_: (part if by_heads else 0, 0, 0)))
    slab = (p.head_dim, config.block_kv) if _tokens_last(p) else (config.block_kv, p.head_dim)
    rings = [pltpu.VMEM((config.buffers, members, heads, *slab), inputs.k.dtype)] * 2
    if p.has_scales:
        rings += [pltpu.VMEM((config.buffers, members, p.kv_heads, config.block_kv), jnp.float32)] * 2
    width = config.pack * p.head_dim
    pieces = QUERY_PIECES if config.operands == "integers" else 1
    if config.operands == "words":
        at_once = config.pack if config.one_by_one else members * heads
        rings.append(pltpu.VMEM((slab[1] // LANES, at_once, slab[0] // 2, LANES), jnp.int32))
    out, lse = pl.pallas_call(
        fresh_kernel(kernel, problem=p, sight=sight, view=view),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(config.cores, share // members, q_blocks),
            in_specs=in_specs,
            out_specs=[queries, pl.BlockSpec((members, packs, rows, 1), at_queries)],
            scratch_shapes=[
                pltpu.VMEM(
                    (members * packs, pieces * rows, width),
                    jnp.int8 if pieces > 1 else float_dtype(q.dtype, p.kv_dtype),
                ),
                pltpu.VMEM((members * packs, rows, 1), jnp.float32),
                pltpu.VMEM((members * packs, rows, LANES), jnp.float32),
                pltpu.VMEM((members * packs, rows, LANES), jnp.float32),
                pltpu.VMEM((members * packs, rows, width), jnp.float32),
                pltpu.SMEM((CURSOR,), jnp.int32),
                pltpu.SemaphoreType.DMA((2 + 2 * p.has_scales, config.buffers)),
                *rings,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_chip().vmem_bytes,
            # Which pages there are, the kernel sees to itself; checking each transfer takes as long as starting it.
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=p.flops() // (4 * p.head_dim)
        ),
        interpret=interpret,
        name=f"decode_attention_q{block_q}_kv{config.block_kv}",
    )(*scalars, *arrays)
    # [batch, kv_heads / pack, pack * q_len * group, ...] -> [batch, q_len, kv_heads, group, ...] -> the shape of q
    out, lse = (
        jnp.moveaxis(x.reshape(p.batch, p.kv_heads, p.q_len, group, x.shape[-1]), 2, 1).reshape(*shape)
        for x, shape in ((out, inputs.q.shape), (lse, inputs.q.shape[:3]))
    )
    return out, lse


def _scales(problem: Problem, inputs: Inputs, block_kv: int) -> list[jax.Array]:
    """The scales of keys and values with the layer first, `[layers, batch or num_pages, kv_heads, tokens]`, if any."""
    scales = [scale for scale in (inputs.k_scale, inputs.v_scale) if scale is not None]
    if not _gathers_scales(problem):
        return [scale if inputs.layer is not None else scale[None] for scale in scales]

    # As in the kernel: a page that does not exist is read as the nearest that does.
    table = jnp.clip(inputs.page_table, 0, (problem.num_pages or 1) - 1)

    def gather(scale: jax.Array) -> jax.Array:
        one = scale if inputs.layer is None else jax.lax.dynamic_index_in_dim(scale, inputs.layer, 0, keepdims=False)
        pages = jnp.moveaxis(one[table], 1, 2)  # [batch, kv_heads, pages, page_size]
        tokens = pages.reshape(problem.batch, problem.kv_heads, problem.max_len)
        return jnp.pad(tokens, ((0, 0), (0, 0), (0, -problem.max_len % block_kv)))[None]

    return [gather(scale) for scale in scales]
