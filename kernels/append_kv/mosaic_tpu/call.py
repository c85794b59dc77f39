"""append_kv on a TPU: writes new tokens into the cache and moves only the blocks that they touch.

For every sequence b and token i of q_len, in all KV heads:

    cache[layer, slab, :, row] = new[b, i]      position = lengths[b] - q_len + i
                                                slab, row = b, position                          dense
                                                            page of the position, offset in it   paged

The cache stays in HBM and is aliased with the output. Blocks of tokens move; a block belongs to one sequence, so that
no block waits for another. A block that is partly new is read, merged with the new tokens and written back; one that
is all new is only written. Where tokens lie along the sublanes, the smallest block is a row of 32-bit words: one
float32, two bfloat16 or four 8-bit tokens. Where they lie along the lanes (scales, and a head_dim that would be padded:
`tpu_layout.minor_axes`) it is a tile of 128 tokens.

Grid: (shares of the KV heads, groups of sequences), with steps as large as VMEM allows: mostly there is one. A step
starts all reads, merges sequence after sequence as they arrive, and waits for all writes at the end.

VMEM holds the blocks and the group's new tokens. New tokens lie along the same axis as in the cache, one sequence after
the other, and are rolled into position; the only new token of a decoding step comes broadcast over the words of its
block instead and needs no roll. Merging works on 32-bit words, whatever the dtype: no number is converted. XLA
quantizes the new tokens before.

Bound by memory latency: a decoding step waits for memory twice, and moves a kilobyte for each key and value of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.append_kv.destinations import bounded_length, destinations, written_positions
from palladion.kernels.append_kv.mosaic_tpu.kernel import CacheArrays, KeysAndValues, Scalars, Scratch, kernel
from palladion.kernels.append_kv.mosaic_tpu.layout import (
    MAX_WHOLE_SLAB,
    BlockLayout,
    BlockLayouts,
    block_layouts,
    cache_shape,
    lane_block,
    slab_tokens,
    smallest_block,
    tokens_along_lanes,
)
from palladion.kernels.append_kv.problem import Inputs, Problem
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.devices import vmem_budget
from palladion.kernels.integers import divisors
from palladion.kernels.search_space import Space
from palladion.kernels.tpu_layout import LANES, SUBLANES, minor_axes
from palladion.kernels.types import Interpret
from palladion.reference.caches import KVCache, quantize_kv

MAX_BLOCK: Final = 64
"""Most tokens that the heuristic moves at once: few transfers, and little that moves in vain at either end."""

MAX_SEQUENCES: Final = 256
"""Most sequences of a grid step: each has a semaphore."""

PAGE_TABLE_BYTES: Final = 512 * 2**10
"""Most bytes of a page table: half of a TPU's SMEM."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block: tokens of keys and values in a block. Where tokens lie along the sublanes, a power of two that divides
        max_len or page_size and fills 32-bit words; along the lanes 128, or all tokens of a page or sequence.
      sequences: sequences per grid step.
      heads: KV heads per grid step, a divisor of all.
    """

    block: int
    sequences: int
    heads: int

    def __post_init__(self) -> None:
        for name in ("block", "sequences", "heads"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")


def heuristic(problem: Problem) -> Config:
    """Returns block sizes with the fewest grid steps that fit the VMEM of every generation."""
    p = problem
    block = smallest_block(p)
    if not tokens_along_lanes(p):
        while block < min(p.q_len, MAX_BLOCK) and slab_tokens(p) % (2 * block) == 0:
            block *= 2
    most = min(p.batch, MAX_SEQUENCES)
    groups = [most, *(1 << n for n in reversed(range((most - 1).bit_length())))]
    configs = [Config(block, sequences, heads) for heads in reversed(divisors(p.kv_heads)) for sequences in groups]
    return next((config for config in configs if _vmem_bytes(p, config) <= vmem_budget()), configs[-1])


def space(problem: Problem) -> Space:
    """Returns the sequences and heads per grid step that the tuner may try."""
    p, start = problem, heuristic(problem)
    sequences = [1 << n for n in range(9) if 1 << n <= p.batch]
    return Space(start, {"sequences": sequences, "heads": divisors(p.kv_heads)}, lambda config: fits(p, config))


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    p, tokens = problem, slab_tokens(problem)
    name = "max_len" if p.page_size is None else "page_size"
    if p.kv_dtype == "float16":
        return "a float16 cache is not for TPUs: float32, bfloat16, int8 and float8 are"
    if p.head_dim % SUBLANES:
        return f"head_dim must be a multiple of {SUBLANES}, got {p.head_dim}"
    if minor_axes(cache_shape(p), p.kv_dtype) not in ((3, 4), (4, 3)):
        given = f"a cache of {cache_shape(p)[1:]} in {p.kv_dtype}"
        return f"{name} must be a multiple of {LANES}, got {tokens}: XLA lays out {given} in another order of axes"
    if tokens_along_lanes(p) and lane_block(p) > MAX_WHOLE_SLAB:
        return f"{name} must be a multiple of {LANES} with head_dim = {p.head_dim}, got {tokens}"
    if tokens % smallest_block(p):
        return f"{name} must be a multiple of {smallest_block(p)} in {p.kv_dtype}, got {tokens}"
    table = 0 if p.page_size is None else 4 * p.batch * (p.max_len // p.page_size)
    if table > PAGE_TABLE_BYTES:
        return f"a page table must fit into {PAGE_TABLE_BYTES >> 10} KiB, got {table >> 10}: use larger pages"
    least = _vmem_bytes(p, heuristic(p))
    if least > vmem_budget():
        given = f"q_len = {p.q_len} takes {least >> 20}"
        return f"the new tokens of a sequence must fit into {vmem_budget() >> 20} MiB, {given}: append fewer per call"
    return None


def fits(problem: Problem, config: Config) -> bool:
    """Returns whether the block sizes are valid for a problem and fit into VMEM."""
    try:
        _check_config(problem, config)
    except ValueError:
        return False
    return _vmem_bytes(problem, config) <= vmem_budget()


def _check_config(problem: Problem, config: Config) -> None:
    """Raises ValueError where block sizes are not valid for a problem."""
    p, tokens, least = problem, slab_tokens(problem), smallest_block(problem)
    powers = [least << n for n in range(tokens.bit_length()) if tokens % (least << n) == 0]
    blocks = [least] if tokens_along_lanes(p) else powers
    check(config.block in blocks, "config.block", config.block, f"one of {blocks} for this cache")
    most = min(p.batch, MAX_SEQUENCES)
    check(config.sequences <= most, "config.sequences", config.sequences, f"at most {most} for this batch")
    check(p.kv_heads % config.heads == 0, "config.heads", config.heads, f"a divisor of the {p.kv_heads} KV heads")


def _layouts(problem: Problem, config: Config) -> BlockLayouts:
    return block_layouts(problem, block_tokens=config.block, sequences=config.sequences, heads=config.heads)


def _vmem_bytes(problem: Problem, config: Config) -> int:
    return _layouts(problem, config).vmem_bytes(config.sequences)


def append_kv(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> KVCache:
    """Runs the kernel; see `palladion.append_kv` for the contract."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    config = config or heuristic(problem)
    _check_config(problem, config)
    layouts, cache = _layouts(problem, config), inputs.cache
    (k, k_scale), (v, v_scale) = (quantize_kv(x, cache.k.dtype) for x in (inputs.k, inputs.v))
    written = _write_blocks(
        problem,
        inputs,
        new=CacheArrays(KeysAndValues(k, v), KeysAndValues(k_scale, v_scale)),
        layouts=layouts,
        config=config,
        interpret=interpret,
    )
    k_scales, v_scales = cache.k_scale, cache.v_scale
    if written.scales is not None:
        k_scales, v_scales = written.scales
    elif k_scale is not None and v_scale is not None and k_scales is not None and v_scales is not None:
        k_scales = _scatter_scales(problem, inputs, k_scales, k_scale)
        v_scales = _scatter_scales(problem, inputs, v_scales, v_scale)
    return dataclasses.replace(cache, k=written.kv.keys, v=written.kv.values, k_scale=k_scales, v_scale=v_scales)


