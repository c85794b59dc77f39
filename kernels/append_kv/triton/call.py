"""append_kv on a GPU: rows of new tokens are stored where they belong in the cache, and nothing else is touched.

For every sequence b, token i of q_len, in every KV head:

    cache[layer, slab, head, row] = new[b, i, head]     position = lengths[b] - q_len + i, where it is to be written
                                                        slab, row = b, position; or the page that holds it, its row

Grid: (batch, blocks of rows); a row is a token's head, and rows of a sequence lie one after the other in the new keys
and values. A program moves a block of them: keys, values, and their scales where there are any. Two axes leave the
third that Triton has for `jax.vmap`.

The cache is an input that is not read, and the output in the same memory: where it is donated, it is updated in place.
What is not to be written is not stored, and its entries of the page table, which may be anything, are not read.
Quantizing is left to XLA, which does it where it computes keys and values; so codes and scales are those of the
reference, bit for bit, and the kernel moves numbers of any dtype as they are.

Bound by the launch: a step of decoding moves a kilobyte for each key and value of a head.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.append_kv.problem import Inputs, Problem
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, offsets_wrap
from palladion.kernels.tuning import Space
from palladion.reference.caches import KVCache, quantize_kv

BLOCK_BYTES: Final = 8 * 2**10
"""Keys of a block: of its values as many; 16 bytes of each for every thread, four times."""

PARTS: Final = ("k", "v", "k_scale", "v_scale")


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_rows: heads of tokens that a program moves, a power of two.
      num_warps: warps of a program.
    """

    block_rows: int
    num_warps: int = 4

    def __post_init__(self) -> None:
        rows = self.block_rows
        check(rows >= 1 and rows & (rows - 1) == 0, "config.block_rows", rows, "a power of two")
        check(self.num_warps in (1, 2, 4, 8, 16), "config.num_warps", self.num_warps, "1, 2, 4, 8 or 16")


