"""How PartitionSpecs cut an axis of an array over a mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a PartitionSpec names: None, one name, or a tuple of them."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def padded(spec: PartitionSpec, shape: tuple[int, ...]) -> list[Any]:
    """Returns an entry for each dimension of a shape; raises ValueError where the spec has more."""
    if len(spec) > len(shape):
        raise ValueError(f"specs: spec: got {spec}; accepted: at most {len(shape)} dimensions, those of {shape}")
    return [*spec, *[None] * (len(shape) - len(spec))]


def check_pieces(name: str, size: int, piece: int, entry: Any, mesh: Mesh | AbstractMesh | None) -> None:
    """Raises ValueError where a mesh cuts through the pieces of an axis.

    Args:
      name: name of the axis.
      size: its size.
      piece: size of a piece that one device must have as a whole.
      entry: the axis' entry of a PartitionSpec.
      mesh: the mesh; None takes the current one, and checks nothing where there is none.
    """
    current = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if current.empty:
        return
    shards = math.prod(current.shape[axis] for axis in mesh_axes(entry))
    if size % (shards * piece):
        raise ValueError(
            f"specs: spec: got {name} = {size} over {shards} devices; accepted: a number of devices that divides the "
            f"{size // piece} pieces of {piece} that {name} has, or None, which gives every device all of {name}"
        )
