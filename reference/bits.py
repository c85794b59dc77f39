"""Narrow floats as integers of the same bits, for XLA on a CPU; on other platforms these functions change nothing.

On a CPU, XLA computes bfloat16 and float8 in float32, and moves the conversion in front of slices, updates and loops:
it converts a whole array where one row is used. Integers pass through such operations unchanged, and a bitcast inside
of a program costs nothing. A bitcast of a program's argument or result is a copy, though, so programs take and return
bits; `view_bits` makes them from arrays in memory.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from palladion.reference.platforms import target_platform

Tree = TypeVar("Tree")


def to_bits(tree: Tree) -> Tree:
    """Returns a pytree with its bfloat16 and float8 leaves bitcast to unsigned integers of their size."""
    if target_platform() != "cpu":
        return tree

    def bits(leaf: jax.Array) -> jax.Array:
        dtype = bits_dtype(leaf.dtype)
        return leaf if dtype == leaf.dtype else jax.lax.bitcast_convert_type(leaf, dtype)

    return jax.tree.map(bits, tree)


def view_bits(tree: Tree) -> Tree:
    """Returns the same as `to_bits`, outside of a program and without a copy."""
    if target_platform() != "cpu":
        return tree

    def view(leaf: jax.Array) -> jax.Array:
        dtype = bits_dtype(leaf.dtype)
        return leaf if dtype == leaf.dtype else jax.device_put(np.asarray(leaf).view(dtype), may_alias=True)

    return jax.tree.map(view, tree)


def bits_dtype(dtype: Any) -> Any:
    """Returns the dtype that `to_bits` gives an array: uint16 or uint8 for bfloat16 and float8, else its own."""
    if dtype in (jnp.float32, jnp.float16) or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return jnp.dtype(jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else jnp.uint8)


def held_in_loop(bits: Tree) -> Tree:
    """Returns the carried bits of a loop behind a barrier, for the body of the loop to use.

    Without it XLA on a CPU converts arrays to float32 once, before the loop, and keeps the larger copy. Elsewhere there
    is no barrier: on a TPU v7x it would change the layout of all arrays.
    """
    return jax.lax.optimization_barrier(bits) if target_platform() == "cpu" else bits


def from_bits(bits: Tree, like: Any) -> Tree:
    """Inverts `to_bits`: returns leaves in the dtypes of those of `like`, a pytree of the same structure."""

    def floats(leaf: jax.Array, original: jax.Array) -> jax.Array:
        return leaf if leaf.dtype == original.dtype else jax.lax.bitcast_convert_type(leaf, original.dtype)

    return jax.tree.map(floats, bits, like)
