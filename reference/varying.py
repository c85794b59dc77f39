"""Types of arrays inside a `jax.shard_map` that checks them: the mesh axes over which an array varies."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def varying_axes(tree: Any) -> frozenset[str]:
    """Returns the manual mesh axes over which any array of a pytree varies; none outside `jax.shard_map`."""
    axes: frozenset[str] = frozenset()
    return axes.union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def vary_over(tree: Tree, axes: frozenset[str]) -> Tree:
    """Returns a pytree whose arrays have the types of arrays that vary over mesh axes, as loops require of carries."""

    def vary(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)