def _write_blocks(
    problem: Problem, inputs: Inputs, *, new: CacheArrays, layouts: BlockLayouts, config: Config, interpret: Interpret
) -> CacheArrays:
    """Runs the kernel and returns the arrays of the cache that it writes; None for scales that it does not."""
    p, cache, layer = problem, inputs.cache, inputs.layer
    old = CacheArrays(KeysAndValues(cache.k, cache.v), KeysAndValues(cache.k_scale, cache.v_scale))
    new = _map_arrays(_new_tokens_in_layout, layouts, new)
    old = _map_arrays(lambda layout, array: _to_kernel(layout, array, layer), layouts, old)
    scalars = Scalars(
        layer=jnp.zeros(1, jnp.int32) if layer is None else layer[None],
        lengths=inputs.lengths,
        new_tokens=inputs.new_tokens,
        page_table=None if cache.page_table is None else cache.page_table.reshape(-1),
    )

    def new_scratch(layout: BlockLayout, _: jax.Array) -> Any:
        tokens = layout.new_tokens(layout.buffer_tokens)
        return pltpu.VMEM(tokens.shape, tokens.dtype)

    def block_scratch(layout: BlockLayout, _: jax.Array) -> Any:
        block = layout.shape(layout.block_tokens)
        return pltpu.VMEM((config.sequences, layout.max_blocks, *block), jnp.dtype(layout.dtype))

    scratch = Scratch(
        new=_map_arrays(new_scratch, layouts, new),
        blocks=_map_arrays(block_scratch, layouts, new),
        block_read=pltpu.SemaphoreType.DMA((config.sequences,)),
        new_read=pltpu.SemaphoreType.DMA(()),
        block_written=pltpu.SemaphoreType.DMA(()),
    )
    in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), old)
    first_alias = len(jax.tree.leaves((scalars, new)))
    (written,) = pl.pallas_call(
        fresh_kernel(kernel, problem=p, layouts=layouts, group_size=config.sequences),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.kv_heads // config.heads, pl.cdiv(p.batch, config.sequences)),
            in_specs=[in_hbm, in_hbm],
            out_specs=(in_hbm,),
            scratch_shapes=[scratch],
        ),
        out_shape=(jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), old),),
        input_output_aliases={first_alias + n: n for n in range(len(jax.tree.leaves(old)))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"append_kv_q{p.q_len}_block{config.block}",
    )(scalars, new, old)
    return _map_arrays(lambda layout, array: _from_kernel(layout, array, layer), layouts, written)


