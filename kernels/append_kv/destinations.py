"""Destinations of new tokens: which are written, and where; shared by the implementations of append_kv."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.append_kv.problem import Problem
from palladion.kernels.integers import divide_with_remainder


class Destinations(NamedTuple):
    """Destinations of tokens in the cache.

    Attributes:
      slab: index of the token's page, or of its sequence in a dense cache.
      row: index of the token in the slab; always in bounds.
      written: whether the token is written: False where its layer or page does not exist.
    """

    slab: jax.Array
    row: jax.Array
    written: jax.Array


def bounded_length(problem: Problem, length: jax.Array) -> jax.Array:
    """Returns a length that writes the same tokens and whose positions do not overflow."""
    return jnp.clip(length, 0, problem.max_len + problem.q_len)


def written_positions(problem: Problem, length: jax.Array, new_tokens: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the position of the first token that is written, and the position after the last one.

    No token is written where the first is not below the second.

    Args:
      problem: the call.
      length: tokens of a sequence, bounded by `bounded_length`.
      new_tokens: how many of the sequence's q_len tokens are real; None means all.
    """
    new = problem.q_len if new_tokens is None else jnp.clip(new_tokens, 0, problem.q_len)
    return jnp.maximum(length - new, 0), jnp.minimum(length, problem.max_len)


def destinations(
    problem: Problem,
    *,
    sequence: jax.Array,
    layer: jax.Array | None,
    position: jax.Array,
    written: jax.Array,
    load_page: Callable[[jax.Array, jax.Array], jax.Array],
) -> Destinations:
    """Returns the destinations of a sequence's tokens in the cache.

    Args:
      problem: the call.
      sequence: index of the sequence.
      layer: layer of a stacked cache; ignored for the cache of one layer.
      position: positions of tokens in the sequence.
      written: whether each token is one to write.
      load_page: returns entries of the sequence's page table, given their indices and a mask; where the mask is False
        nothing may be assumed of the entry. Not called for a dense cache.
    """
    p = problem
    if p.num_layers is not None and layer is not None:
        written &= (layer >= 0) & (layer < p.num_layers)
    position = jnp.clip(position, 0, p.max_len - 1)
    if p.page_size is None or p.num_pages is None:
        return Destinations(jnp.broadcast_to(sequence, position.shape), position, written)
    page, row = divide_with_remainder(position, p.page_size)
    slab = load_page(page, written)
    return Destinations(slab, row, written & (slab >= 0) & (slab < p.num_pages))
