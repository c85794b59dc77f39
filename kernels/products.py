"""Products of rows and weights: how one is run, and how one under vmap becomes a single product of all rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from palladion.kernels.backend import dispatch
from palladion.kernels.implementation import Implementation
from palladion.kernels.linear import Inputs, LinearProblem
from palladion.kernels.types import Interpret
from palladion.reference.derivatives import with_derivatives_of


def multiply(
    operation: str,
    table: Sequence[Implementation],
    problem: LinearProblem,
    inputs: Inputs,
    leading: tuple[int, ...],
    *,
    backend: str | None,
    config: Any,
    interpret: Interpret,
) -> jax.Array:
    """Runs the implementation that `dispatch` chooses and restores the leading dimensions of x.

    Every implementation has the derivatives of the reference. A product without rows or channels is empty, as in NumPy,
    and runs no implementation.
    """
    shape = (*leading, problem.result_features)
    if math.prod(shape) == 0:
        return jnp.zeros(shape, problem.out_dtype)

    def run(problem: LinearProblem, inputs: Inputs) -> jax.Array:
        options: dict[str, Any] = {"backend": backend, "config": config, "interpret": interpret}
        result: jax.Array = dispatch(operation, table, problem, inputs, **options, differentiable=True)
        return result

    # Known values are not mapped, and custom_vmap would hide where they are sharded.
    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs))
    out = run(problem, inputs) if known else _with_mapped_rows(problem, run)(inputs)
    return out.reshape(shape)


def _with_mapped_rows(
    problem: LinearProblem, run: Callable[[LinearProblem, Inputs], jax.Array]
) -> Callable[[Inputs], jax.Array]:
    """Returns the product as a function that, under vmap, is one product of all rows: kernels read the weight once.

    Equinox applies its layers to a batch by vmap. Weights that are mapped too have a product each, and so have rows
    that may be sharded.

    Args:
      problem: the call.
      run: runs a call.
    """
    single = functools.partial(run, problem)
    product = jax.custom_batching.custom_vmap(single)

    @product.def_vmap
    def _(axis_size: int, in_batched: Any, inputs: Inputs) -> tuple[jax.Array, bool]:
        (batched,) = in_batched
        by_row = batched._replace(x=None, residual=None)
        # To merge two dimensions gathers what is sharded along the minor one; of one row there is none.
        kinds = (AxisType.Explicit,) if problem.rows == 1 else (AxisType.Explicit, AxisType.Auto)
        if any(jax.tree.leaves(by_row)) or _may_be_sharded(inputs, kinds):
            in_axes = jax.tree.map(lambda mapped: 0 if mapped else None, batched)
            return jax.vmap(single, (in_axes,), axis_size=axis_size)(inputs), True

        def merge(part: jax.Array, mapped: bool) -> jax.Array:
            every = part if mapped else jnp.broadcast_to(part, (axis_size, *part.shape))
            return every.reshape(-1, every.shape[-1])

        x = merge(inputs.x, batched.x)
        residual = None if inputs.residual is None else merge(inputs.residual, batched.residual)
        rows = dataclasses.replace(problem, rows=axis_size * problem.rows)
        out = _with_mapped_rows(rows, run)(inputs._replace(x=x, residual=residual))
        return out.reshape(axis_size, problem.rows, -1), True

    # Reverse mode does not pass through custom_vmap.
    return with_derivatives_of(single, product)


def _may_be_sharded(inputs: Inputs, kinds: Collection[AxisType]) -> bool:
    """Returns whether arrays may be sharded over axes of these kinds; without a mesh, XLA may do so over Auto axes."""
    current = jax.sharding.get_abstract_mesh()
    meshes = [current, *(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(inputs))]
    if all(mesh.empty for mesh in meshes):
        return AxisType.Auto in kinds and current.abstract_device is None and jax.device_count() > 1
    axes = [axis for mesh in meshes for axis in zip(mesh.axis_sizes, mesh.axis_types, strict=True)]
    return any(size > 1 and kind in kinds for size, kind in axes)
