"""Quantizes an Equinox model in two lines, and generates with it.

    python examples/equinox_model.py

The model is a transformer of one layer with random weights. Layers of Equinox are written for one token and applied to
many by `jax.vmap`: the quantized product is one product of all rows nevertheless.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from palladion import KVCache, append_kv, decode_attention
from palladion.frameworks.equinox import quantize_model

VOCABULARY, WIDTH, Q_HEADS, KV_HEADS, HEAD_DIM, LAYERS, MAX_LEN = 256, 128, 4, 2, 32, 1, 64


def every_token(layer):
    """Returns a layer of one token as a layer of `[batch, q_len, ...]`."""
    return jax.vmap(jax.vmap(layer))


class Block(eqx.Module):
    norm: eqx.nn.RMSNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.qkv = eqx.nn.Linear(WIDTH, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, key=key)
        self.out = eqx.nn.Linear(Q_HEADS * HEAD_DIM, WIDTH, key=key)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, activation=jax.nn.silu, key=key)

    def __call__(self, x, cache, lengths):
        heads = every_token(self.qkv)(every_token(self.norm)(x)).reshape(*x.shape[:2], -1, HEAD_DIM)
        q, k, v = jnp.split(heads, [Q_HEADS, Q_HEADS + KV_HEADS], axis=2)
        cache = append_kv(cache, k, v, lengths)
        attended = decode_attention(q, cache.k, cache.v, lengths)
        x = x + every_token(self.out)(attended.reshape(*x.shape[:2], -1))
        return x + every_token(self.mlp)(x), cache


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=key)
        self.blocks = [Block(key) for key in jax.random.split(key, LAYERS)]
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=key)

    def __call__(self, tokens, caches, lengths):
        """Returns the most likely tokens `[batch]` after the newest `[batch, q_len]`, and the caches of all layers."""
        x, written = every_token(self.embedding)(tokens), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache, lengths)
            written.append(cache)
        return jnp.argmax(jax.vmap(self.head)(x[:, -1]), -1), written


@eqx.filter_jit
def generate(model, prompt, new_tokens):
    """Returns new tokens `[batch, new_tokens]`."""
    caches = [KVCache.dense(len(prompt), KV_HEADS, MAX_LEN, HEAD_DIM, "float32") for _ in range(LAYERS)]
    token, caches = model(prompt, caches, prompt.shape[1])

    def step(carry, length):
        token, caches = carry
        return model(token[:, None], caches, length), token

    lengths = prompt.shape[1] + 1 + jnp.arange(new_tokens, dtype=jnp.int32)  # each counts the new token
    return jax.lax.scan(step, (token, caches), lengths)[1].T


model = Transformer(jax.random.key(0))
prompt = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
print("float32:", generate(model, prompt, 8).tolist())

model, report = quantize_model(model, "int8")  # where="blocks/" would leave the head

print("int8:   ", generate(model, prompt, 8).tolist())
print(report)
