"""Layout of arrays in a TPU's memory, as far as kernels that copy slices of them depend on it."""

from __future__ import annotations

import math
from typing import Final

import jax.numpy as jnp
from jax.typing import DTypeLike

from palladion.kernels.integers import round_up

LANES: Final = 128
SUBLANES: Final = 8
"""Sublanes and lanes of a tile: an array's last two dimensions are stored in tiles of 8 x 128 32-bit words."""


def tile_rows(dtype: DTypeLike) -> int:
    """Returns the rows of a tile in VMEM: narrower numbers share a word with numbers of the rows below."""
    return SUBLANES * (4 // jnp.dtype(dtype).itemsize)


def tokens_last(tokens: int, head_dim: int) -> bool:
    """Returns whether XLA lays out a cache `[..., tokens, head_dim]` with tokens along the lanes.

    XLA does so if it takes less padding. A kernel must then take the cache with the two axes swapped, which are the
    same bytes; otherwise XLA copies the whole cache before every call.
    """
    swapped = round_up(head_dim, SUBLANES) * round_up(tokens, LANES)
    return swapped < round_up(tokens, SUBLANES) * round_up(head_dim, LANES)


def minor_axes(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[int, int]:
    """Returns the axes of an array that XLA lays along the sublanes and along the lanes by default.

    XLA takes the two axes that need the least padding: in a bfloat16 cache with pages of 16 tokens and heads of 64
    numbers, the lanes may hold pages. A kernel gets an array without a copy only if it takes the axes in this order.
    The rule was found by experiment; a test compares it with the compiler.

    Args:
      shape: shape of the array, two axes or more.
      dtype: dtype of the array.
    """
    word_rows = 4 // jnp.dtype(dtype).itemsize

    def padded(axes: tuple[int, int]) -> int:
        rows, width = (shape[axis] for axis in axes)
        tile = min(SUBLANES, max(word_rows, 1 << (rows - 1).bit_length()))
        return math.prod(shape) // (rows * width) * round_up(rows, tile) * round_up(width, LANES)

    last_first = range(len(shape) - 1, -1, -1)  # ties go to the last axes
    return min(((row, lane) for lane in last_first for row in last_first if row != lane), key=padded)
