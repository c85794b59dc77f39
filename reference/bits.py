"""Narrow floats as integers, for XLA on a CPU; on other platforms these functions change nothing.

A CPU's XLA computes bfloat16 and float8 in float32, and moves the conversion in front of slices, updates and loops: all
of an array is widened where a row of it was wanted. Integers of the same bits pass through such operations as they are,
and becoming one costs nothing within a program. A program's own arguments and results are copied, though: these are to
be bits already, `view_bits` of what is there.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from palladion.reference.platforms import target_platform

Tree = TypeVar("Tree")


def to_bits(tree: Tree) -> Tree:
    """bfloat16 and float8 leaves of a pytree as unsigned integers of their size, the others as they are."""
    if target_platform() != "cpu":
        return tree

    def bits(leaf: jax.Array) -> jax.Array:
        dtype = bits_dtype(leaf.dtype)
        return leaf if dtype == leaf.dtype else jax.lax.bitcast_convert_type(leaf, dtype)

    return jax.tree.map(bits, tree)


def view_bits(tree: Tree) -> Tree:
    """`to_bits` of arrays in memory, without a copy."""
    if target_platform() != "cpu":
        return tree

    def view(leaf: jax.Array) -> jax.Array:
        dtype = bits_dtype(leaf.dtype)
        return leaf if dtype == leaf.dtype else jax.device_put(np.asarray(leaf).view(dtype), may_alias=True)

    return jax.tree.map(view, tree)


def bits_dtype(dtype: Any) -> Any:
    """The dtype of a dtype's bits: uint16 or uint8 for bfloat16 and float8, itself for others."""
    if dtype in (jnp.float32, jnp.float16) or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return jnp.dtype(jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else jnp.uint8)


def held_in_loop(bits: Tree) -> Tree:
    """What the body of a loop begins with, so that XLA on a CPU does not convert it once before, and hold a wide copy.

    On a TPU v7x the same would turn all arrays into another layout.
    """
    return jax.lax.optimization_barrier(bits) if target_platform() == "cpu" else bits


def from_bits(bits: Tree, like: Any) -> Tree:
    """The inverse of `to_bits`: leaves in the dtypes of those of `like`, a pytree of the same structure."""

    def floats(leaf: jax.Array, original: jax.Array) -> jax.Array:
        return leaf if leaf.dtype == original.dtype else jax.lax.bitcast_convert_type(leaf, original.dtype)

    return jax.tree.map(floats, bits, like)
