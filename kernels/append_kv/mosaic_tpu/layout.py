"""Token blocks of append_kv on a TPU: how they lie in the cache, in the new tokens, and in VMEM.

A slab is one page of a paged cache, or the dense cache of one sequence.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from palladion.kernels.append_kv.problem import Problem
from palladion.kernels.integers import round_up
from palladion.kernels.tpu_layout import LANES, SUBLANES, minor_axes, tile_rows
from palladion.kernels.types import Scalar

MAX_WHOLE_SLAB: Final = 512
"""Most tokens of a slab that is moved as one block because its tokens do not fill whole tiles of lanes."""


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Layout of the token blocks of two like arrays: keys and values, or their scales.

    Attributes:
      token_shape: shape of one token, with a 1 on the token axis: `[heads, 1, head_dim]`, `[heads, head_dim, 1]`,
        `[heads, 1]`, or `[heads, 1, 1]` where the slab axis follows the heads.
      token_axis: the token axis in `token_shape`.
      swapped_axes: the two axes of the cache array (layers first) that the kernel takes swapped; None for none.
      dtype: dtype of the cache array.
      slab_tokens: tokens of a slab.
      block_tokens: tokens of a block, which divide `slab_tokens`.
      max_blocks: most blocks that the new tokens of one sequence touch.
      broadcast: whether the only new token of each sequence comes as int32 words that repeat it over a
        block, so that it needs no shift.
      tile_tokens: tokens of a tile; other new tokens are read by the tile.
      read_tokens: new tokens read for one block: whole tiles that contain the block's tokens, and at least a block.
      buffer_tokens: new tokens in VMEM, of a group of sequences, padded.
      total_tokens: new tokens in HBM, of the batch, padded.
    """

    token_shape: tuple[int, ...]
    token_axis: int
    swapped_axes: tuple[int, int] | None
    dtype: str
    slab_tokens: int
    block_tokens: int
    max_blocks: int
    broadcast: bool
    tile_tokens: int
    read_tokens: int
    buffer_tokens: int
    total_tokens: int

    @property
    def tokens_per_word(self) -> int:
        """Tokens that share a 32-bit word."""
        return 1 if self.token_axis == len(self.token_shape) - 1 else 4 // jnp.dtype(self.dtype).itemsize

    @property
    def heads(self) -> int:
        """KV heads of a grid step."""
        return self.token_shape[0]

    @property
    def slabs_follow_heads(self) -> bool:
        """Whether the kernel takes the array as `[num_layers, kv_heads, slabs, tokens]`."""
        return self.swapped_axes == (1, 2)

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Returns the shape of that many tokens."""
        return (*self.token_shape[: self.token_axis], tokens, *self.token_shape[self.token_axis + 1 :])

    def new_tokens(self, tokens: int) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of that many new tokens; `[tokens, heads, block width]` if broadcast."""
        if self.broadcast:
            return jax.ShapeDtypeStruct((tokens, self.heads, self.shape(self.block_tokens)[-1]), jnp.int32)
        return jax.ShapeDtypeStruct(self.shape(tokens), jnp.dtype(self.dtype))

    def token_index(self, start: Scalar, tokens: int) -> tuple[Any, ...]:
        """Returns the index of that many tokens on all axes after the heads."""
        index: list[Any] = [slice(None)] * (len(self.token_shape) - 1)
        index[self.token_axis - 1] = pl.ds(start, tokens)
        return tuple(index)

    def vmem_bytes(self, sequences: int) -> int:
        """Returns the bytes of VMEM that blocks and new tokens of both arrays take."""
        blocks = sequences * self.max_blocks * _padded_bytes(self.shape(self.block_tokens), self.dtype)
        new = self.new_tokens(self.buffer_tokens)
        return 2 * (blocks + _padded_bytes(new.shape, new.dtype))


class BlockLayouts(NamedTuple):
    """Layouts of all arrays that the kernel writes.

    Attributes:
      kv: layout of keys and values.
      scales: layout of their scales; None where the kernel writes none.
    """

    kv: BlockLayout
    scales: BlockLayout | None

    def vmem_bytes(self, sequences: int) -> int:
        """Returns the bytes of VMEM that all blocks and new tokens take."""
        return sum(layout.vmem_bytes(sequences) for layout in self if layout is not None)


