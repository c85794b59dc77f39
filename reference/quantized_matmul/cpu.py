"""Products by blocks of channels, for XLA on a CPU.

A CPU would write a whole dequantized weight to memory and read it again; a block of its channels stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp

from palladion.reference.bits import from_bits, to_bits
from palladion.reference.quantized_matmul.definition import Weight

BLOCK_BYTES: Final = 2 * 2**20
"""Most bytes of a block in float32, unless `BLOCK_CHANNELS` channels take more: what a core's cache holds."""

BLOCK_CHANNELS: Final = 128
"""Channels of a block are a multiple of this."""


def multiply_by_blocks(multiply: Callable[[Weight], jax.Array], w: Weight, layer: jax.Array | None) -> jax.Array:
    """Multiplies by one block of channels after the other.

    Args:
      multiply: returns the product with a block `[in, channels]`, `[rows, channels]`.
      w: `[in, out]`, with a leading `[num_layers]` where there is a layer.
      layer: int32 scalar or None.

    Returns:
      `[rows, out]`.
    """
    out_features = w.shape[-1]
    block = block_channels(w.shape[-2], out_features)
    if block == out_features:
        return multiply(_slice_channels(w, layer, 0, out_features))
    whole = out_features // block * block
    products = jax.lax.map(lambda start: multiply(_slice_channels(w, layer, start, block)), jnp.arange(0, whole, block))
    y = jnp.moveaxis(products, 0, 1).reshape(products.shape[1], whole)  # from [blocks, rows, channels]
    if whole == out_features:
        return y
    return jnp.concatenate([y, multiply(_slice_channels(w, layer, whole, out_features - whole))], axis=1)


def block_channels(in_features: int, out_features: int) -> int:
    """Returns how many channels a block has."""
    fitting = BLOCK_BYTES // (4 * max(in_features, 1)) // BLOCK_CHANNELS * BLOCK_CHANNELS
    return min(max(fitting, BLOCK_CHANNELS), out_features)


def _slice_channels(w: Weight, layer: jax.Array | None, start: jax.Array | int, channels: int) -> Weight:
    """Returns channels `[start, start + channels)` of one layer."""

    def slice_part(part: jax.Array) -> jax.Array:
        # One slice of both axes: XLA would copy a slice of the layer alone before it slices channels.
        stack = to_bits(part if layer is not None else part[None])
        starts = (0 if layer is None else layer, 0, start)
        sizes = (1, stack.shape[1], channels)
        return jax.lax.dynamic_slice(stack, [jnp.asarray(index, jnp.int32) for index in starts], sizes)[0]

    return from_bits(jax.tree.map(slice_part, w), w)
