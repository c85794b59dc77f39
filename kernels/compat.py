"""Differences between the versions of jax from 0.10.2 to 0.12, and workarounds for defects that all of them have."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax
from jax._src import config, core
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

Operands = TypeVar("Operands")

PALLAS_TRITON_WARNING: Final = "The Pallas Triton backend is deprecated"
"""Beginning of the warning that jax >= 0.11 gives whenever a Triton kernel is lowered."""

INTERPRETS_CLUSTERS: Final = jax.__version_info__ >= (0, 11)
"""Whether jax's interpreter of Mosaic GPU kernels knows clusters of programs."""

INTERPRETS_TENSOR_MEMORY: Final = jax.__version_info__ >= (0, 11)
"""Whether it knows tensor memory, and products there."""

LAUNCHES_OVERLAP: Final = jax.__version_info__ >= (0, 11)
"""Whether `griddepcontrol_wait` in a Mosaic GPU kernel lets it start while the kernel before it ends."""

# The warning addresses the author of the kernel, not the user. The filter is global because lowering happens long after
# the kernel was called.
warnings.filterwarnings("ignore", message=PALLAS_TRITON_WARNING, category=DeprecationWarning)


def fresh_kernel(kernel: Callable[..., None], **options: Any) -> Callable[..., None]:
    """Returns the kernel with its static options bound, as a new object for each call.

    jax 0.11 caches a traced kernel by the function alone: in a second grid the same function would see the
    `pl.num_programs` of the first (jax-ml/jax#40847).
    """
    return functools.partial(kernel, **options)


def hide_constants(operands: Operands) -> Operands:
    """Returns the operands of an interpreted kernel unchanged, and keeps XLA from folding constants among them.

    An interpreted kernel is ordinary XLA code. Up to jax 0.11, XLA's constant folding ignores the layout of a
    transposed constant when it evaluates a bitcast to another width. Compiled kernels are opaque to it.
    """
    return jax.lax.optimization_barrier(operands)


def offsets_wrap(numbers: int) -> bool:
    """Returns whether Pallas-Triton addresses an array of that many one-byte numbers wrongly.

    Up to 4 GiB it computes offsets in 32 bits, which Triton takes as signed: from 2 GiB on they are negative.
    """
    return 2**31 < numbers <= 2**32


def load_to_registers(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
    """Loads a reference of a Mosaic GPU kernel in a register layout; jax 0.10 wants an index, and 0.11 warns of one.

    Args:
      ref: reference to shared or device memory.
      layout: layout of the result.
      optimized: whether a load that is not conflict-free is an error.
    """
    given = inspect.signature(plgpu.load).parameters.get("idx")
    index = ((),) if given is not None and given.default is inspect.Parameter.empty else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store_from_registers(ref: Any, value: jax.Array) -> None:
    """Stores an array of a Mosaic GPU kernel, also where that is not conflict-free, which is an error in jax 0.12."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def gpu_interpreter(interpret: Any) -> Any:
    """Returns the `interpret` of `mosaic_gpu.kernel`: None to compile it, or parameters of jax's interpreter.

    TMA fills with zeros what lies beyond an array, and so does the interpreter then. jax 0.10.2 does not export it.
    """
    if not isinstance(interpret, bool):
        return interpret
    if not interpret:
        return None
    return InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")


def without_varying_types() -> contextlib.AbstractContextManager[None]:
    """Stops JAX from following over which mesh axes arrays vary, as `jax.shard_map(..., check_vma=False)` does."""
    return config._check_vma(False)


def mapped_mesh_axes() -> frozenset[Any]:
    """Returns the Explicit mesh axes over which a `jax.vmap` around the call is sharded; shares are theirs already."""
    axes: frozenset[Any] = core.get_axis_env().explicit_mesh_axis_names
    return axes
