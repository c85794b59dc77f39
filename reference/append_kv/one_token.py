"""Writing one token of one sequence into a dense cache: a slice update.

XLA does it in place, without the loop that it makes of a scatter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from palladion.reference.caches import KVCache


def write(cache: KVCache, tokens: KVCache, lengths: jax.Array, layer: jax.Array | None = None) -> KVCache:
    """Writes a token in the dtypes of the cache, `[1, 1, kv_heads, ...]`, to the last of `lengths` positions."""
    position = jnp.clip(lengths[0], 0, cache.max_len + 1) - 1  # may be no position at all
    row = jnp.clip(position, 0, cache.max_len - 1)
    written = position == row
    if layer is not None:
        written &= (layer >= 0) & (layer < cache.k.shape[0])

    def update(part: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.swapaxes(new, 1, 2)  # [1, kv_heads, 1, ...] as the cache has it
        start = (0, 0, row) + (0,) * (new.ndim - 3)
        if layer is not None:
            new, start = new[None], (layer, *start)
        old = jax.lax.dynamic_slice(part, start, new.shape)
        return jax.lax.dynamic_update_slice(part, jnp.where(written, new, old), start)

    return jax.tree.map(update, cache, tokens)
