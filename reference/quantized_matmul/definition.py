"""x @ w for a quantized and for a dense weight: the definition.

    y = rms_norm(x) @ dequantize(w) + bias
    result = residual + activation(y)
    result = residual + activation(gate) * up        where gated, with y = [gate, up]

Norm, bias, activation and residual are optional. Products are accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp

from palladion.reference.derivatives import with_derivatives_of
from palladion.reference.quantization import QuantizedArray, dequantize, quantize_rows
from palladion.reference.rms_norm import rms_norm

NORM_EPS: Final = 1e-5
"""Default of `norm_eps`."""

Activation = Callable[[jax.Array], jax.Array]
Weight = TypeVar("Weight", jax.Array, QuantizedArray)
Multiply = Callable[[jax.Array, Weight, jax.Array | None], jax.Array]
"""Computes x `[..., in]` @ one layer of a weight: `[..., out]` in float32."""


def multiply_quantized(x: jax.Array, w: QuantizedArray, layer: jax.Array | None = None) -> jax.Array:
    """Returns x @ the dequantized weight, both in float32."""
    return dot(x.astype(jnp.float32), dequantize(select_layer(w, layer)))


def multiply_dense(x: jax.Array, w: jax.Array, layer: jax.Array | None = None) -> jax.Array:
    """Returns x @ w in float32."""
    w = select_layer(w, layer)
    if x.dtype == w.dtype != jnp.float32:
        # Products of two narrow floats are exact in float32, and matrix units accumulate in float32.
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)
    return dot(x.astype(jnp.float32), w.astype(jnp.float32))


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
    multiply: Multiply[QuantizedArray] = multiply_quantized,
) -> jax.Array:
    """Multiplies by a quantized weight; `palladion.quantized_matmul` documents the arguments, which are valid here.

    `multiply` computes the product alone: a faster form of it than the definition's may be passed.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if norm is not None:
        x = rms_norm(x, norm, norm_eps)

    def multiply_codes(x: jax.Array, w: QuantizedArray, layer: jax.Array | None) -> jax.Array:
        codes, scales = quantize_rows(x, quantize_x)
        return multiply(codes.astype(jnp.bfloat16), w, layer) * scales[..., None]  # exact

    # Rounding has a derivative of 0: that of the product passes straight through it.
    product = multiply if quantize_x is None else with_derivatives_of(multiply, multiply_codes)
    return _epilogue(product(x, w, layer), bias, activation, gated, residual).astype(out_dtype)


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
    multiply: Multiply[jax.Array] = multiply_dense,
) -> jax.Array:
    """Multiplies by a dense weight `[in, out]` of any float dtype, with the arguments of `quantized_matmul`."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if norm is not None:
        x = rms_norm(x, norm, norm_eps)
    return _epilogue(multiply(x, w, layer), bias, activation, gated, residual).astype(out_dtype)


def _epilogue(
    y: jax.Array, bias: jax.Array | None, activation: Activation | None, gated: bool, residual: jax.Array | None
) -> jax.Array:
    """Applies bias, activation, gate and residual to the float32 product."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    gate, up = jnp.split(y, 2, axis=-1) if gated else (y, None)
    result = gate if activation is None else activation(gate)
    if up is not None:
        result = result * up
    return result if residual is None else residual.astype(jnp.float32) + result


def select_layer(w: Weight, layer: jax.Array | None) -> Weight:
    """Returns one matrix of a weight with a leading `[num_layers]`; where `layer` is None, the weight."""
    if layer is None:
        return w
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), w)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns x @ w in float32. Float32 operands keep full precision: a TPU's default for them is bfloat16."""
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
