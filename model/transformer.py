"""The decoder: embedding, layers of attention and a SwiGLU MLP, output head; one function for prefill and decode.

`forward` takes the newest tokens of every sequence, appends their keys and values to the cache and returns logits. A
prompt is a call with many tokens, a decode step a call with one. Sequences are aligned at their ends: token i of a call
has the position lengths - q_len + i, and a shorter prompt is padded in front, where nothing is written or attended to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.append_qkv import append_qkv
from palladion.kernels.decode_attention import decode_attention
from palladion.kernels.matmul import matmul
from palladion.kernels.quantized_matmul import quantized_matmul
from palladion.model.config import ModelConfig
from palladion.model.parameters import Layer, Parameters, Weight
from palladion.reference import KVCache, QuantizedArray, dequantize, rms_norm
from palladion.reference.bits import from_bits, to_bits
from palladion.reference.modes import usual_modes
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import Order

FEW_TOKENS: Final = 4
"""Up to this many tokens, embeddings are sliced one by one: XLA on a CPU makes a slow loop of a gather of columns."""

Cache = KVCache | tuple[KVCache, ...]
"""The KV caches of all layers: one stacked `KVCache`, or one per layer, like the layers of `Parameters`."""

Adapt = Callable[[jax.Array, Weight], jax.Array]
"""A function of activations `[..., in]` and the weight that multiplies them, stacked where the layers are."""


class Rotation(NamedTuple):
    """The rotary angles of the new tokens.

    Attributes:
      cosine: float32 `[batch, q_len, head_dim / 2]`.
      sine: float32 `[batch, q_len, head_dim / 2]`.
    """

    cosine: jax.Array
    sine: jax.Array


def empty_cache(parameters: Parameters, config: ModelConfig, batch: int, max_len: int, dtype: Any) -> Cache:
    """Returns a cache without tokens, stacked where the layers are.

    Args:
      parameters: weights of the model; only their structure matters.
      config: shapes of the model.
      batch: number of sequences.
      max_len: tokens that each sequence has room for.
      dtype: float32, bfloat16, float16, int8, float8_e4m3fn or float8_e5m2.

    Raises:
      ValueError: a size is below 1, or the dtype is not listed.
    """
    sizes = (batch, config.kv_heads, max_len, config.head_dim)
    if isinstance(parameters.layers, Layer):
        return KVCache.dense(*sizes, dtype, num_layers=config.num_layers)
    return tuple(KVCache.dense(*sizes, dtype) for _ in parameters.layers)


@usual_modes()
def forward(
    parameters: Parameters,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    *,
    every_position: bool = False,
    dtype: Any = jnp.float32,
    backend: str | None = None,
    interpret: Any = None,
    adapt: Adapt | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs the newest tokens of every sequence through the model.

    Args:
      parameters: the weights.
      config: shapes and constants of the model.
      tokens: int32 `[batch, q_len]`; padding in front of a sequence (at negative positions) may be any token.
      lengths: int32 `[batch]`, tokens in the cache after this call, of which up to q_len are new; 0 for a sequence that
        has not begun.
      cache: made by `empty_cache`, holding the tokens before these. If it is donated, it is updated in place.
      every_position: whether logits of all tokens are returned, or only those of each sequence's last token.
      dtype: dtype of the activations.
      backend: backend of every operation, one of `palladion.BACKENDS`.
      interpret: whether kernels are interpreted, as for the operations.
      adapt: receives the input of each linear layer and its weight, and returns the input to use instead: to record
        activations, or to see what rounding them costs.

    Returns:
      Logits float32 `[batch, vocab]`, or `[batch, q_len, vocab]` with `every_position`; and the cache.

    Raises:
      ValueError: one of cache and layers is stacked and the other is not.
      Unsupported: the chosen backend does not cover an operation of this model.
    """
    tokens, lengths = tokens.astype(jnp.int32), lengths.astype(jnp.int32)  # a caller with x64 has int64
    rotation = rotate(lengths, tokens.shape[1], parameters.inverse_frequencies)
    decoder = _Decoder(config, lengths, rotation, parameters.order, backend, interpret, adapt)
    hidden = embed(parameters, tokens, dtype)  # [batch, q_len, hidden]
    if isinstance(parameters.layers, Layer) and isinstance(cache, KVCache):
        layers, stacked_cache = parameters.layers, cache

        def step(index: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            hidden, cache = decoder.layer(layers, carry[0], from_bits(carry[1], stacked_cache), index)
            return hidden, to_bits(cache)

        # The loop carries the cache as bits: XLA on a CPU would convert all of a bfloat16 or float8 cache to float32.
        hidden, bits = jax.lax.fori_loop(0, config.num_layers, step, (hidden, to_bits(cache)))
        cache = from_bits(bits, stacked_cache)
    elif isinstance(parameters.layers, tuple) and isinstance(cache, tuple):
        caches = []
        # On a GPU equal layers are traced once. A CPU's XLA fuses across layers, so there they stay one program.
        run = jax.jit(decoder.layer) if target_platform() == "gpu" else decoder.layer
        for layer, layer_cache in zip(parameters.layers, cache, strict=True):
            hidden, layer_cache = run(layer, hidden, layer_cache, None)
            caches.append(layer_cache)
        cache = tuple(caches)
    else:
        raise ValueError(
            f"cache: got {type(cache).__name__} for layers in a {type(parameters.layers).__name__}; accepted: stacked "
            "where the layers are, a tuple where they are one; `empty_cache` makes it"
        )
    last = hidden if every_position else hidden[:, -1]
    logits = decoder.linear(last, parameters.head, norm=parameters.final_norm, out_dtype=jnp.float32)
    return logits, cache


def rotate(lengths: jax.Array, q_len: int, inverse_frequencies: jax.Array) -> Rotation:
    """Returns the rotary angles of each sequence's last q_len tokens."""
    position = lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)  # [batch, q_len]
    angle = position[..., None].astype(jnp.float32) * inverse_frequencies
    return Rotation(jnp.cos(angle), jnp.sin(angle))


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoder:
    """Everything that the layers of a call share.

    Attributes:
      config: shapes and constants of the model.
      lengths: int32 `[batch]`, tokens in the cache, new ones included.
      rotation: rotary angles of the new tokens.
      order: storage order of dense weights.
      backend: backend of the operations.
      interpret: whether kernels are interpreted.
      adapt: as for `forward`.
    """

    config: ModelConfig
    lengths: jax.Array
    rotation: Rotation
    order: Order
    backend: str | None
    interpret: Any
    adapt: Adapt | None

    def layer(
        self, layer: Layer, hidden: jax.Array, cache: KVCache, index: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        """Runs one layer over hidden `[batch, q_len, hidden]`; `index` selects it where layers are stacked."""
        attended, cache = self.attention(layer, hidden, cache, index)
        hidden = self.linear(attended, layer.output, index, residual=hidden)
        return self.linear(self.gated(layer, hidden, index), layer.down, index, residual=hidden), cache

    def attention(
        self, layer: Layer, x: jax.Array, cache: KVCache, index: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        """Returns the attention of x's tokens, `[batch, q_len, q_heads * head_dim]`, and the cache that holds them."""
        config = self.config
        heads = config.q_heads + 2 * config.kv_heads
        bias = None if layer.qkv_bias is None else _select(layer.qkv_bias, index)
        qkv = self.linear(x, layer.qkv, index, norm=layer.attention_norm, bias=bias)
        qkv = qkv.reshape(*x.shape[:2], heads, config.head_dim)
        q, cache = append_qkv(
            cache, qkv, self.lengths, *self.rotation, layer=index, backend=self.backend, interpret=self.interpret
        )
        out = decode_attention(
            q,
            cache.k,
            cache.v,
            self.lengths,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            sliding_window=config.sliding_window,
            layer=index,
            backend=self.backend,
            interpret=self.interpret,
        )
        return out.reshape(*x.shape[:2], -1), cache

    def gated(self, layer: Layer, x: jax.Array, index: jax.Array | None) -> jax.Array:
        """Returns silu(norm(x) @ gate) * (norm(x) @ up)."""
        if isinstance(layer.gate_up, tuple):
            gate, up = (
                self.linear(x, weight, index, norm=layer.mlp_norm, activation=activation)
                for weight, activation in zip(layer.gate_up, (jax.nn.silu, None), strict=True)
            )
            return gate * up
        return self.linear(x, layer.gate_up, index, norm=layer.mlp_norm, activation=jax.nn.silu, gated=True)

    def linear(
        self,
        x: jax.Array,
        weight: Weight | tuple[Weight, ...],
        index: jax.Array | None = None,
        *,
        norm: jax.Array | None = None,
        bias: jax.Array | None = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        gated: bool = False,
        residual: jax.Array | None = None,
        out_dtype: Any = None,
    ) -> jax.Array:
        """Returns norm(x) @ weight with bias, activation and residual fused; products of a tuple are concatenated."""
        if isinstance(weight, tuple):
            products = [self.linear(x, one, index, norm=norm, out_dtype=out_dtype) for one in weight]
            joined = jnp.concatenate(products, axis=-1)
            return joined if bias is None else joined + bias.astype(joined.dtype)
        norm, eps = None if norm is None else _select(norm, index), self.config.rms_norm_eps
        if self.adapt is not None:
            # It sees what is multiplied: the normalized activations.
            x, norm = x if norm is None else rms_norm(x, norm, eps), None
            x = self.adapt(x, weight)
        multiply: Callable[..., jax.Array] = functools.partial(matmul, order=self.order)
        if isinstance(weight, QuantizedArray):
            multiply = quantized_matmul
        return multiply(
            x,
            weight,
            bias=bias,
            activation=activation,
            gated=gated,
            norm=norm,
            norm_eps=eps,
            residual=residual,
            layer=index,
            out_dtype=out_dtype,
            backend=self.backend,
            interpret=self.interpret,
        )


def _select(x: jax.Array, index: jax.Array | None) -> jax.Array:
    """Returns entry `index` of a stacked array, or x where it is not stacked."""
    return x if index is None else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def embed(parameters: Parameters, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Returns the embeddings `[..., hidden]` of tokens `[...]`; a tied embedding's rows are the head's channels."""
    table = parameters.head if parameters.embedding is None else parameters.embedding
    order: Order = "out_in" if parameters.embedding is not None else parameters.order
    if isinstance(table, QuantizedArray):
        order = table.order
    bits = jax.tree.map(lambda leaf: _gather(leaf, tokens.reshape(-1), order == "in_out"), to_bits(table))
    stored = from_bits(bits, table)
    if isinstance(stored, QuantizedArray):
        rows = dequantize(stored, dtype).T
    else:
        rows = (stored.T if order == "in_out" else stored).astype(dtype)
    return rows.reshape(*tokens.shape, -1)


def _gather(table: jax.Array, indices: jax.Array, by_columns: bool) -> jax.Array:
    """Returns rows, or columns, of a matrix."""
    axis = 1 if by_columns else 0
    if len(indices) > FEW_TOKENS:
        return jnp.take(table, indices, axis=axis, mode="clip")
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(table, index, 1, axis) for index in indices], axis)
