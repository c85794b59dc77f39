"""Decodes in plain JAX: append_kv and decode_attention in a scan, with a cache that is updated in place.

    python examples/decode_loop.py

The model is one attention layer with random weights in 4 bits. Its prompts have different lengths. What it generates is
compared with one pass over the whole sequences.
"""

import functools

import jax
import jax.numpy as jnp

from palladion import KVCache, append_kv, decode_attention, quantize

NEW_TOKENS, MAX_LEN = 12, 64
VOCABULARY, WIDTH, Q_HEADS, KV_HEADS, HEAD_DIM = 256, 128, 4, 2, 32


def make_parameters(key):
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "qkv": (WIDTH, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "out": (Q_HEADS * HEAD_DIM, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    dense = {name: jax.random.normal(key, shapes[name]) for key, name in zip(keys, shapes, strict=True)}
    return {name: w if name == "embedding" else quantize(w, "int4-g32") for name, w in dense.items()}


def forward(parameters, cache, tokens, lengths):
    """Returns logits of the newest tokens `[batch, q_len]`, which `lengths` count, and the cache that holds them."""
    x = parameters["embedding"][tokens]
    heads = (x @ parameters["qkv"]).reshape(*tokens.shape, -1, HEAD_DIM)
    q, k, v = jnp.split(heads, [Q_HEADS, Q_HEADS + KV_HEADS], axis=2)
    cache = append_kv(cache, k, v, lengths)
    attended = decode_attention(q, cache.k, cache.v, lengths)
    x = x + attended.reshape(*tokens.shape, -1) @ parameters["out"]
    return x @ parameters["head"], cache


@functools.partial(jax.jit, donate_argnames="cache")  # donated, so that it is updated in place
def generate(parameters, cache, prompts, lengths):
    """Returns new tokens `[batch, NEW_TOKENS]`; prompts are padded in front."""
    logits, cache = forward(parameters, cache, prompts, lengths)

    def step(carry, _):
        cache, token, lengths = carry
        lengths = lengths + 1  # the new token counts
        logits, cache = forward(parameters, cache, token[:, None], lengths)
        return (cache, jnp.argmax(logits[:, -1], -1), lengths), token

    carry, tokens = jax.lax.scan(step, (cache, jnp.argmax(logits[:, -1], -1), lengths), length=NEW_TOKENS)
    return tokens.T, carry[0]


parameters = make_parameters(jax.random.key(0))
prompts, lengths = jnp.array([[7, 1, 8, 2, 8], [0, 0, 3, 1, 4]]), jnp.array([5, 3], jnp.int32)
empty = KVCache.dense(batch=2, kv_heads=KV_HEADS, max_len=MAX_LEN, head_dim=HEAD_DIM, dtype="float32")
tokens, cache = generate(parameters, empty, prompts, lengths)
print("generated:", tokens.tolist())
print("the cache was updated in place:", empty.k.is_deleted())

whole = jnp.concatenate([prompts, tokens], axis=1)
fresh = KVCache.dense(batch=2, kv_heads=KV_HEADS, max_len=MAX_LEN, head_dim=HEAD_DIM, dtype="float32")
logits, _ = forward(parameters, fresh, whole, lengths + NEW_TOKENS)
again = jnp.argmax(logits[:, -NEW_TOKENS - 1 : -1], -1)
print("one pass over the whole sequences predicts the same:", bool((again == tokens).all()))
