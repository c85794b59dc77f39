"""The model's norms: RMS norm or LayerNorm of activations, and of the heads of queries and keys.

RMS norms before a product are left to the product, which fuses them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from palladion.model.config import ModelConfig
from palladion.reference import rms_norm


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Returns (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis, computed in float32.

    Source: Layer Normalization (arXiv 1607.06450).
    """
    centered = x.astype(jnp.float32)
    centered = centered - jnp.mean(centered, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + eps) * weight + bias).astype(x.dtype)


def normalize(config: ModelConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Normalizes activations `[..., features]`; a LayerNorm's weight is `[2, features]`, factors and biases."""
    if config.norm == "layer":
        return layer_norm(x, weight[0], weight[1], config.norm_eps)
    return rms_norm(x, weight, config.norm_eps)


def normalize_queries_and_keys(config: ModelConfig, qkv: jax.Array, weight: jax.Array) -> jax.Array:
    """Normalizes queries and keys of joined heads.

    Args:
      config: says over what is normalized: each head, or all heads of the queries, and all of the keys.
      qkv: `[batch, q_len, q_heads + 2 * kv_heads, head_dim]`: queries, then keys, then values.
      weight: `[q_heads + kv_heads, head_dim]`.

    Returns:
      The shape and dtype of qkv.
    """
    q_heads, kv_heads = config.q_heads, config.kv_heads
    queries_and_keys, values = qkv[:, :, : q_heads + kv_heads], qkv[:, :, q_heads + kv_heads :]
    if config.qk_norm != "projection":
        if config.norm == "layer":
            normalized = layer_norm(queries_and_keys, weight, jnp.zeros(()), config.norm_eps)
        else:
            normalized = rms_norm(queries_and_keys, weight, config.norm_eps)
        return jnp.concatenate([normalized, values], axis=2)
    parts = [
        rms_norm(part.reshape(*part.shape[:2], -1), scales.reshape(-1), config.norm_eps).reshape(part.shape)
        for part, scales in (
            (queries_and_keys[:, :, :q_heads], weight[:q_heads]),
            (queries_and_keys[:, :, q_heads:], weight[q_heads:]),
        )
    ]
    return jnp.concatenate([*parts, values], axis=2)
