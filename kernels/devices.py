"""What a device can do: so far its memory bandwidth, measured."""

from __future__ import annotations

import functools
import time
from typing import Any, Final

import jax
import jax.numpy as jnp

READ_BYTES: Final = 256 * 2**20
"""Read at a time: several times larger than any cache."""

ROW: Final = 512
"""float32 numbers in a row: of the shapes tried (256 to 4096 wide, sums and maxima) the fastest on a CPU."""

REPEATS: Final = 12


def cpu_compiler_options() -> dict[str, Any]:
    """Options with which XLA uses the full width of a CPU's vector units; none on other platforms."""
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


@functools.cache
def measured_bandwidth() -> float:
    """Bytes per second at which JAX's default device reads memory: the best of several passes over 256 MB.

    A reduction along the slow axis of a large array is the fastest read that XLA compiles, and needs no arithmetic to
    speak of. The best pass is what counts, because whatever disturbs a pass makes it slower.
    """
    x = jnp.ones((READ_BYTES // (4 * ROW), ROW), jnp.float32)
    read = jax.jit(lambda x: jnp.max(x, axis=0), compiler_options=cpu_compiler_options()).lower(x).compile()
    read(x).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        read(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)
