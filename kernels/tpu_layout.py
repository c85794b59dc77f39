"""How XLA lays out arrays on a TPU, as far as kernels that move parts of them have to know."""

from __future__ import annotations

from typing import Any, Final

import jax.numpy as jnp

LANES: Final = 128
SUBLANES: Final = 8
"""An array's last two dimensions are kept in tiles of 8 x 128 32-bit words."""


def round_up(n: int, multiple: int) -> int:
    """The next multiple at or above n."""
    return -(-n // multiple) * multiple


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
