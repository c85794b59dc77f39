"""Kernels inside `jax.shard_map`, whose checks follow over which mesh axes every array varies.

A Pallas kernel, interpreted or not, has no types for that: it is traced as one opaque operation, whose results vary
wherever an argument does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

from palladion.kernels.compat import without_varying_types
from palladion.reference.varying import vary_over, varying_axes

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


def call_unchecked(run: Callable[[Inputs], Result], inputs: Inputs) -> Result:
    """Calls a function that is not typed by the mesh axes over which arrays vary; its results vary over all of them.

    Args:
      run: a function of one pytree.
      inputs: its argument; outside `jax.shard_map`, and with check_vma=False, the function is called as usual.
    """
    axes = varying_axes(inputs)
    if not axes:
        return run(inputs)
    leaves, structure = jax.tree.flatten(inputs)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    with without_varying_types():
        traced, result = jax.make_jaxpr(run, return_shape=True)(jax.tree.unflatten(structure, shapes))
    results = _unchecked.bind(*leaves, traced=traced)
    return vary_over(jax.tree.unflatten(jax.tree.structure(result), results), axes)


def _run(*arrays: jax.Array, traced: ClosedJaxpr) -> list[jax.Array]:
    return jaxpr_as_fun(traced)(*arrays)


def _shapes(*arrays: Any, traced: ClosedJaxpr) -> list[Any]:
    del arrays
    return [aval.strip_weak_type() for aval in traced.out_avals]


def _lower(context: Any, *arrays: Any, traced: ClosedJaxpr) -> Any:
    with without_varying_types():
        untyped = context.replace(avals_in=traced.in_avals, avals_out=traced.out_avals)
        return mlir.lower_fun(jaxpr_as_fun(traced), multiple_results=True)(untyped, *arrays)


def _batch(arrays: Any, dimensions: Any, *, traced: ClosedJaxpr) -> Any:
    batched = jax.vmap(jaxpr_as_fun(traced), in_axes=dimensions)
    results = call_unchecked(lambda leaves: batched(*leaves), arrays)
    return results, [0] * len(results)


_unchecked = Primitive("unchecked")
_unchecked.multiple_results = True
_unchecked.def_impl(_run)
_unchecked.def_abstract_eval(_shapes)
mlir.register_lowering(_unchecked, _lower)
batching.primitive_batchers[_unchecked] = _batch
