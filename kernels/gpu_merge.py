"""Lets the last of several programs of a GPU kernel put together what all of them have stored."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.types import Ref


def arrive(counters: Ref, place: tuple[Any, ...], number: jax.Array, *, native: bool) -> jax.Array:
    """Adds to a counter after everything that the program has stored, and returns what the counter was before.

    The addition releases what the program wrote before it and acquires what was written before other additions, at the
    scope of the GPU; a barrier before it makes that the whole program's. A program that finds all others counted may
    read what they stored.

    Args:
      counters: int32, zeros before the first program.
      place: the counter.
      number: int32 scalar, 1 if the program counts and 0 if not.
      native: whether the kernel is compiled for an NVIDIA GPU, not interpreted.
    """
    if native:
        plgpu.debug_barrier()
    return plgpu.atomic_add(counters, place, number)
