"""Replaces jax.nn.dot_product_attention in a decode loop, whose cache is [batch, max_len, kv_heads, head_dim].

    python examples/drop_in_attention.py

First the call alone is replaced. That transposes the cache, which may copy it in each step, so the cache is converted
once then, and appended to and read where it lies.
"""

import jax
import jax.numpy as jnp

from palladion import append_kv, decode_attention, dot_product_attention
from palladion.frameworks.attention import kv_cache_from_bskh

BATCH, MAX_LEN, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 32, 8, 2, 64
STEPS = 6

keys = jax.random.split(jax.random.key(0), 5)
queries = jax.random.normal(keys[0], (STEPS, BATCH, 1, Q_HEADS, HEAD_DIM))
new_keys, new_values = (jax.random.normal(key, (STEPS, BATCH, 1, KV_HEADS, HEAD_DIM)) for key in keys[1:3])
cached_keys, cached_values = (jax.random.normal(key, (BATCH, MAX_LEN, KV_HEADS, HEAD_DIM)) for key in keys[3:])
filled = jnp.array([10, 3], jnp.int32)  # tokens of each sequence that the cache holds already


def decode(attention):
    """Attends with a function that has the arguments of jax.nn.dot_product_attention."""

    def step(carry, new):
        keys, values, lengths = carry
        query, key, value = new
        at = (jnp.arange(BATCH), lengths)
        keys, values, lengths = keys.at[at].set(key[:, 0]), values.at[at].set(value[:, 0]), lengths + 1
        return (keys, values, lengths), attention(query, keys, values, key_value_seq_lengths=lengths)

    return jax.lax.scan(step, (cached_keys, cached_values, filled), (queries, new_keys, new_values))[1]


def decode_converted():
    """Attends over a cache that was converted once."""

    def step(carry, new):
        cache, lengths = carry
        query, key, value = new
        lengths = lengths + 1
        cache = append_kv(cache, key, value, lengths)
        return (cache, lengths), decode_attention(query, cache.k, cache.v, lengths)

    carry = (kv_cache_from_bskh(cached_keys, cached_values), filled)
    return jax.lax.scan(step, carry, (queries, new_keys, new_values))[1]


expected = jax.jit(decode, static_argnums=0)(jax.nn.dot_product_attention)
replaced = jax.jit(decode, static_argnums=0)(dot_product_attention)
converted = jax.jit(decode_converted)()
print("palladion.dot_product_attention agrees:", bool(jnp.allclose(replaced, expected, atol=1e-5)))
print("append_kv and decode_attention agree:", bool(jnp.allclose(converted, expected, atol=1e-5)))

try:
    dot_product_attention(queries[0], cached_keys, cached_values, is_causal=True, key_value_seq_lengths=filled)
except ValueError as error:
    print("what it does not compute is an error:", error)
