"""Memory of the kernel: its arrays in device memory, the ring in shared memory, and the transfers between them.

A KV block comes by TMA, in one transfer of keys and one of values, or with pages in one of each for each page. They
arrive at barriers, one of keys and one of values for each place of the ring. Pages are multiples of 8 tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.decode_attention.mosaic_gpu.config import TILE, Config
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.decode_attention.shares import Share
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Ref, Scalar


class Refs(NamedTuple):
    """The inputs, in device memory; None where the call has no such array.

    Attributes:
      layer: `[1]`, or None for the cache of one layer.
      lengths: `[batch]`.
      q: `[batch, kv_heads, rows, head_dim]`.
      k: `[num_layers, batch or num_pages, kv_heads, max_len or page_size, head_dim]`.
      v: like k.
      k_scale: k without head_dim, float32.
      v_scale: like k_scale.
      page_table: `[batch, pages_per_seq]`.
      sinks: `[kv_heads, rows]`, float32, rows up to a multiple of block_rows; None also where results are merged.

    For many rows, q is `[batch, rows, heads, head_dim]`, and sinks are `[heads, rows]` (`many_rows.py`).
    """

    layer: Any
    lengths: Ref
    q: Ref
    k: Ref
    v: Ref
    k_scale: Any = None
    v_scale: Any = None
    page_table: Any = None
    sinks: Any = None


class Scratch(NamedTuple):
    """Shared memory of a program, and its barriers; None where a program has no such thing.

    Attributes:
      q: queries, `[block_rows, head_dim]`; for many rows `[warpgroups, 64, head_dim]`, where outputs are put later.
      k: ring of keys, `[num_stages, block_kv, head_dim]`.
      v: ring of values, like k.
      q_arrived: barrier of the queries; for many rows one for each warpgroup.
      k_arrived: barriers of keys and of all scales, one for each place of the ring.
      v_arrived: barriers of values.
      k_scale: ring of scales, `[num_stages, block_kv]`.
      v_scale: like k_scale.
      weights: `[block_rows, block_kv]`.
      out: what is written by TMA, `[block_rows, head_dim]`; in tiles like `parts` where a cluster merges splits.
      parts: outputs of splits that a cluster merges, float32 `[1, or splits if interpreted, head_dim / 64, block_rows,
        64]`.
      part_lse: their lse, float32 `[1, or splits if interpreted, block_rows]`.
      k_done: barriers at which warpgroups arrive that have multiplied keys, one for each place of the ring.
      v_done: the same of values.
      v_cleared: barriers at which the first warpgroup arrives when values that no row sees are zero.
      turn: barriers at which each of two warpgroups waits for its turn on the tensor cores.
    """

    q: Ref
    k: Ref
    v: Ref
    q_arrived: Ref
    k_arrived: Ref
    v_arrived: Ref
    k_scale: Any = None
    v_scale: Any = None
    weights: Any = None
    out: Any = None
    parts: Any = None
    part_lse: Any = None
    k_done: Any = None
    v_done: Any = None
    v_cleared: Any = None
    turn: Any = None


def chunk_of(problem: Problem, block_kv: int) -> int:
    """Returns the tokens of a block that a transfer brings: they lie on one page."""
    return block_kv if problem.page_size is None else math.gcd(problem.page_size, block_kv)


def value_dtype(problem: Problem) -> str:
    """Returns the dtype of values and weights as operands: codes take fewer instructions to become float16."""
    return "float16" if problem.has_scales else problem.kv_dtype


def swizzle_of(row_bytes: int) -> int:
    """Returns the bytes that TMA permutes in shared memory, of which rows are multiples."""
    return 64 if row_bytes % 128 else 128


def swizzled(shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """Returns the type of memory whose rows TMA permutes so that tensor cores read them without collisions."""
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle_of(shape[-1] * size)
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, jnp.dtype(dtype), transforms=() if interpret else transforms)


def scratch_types(problem: Problem, config: Config, whole: bool, interpret: bool) -> Scratch:
    """Returns the types of `Scratch`; `whole` is whether the program writes a result, not a part to be merged."""
    p, c = problem, config
    ring = (c.num_stages, c.block_kv)
    copies = c.block_kv // chunk_of(p, c.block_kv)
    scales = plgpu.SMEM(ring, jnp.float32) if p.has_scales else None
    common: dict[str, Any] = {
        "k": swizzled((*ring, p.head_dim), p.kv_dtype, interpret),
        "v": swizzled((*ring, p.head_dim), p.kv_dtype, interpret),
        "k_arrived": plgpu.Barrier(num_arrivals=copies * (3 if p.has_scales else 1), num_barriers=c.num_stages),
        "v_arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=c.num_stages),
        "k_scale": scales,
        "v_scale": scales,
    }
    if c.warpgroups > 1:
        done = plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.num_stages)
        return Scratch(
            **common,
            q=swizzled((c.warpgroups, TILE, p.head_dim), p.q_dtype, interpret),
            q_arrived=plgpu.Barrier(num_barriers=c.warpgroups),
            k_done=done,
            v_done=done,
            v_cleared=plgpu.Barrier(num_barriers=c.num_stages),
            turn=plgpu.Barrier(num_barriers=c.warpgroups) if c.ping_pong else None,
        )
    few_rows = Scratch(
        **common,
        q=swizzled((c.block_rows, p.head_dim), p.q_dtype, interpret),
        q_arrived=plgpu.Barrier(),
        weights=swizzled((c.block_rows, c.block_kv), value_dtype(p), interpret),
    )
    if c.in_cluster:
        splits, tiles = c.splits if interpret else 1, (p.head_dim // TILE, c.block_rows, TILE)
        return few_rows._replace(
            out=plgpu.SMEM(tiles, jnp.dtype(p.q_dtype)),
            parts=plgpu.SMEM((splits, *tiles), jnp.float32),
            part_lse=plgpu.SMEM((splits, c.block_rows), jnp.float32),
        )
    return few_rows._replace(out=plgpu.SMEM((c.block_rows, p.head_dim), jnp.dtype(p.q_dtype)) if whole else None)


@dataclasses.dataclass(frozen=True)
class Ring:
    """The ring of KV blocks that a program goes through.

    Attributes:
      problem: the call.
      config: block sizes.
      refs: the inputs.
      scratch: shared memory and barriers.
      share: the program's share of the cache.
      layer: layer of the cache.
      head: KV head.
    """

    problem: Problem
    config: Config
    refs: Refs
    scratch: Scratch
    share: Share
    layer: Scalar
    head: Scalar

    def place(self, block: Scalar) -> jax.Array:
        """Returns the place of a KV block in the ring."""
        return jax.lax.rem(block - self.share.begin, jnp.int32(self.config.num_stages))

    def locate(self, block: Scalar) -> list[tuple[Scalar, Scalar]]:
        """Returns the sequence or page of each chunk of a KV block, and the first token of the chunk there.

        A chunk past what the rows see is read from the last page that they see, and one before it from the first:
        entries of the page table beyond are not read.
        """
        p, size = self.problem, self.config.block_kv
        tokens = [block * size + start for start in range(0, size, chunk_of(p, size))]
        if p.page_size is None:
            return [(self.share.sequence, token) for token in tokens]
        outermost = (self.share.span.first_token, jnp.maximum(self.share.span.last_token, 0))
        first, last = (divide_with_remainder(token, p.page_size)[0] for token in outermost)
        found: list[tuple[Scalar, Scalar]] = []
        for token in tokens:
            page, within = divide_with_remainder(token, p.page_size)
            page = self.refs.page_table[self.share.sequence, jnp.clip(page, first, last)]
            # A page that does not exist is read as the nearest that does.
            found.append((jnp.clip(page, 0, self.refs.k.shape[1] - 1), within))
        return found

    def fetch(self, block: Scalar, located: list[tuple[Scalar, Scalar]]) -> None:
        """Starts the transfers of a KV block."""
        self.fetch_keys(block, located)
        self.fetch_values(block, located)

    def fetch_keys(self, block: Scalar, located: list[tuple[Scalar, Scalar]]) -> None:
        """Starts the transfers of a block's keys and scales."""
        refs, scratch = self.refs, self.scratch
        self._fetch(refs.k, scratch.k, scratch.k_arrived, block, located)
        self._fetch(refs.k_scale, scratch.k_scale, scratch.k_arrived, block, located)
        self._fetch(refs.v_scale, scratch.v_scale, scratch.k_arrived, block, located)

    def fetch_values(self, block: Scalar, located: list[tuple[Scalar, Scalar]]) -> None:
        """Starts the transfers of a block's values."""
        self._fetch(self.refs.v, self.scratch.v, self.scratch.v_arrived, block, located)

    def _fetch(
        self, source: Any, target: Any, arrived: Ref, block: Scalar, located: list[tuple[Scalar, Scalar]]
    ) -> None:
        """Starts the transfers of a part of a KV block, if there is such a part."""
        if source is None:
            return
        place, size = self.place(block), chunk_of(self.problem, self.config.block_kv)
        for number, (slab, token) in enumerate(located):
            plgpu.copy_gmem_to_smem(
                source.at[self.layer, slab, self.head, pl.ds(token, size)],
                target.at[place, pl.ds(number * size, size)],
                arrived.at[place],
            )


