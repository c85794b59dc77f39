"""The static layout of the TPU kernel: how its work is cut, and how the cache lies in memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import jax.numpy as jnp

from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.integers import round_up
from palladion.kernels.tpu_layout import LANES, SUBLANES, tile_rows

CHUNK_BYTES: Final = 2**20
"""Most bytes of keys and values that one chunk of a dense cache has; a sequence's last chunk is transferred whole."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static layout of a kernel, all that does not depend on lengths.

    Attributes:
      tokens_last: whether keys and values are `[…, head_dim, tokens]` instead of `[…, tokens, head_dim]`.
      scales_gathered: whether the scales of a paged cache come without pages, as `[1, batch, kv_heads, tokens]`.
      cores_divide_heads: whether each core has some of the KV heads; otherwise each has some of the sequences.
      core_batch: sequences of a core.
      core_heads: KV heads of a core.
      block_batch: sequences that are processed together.
      block_heads: KV heads that are multiplied together.
      loop_heads: whether head blocks are processed one after the other instead of all at once.
      operands: one of `products.OPERANDS`.
    """

    tokens_last: bool
    scales_gathered: bool
    cores_divide_heads: bool
    core_batch: int
    core_heads: int
    block_batch: int
    block_heads: int
    loop_heads: bool
    operands: str

    @property
    def batch_blocks(self) -> int:
        """Batch blocks of a core."""
        return self.core_batch // self.block_batch

    @property
    def head_blocks(self) -> int:
        """Head blocks of a core."""
        return self.core_heads // self.block_heads


def heads_of_core(problem: Problem, cores: int) -> int:
    """Returns the KV heads of each core: all of them where they cannot be divided."""
    return problem.kv_heads // cores if problem.kv_heads % cores == 0 else problem.kv_heads


def tokens_last(problem: Problem) -> bool:
    """Returns whether tokens lie along the lanes; no other case of `tpu_layout.tokens_last` is supported."""
    return problem.head_dim % LANES != 0


def gathers_scales(problem: Problem) -> bool:
    """Returns whether XLA gathers the scales first, because pages are too short to transfer theirs one by one."""
    return problem.has_scales and problem.page_size is not None and problem.page_size % LANES != 0


def chunk_multiple(problem: Problem) -> int:
    """Returns the number of tokens in a tile, of which chunks must be multiples."""
    if tokens_last(problem) or (problem.has_scales and not gathers_scales(problem)):
        return LANES
    return SUBLANES if problem.page_size is not None else tile_rows(problem.kv_dtype)


def chunk_of(problem: Problem, block_kv: int = 0) -> int:
    """Returns the tokens of the largest chunk that divides KV blocks of `block_kv`, or 0 where there is none."""
    p, multiple = problem, chunk_multiple(problem)
    if p.page_size is not None:
        whole = p.page_size % multiple == 0 and block_kv % p.page_size == 0
        return p.page_size if whole else 0
    most = CHUNK_BYTES // token_bytes(p)
    if p.sliding_window is not None:
        # Both ends of the visible range are transferred in whole chunks.
        most = min(most, p.sliding_window // 4)
    most = max(most, multiple)
    divisible = math.gcd(p.max_len, block_kv)
    return max((n for n in range(multiple, most + 1, multiple) if divisible % n == 0), default=0)


def token_bytes(problem: Problem) -> int:
    """Returns the bytes of VMEM that the keys and values of one token take."""
    width = problem.head_dim if tokens_last(problem) else round_up(problem.head_dim, LANES)
    return 2 * problem.kv_heads * (width * jnp.dtype(problem.kv_dtype).itemsize + (4 if problem.has_scales else 0))
