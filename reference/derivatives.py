"""Derivatives of the faster forms: those of the definition that a form computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.custom_derivatives import SymbolicZero

P = ParamSpec("P")
R = TypeVar("R")


def with_derivatives_of(definition: Callable[P, R], form: Callable[P, R]) -> Callable[P, R]:
    """Returns `form` with the derivatives of `definition`, a function of the same arguments and results.

    A fast form may be one that JAX cannot differentiate (a kernel, or reverse mode through a loop of dynamic length),
    or one whose derivatives are silently zero (anything that passes floats as bits). Reverse mode keeps the arguments
    only and computes the definition again, so a forward pass that is differentiated needs no more memory than one that
    is not. Nothing is computed for arguments that are not differentiated.

    Args:
      definition: a differentiable function of pytrees of arrays, positional arguments only.
      form: computes the same, faster.
    """
    fast = jax.custom_jvp(form)

    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[R, R]:
        leaves, tree = jax.tree.flatten(primals)
        varied = {
            n: tangent
            for n, tangent in enumerate(jax.tree.leaves(tangents, is_leaf=lambda x: isinstance(x, SymbolicZero)))
            if not isinstance(tangent, SymbolicZero) and tangent.dtype != jax.dtypes.float0
        }

        def of_varied(varied: dict[int, jax.Array]) -> R:
            arguments = jax.tree.unflatten(tree, [varied.get(n, leaf) for n, leaf in enumerate(leaves)])
            return jax.checkpoint(definition)(*arguments)

        points = {n: leaves[n] for n in varied}
        return fast(*primals), jax.jvp(of_varied, (points,), (varied,))[1]

    fast.defjvp(jvp, symbolic_zeros=True)
    return fast
