"""A guard against programs that are traced for one platform and lowered for another, as `jax.export` does.

Backends are chosen while a call is traced, when JAX does not say for which platform the program will be lowered. What
was chosen because there is no accelerator must not end up in a program for one, in silence.
"""

from __future__ import annotations

from typing import Any, Final

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from palladion.kernels.implementation import Unsupported

_guard: Final = Primitive("traced_for_platform")
"""The identity, with a lowering that checks for which platform it is lowered."""

_guard.def_impl(lambda x, **_: x)
_guard.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_guard)
ad.deflinear2(_guard, lambda cotangent, _, **__: [cotangent])


def guard_platform(inputs: Any, *, name: str, platform: str, kernels: tuple[tuple[str, str], ...]) -> Any:
    """Returns the inputs of what was chosen for one platform; lowering it for another that has a kernel is an error.

    Args:
      inputs: a pytree of arrays.
      name: the call and what was chosen, for the message.
      platform: the platform that was traced for.
      kernels: platforms that have kernels, each with the name of its backend.
    """
    leaves, tree = jax.tree.flatten(inputs)
    leaves[0] = _guard.bind(leaves[0], name=name, platform=platform, kernels=kernels)
    return jax.tree.unflatten(tree, leaves)


def _lower(ctx: Any, x: Any, *, name: str, platform: str, kernels: tuple[tuple[str, str], ...]) -> list[Any]:
    for lowered in ctx.module_context.platforms:
        target = "gpu" if lowered in ("cuda", "rocm") else lowered
        for kernel_platform, backend in kernels:
            if target == kernel_platform != platform:
                raise Unsupported(
                    f"{name} was chosen for {platform} while tracing, but the program is lowered for {lowered}, which "
                    f"has {backend}. Trace it for that chip, whose sizes the kernel needs: `with palladion.tracing_for("
                    f"chip): jax.export.export(...)`; or pass backend='xla' to export XLA's form"
                )
    return [x]


mlir.register_lowering(_guard, _lower)
