"""x @ w for a quantized w: the definition, in plain XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from palladion.reference.quantization import QuantizedArray, dequantize


def quantized_matmul(
    x: jax.Array,
    w: QuantizedArray,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """Multiplies by a quantized weight.

    Args:
      x: `[..., in]`, float.
      w: logically `[in, out]`.
      bias: `[out]` or None.
      activation: an elementwise function of float32, or None.
      out_dtype: dtype of the result; None means x's.

    Returns:
      `[..., out]`.
    """
    y = jnp.matmul(x.astype(jnp.float32), dequantize(w), precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return (y if activation is None else activation(y)).astype(x.dtype if out_dtype is None else out_dtype)
