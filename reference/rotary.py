"""Rotary position embedding: the definition. Source: RoFormer (arXiv 2104.09864), with the halves of a head paired."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates pairs of features by the angles of their token's position, in float32.

    Feature i < rotary_dim / 2 is paired with feature i + rotary_dim / 2; features from rotary_dim on stay as they are.

    Args:
      x: `[batch, q_len, heads, head_dim]`, float.
      cosine: float32 `[batch, q_len, rotary_dim / 2]`, the cosines of the angles.
      sine: like cosine.

    Returns:
      The shape and dtype of x.
    """
    pairs = cosine.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    rotated = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
