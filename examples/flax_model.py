"""Quantizes a Flax NNX model in two lines, and generates with it.

    python examples/flax_model.py

The model is a transformer of one layer with random weights, written with modules of Flax. `quantize_model` replaces the
kernels of its linear layers, and leaves embeddings and norms. Where two tokens are about as likely, the quantized model
may choose the other.
"""

import jax.numpy as jnp
from flax import nnx

from palladion import KVCache, append_kv, decode_attention
from palladion.frameworks.nnx import quantize_model

VOCABULARY, WIDTH, Q_HEADS, KV_HEADS, HEAD_DIM, LAYERS, MAX_LEN = 256, 128, 4, 2, 32, 1, 64


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query = nnx.LinearGeneral(WIDTH, (Q_HEADS, HEAD_DIM), rngs=rngs)
        self.key = nnx.LinearGeneral(WIDTH, (KV_HEADS, HEAD_DIM), rngs=rngs)
        self.value = nnx.LinearGeneral(WIDTH, (KV_HEADS, HEAD_DIM), rngs=rngs)
        self.out = nnx.LinearGeneral((Q_HEADS, HEAD_DIM), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, cache, lengths):
        normed = self.norm(x)
        cache = append_kv(cache, self.key(normed), self.value(normed), lengths)
        x = x + self.out(decode_attention(self.query(normed), cache.k, cache.v, lengths))
        return x + self.down(nnx.silu(self.up(self.mlp_norm(x)))), cache


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens, caches, lengths):
        """Returns the most likely tokens after the newest `[batch, q_len]`, and the caches of all layers."""
        x, written = self.embed(tokens), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache, lengths)
            written.append(cache)
        return jnp.argmax(self.head(x[:, -1:]), -1), written


@nnx.jit(donate_argnames="caches")  # donated, so that they are updated in place
def step(model, tokens, caches, lengths):
    """Runs the model; `lengths` count the new tokens."""
    return model(tokens, caches, lengths)


def generate(model, prompt, new_tokens):
    """Returns new tokens `[batch, new_tokens]`."""
    caches = [KVCache.dense(len(prompt), KV_HEADS, MAX_LEN, HEAD_DIM, "float32") for _ in range(LAYERS)]
    tokens, found, length = prompt, [], prompt.shape[1]
    for _ in range(new_tokens):
        tokens, caches = step(model, tokens, caches, length)
        found.append(tokens)
        length += 1
    return jnp.concatenate(found, axis=1)


model = Transformer(nnx.Rngs(1))
prompt = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
print("float32:", generate(model, prompt, 8).tolist())

report = quantize_model(model, "int8")  # in place; where="blocks/" would leave the head

print("int8:   ", generate(model, prompt, 8).tolist())
print(report)
