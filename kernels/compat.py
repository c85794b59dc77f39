"""Differences between the versions of jax from 0.10.2 to 0.12, and workarounds for defects that all of them have."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax

Operands = TypeVar("Operands")

PALLAS_TRITON_WARNING: Final = "The Pallas Triton backend is deprecated"
"""Beginning of the warning that jax >= 0.11 gives whenever a Triton kernel is lowered."""

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
