"""Lengths count the new tokens: scalars, what is known to write nothing, and caches in another layout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion import KVCache, append_kv, append_qkv, decode_attention


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def append(cache: KVCache, lengths: Any, **options: Any) -> KVCache:
    return append_kv(cache, normal(2, 1, 4), normal(2, 1, 4, seed=1), lengths, **options)


def append_joined(cache: KVCache, lengths: Any, **options: Any) -> KVCache:
    return append_qkv(cache, normal(2, 3, 4), lengths, jnp.ones((2, 2)), jnp.zeros((2, 2)), **options)[1]


def attend(cache: KVCache, lengths: Any) -> jax.Array:
    return decode_attention(normal(2, 2, 4), cache.k, cache.v, lengths)


@pytest.mark.parametrize("operation", [append, append_joined, attend])
def test_a_scalar_is_the_length_of_every_sequence(operation: Any):
    cache = append(KVCache.dense(2, 1, 8, 4, "float32"), [3, 3])
    expected = operation(cache, jnp.array([3, 3], jnp.int32))
    for length in (3, np.int64(3), jnp.int32(3), jnp.array(3), [3, 3], np.array([3, 3])):
        result = operation(cache, length)
        jax.tree.map(np.testing.assert_array_equal, result, expected)
    jax.tree.map(np.testing.assert_allclose, jax.jit(operation)(cache, 3), expected)
    for wrong in (3.0, [[3, 3]], [3], True):
        with pytest.raises(ValueError, match=r"lengths: got .*; accepted: "):
            operation(cache, wrong)
    for outside in (9, -1):
        with pytest.raises(ValueError, match=rf"lengths: got \[{outside}, {outside}\]; accepted: 0 to 8"):
            operation(cache, outside)


@pytest.mark.parametrize("operation", [append, append_joined])
def test_an_append_that_writes_nothing_is_an_error(operation: Any):
    """The counts before the call, those of an empty cache, are the first mistake."""
    cache = KVCache.dense(2, 1, 8, 4, "float32")
    message = r"lengths: got \[0, 0\]; accepted: tokens in the cache after this call, the new ones included"
    for lengths in (0, [0, 0], jnp.zeros(2, jnp.int32)):
        with pytest.raises(ValueError, match=message):
            operation(cache, lengths)
    for unchanged in (jax.jit(operation)(cache, 0), operation(cache, 0, new_tokens=[0, 0])):
        assert not np.asarray(unchanged.k).any()
    assert np.asarray(operation(cache, [0, 1]).k[1]).any()


def test_a_cache_in_another_layout_is_recognized():
    """Tokens before heads, as in most models' code."""
    cache = KVCache(*(normal(2, 32, 8, 16, seed=seed) for seed in (1, 2)))  # [batch, max_len, kv_heads, head_dim]
    pages = KVCache(cache.k, cache.v, page_table=jnp.array([[0], [1]], jnp.int32))
    hint = r"k of shape \(2, 32, 8, 16\) is probably \[batch, max_len, kv_heads, head_dim\], but .* jnp.swapaxes\("
    q, k, angles = normal(2, 8, 16), normal(2, 8, 16), jnp.ones((2, 8))
    with pytest.raises(ValueError, match="q: got 8 heads; accepted: a multiple of the cache's 32 KV heads. " + hint):
        decode_attention(q, cache.k, cache.v, 5)
    with pytest.raises(ValueError, match=r"k: got 8 heads of 16; accepted: 32 heads of 16. cache." + hint):
        append_kv(cache, k, k, 5)
    with pytest.raises(ValueError, match="qkv: got 24 heads for a cache of 32; .* cache." + hint):
        append_qkv(cache, normal(2, 24, 16), 5, angles, angles)
    with pytest.raises(ValueError, match=r"is probably \[num_pages, page_size, kv_heads, head_dim\]"):
        decode_attention(q, cache.k, cache.v, 5, page_table=pages.page_table)
    swapped = [jnp.swapaxes(part, -3, -2) for part in (cache.k, cache.v)]
    assert decode_attention(q, *swapped, 5).shape == q.shape
    with pytest.raises(ValueError, match=r"accepted: a multiple of the cache's 32 KV heads$"):
        decode_attention(normal(2, 7, 16), cache.k, cache.v, 5)