def _padded_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    *rows, width = shape
    return round_up(math.prod(rows), SUBLANES) * round_up(width, LANES) * jnp.dtype(dtype).itemsize


def slab_tokens(problem: Problem) -> int:
    """Returns the tokens of a slab."""
    return problem.page_size or problem.max_len


def cache_shape(problem: Problem) -> tuple[int, ...]:
    """Returns the shape of cached keys or values, layers first."""
    p = problem
    return (p.num_layers or 1, p.num_pages or p.batch, p.kv_heads, slab_tokens(p), p.head_dim)


def tokens_along_lanes(problem: Problem) -> bool:
    """Returns whether XLA lays out keys and values as `[…, head_dim, tokens]`."""
    return minor_axes(cache_shape(problem), problem.kv_dtype) == (4, 3)


def lane_block(problem: Problem) -> int:
    """Returns the tokens of a block whose tokens lie along the lanes."""
    tokens = slab_tokens(problem)
    return LANES if tokens % LANES == 0 else tokens


def smallest_block(problem: Problem) -> int:
    """Returns the fewest tokens of keys and values that can be moved at once."""
    p = problem
    return lane_block(p) if tokens_along_lanes(p) else 4 // jnp.dtype(p.kv_dtype).itemsize


def _kernel_writes_scales(problem: Problem) -> bool:
    """Returns whether XLA lays out scales with tokens along the lanes; for short pages it may take pages instead."""
    along_lanes = minor_axes(cache_shape(problem)[:-1], "float32")[1] == 3
    return problem.quantized and along_lanes and lane_block(problem) <= MAX_WHOLE_SLAB


def block_layouts(problem: Problem, *, block_tokens: int, sequences: int, heads: int) -> BlockLayouts:
    """Returns the layouts of the arrays that the kernel writes.

    Args:
      problem: the call.
      block_tokens: tokens of keys and values in a block.
      sequences: sequences of a grid step.
      heads: KV heads of a grid step.
    """
    p = problem

    def layout(
        token_shape: tuple[int, ...],
        token_axis: int,
        swapped_axes: tuple[int, int] | None,
        dtype: str,
        block: int,
        *,
        broadcast: bool,
    ) -> BlockLayout:
        tile = LANES if token_axis == len(token_shape) - 1 else tile_rows(dtype)
        read = round_up(max(min(block, p.q_len) + tile - 1, block), tile)
        groups, group_tokens = pl.cdiv(p.batch, sequences), sequences * p.q_len
        if broadcast:
            buffer, total = sequences, groups * sequences
        else:
            starts_inside_tile = groups > 1 and group_tokens % tile != 0
            buffer = max(read, round_up(group_tokens + (tile - 1 if starts_inside_tile else 0), tile))
            total = max(buffer, round_up(p.batch * p.q_len, tile))
        return BlockLayout(
            token_shape=token_shape,
            token_axis=token_axis,
            swapped_axes=swapped_axes,
            dtype=dtype,
            slab_tokens=slab_tokens(p),
            block_tokens=block,
            max_blocks=(p.q_len + block - 2) // block + 1,
            broadcast=broadcast,
            tile_tokens=tile,
            read_tokens=read,
            buffer_tokens=buffer,
            total_tokens=total,
        )

    one_token = p.q_len == 1
    if tokens_along_lanes(p):
        kv = layout((heads, p.head_dim, 1), 2, (3, 4), p.kv_dtype, block_tokens, broadcast=False)
    else:
        broadcast = one_token and block_tokens == smallest_block(p)
        kv = layout((heads, 1, p.head_dim), 1, None, p.kv_dtype, block_tokens, broadcast=broadcast)
    if not _kernel_writes_scales(p):
        return BlockLayouts(kv, None)
    # Where there are fewer slabs than fill a tile's sublanes, XLA may lay slabs along the sublanes instead of KV heads.
    if minor_axes(cache_shape(p)[:-1], "float32") == (1, 3):
        scales = layout((heads, 1, 1), 2, (1, 2), "float32", lane_block(p), broadcast=one_token)
    else:
        scales = layout((heads, 1), 1, None, "float32", lane_block(p), broadcast=one_token)
    return BlockLayouts(kv, scales)
