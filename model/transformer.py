"""The decoder: embedding, layers of attention and SwiGLU MLP, output head; one function for prefill and decode.

`forward` takes the newest tokens of every sequence, writes their keys and values into the cache and returns logits.
A prompt is a call with many tokens, a decode step a call with one. Sequences end together: token i of a call stands at
position lengths - q_len + i, so that a shorter prompt is padded in front, where nothing is written or seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.kernels.append_qkv import append_qkv
from palladion.kernels.backend import default_backend
from palladion.kernels.decode_attention import decode_attention
from palladion.kernels.matmul import matmul
from palladion.kernels.quantized_matmul import quantized_matmul
from palladion.model.config import ModelConfig
from palladion.model.parameters import Layer, Parameters, Weight
from palladion.reference import KVCache, QuantizedArray, dequantize, rms_norm
from palladion.reference.bits import from_bits, to_bits
from palladion.reference.platforms import target_platform

FEW_TOKENS: Final = 4
"""Up to here rows of the embedding are sliced one by one: XLA on a CPU turns a gather of columns into a slow loop."""

Cache = KVCache | tuple[KVCache, ...]
"""The caches of all layers: one stacked `KVCache`, or one for each layer, as the layers of `Parameters` are."""

Adapt = Callable[[jax.Array, Weight], jax.Array]
"""A function of activations `[..., in]` and the weight that they meet, stacked where the layers are."""


def empty_cache(parameters: Parameters, config: ModelConfig, batch: int, max_len: int, dtype: Any) -> Cache:
    """A cache without tokens, stacked where the layers are.

    Args:
      parameters: of the model; only its structure counts.
      config: of the model.
      batch: sequences.
      max_len: tokens that each sequence has room for.
      dtype: float32, bfloat16, float16, int8, float8_e4m3fn or float8_e5m2.

    Raises:
      ValueError: a size below 1, or a dtype that is not listed.
    """
    sizes = (batch, config.kv_heads, max_len, config.head_dim)
    if isinstance(parameters.layers, Layer):
        return KVCache.dense(*sizes, dtype, num_layers=config.num_layers)
    return tuple(KVCache.dense(*sizes, dtype) for _ in parameters.layers)


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
      config: shapes and constants.
      tokens: int32 `[batch, q_len]`; what stands in front of a sequence (a negative position) may be any token.
      lengths: int32 `[batch]`, tokens in the cache once this call is done; at most q_len of them are new. 0 is a
        sequence that has not begun.
      cache: of `empty_cache`, holding the tokens before these. Donate it, and it is updated in place.
      every_position: whether logits of all tokens are returned; otherwise only of each sequence's last.
      dtype: of the activations.
      backend: of the operations; see `palladion.BACKENDS`.
      interpret: whether kernels are interpreted, as for the operations.
      adapt: takes what a linear layer is about to multiply, and its weight; what it returns is multiplied instead. To
        record activations, or to see what rounding them costs.

    Returns:
      Logits float32 `[batch, vocab]`, or `[batch, q_len, vocab]` with `every_position`; and the cache.

    Raises:
      ValueError: the cache is stacked and the layers are not, or the other way round.
      Unsupported: the chosen backend does not cover an operation of this model.
    """
    decoder = _Decoder(config, lengths, parameters.inverse_frequencies, tokens.shape[1], backend, interpret, adapt)
    hidden = embed(parameters, tokens, dtype)  # [batch, q_len, hidden]
    if isinstance(parameters.layers, Layer) and isinstance(cache, KVCache):
        layers, original = parameters.layers, cache

        def step(index: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            hidden, bits = carry
            hidden, cache = decoder.layer(layers, hidden, from_bits(bits, original), index)
            return hidden, to_bits(cache)

        hidden, bits = jax.lax.fori_loop(0, config.num_layers, step, (hidden, to_bits(cache)))
        cache = from_bits(bits, original)
    elif isinstance(parameters.layers, tuple) and isinstance(cache, tuple):
        caches = []
        # Layers that are alike are traced once. Elsewhere they stay part of the program: a CPU's XLA fuses across them.
        run = jax.jit(decoder.layer) if target_platform() == "gpu" else decoder.layer
        for layer, layer_cache in zip(parameters.layers, cache, strict=True):
            hidden, layer_cache = run(layer, hidden, layer_cache, None)
            caches.append(layer_cache)
        cache = tuple(caches)
    else:
        raise ValueError("cache: must be stacked as the layers of the parameters are; take one of empty_cache")
    last = hidden if every_position else hidden[:, -1]
    logits = decoder.linear(last, parameters.head, norm=parameters.final_norm, out_dtype=jnp.float32)
    return logits, cache


class _Decoder:
    """What all layers of a call share: positions, their rotations, and how operations are run."""

    def __init__(
        self,
        config: ModelConfig,
        lengths: jax.Array,
        inverse_frequencies: jax.Array,
        q_len: int,
        backend: str | None,
        interpret: Any,
        adapt: Adapt | None,
    ) -> None:
        self.config = config
        self.adapt = adapt
        self.lengths = lengths
        self.backend = backend
        self.interpret = interpret
        # A kernel multiplies dense weights on GPUs, and there a few rows; elsewhere whoever asks for kernels gets XLA.
        self.dense_backend = "auto" if (backend or default_backend()) in ("auto", "pallas", "triton") else "xla"
        position = lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)  # [batch, q_len]
        angle = position[..., None].astype(jnp.float32) * inverse_frequencies
        self.rotation = (jnp.cos(angle), jnp.sin(angle))  # [batch, q_len, head_dim / 2] each

    def layer(
        self, layer: Layer, hidden: jax.Array, cache: KVCache, index: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        """One layer over hidden `[batch, q_len, hidden]`: that at `index` where weights and cache are stacked."""
        attended, cache = self.attention(layer, hidden, cache, index)
        hidden = self.linear(attended, layer.output, index, residual=hidden)
        return self.linear(self.gated(layer, hidden, index), layer.down, index, residual=hidden), cache

    def attention(
        self, layer: Layer, x: jax.Array, cache: KVCache, index: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        config = self.config
        heads = (config.q_heads, config.kv_heads, config.kv_heads)
        bias = None if layer.qkv_bias is None else _at(layer.qkv_bias, index)
        qkv = self.linear(x, layer.qkv, index, norm=layer.attention_norm, bias=bias)
        qkv = qkv.reshape(*x.shape[:2], sum(heads), config.head_dim)
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
        """norm(x) @ weight with what can be fused into it; the parts of a tuple side by side."""
        if isinstance(weight, tuple):
            found = [self.linear(x, part, index, norm=norm, out_dtype=out_dtype) for part in weight]
            parts = jnp.concatenate(found, axis=-1)
            return parts if bias is None else parts + bias.astype(parts.dtype)
        norm, eps = None if norm is None else _at(norm, index), self.config.rms_norm_eps
        if self.adapt is not None:
            # It is to see what is multiplied.
            x, norm = x if norm is None else rms_norm(x, norm, eps), None
            x = self.adapt(x, weight)
        fused: dict[str, Any] = {
            "norm": norm,
            "norm_eps": eps,
            "bias": bias,
            "activation": activation,
            "gated": gated,
            "residual": residual,
            "out_dtype": out_dtype,
        }
        if isinstance(weight, QuantizedArray):
            run = {"backend": self.backend, "interpret": self.interpret}
            return quantized_matmul(x, weight, layer=index, **fused, **run)
        return matmul(x, weight, layer=index, **fused, backend=self.dense_backend, interpret=self.interpret)

    def gated(self, layer: Layer, x: jax.Array, index: jax.Array | None) -> jax.Array:
        """silu(x @ gate) * (x @ up), of normalized x."""
        if isinstance(layer.gate_up, tuple):
            gate, up = (
                self.linear(x, weight, index, norm=layer.mlp_norm, activation=activation)
                for weight, activation in zip(layer.gate_up, (jax.nn.silu, None), strict=True)
            )
            return gate * up
        return self.linear(x, layer.gate_up, index, norm=layer.mlp_norm, activation=jax.nn.silu, gated=True)


def _at(x: jax.Array, index: jax.Array | None) -> jax.Array:
    """Entry `index` of a stacked array."""
    return x if index is None else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def embed(parameters: Parameters, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the embedding for tokens `[...]`: `[..., hidden]`. A tied embedding's rows are columns of the head."""
    table = parameters.head if parameters.embedding is None else parameters.embedding
    by_columns = parameters.embedding is None or isinstance(table, QuantizedArray)
    found = from_bits(jax.tree.map(lambda part: _take(part, tokens.reshape(-1), by_columns), to_bits(table)), table)
    rows = dequantize(found, dtype) if isinstance(found, QuantizedArray) else found.astype(dtype)
    return (rows.T if by_columns else rows).reshape(*tokens.shape, -1)


def _take(table: jax.Array, indices: jax.Array, by_columns: bool) -> jax.Array:
    """Rows, or columns, of a matrix."""
    axis = 1 if by_columns else 0
    if len(indices) > FEW_TOKENS:
        return jnp.take(table, indices, axis=axis, mode="clip")
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(table, index, 1, axis) for index in indices], axis)
