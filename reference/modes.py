"""JAX's modes of strictness, which are the caller's and do not hold for the code in here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def usual_modes() -> Iterator[None]:
    """Traces with JAX's defaults, whatever the caller has set: ranks and dtypes are promoted, integers have 32 bits.

    The code in here broadcasts on purpose, and its kernels index with int32. Arguments have been validated and results
    have the promised dtypes, so that a caller who is strict (`jax_enable_x64`, `jax_numpy_rank_promotion`,
    `jax_numpy_dtype_promotion`) sees no difference.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield
