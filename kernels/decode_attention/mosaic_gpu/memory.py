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

from palladion.kernels.decode_attention.mosaic_gpu.config import Config
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
    """Shared memory of a program, and the barriers that transfers arrive at.

    Attributes:
      q: queries, `[block_rows, head_dim]`.
      k: ring of keys, `[num_stages, block_kv, head_dim]`.
      v: ring of values, like k.
      k_scale: ring of scales, `[num_stages, block_kv]`, or None.
      v_scale: like k_scale.
      weights: `[block_rows, block_kv]`.
      out: what is written by TMA, `[block_rows, head_dim]`, or None.
      q_arrived: barrier of the queries.
      k_arrived: barriers of keys and of all scales, one for each place of the ring.
      v_arrived: barriers of values.
    """

    q: Ref
    k: Ref
    v: Ref
    k_scale: Any
    v_scale: Any
    weights: Ref
    out: Any
    q_arrived: Ref
    k_arrived: Ref
    v_arrived: Ref


def chunk_of(problem: Problem, block_kv: int) -> int:
    """Returns the tokens of a block that a transfer brings: they lie on one page."""
    return block_kv if problem.page_size is None else math.gcd(problem.page_size, block_kv)


def value_dtype(problem: Problem) -> str:
    """Returns the dtype of values and weights as operands: codes take fewer instructions to become float16."""
    return "float16" if problem.has_scales else problem.kv_dtype


def swizzle_of(row_bytes: int) -> int:
    """Returns the bytes that TMA permutes in shared memory, of which rows are multiples."""
    return 64 if row_bytes % 128 else 128


def scratch_types(problem: Problem, config: Config, whole: bool, interpret: bool) -> Scratch:
    """Returns the types of `Scratch`; `whole` is whether the program writes a result, not a part to be merged."""
    p, c = problem, config
    ring = (c.num_stages, c.block_kv)

    def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
        """Returns memory whose rows TMA permutes so that tensor cores read them without collisions."""
        size = jnp.dtype(dtype).itemsize
        swizzle = swizzle_of(shape[-1] * size)
        transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
        return plgpu.SMEM(shape, jnp.dtype(dtype), transforms=() if interpret else transforms)

    copies = c.block_kv // chunk_of(p, c.block_kv)
    scales = plgpu.SMEM(ring, jnp.float32) if p.has_scales else None
    return Scratch(
        q=swizzled((c.block_rows, p.head_dim), p.q_dtype),
        k=swizzled((*ring, p.head_dim), p.kv_dtype),
        v=swizzled((*ring, p.head_dim), p.kv_dtype),
        k_scale=scales,
        v_scale=scales,
        weights=swizzled((c.block_rows, c.block_kv), value_dtype(p)),
        out=plgpu.SMEM((c.block_rows, p.head_dim), jnp.dtype(p.q_dtype)) if whole else None,
        q_arrived=plgpu.Barrier(),
        k_arrived=plgpu.Barrier(num_arrivals=copies * (3 if p.has_scales else 1), num_barriers=c.num_stages),
        v_arrived=plgpu.Barrier(num_arrivals=copies, num_barriers=c.num_stages),
    )


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
        place, refs, scratch = self.place(block), self.refs, self.scratch
        size = chunk_of(self.problem, self.config.block_kv)
        transfers = [
            (refs.k, scratch.k, scratch.k_arrived),
            (refs.k_scale, scratch.k_scale, scratch.k_arrived),
            (refs.v_scale, scratch.v_scale, scratch.k_arrived),
            (refs.v, scratch.v, scratch.v_arrived),
        ]
        for source, target, arrived in transfers:
            for number, (slab, token) in enumerate(located):
                if source is not None:
                    plgpu.copy_gmem_to_smem(
                        source.at[self.layer, slab, self.head, pl.ds(token, size)],
                        target.at[place, pl.ds(number * size, size)],
                        arrived.at[place],
                    )


def shared_bytes(problem: Problem, config: Config) -> int:
    """Returns the shared memory of a program: the ring, operands, what is written, and 4 KiB for all else."""
    p, c = problem, config
    rows = c.block_rows * (2 * p.head_dim * 2 + c.block_kv * 2)
    return c.num_stages * stage_bytes(p, c.block_kv) + rows + 4096


def stage_bytes(problem: Problem, block_kv: int) -> int:
    """Returns the shared memory of a KV block, with its scales."""
    p = problem
    return 2 * block_kv * (p.head_dim * jnp.dtype(p.kv_dtype).itemsize + (4 if p.has_scales else 0))
