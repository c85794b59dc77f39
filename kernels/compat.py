"""What differs between versions of jax, 0.10.2 to 0.12, and what none of them gets right, in one place."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax

Operands = TypeVar("Operands")

PALLAS_TRITON_WARNING: Final = "The Pallas Triton backend is deprecated"
"""How the warning begins that jax >= 0.11 gives wherever a Triton kernel is lowered."""

# It asks the kernel's author for something, not the user. Lowering happens long after the kernel was called, so that
# the filter has to stay.
warnings.filterwarnings("ignore", message=PALLAS_TRITON_WARNING, category=DeprecationWarning)


def fresh_kernel(kernel: Callable[..., None], **options: Any) -> Callable[..., None]:
    """The kernel with its static options, as an object of its own for every call.

    jax 0.11 caches a traced kernel by the function alone: one function in several grids then sees the `pl.num_programs`
    of the first (jax-ml/jax#40847).
    """
    return functools.partial(kernel, **options)


def unfolded(operands: Operands) -> Operands:
    """Returns the operands of an interpreted kernel unchanged, but hides from XLA that some may be constants.

    An interpreted kernel is ordinary XLA, and up to jax 0.11 XLA's constant folding ignores the layout of a transposed
    constant when it evaluates a bitcast to another width. A compiled kernel is opaque to it.
    """
    return jax.lax.optimization_barrier(operands)


def offsets_wrap(numbers: int) -> bool:
    """Whether Pallas-Triton reaches some of that many one-byte numbers by a wrong address.

    It counts in 32 bits up to 4 GiB, and Triton takes those as signed: from 2 GiB on they point before the array.
    """
    return 2**31 < numbers <= 2**32


def known_options(**options: Any) -> dict[str, Any]:
    """Those of XLA's compiler options that the XLA which is installed knows.

    An option that XLA does not know, or a value that it does not take, is an error wherever it is passed to `jax.jit`;
    XLA renames and drops options from version to version. So each is tried, once, on a program that does nothing.
    """
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        # Where something is being traced, for a device that may not be here, this is compiled for one that is.
        with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True
