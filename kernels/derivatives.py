"""Derivatives of kernels, which JAX cannot differentiate: those of the reference, or an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from palladion.kernels.implementation import Unsupported

Result = TypeVar("Result")


def without_derivatives(name: str, kernel: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Returns a function that runs a kernel, and that raises `Unsupported` where it is differentiated.

    Args:
      name: the call and its backend, for the message.
      kernel: runs the kernel, given its inputs.
    """
    run = jax.custom_jvp(kernel)

    def jvp(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise Unsupported(
            f"{name}: has no derivative. backend='xla' has one; jax.lax.stop_gradient around the arguments says that "
            "none is wanted"
        )

    run.defjvp(jvp)
    return run
