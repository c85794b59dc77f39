"""What differs between versions of jax, in one place: 0.10.2 to 0.12."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Final

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
