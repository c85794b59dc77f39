"""Writing new tokens into a KV cache, in the form that is fastest.

`definition.py` says what is written where, `one_token.py` is a faster way to write a single token. Both write bits on a
CPU (`bits.py`); derivatives are those of the definition.
"""

from __future__ import annotations

import jax

from palladion.reference.append_kv import definition, one_token
from palladion.reference.bits import from_bits, to_bits
from palladion.reference.caches import KVCache
from palladion.reference.derivatives import with_derivatives_of

__all__ = ["append_kv"]


def append_kv(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> KVCache:
    """Writes the newest tokens of each sequence; see `palladion.append_kv` for the contract (inputs are valid here).

    Args:
      cache: dense or paged.
      k: `[batch, q_len, kv_heads, head_dim]`.
      v: like k.
      lengths: int32 `[batch]`, tokens in the cache once this call is done.
      new_tokens: int32 `[batch]`, how many of the q_len tokens are real, the last ones; None means all.
      layer: int32 scalar, which layer of caches with a leading `[num_layers]` to write, or None where they have none.
    """
    return with_derivatives_of(definition.append_kv, _append)(cache, k, v, lengths, new_tokens, layer)


def _append(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    new_tokens: jax.Array | None,
    layer: jax.Array | None,
) -> KVCache:
    """Writes in the form that is fastest for these tokens."""
    bits, tokens = to_bits(cache), to_bits(definition.quantize_tokens(cache, k, v))
    if k.shape[:2] == (1, 1) and new_tokens is None and cache.page_table is None:
        bits = one_token.write(bits, tokens, lengths, layer)
    else:
        bits = definition.write(bits, tokens, lengths, new_tokens, layer)
    return from_bits(bits, cache)
