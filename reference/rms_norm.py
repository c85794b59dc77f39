"""Root mean square layer normalization: the definition. Source: arXiv 1910.07467."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns x / sqrt(mean(x ** 2) + eps) * weight over the last axis, computed in float32.

    Args:
      x: `[..., features]`, float.
      weight: `[features]`, float.
      eps: added to the mean square.

    Returns:
      The shape and dtype of x.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps) * weight.astype(jnp.float32)).astype(x.dtype)