def _map_arrays(
    function: Callable[[BlockLayout, jax.Array], Any], layouts: BlockLayouts, arrays: CacheArrays
) -> CacheArrays:
    """Returns a function of each array and its layout; None for scales without a layout."""

    def of_pair(layout: BlockLayout, pair: KeysAndValues) -> KeysAndValues:
        return KeysAndValues(function(layout, pair.keys), function(layout, pair.values))

    scales = None if layouts.scales is None else of_pair(layouts.scales, arrays.scales)
    return CacheArrays(of_pair(layouts.kv, arrays.kv), scales)


def _to_kernel(layout: BlockLayout, array: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Returns an array of the cache with a layer axis, and its axes in the order that they have in memory."""
    array = array[None] if layer is None else array
    return array if layout.swapped_axes is None else jnp.swapaxes(array, *layout.swapped_axes)


def _from_kernel(layout: BlockLayout, array: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Reverses `_to_kernel`."""
    array = array if layout.swapped_axes is None else jnp.swapaxes(array, *layout.swapped_axes)
    return array[0] if layer is None else array


def _new_tokens_in_layout(layout: BlockLayout, x: jax.Array) -> jax.Array:
    """Returns new tokens `[batch, q_len, kv_heads, (head_dim)]` as `layout.new_tokens` describes, with all KV heads."""
    x = x.reshape(-1, *x.shape[2:])  # [tokens, kv_heads, (head_dim)]
    x = jnp.pad(x, ((0, layout.total_tokens - len(x)), *[(0, 0)] * (x.ndim - 1)))
    if layout.broadcast:
        if x.ndim == 2:  # scales: one word for each token of a block
            x = jnp.broadcast_to(x[..., None], (*x.shape, layout.block_tokens))
        per_word = layout.tokens_per_word
        bits = jax.lax.bitcast_convert_type(x, f"uint{32 // per_word}").astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(bits * {1: 1, 2: 0x10001, 4: 0x1010101}[per_word], jnp.int32)
    if x.ndim < len(layout.token_shape):  # scales whose slab axis follows the heads
        x = x[..., None]
    return jnp.moveaxis(x, 0, layout.token_axis)


def _scatter_scales(problem: Problem, inputs: Inputs, scales: jax.Array, new: jax.Array) -> jax.Array:
    """Returns scales `[(num_layers,) slabs, kv_heads, tokens]` with new ones `[batch, q_len, kv_heads]`, by XLA.

    XLA writes one number at a time: if it wrote a token at a time, it would lay out the array with heads along the
    lanes and copy it before and after.
    """
    p, cache = problem, inputs.cache
    length = bounded_length(p, inputs.lengths)[:, None]  # [batch, 1]
    new_tokens = None if inputs.new_tokens is None else inputs.new_tokens[:, None]
    first, end = written_positions(p, length, new_tokens)
    position = length - p.q_len + jnp.arange(p.q_len, dtype=jnp.int32)  # [batch, q_len]

    def load_page(page: jax.Array, _: jax.Array) -> jax.Array:
        assert cache.page_table is not None
        return jnp.take_along_axis(cache.page_table, page, axis=1)

    slab, row, written = destinations(
        p,
        sequence=jnp.arange(p.batch, dtype=jnp.int32)[:, None],
        layer=inputs.layer,
        position=position,
        written=(position >= first) & (position < end),
        load_page=load_page,
    )
    row = jnp.where(written, row, slab_tokens(p))  # the scatter drops indices out of bounds
    stacked = () if inputs.layer is None else (inputs.layer,)
    index = (*stacked, slab[..., None], jnp.arange(p.kv_heads), row[..., None])
    return scales.at[index].set(new, mode="drop", unique_indices=True)
