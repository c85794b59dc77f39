"""RMS norm of the rows of x in one launch on a GPU, for products that do not normalize x themselves.

    y = x / sqrt(mean(x ** 2) + eps) * weight

Grid: (rows). A program has a row in registers: it reads x once, sums squares across its threads, and writes y. XLA
takes two launches for it, each of which costs a microsecond or more.

Bound by the launch: a row has a few kilobytes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.compat import fresh_kernel
from palladion.kernels.types import Interpret, Ref

FEATURES_PER_WARP: Final = 512
"""Features of a warp, 16 of each thread, as far as there are warps."""

MAX_WARPS: Final = 16
"""Most warps of a program."""


class Refs(NamedTuple):
    """Inputs of the kernel.

    Attributes:
      x: `[rows, features]`.
      weight: `[features]`.
    """

    x: Ref
    weight: Ref


def kernel(refs: Refs, out: Ref, *, features: int, eps: float) -> None:
    """Normalizes one row.

    Args:
      refs: the inputs.
      out: `[rows, features]`.
      features: features of a row.
      eps: number added to the mean square.
    """
    row = pl.program_id(0)
    feature = jnp.arange(pl.next_power_of_2(features), dtype=jnp.int32)
    exists = None if features == len(feature) else feature < features
    other = None if exists is None else 0
    x = plgpu.load(refs.x.at[row, feature], mask=exists, other=other).astype(jnp.float32)
    weight = plgpu.load(refs.weight.at[feature], mask=exists, other=other).astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.sum(x * x) / features + eps)
    plgpu.store(out.at[row, feature], (x * factor * weight).astype(out.dtype), mask=exists)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, interpret: Interpret) -> jax.Array:
    """Returns the rows of x, normalized; `palladion.reference.rms_norm` defines it.

    Args:
      x: `[rows, features]`, float.
      weight: `[features]`, float.
      eps: number added to the mean square.
      interpret: whether the kernel is interpreted.

    Returns:
      The shape and dtype of x.
    """
    rows, features = x.shape
    num_warps = min(max(pl.next_power_of_2(features) // FEATURES_PER_WARP, 1), MAX_WARPS)
    normalized: jax.Array = pl.pallas_call(
        fresh_kernel(kernel, features=features, eps=eps),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name=f"rms_norm_{features}",
    )(Refs(x, weight))
    return normalized