def sinks_by_rows(problem: Problem, sinks: jax.Array | None, all_rows: int) -> jax.Array | None:
    """Returns the sink of each query row, float32 `[kv_heads, all_rows]`; 0 for rows that there are not."""
    p = problem
    if sinks is None:
        return None
    heads = sinks.astype(jnp.float32).reshape(p.kv_heads, p.group)
    return jnp.pad(jnp.tile(heads, (1, p.q_len)), ((0, 0), (0, all_rows - p.q_len * p.group)))


def shared_bytes(problem: Problem, config: Config) -> int:
    """Returns the shared memory of a program: the ring, operands, what is written, and 4 KiB for all else."""
    p, c = problem, config
    if c.warpgroups > 1:
        return c.num_stages * stage_bytes(p, c.block_kv) + c.block_rows * p.head_dim * 2 + 1024
    part = 4 * (p.head_dim + 1) if c.in_cluster else 0
    rows = c.block_rows * (2 * p.head_dim * 2 + c.block_kv * 2 + part)
    return c.num_stages * stage_bytes(p, c.block_kv) + rows + 4096


def stage_bytes(problem: Problem, block_kv: int) -> int:
    """Returns the shared memory of a KV block, with its scales."""
    p = problem
    return 2 * block_kv * (p.head_dim * jnp.dtype(p.kv_dtype).itemsize + (4 if p.has_scales else 0))
