"""append_kv on a TPU: new tokens go where they belong in the cache, and only what they touch is moved.

For every sequence b, token i of q_len, in all KV heads:

    cache[layer, slab, :, row] = new[b, i]      position = lengths[b] - q_len + i, where it is to be written at all
                                                slab, row = b, position; or the page that holds it, and its row there

The cache stays in HBM and is the result too. What moves are blocks of tokens of one sequence: one that is partly new
comes in, takes its new tokens and goes back; one that is all new only goes back. Where tokens lie along the sublanes,
a block may be as small as a row of 32-bit words: one float32, two bfloat16 or four 8-bit tokens. Where they lie along
the lanes (scales, and a head_dim that would be padded: `tpu_layout.minor_axes`) it is a tile of 128 tokens. No block
has tokens of two sequences: none waits for another.

Grid: (shares of the KV heads; groups of sequences), as large as VMEM allows: mostly one step does it all. A step starts
everything that it reads, merges sequence after sequence as they arrive, and waits for what it writes at its end.

Resident in VMEM: the blocks, and the new tokens of the group: along the same axis as in the cache but one sequence
after the other, from where they are rolled into place. The one token of a step of decoding comes in words that it fills
instead, which need no moving. All of it is bits in 32-bit words, whatever the dtype: no number is converted. Quantizing
is left to XLA, before: new tokens are few.

Bound by the latency of memory: a step of decoding waits for it twice, and moves a kilobyte for each key and value of a
head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.append_kv.mosaic_tpu.kernel import Part, kernel
from palladion.kernels.append_kv.problem import Inputs, Problem
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.tpu_layout import LANES, SUBLANES, minor_axes, round_up, tile_rows
from palladion.kernels.tuning import Space
from palladion.reference.caches import QUANTIZED_CACHE_DTYPES, KVCache, quantize_kv

MAX_BLOCK: Final = 64
"""Tokens that are moved at a time where many are written: few transfers, and not much at either end for nothing."""

MAX_WHOLE: Final = 512
"""Tokens along the lanes that are moved in one piece where they do not divide into tiles."""

MAX_SEQUENCES: Final = 256
"""Sequences of a grid step: each has a semaphore."""

VMEM_BYTES: Final = 12 * 2**20
"""What all blocks may take: three quarters of what the smallest TPU has (v4, 16 MB)."""

SMEM_BYTES: Final = 512 * 2**10
"""What a page table may take: half of it all."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How much is moved at a time.

    Attributes:
      block: tokens of keys and values in a block: where they lie along the sublanes a power of two that divides max_len
        or page_size and fills 32-bit words; along the lanes 128, or all of them.
      sequences: of a grid step.
      heads: KV heads of a grid step, a divisor of all.
    """

    block: int
    sequences: int
    heads: int

    def __post_init__(self) -> None:
        for name in ("block", "sequences", "heads"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")


def heuristic(problem: Problem) -> Config:
    """The fewest grid steps that fit into the VMEM of every generation."""
    p = problem
    block = _least_block(p)
    if not _tokens_last(p):
        while block < min(p.q_len, MAX_BLOCK) and _rows(p) % (2 * block) == 0:
            block *= 2
    shares = [heads for heads in range(p.kv_heads, 0, -1) if p.kv_heads % heads == 0]
    most = min(p.batch, MAX_SEQUENCES)
    groups = [most, *(1 << n for n in reversed(range((most - 1).bit_length())))]
    configs = [Config(block, sequences, heads) for heads in shares for sequences in groups]
    return next((config for config in configs if _vmem_bytes(p, config) <= VMEM_BYTES), configs[-1])


def _rows(problem: Problem) -> int:
    """Tokens of a page, or of a whole dense cache: what is in one piece in memory."""
    return problem.page_size or problem.max_len


def _cache_shape(problem: Problem) -> tuple[int, ...]:
    """That of keys and values, with layers."""
    p = problem
    return (p.num_layers or 1, p.num_pages or p.batch, p.kv_heads, _rows(p), p.head_dim)


def _tokens_last(problem: Problem) -> bool:
    """Whether keys and values are `[…, head_dim, tokens]` in memory."""
    return minor_axes(_cache_shape(problem), problem.kv_dtype) == (4, 3)


def _lane_block(problem: Problem) -> int:
    """The tokens that are moved at a time where they lie along the lanes."""
    return LANES if _rows(problem) % LANES == 0 else _rows(problem)


def _least_block(problem: Problem) -> int:
    """The fewest tokens of keys and values that can be moved at a time."""
    p = problem
    return _lane_block(p) if _tokens_last(p) else 4 // jnp.dtype(p.kv_dtype).itemsize


def _writes_scales(problem: Problem) -> bool:
    """Whether scales have their tokens along the lanes in memory; those of short pages have their pages there."""
    in_lanes = minor_axes(_cache_shape(problem)[:-1], "float32")[1] == 3
    return problem.kv_dtype in QUANTIZED_CACHE_DTYPES and in_lanes and _lane_block(problem) <= MAX_WHOLE


def _parts(problem: Problem, config: Config) -> tuple[Part, ...]:
    """Keys and values, and scales where the kernel writes them."""
    p = problem
    groups, tokens = pl.cdiv(p.batch, config.sequences), config.sequences * p.q_len

    def part(
        shape: tuple[int, ...], axis: int, swapped: tuple[int, int] | None, dtype: str, block: int, spread: bool
    ) -> Part:
        unit = LANES if axis == len(shape) - 1 else tile_rows(dtype)
        taken = round_up(max(min(block, p.q_len) + unit - 1, block), unit)
        # Groups may begin in the middle of a tile.
        window = max(taken, round_up(tokens if groups == 1 or tokens % unit == 0 else tokens + unit - 1, unit))
        total = max(window, round_up(p.batch * p.q_len, unit))
        if spread:
            window, total = config.sequences, groups * config.sequences
        blocks = (p.q_len + block - 2) // block + 1
        return Part(shape, axis, swapped, dtype, _rows(p), block, blocks, spread, unit, taken, window, total)

    one_token, heads = p.q_len == 1, config.heads
    if _tokens_last(p):
        parts = [part((heads, p.head_dim, 1), 2, (3, 4), p.kv_dtype, config.block, spread=False)]
    else:
        spread = one_token and config.block == _least_block(p)
        parts = [part((heads, 1, p.head_dim), 1, None, p.kv_dtype, config.block, spread)]
    if _writes_scales(p):
        # Where there are fewer sequences than would fill the tiles of KV heads, XLA may have them in these instead.
        slabs_last = minor_axes(_cache_shape(p)[:-1], "float32") == (1, 3)
        shape = (heads, 1, 1) if slabs_last else (heads, 1)
        swapped = (1, 2) if slabs_last else None
        parts.append(part(shape, len(shape) - 1, swapped, "float32", _lane_block(p), one_token))
    return tuple(parts)


def _vmem_bytes(problem: Problem, config: Config) -> int:
    return sum(part.vmem_bytes(config.sequences) for part in _parts(problem, config))


def space(problem: Problem) -> Space:
    """Sequences and heads of a grid step."""
    p, start = problem, heuristic(problem)
    sequences = [1 << n for n in range(9) if 1 << n <= p.batch]
    heads = [n for n in range(1, p.kv_heads + 1) if p.kv_heads % n == 0]
    return Space(start, {"sequences": sequences, "heads": heads}, lambda config: fits(p, config))


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    p, rows = problem, _rows(problem)
    name = "max_len" if p.page_size is None else "page_size"
    if p.kv_dtype == "float16":
        return "a float16 cache is not for TPUs: float32, bfloat16, int8 and float8 are"
    if p.head_dim % SUBLANES:
        return f"head_dim must be a multiple of {SUBLANES}, got {p.head_dim}"
    if minor_axes(_cache_shape(p), p.kv_dtype) not in ((3, 4), (4, 3)):
        given = f"a cache of {_cache_shape(p)[1:]} in {p.kv_dtype}"
        return f"XLA keeps {given} in an order of its own, which {name} a multiple of {LANES} prevents"
    if _tokens_last(p) and _lane_block(p) > MAX_WHOLE:
        return f"{name} must be a multiple of {LANES} with head_dim = {p.head_dim}, got {rows}"
    if rows % _least_block(p):
        return f"{name} must be a multiple of {_least_block(p)} in {p.kv_dtype}, got {rows}"
    table = 0 if p.page_size is None else 4 * p.batch * (p.max_len // p.page_size)
    if table > SMEM_BYTES:
        return f"a page table must fit into {SMEM_BYTES >> 10} KiB, got {table >> 10}; larger pages make it smaller"
    least = _vmem_bytes(p, heuristic(p))
    if least > VMEM_BYTES:
        given = f"q_len = {p.q_len} takes {least >> 20}"
        return f"a sequence's new tokens must fit into {VMEM_BYTES >> 20} MiB, {given}: append fewer at a time"
    return None


def fits(problem: Problem, config: Config) -> bool:
    """Whether a problem can be cut like that, in the VMEM that there is."""
    try:
        _check_config(problem, config)
    except ValueError:
        return False
    return _vmem_bytes(problem, config) <= VMEM_BYTES


def _check_config(problem: Problem, config: Config) -> None:
    """Raises ValueError where a problem cannot be cut like that."""
    p, rows, least = problem, _rows(problem), _least_block(problem)
    powers = [least << n for n in range(rows.bit_length()) if rows % (least << n) == 0]
    blocks = [least] if _tokens_last(p) else powers
    check(config.block in blocks, "config.block", config.block, f"one of {blocks} for this cache")
    most = min(p.batch, MAX_SEQUENCES)
    check(config.sequences <= most, "config.sequences", config.sequences, f"at most {most} for this batch")
    check(p.kv_heads % config.heads == 0, "config.heads", config.heads, f"a divisor of the {p.kv_heads} KV heads")


def append_kv(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> KVCache:
    """Runs the kernel; see `palladion.append_kv` for the contract."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    p, cache = problem, inputs.cache
    config = config or heuristic(p)
    _check_config(p, config)
    parts = _parts(p, config)
    (k, k_scale), (v, v_scale) = (quantize_kv(x, cache.k.dtype) for x in (inputs.k, inputs.v))
    tokens = [x for x in (k, v, k_scale, v_scale) if x is not None]
    arrays = [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None]
    by_array = [part for part in parts for _ in range(2)]
    new = [_as_window(x, part) for x, part in zip(tokens, by_array, strict=False)]
    taken = [_as_kernel(x, part, inputs.layer) for x, part in zip(arrays, by_array, strict=False)]

    scalars = [jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None], inputs.lengths]
    if inputs.new_tokens is not None:
        scalars.append(inputs.new_tokens)
    if cache.page_table is not None:
        scalars.append(cache.page_table.reshape(-1))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    windows = [part.new(part.window) for part in by_array]
    blocks = [(config.sequences, part.blocks, *part.sized(part.block)) for part in by_array]
    results = pl.pallas_call(
        fresh_kernel(kernel, problem=p, parts=parts, sequences=config.sequences),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(p.kv_heads // config.heads, pl.cdiv(p.batch, config.sequences)),
            in_specs=[hbm] * (2 * len(taken)),
            out_specs=[hbm] * len(taken),
            scratch_shapes=[
                *[pltpu.VMEM(window.shape, window.dtype) for window in windows],
                *[pltpu.VMEM(shape, part.dtype) for shape, part in zip(blocks, by_array, strict=True)],
                pltpu.SemaphoreType.DMA((config.sequences,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in taken],
        input_output_aliases={len(scalars) + len(new) + n: n for n in range(len(taken))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"append_kv_q{p.q_len}_block{config.block}",
    )(*scalars, *new, *taken)
    written = [_from_kernel(x, part, inputs.layer) for x, part in zip(results, by_array, strict=True)]
    for array, x in zip(arrays[len(written) :], tokens[len(written) :], strict=True):
        written.append(_scatter(p, inputs, array, x))
    names = ("k", "v", "k_scale", "v_scale")[: len(written)]
    return dataclasses.replace(cache, **dict(zip(names, written, strict=True)))


def _as_kernel(x: jax.Array, part: Part, layer: jax.Array | None) -> jax.Array:
    """An array of the cache with layers, and its axes in the order that they have in memory."""
    x = x[None] if layer is None else x
    return x if part.swapped is None else jnp.swapaxes(x, *part.swapped)


def _from_kernel(x: jax.Array, part: Part, layer: jax.Array | None) -> jax.Array:
    """The reverse of `_as_kernel`."""
    x = x if part.swapped is None else jnp.swapaxes(x, *part.swapped)
    return x[0] if layer is None else x


def _as_window(x: jax.Array, part: Part) -> jax.Array:
    """New tokens `[batch, q_len, kv_heads, (head_dim)]` as `Part.new` says, with all heads."""
    x = x.reshape(-1, *x.shape[2:])  # [tokens, kv_heads, (head_dim)]
    x = jnp.pad(x, ((0, part.total - len(x)), *[(0, 0)] * (x.ndim - 1)))
    if part.spread:
        # A number as often as a word holds it, or one for each place along the lanes.
        x = x if x.ndim == 3 else jnp.broadcast_to(x[..., None], (*x.shape, part.block))
        bits = jax.lax.bitcast_convert_type(x, f"uint{32 // part.pack}").astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(bits * {1: 1, 2: 0x10001, 4: 0x1010101}[part.pack], jnp.int32)
    x = x if x.ndim == len(part.shape) else x[..., None]  # scales where slabs follow the heads
    return jnp.moveaxis(x, 0, part.axis)


def _scatter(problem: Problem, inputs: Inputs, target: jax.Array, new: jax.Array) -> jax.Array:
    """Scales `[(layers,) slabs, kv_heads, tokens]` with the new ones, `[batch, q_len, kv_heads]`, by XLA.

    One number at a time: written by the token, XLA would have the array in another order, heads along the lanes, and
    copy it around the program.
    """
    p, rows = problem, _rows(problem)
    lengths = jnp.clip(inputs.lengths, 0, p.max_len + p.q_len)[:, None]  # [batch, 1]
    position = lengths - p.q_len + jnp.arange(p.q_len, dtype=jnp.int32)  # [batch, q_len]
    first = lengths - (p.q_len if inputs.new_tokens is None else jnp.clip(inputs.new_tokens, 0, p.q_len)[:, None])
    is_new = (position >= jnp.maximum(first, 0)) & (position < p.max_len)
    slab = jnp.broadcast_to(jnp.arange(p.batch, dtype=jnp.int32)[:, None], position.shape)
    if inputs.cache.page_table is not None:
        page = jnp.clip(position // rows, 0, p.max_len // rows - 1)
        slab = jnp.take_along_axis(inputs.cache.page_table, page, axis=1)
        is_new &= (slab >= 0) & (slab < inputs.cache.k.shape[-4])
    if inputs.layer is not None:
        is_new &= (inputs.layer >= 0) & (inputs.layer < inputs.cache.k.shape[0])
    # An index past the end is dropped.
    row = jnp.where(is_new, position % rows, rows)
    stacked = () if inputs.layer is None else (inputs.layer,)
    place = (*stacked, slab[..., None], jnp.arange(p.kv_heads), row[..., None])
    return target.at[place].set(new, mode="drop", unique_indices=True)
