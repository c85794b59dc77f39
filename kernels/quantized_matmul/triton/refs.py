"""Names the arrays of quantized_matmul's forms on a GPU, reads factors, and finishes a product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.gpu_rows import read as read
from palladion.kernels.quantized_matmul.float_bits import decode_e8m0
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.types import Ref


class Refs(NamedTuple):
    """The inputs of a kernel in device memory; None where the call has no such array.

    Attributes:
      layer: `[1]`.
      x: `[rows, in]`; int8 or float16 where it was quantized.
      codes: `[num_layers, out, in or in / 2]`.
      scales: `[num_layers, out, groups]`; uint8 bits for mxfp4.
      zeros: like scales.
      minimums: like scales.
      x_scale: `[rows]` float32; None where splits are added up outside.
      bias: `[out]`; None where splits are added up outside.
      residual: `[rows, result_features]`; None where it is added outside.
      norm: `[in]`; None where x is normalized.
    """

    layer: Ref
    x: Ref
    codes: Ref
    scales: Ref
    zeros: Any = None
    minimums: Any = None
    x_scale: Any = None
    bias: Any = None
    residual: Any = None
    norm: Any = None


def read_scales(ref: Ref, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """Scales in float32; e8m0 ones are there as their bits."""
    if ref.dtype != jnp.uint8:
        return read(ref, place, mask)
    return decode_e8m0(plgpu.load(ref.at[place], mask=mask, other=None if mask is None else 0).astype(jnp.int32))


def both(*masks: jax.Array | None) -> jax.Array | None:
    """Where all masks hold; None stands for everywhere."""
    there = [mask for mask in masks if mask is not None]
    if not there:
        return None
    result = there[0]
    for mask in there[1:]:
        result = result & mask
    return result


def finish(
    refs: Refs,
    problem: Problem,
    products: Sequence[jax.Array],
    channel: jax.Array,
    real: jax.Array | None,
    x_scale: jax.Array | None,
    splits: int,
) -> list[jax.Array]:
    """Scales that all of `in` shares, and where one program has the whole sum, what follows it but for a residual.

    Args:
      refs: the kernel's.
      problem: what is computed.
      products: float32 `[..., channels]`, of every part.
      channel: `[channels]`.
      real: `[channels]`, which of them exist; None for all.
      x_scale: of the rows, to be multiplied by `[..., 1]`, or None.
      splits: shares of `in`; where there are several, the rest is left to whoever adds them up.

    Returns:
      What is stored: the result alone, or all parts where there are several splits.
    """
    p = problem
    found = []
    for part, product in enumerate(products):
        columns = channel + part * p.result_features
        if p.scheme.group_size is None and p.scheme.offset != "minimums":
            product = product * read_scales(refs.scales, (refs.layer[0], columns, 0), real)
        if x_scale is not None:
            product = product * x_scale
        if refs.bias is not None:
            product = product + read(refs.bias, (columns,), real)
        found.append(product)
    return found if splits > 1 else [p.finish(found)]
