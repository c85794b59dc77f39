"""Query rows of a program, and the tiles that a head is cut into."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.integers import divide_with_remainder
from palladion.kernels.types import Scalar

MIN_WIDTH: Final = 32
"""Least width of a tile of head_dim; with narrower ones, all four warps would multiply the same numbers."""


class Tile(NamedTuple):
    """Features of a head that are loaded together: `width`, a power of two, from `first` on."""

    first: Scalar
    width: int

    @property
    def features(self) -> jax.Array:
        """Indices of the features, int32 `[width]`."""
        return self.first + jnp.arange(self.width, dtype=jnp.int32)


def tiles_of(head_dim: int) -> tuple[Tile, ...]:
    """Returns the tiles of a head, widest first; the last may reach past head_dim and is masked.

    Triton's arrays have sides of powers of two. A head of 192 is one tile of 128 and one of 64, so that nothing
    absent is loaded or multiplied. Where at most a quarter is missing, as with 112, one tile costs less than three.
    """
    tiles, first = [], 0
    while first < head_dim:
        left = head_dim - first
        width = max(pl.next_power_of_2(left), MIN_WIDTH)
        if left <= width * 3 // 4 and width > MIN_WIDTH:
            width //= 2
        tiles.append(Tile(first, width))
        first += width
    return tuple(tiles)


class Rows(NamedTuple):
    """Query rows: row r of a KV head is query r // group, of the head's query head r % group.

    Attributes:
      query: index of each row's query, `[rows]`.
      q_head: query head of each row, `[rows]`.
      exists: whether each row is one, `[rows]`; the others fill the block.
    """

    query: jax.Array
    q_head: jax.Array
    exists: jax.Array

    @classmethod
    def of(cls, problem: Problem, head: Scalar, first_row: Scalar, count: int) -> Rows:
        """Returns `count` rows of a KV head from `first_row` on."""
        row = first_row + jnp.arange(count, dtype=jnp.int32)
        query, head_in_group = divide_with_remainder(row, problem.group)
        return cls(query, head * problem.group + head_in_group, row < problem.q_len * problem.group)

    def tile_index(self, tile: Tile, head_dim: int) -> tuple[tuple[Any, ...], jax.Array]:
        """Returns the index of the rows' features in q or out, and which of them exist, `[rows, width]`."""
        features = tile.features
        index = (self.query[:, None], self.q_head[:, None], features[None, :])
        return index, self.exists[:, None] & (features < head_dim)[None, :]
