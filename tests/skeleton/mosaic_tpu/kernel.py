"""Multiplies all rows of x by a block of w's channels, on a TPU.

    out[r, o] = finish(sum_i x[r, i] w[i, o] + bias[o])

Grid: (out blocks). A step has all of `in`, so that nothing is kept from one step to the next.
Resident in VMEM: x, for the whole call; two blocks of w, one in use while Pallas fetches the next.
Bound by memory: each weight is read once, for 2 * rows FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.matmul.problem import Problem
from palladion.kernels.types import Ref


class Refs(NamedTuple):
    """Inputs of a step, in VMEM.

    Attributes:
      x: `[rows, in]`.
      w: `[in, block_out]`.
      bias: `[1, block_out]` or None.
    """

    x: Ref
    w: Ref
    bias: Ref | None


def kernel(refs: Refs, out: Ref, *, problem: Problem) -> None:
    """Computes a block of channels.

    Args:
      refs: the inputs.
      out: `[rows, block_out]`.
      problem: shapes and options.
    """
    dtype = jnp.promote_types(problem.x_dtype, problem.w_dtype)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None  # otherwise float32 is rounded to bfloat16
    x, w = refs.x[...].astype(dtype), refs.w[...].astype(dtype)
    y = jnp.dot(x, w, precision=exact, preferred_element_type=jnp.float32)  # [rows, block_out]
    if refs.bias is not None:
        y += refs.bias[...]
    out[...] = problem.finish([y]).astype(out.dtype)
