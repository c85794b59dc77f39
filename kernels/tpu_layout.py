"""How XLA lays out arrays on a TPU, as far as kernels that move parts of them have to know."""

from __future__ import annotations

import math
from typing import Any, Final

import jax.numpy as jnp

from palladion.kernels.integers import round_up as round_up

LANES: Final = 128
SUBLANES: Final = 8
"""An array's last two dimensions are kept in tiles of 8 x 128 32-bit words."""


def tile_rows(dtype: Any) -> int:
    """Rows of a tile in VMEM: narrower numbers share a word with those of the rows below."""
    return SUBLANES * (4 // jnp.dtype(dtype).itemsize)


def tokens_last(tokens: int, head_dim: int) -> bool:
    """Whether XLA keeps a cache `[..., tokens, head_dim]` with its tokens along the lanes.

    It does where that takes less padding. A kernel then takes the cache with the two axes swapped: those are the same
    bytes, where any other order would have the whole cache copied before every call.
    """
    swapped = round_up(head_dim, SUBLANES) * round_up(tokens, LANES)
    return swapped < round_up(tokens, SUBLANES) * round_up(head_dim, LANES)


def minor_axes(shape: tuple[int, ...], dtype: Any) -> tuple[int, int]:
    """Which axes of an array XLA lays along the sublanes and along the lanes, unless it is told otherwise.

    Those that take the least padding: of a cache in bfloat16 whose pages of 16 tokens have heads of 64 numbers, the
    lanes may stand for pages. Only kernels that take the axes in this order get an array as it lies in memory. The rule
    was found by experiment; a test holds it against the compiler.

    Args:
      shape: two axes or more.
      dtype: of the array.

    Returns:
      The axis along the sublanes and the one along the lanes.
    """
    least = 4 // jnp.dtype(dtype).itemsize  # rows in a word

    def padded(axes: tuple[int, int]) -> int:
        rows, width = (shape[axis] for axis in axes)
        tile = min(SUBLANES, max(least, 1 << (rows - 1).bit_length()))
        return math.prod(shape) // (rows * width) * round_up(rows, tile) * round_up(width, LANES)

    from_the_last = range(len(shape) - 1, -1, -1)
    return min(((s, lane) for lane in from_the_last for s in from_the_last if s != lane), key=padded)
