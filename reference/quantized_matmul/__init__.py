"""x @ w by the form that is fastest on the platform.

`definition.py` says what a product is. Its inner product has faster forms: `streaming.py` for few rows and packed
codes, on any platform, `cpu.py` for weights that a CPU's cache does not hold, and `gpu.py` for products that convert
codes as they read them. Which of them runs is decided here.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from palladion.reference.derivatives import with_derivatives_of
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import Order, QuantizedArray
from palladion.reference.quantized_matmul import cpu, definition, gpu, streaming
from palladion.reference.quantized_matmul.definition import NORM_EPS, Activation, Weight, select_layer

__all__ = ["NORM_EPS", "matmul", "quantized_matmul"]

FEW_ROWS: Final = 4
"""Rows up to which streaming a small weight once for each row is faster than dequantizing it."""


def quantized_matmul(
    x: jax.Array,
    w: QuantizedArray,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    norm: jax.Array | None = None,
    norm_eps: float = NORM_EPS,
    residual: jax.Array | None = None,
    quantize_x: str | None = None,
    layer: jax.Array | None = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies by a quantized weight; see `palladion.quantized_matmul` for the contract (inputs are valid here).

    Args:
      x: `[..., in]`, float.
      w: logically `[in, out]`.
      bias: `[out]` or None.
      activation: an elementwise function of float32, or None.
      gated: whether the first half of the channels, activated, multiplies the second.
      norm: `[in]`, with which x is normalized first, or None.
      norm_eps: added to the mean square of the norm.
      residual: `[..., out]`, or `[..., out / 2]` where gated, added to the result, or None.
      quantize_x: the dtype to which x is quantized first, with one scale per row, or None.
      layer: int32 scalar, which matrix of a w with a leading `[num_layers]` to use, or None where it has none.
      out_dtype: dtype of the result; None means x's.
      batch_invariant: whether each row is multiplied by itself, so that the other rows cannot change its bits.

    Returns:
      `[..., out]`, or `[..., out / 2]` where gated.
    """

    def multiply(rows: jax.Array, residuals: jax.Array | None) -> jax.Array:
        return definition.quantized_matmul(
            rows,
            w,
            bias=bias,
            activation=activation,
            gated=gated,
            norm=norm,
            norm_eps=norm_eps,
            residual=residuals,
            quantize_x=quantize_x,
            layer=layer,
            out_dtype=out_dtype,
            multiply=with_derivatives_of(definition.multiply_quantized, _multiply_quantized),
        )

    if not batch_invariant:
        return multiply(x, residual)
    residuals = None if residual is None else residual.reshape(-1, 1, residual.shape[-1])
    y = jax.lax.map(lambda row: multiply(*row), (x.reshape(-1, 1, w.in_features), residuals))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    norm: jax.Array | None = None,
    norm_eps: float = NORM_EPS,
    residual: jax.Array | None = None,
    layer: jax.Array | None = None,
    out_dtype: Any = None,
    order: Order = "in_out",
) -> jax.Array:
    """Multiplies by a dense weight of any float dtype, with the arguments of `quantized_matmul`.

    The weight is `[in, out]`, or `[out, in]` where `order` is "out_in".
    """
    if order == "out_in":
        w, layer = select_layer(w, layer).T, None  # part of the product's layout, no copy
    multiply = definition.multiply_dense if order == "out_in" else _multiply_dense
    return definition.matmul(
        x,
        w,
        bias=bias,
        activation=activation,
        gated=gated,
        norm=norm,
        norm_eps=norm_eps,
        residual=residual,
        layer=layer,
        out_dtype=out_dtype,
        multiply=with_derivatives_of(definition.multiply_dense, multiply),
    )


def _multiply_quantized(x: jax.Array, w: QuantizedArray, layer: jax.Array | None) -> jax.Array:
    """Multiplies by a quantized weight in the form that is fastest for it."""
    rows = x.reshape(-1, w.in_features)
    if target_platform() == "gpu":
        return gpu.multiply(rows, w, layer).reshape(*x.shape[:-1], w.out_features)
    if w.order == "out_in":
        return definition.multiply_quantized(x, w, layer)
    rows = rows.astype(jnp.float32)
    chunks = streaming.divides_into_chunks(w)
    multiply = streaming.multiply_nibbles if chunks and w.scheme.packed else definition.multiply_quantized
    if chunks and _are_few(rows, _streamed_rows(w, packed=w.scheme.packed)):
        y = jnp.stack([streaming.stream_quantized(row, w, layer) for row in rows])
    elif target_platform() == "cpu":
        y = cpu.multiply_by_blocks(functools.partial(multiply, rows), w, layer)
    else:
        y = multiply(rows, select_layer(w, layer))
    return y.reshape(*x.shape[:-1], w.out_features)


def _multiply_dense(x: jax.Array, w: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Multiplies by a dense weight in the form that is fastest for it."""
    if target_platform() != "cpu" or w.dtype == jnp.float32:
        return definition.multiply_dense(x, w, layer)
    in_features, out_features = w.shape[-2:]
    rows = x.astype(jnp.float32).reshape(-1, in_features)
    if in_features % streaming.CHUNK == 0 and _are_few(rows, _streamed_rows(w)):
        y = jnp.stack([streaming.stream_dense(row, w, layer) for row in rows])
    else:
        y = cpu.multiply_by_blocks(functools.partial(definition.multiply_dense, rows), w, layer)
    return y.reshape(*x.shape[:-1], out_features)


def _are_few(rows: jax.Array, limit: int) -> bool:
    """Returns whether there are 1 to `limit` rows; a symbolic number of them may be any."""
    return not is_symbolic_dim(rows.shape[0]) and 1 <= rows.shape[0] <= limit


def _streamed_rows(w: Weight, packed: bool = False) -> int:
    """Returns up to how many rows each of them streams the weight: fewer where it comes from memory every time."""
    in_features, out_features = w.shape[-2:]
    if target_platform() != "cpu" or 4 * in_features * out_features <= 4 * cpu.BLOCK_BYTES:
        return FEW_ROWS
    return FEW_ROWS // 2 if packed else 1
