"""Root mean square layer normalization: the definition. Source: arXiv 1910.07467."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last axis, in float32.

    Args:
      x: `[..., features]`, float.
      weight: `[features]`, float.
      eps: added to the mean square.

    Returns:
      Like x.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * weight.astype(jnp.float32)).astype(x.dtype)