def heuristic(problem: Problem) -> Config:
    """All heads of a token together, and as many tokens as fill a program."""
    p = problem
    row_bytes = pl.next_power_of_2(p.head_dim) * jnp.dtype(p.kv_dtype).itemsize
    most = max(BLOCK_BYTES // row_bytes, 1)
    rows = min(pl.next_power_of_2(p.q_len * p.kv_heads), 1 << (most.bit_length() - 1))
    # 16 bytes a thread, or as few warps as there are rows for.
    return Config(rows, num_warps=min(max(pl.next_power_of_2(rows * row_bytes // (16 * 32)), 1), 4))


def space(problem: Problem) -> Space:
    """Rows of a program, and its warps."""
    p, start = problem, heuristic(problem)
    rows = [1 << n for n in range(10) if 1 << n < 2 * p.q_len * p.kv_heads]
    return Space(start, {"block_rows": rows, "num_warps": (1, 2, 4, 8)})


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    p = problem
    if jnp.dtype(p.kv_dtype).itemsize == 1:
        slabs = p.batch * p.max_len if p.num_pages is None else p.num_pages * (p.page_size or 1)
        size = math.prod((p.num_layers or 1, slabs, p.kv_heads, p.head_dim))
        if offsets_wrap(size):
            return f"keys of a {p.kv_dtype} cache must take up to 2 GiB, or more than 4, got {size} bytes"
    return None


def append_kv(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> KVCache:
    """Runs the kernel; see `palladion.append_kv` for the contract."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    p, cache = problem, inputs.cache
    k, k_scale = quantize_kv(inputs.k, cache.k.dtype)
    v, v_scale = quantize_kv(inputs.v, cache.v.dtype)
    parts = {
        name: (new, getattr(cache, name))
        for name, new in zip(PARTS, (k, v, k_scale, v_scale), strict=True)
        if new is not None
    }
    held = [old if inputs.layer is not None else old[None] for _, old in parts.values()]
    layer = jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None]
    scalars = [layer, inputs.lengths]
    if inputs.new_tokens is not None:
        scalars.append(inputs.new_tokens)
    if cache.page_table is not None:
        scalars.append(cache.page_table)
    operands = [*scalars, *(new for new, _ in parts.values())]
    written = pl.pallas_call(
        fresh_kernel(_kernel, problem=p, block_rows=config.block_rows, parts=len(parts)),
        grid=(p.batch, pl.cdiv(p.q_len * p.kv_heads, config.block_rows)),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in held],
        input_output_aliases={len(operands) + number: number for number in range(len(held))},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"append_kv_r{config.block_rows}",
    )(*operands, *held)
    if inputs.layer is None:
        written = [array[0] for array in written]
    return dataclasses.replace(cache, **dict(zip(parts, written, strict=True)))


def _kernel(
    layer_ref: Any,  # [1]
    lengths_ref: Any,  # [batch]
    *refs: Any,  # new_tokens [batch] and page_table [batch, pages_per_seq], as far as there are any; new tokens
    # [batch, q_len, kv_heads, head_dim] and their scales; the cache [num_layers, slabs, kv_heads, rows, head_dim] and
    # its scales, as inputs and again as outputs
    problem: Problem,
    block_rows: int,
    parts: int,
) -> None:
    p = problem
    *scalar_refs, page_table_ref = refs[: -3 * parts] if p.page_size is not None else (*refs[: -3 * parts], None)
    new_refs, cache_refs = refs[-3 * parts : -2 * parts], refs[-parts:]
    b = pl.program_id(0)
    length = bounded_length(p, lengths_ref[b])
    begin, end = written_tokens(p, length, scalar_refs[0][b] if p.has_new_tokens else None)

    first = pl.program_id(1) * block_rows
    r = first + jnp.arange(block_rows, dtype=jnp.int32)  # [block_rows]
    token, head = jax.lax.div(r, jnp.full_like(r, p.kv_heads)), jax.lax.rem(r, jnp.full_like(r, p.kv_heads))
    # A block with something to write stores the nearest of it once more in the place of what is not.
    written = (begin < end) & (first < end * p.kv_heads) & (first + block_rows > begin * p.kv_heads)
    token = jnp.clip(jnp.clip(token, begin, end - 1), 0, p.q_len - 1)
    mask = jnp.broadcast_to(written, token.shape)
    slab, row, mask = place_of(p, b, layer_ref[0], length, token, page_table_ref, mask)

    feature = jnp.arange(pl.next_power_of_2(p.head_dim), dtype=jnp.int32)
    wide = mask[:, None] & (feature < p.head_dim)[None, :]
    for new, cache in zip(new_refs, cache_refs, strict=True):
        source, target = new.at[b, token, head], cache.at[layer_ref[0], slab, head, row]
        if len(new.shape) == 3:  # scales
            plgpu.store(target, plgpu.load(source, mask=mask), mask=mask)
            continue
        source = new.at[b, token[:, None], head[:, None], feature[None, :]]
        target = cache.at[layer_ref[0], slab[:, None], head[:, None], row[:, None], feature[None, :]]
        plgpu.store(target, plgpu.load(source, mask=wide), mask=wide)


def bounded_length(problem: Problem, length: jax.Array) -> jax.Array:
    """Returns a length that writes the same tokens, and whose positions do not overflow."""
    return jnp.clip(length, 0, problem.max_len + problem.q_len)


def written_tokens(problem: Problem, length: jax.Array, new_tokens: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The first of a sequence's new tokens that is written, and the one after the last.

    Those at positions 0 to max_len - 1 are, and of those the new ones.

    Args:
      problem: what is written.
      length: tokens in the sequence's cache, bounded.
      new_tokens: of its q_len tokens the real ones; None for all.
    """
    begin = jnp.maximum(problem.q_len - length, 0)
    if new_tokens is not None:
        begin = jnp.maximum(begin, problem.q_len - jnp.clip(new_tokens, 0, problem.q_len))
    return begin, jnp.minimum(problem.q_len - length + problem.max_len, problem.q_len)


def place_of(
    problem: Problem,
    b: jax.Array,
    layer: jax.Array,
    length: jax.Array,
    token: jax.Array,
    page_table_ref: Any,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the slab and the row of a sequence's tokens where masked, others that exist elsewhere, and a mask.

    The mask leaves out tokens whose layer or page does not exist.
    """
    p = problem
    if p.num_layers is not None:
        mask &= (layer >= 0) & (layer < p.num_layers)
    row = jnp.clip(length - p.q_len + token, 0, p.max_len - 1)
    if p.page_size is None or p.num_pages is None:
        return jnp.broadcast_to(b, row.shape), row, mask
    page, row = (do(row, jnp.full_like(row, p.page_size)) for do in (jax.lax.div, jax.lax.rem))
    slab = plgpu.load(page_table_ref.at[b, page], mask=mask, other=0)
    return slab, row, mask & (slab >= 0) & (slab < p.num_pages)
