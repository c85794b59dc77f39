"""Guards against programs that are lowered for other devices than their calls were traced for.

Backends are chosen while a call is traced, when JAX does not say for which platform the program will be lowered, as
`jax.export` does for any, nor for how many devices, as in_shardings of `jax.jit` do. What was chosen because there is
no accelerator must not end up in a program for one, in silence; and no kernel can be part of a program that XLA
partitions for several TPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from palladion.kernels.implementation import Unsupported
from palladion.kernels.sharding import WAYS_OUT
from palladion.reference.platforms import platform_kind


def _identity(name: str) -> Primitive:
    """Returns a primitive that is the identity; its lowering is to check for what it is lowered."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x, **_: x)
    primitive.def_abstract_eval(lambda x, **_: x)
    batching.defvectorized(primitive)
    ad.deflinear2(primitive, lambda cotangent, _, **__: [cotangent])
    return primitive


_traced_for_platform: Final = _identity("traced_for_platform")
_not_partitioned: Final = _identity("not_partitioned")
_kernel_of_platform: Final = _identity("kernel_of_platform")


def guard_platform(inputs: Any, *, name: str, platform: str, kernels: tuple[tuple[str, str], ...]) -> Any:
    """Returns the inputs of what was chosen for one platform; lowering it for another that has a kernel is an error.

    Args:
      inputs: a pytree of arrays.
      name: the call and what was chosen, for the message.
      platform: the platform that was traced for.
      kernels: platforms that have kernels, each with the name of its backend.
    """
    return _with_first(_traced_for_platform, inputs, name=name, platform=platform, kernels=kernels)


def guard_partitioning(inputs: Any, *, name: str) -> Any:
    """Returns the inputs of a TPU kernel; lowering it to a program that XLA partitions for several TPUs is an error.

    Args:
      inputs: a pytree of arrays.
      name: the call and its kernel, for the message.
    """
    return _with_first(_not_partitioned, inputs, name=name)


def guard_kernel(inputs: Any, *, name: str, platform: str) -> Any:
    """Returns the inputs of a compiled kernel; running or lowering it on another platform than its own is an error.

    Args:
      inputs: a pytree of arrays.
      name: the call and its kernel, for the message.
      platform: platform of the kernel.
    """
    return _with_first(_kernel_of_platform, inputs, name=name, platform=platform)


def _with_first(primitive: Primitive, inputs: Any, **parameters: Any) -> Any:
    """Returns inputs whose first array has passed through a primitive."""
    leaves, tree = jax.tree.flatten(inputs)
    leaves[0] = primitive.bind(leaves[0], **parameters)
    return jax.tree.unflatten(tree, leaves)


def _check_devices(ctx: Any, x: Any, *, name: str) -> list[Any]:
    devices = getattr(ctx.module_context.axis_context, "num_devices", None) or 1
    if devices > 1:
        raise Unsupported(
            f"{name}: XLA partitions no kernels for several TPUs, and the program is lowered for {devices}, of which "
            f"nothing was known while it was traced; {WAYS_OUT}. With `jax.set_mesh(mesh)` backend='auto' takes XLA's "
            "form, and backend='xla' always does"
        )
    return [x]


def _check_platform(ctx: Any, x: Any, *, name: str, platform: str, kernels: tuple[tuple[str, str], ...]) -> list[Any]:
    for lowered in ctx.module_context.platforms:
        for kernel_platform, backend in kernels:
            if platform_kind(lowered) == kernel_platform != platform:
                raise Unsupported(
                    f"{name} was chosen for {platform} while tracing, but the program is lowered for {lowered}, which "
                    f"has {backend}. Trace it for that chip, whose sizes the kernel needs: `with palladion.tracing_for("
                    f"chip): jax.export.export(...)`; or pass backend='xla' to export XLA's form"
                )
    return [x]


def _check_kernel(platforms: Iterable[str], name: str, platform: str) -> None:
    others = [other for other in platforms if platform_kind(other) != platform]
    if others:
        raise Unsupported(
            f"{name} is compiled for {platform}, and the program is for {', '.join(others)}; interpret=True runs the "
            "kernel anywhere, and backend='xla' runs XLA's form"
        )


def _run_kernel(x: Any, *, name: str, platform: str) -> Any:
    devices = x.devices() if isinstance(x, jax.Array) else jax.devices()[:1]
    _check_kernel((device.platform for device in devices), name, platform)
    return x


def _lower_kernel(ctx: Any, x: Any, *, name: str, platform: str) -> list[Any]:
    _check_kernel(ctx.module_context.platforms, name, platform)
    return [x]


_kernel_of_platform.def_impl(_run_kernel)
mlir.register_lowering(_kernel_of_platform, _lower_kernel)
mlir.register_lowering(_traced_for_platform, _check_platform)
mlir.register_lowering(_not_partitioned, _check_devices)
