"""Which activations a Mosaic GPU kernel can apply itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

ELEMENTWISE: Final = frozenset(
    "add sub mul div max min neg abs exp logistic tanh rsqrt integer_pow square".split()  # noqa: SIM905
)
"""Primitives that Mosaic GPU compiles in registers, in all versions of jax."""


def compiles(activation: Callable[[jax.Array], jax.Array]) -> bool:
    """Returns whether Mosaic GPU compiles all operations of a function, so far as is known."""

    def primitives(jaxpr: Any) -> set[str]:
        inner = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name == "jit"]
        return set().union({eqn.primitive.name for eqn in jaxpr.eqns} - {"jit"}, *map(primitives, inner))

    traced = jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((64, 8), jnp.float32))
    return not traced.consts and primitives(traced.jaxpr) <= ELEMENTWISE
