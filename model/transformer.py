"""The decoder: embedding, layers of attention and MLP, output head; one function for prefill and decode.

`forward` takes the newest tokens of every sequence, appends their keys and values to the cache and returns logits. A
prompt is a call with many tokens, a decode step a call with one. Sequences are aligned at their ends: token i of a call
has the position lengths - q_len + i, and a shorter prompt is padded in front, where nothing is written or attended to.

All families of models are this one decoder: `ModelConfig` has the options in which they differ, and weights that a
family lacks are None.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.kernels.append_qkv import append_qkv
from palladion.kernels.decode_attention import decode_attention
from palladion.kernels.matmul import matmul
from palladion.kernels.quantized_matmul import quantized_matmul
from palladion.model.config import LayerKind, ModelConfig
from palladion.model.embedding import embed
from palladion.model.normalization import normalize, normalize_queries_and_keys
from palladion.model.parameters import Layer, Parameters, Weight
from palladion.model.rotary import Rotation, rotate
from palladion.reference import KVCache, QuantizedArray
from palladion.reference.bits import from_bits, to_bits
from palladion.reference.modes import usual_modes
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import Order

Cache = KVCache | tuple[KVCache, ...]
"""The KV caches of all layers: one stacked `KVCache`, or one per layer, like the layers of `Parameters`."""

Adapt = Callable[[jax.Array, Weight], jax.Array]
"""A function of activations `[..., in]` and the weight that multiplies them, stacked where the layers are."""


def squared_relu(x: jax.Array) -> jax.Array:
    """Returns the square of x where it is positive, else 0."""
    positive = jnp.maximum(x, 0)
    return positive * positive


ACTIVATIONS: Final = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu, "relu2": squared_relu}
"""Activations of the MLP by their names in `ModelConfig`."""


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
    room = (cache if isinstance(cache, KVCache) else cache[0]).k.shape[-2]
    rotations = rotate(config, lengths, tokens.shape[1], parameters.inverse_frequencies, room)
    decoder = _Decoder(config, lengths, rotations, parameters.order, backend, interpret, adapt)
    hidden = embed(parameters, tokens, dtype)  # [batch, q_len, hidden]
    if config.embedding_scale != 1.0:
        hidden = hidden * jnp.asarray(config.embedding_scale, hidden.dtype)
    kinds = config.layer_kinds
    if isinstance(parameters.layers, Layer) and isinstance(cache, KVCache):
        layers, stacked_cache = parameters.layers, cache
        Carry = tuple[jax.Array, KVCache]  # the cache as bits

        def one(index: jax.Array | int, kind: LayerKind, carry: Carry) -> Carry:
            hidden, cache = carry[0], from_bits(carry[1], stacked_cache)
            hidden, cache = decoder.layer(layers, hidden, cache, jnp.asarray(index, jnp.int32), kind)
            return hidden, to_bits(cache)

        def period(number: jax.Array, carry: Carry) -> Carry:
            """Runs one layer of each kind: the kind decides what is compiled, so it cannot depend on a loop's index."""
            for offset, kind in enumerate(kinds):
                carry = one(number * len(kinds) + offset, kind, carry)
            return carry

        # The loop carries the cache as bits: XLA on a CPU would convert all of a bfloat16 or float8 cache to float32.
        periods, rest = divmod(config.num_layers, len(kinds))
        carry = jax.lax.fori_loop(0, periods, period, (hidden, to_bits(cache)))
        for offset in range(rest):
            carry = one(periods * len(kinds) + offset, kinds[offset], carry)
        hidden, cache = carry[0], from_bits(carry[1], stacked_cache)
    elif isinstance(parameters.layers, tuple) and isinstance(cache, tuple):
        caches = []
        # On a GPU equal layers are traced once. A CPU's XLA fuses across layers, so there they stay one program.
        run = jax.jit(decoder.layer, static_argnums=4) if target_platform() == "gpu" else decoder.layer
        for number, (layer, layer_cache) in enumerate(zip(parameters.layers, cache, strict=True)):
            hidden, layer_cache = run(layer, hidden, layer_cache, None, kinds[number % len(kinds)])
            caches.append(layer_cache)
        cache = tuple(caches)
    else:
        raise ValueError(
            f"cache: got {type(cache).__name__} for layers in a {type(parameters.layers).__name__}; accepted: stacked "
            "where the layers are, a tuple where they are one; `empty_cache` makes it"
        )
    last = hidden if every_position else hidden[:, -1]
    logits = decoder.linear(last, parameters.head, norm=parameters.final_norm, out_dtype=jnp.float32)
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
    return logits, cache


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoder:
    """Everything that the layers of a call share.

    Attributes:
      config: shapes and constants of the model.
      lengths: int32 `[batch]`, tokens in the cache, new ones included.
      rotations: rotary angles of the new tokens, by each set of frequencies.
      order: storage order of dense weights.
      backend: backend of the operations.
      interpret: whether kernels are interpreted.
      adapt: as for `forward`.
    """

    config: ModelConfig
    lengths: jax.Array
    rotations: tuple[Rotation, ...]
    order: Order
    backend: str | None
    interpret: Any
    adapt: Adapt | None

    def layer(
        self, layer: Layer, hidden: jax.Array, cache: KVCache, index: jax.Array | None, kind: LayerKind
    ) -> tuple[jax.Array, KVCache]:
        """Runs one layer over hidden `[batch, q_len, hidden]`; `index` selects it where layers are stacked."""
        x, cache = self.attention(layer, hidden, cache, index, kind)
        after = self.added(hidden, x, layer.output, layer.output_bias, layer.attention_post_norm, index)
        x = self.mlp(layer, hidden if self.config.parallel else after, index)
        return self.added(after, x, layer.down, layer.down_bias, layer.mlp_post_norm, index), cache

    def added(
        self,
        hidden: jax.Array,
        x: jax.Array,
        weight: Weight,
        bias: jax.Array | None,
        norm: jax.Array | None,
        index: jax.Array | None,
    ) -> jax.Array:
        """Returns hidden + residual_scale * norm(x @ weight + bias)."""
        scale = self.config.residual_scale
        if norm is None and scale == 1.0:
            return self.linear(x, weight, index, bias=bias, residual=hidden)
        y = self.linear(x, weight, index, bias=bias)
        y = y if norm is None else normalize(self.config, y, _select(norm, index))
        return hidden + (y if scale == 1.0 else y * jnp.asarray(scale, y.dtype))

    def attention(
        self, layer: Layer, x: jax.Array, cache: KVCache, index: jax.Array | None, kind: LayerKind
    ) -> tuple[jax.Array, KVCache]:
        """Returns the attention of x's tokens, `[batch, q_len, q_heads * head_dim]`, and the cache that holds them."""
        config, rotation = self.config, self.rotations[kind.rotation or 0]
        if kind.rotation is None:  # all angles are 0
            rotation = Rotation(jnp.ones_like(rotation.cosine), jnp.zeros_like(rotation.sine))
        qkv = self.linear(x, layer.qkv, index, norm=layer.attention_norm, bias=layer.qkv_bias)
        qkv = qkv.reshape(*x.shape[:2], config.q_heads + 2 * config.kv_heads, config.head_dim)
        if layer.qk_norm is not None:
            qkv = normalize_queries_and_keys(config, qkv, _select(layer.qk_norm, index))
        q, cache = append_qkv(
            cache, qkv, self.lengths, *rotation, layer=index, backend=self.backend, interpret=self.interpret
        )
        out = decode_attention(
            q,
            cache.k,
            cache.v,
            self.lengths,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            scale=config.attention_scale,
            sliding_window=config.sliding_window if kind.windowed else None,
            logits_soft_cap=config.attention_soft_cap,
            layer=index,
            backend=self.backend,
            interpret=self.interpret,
        )
        return out.reshape(*x.shape[:2], -1), cache

    def mlp(self, layer: Layer, x: jax.Array, index: jax.Array | None) -> jax.Array:
        """Returns activation(norm(x) @ gate) * (norm(x) @ up), or activation(norm(x) @ up) where there is no gate."""
        activation = ACTIVATIONS[self.config.activation]
        norm = layer.attention_norm if self.config.parallel else layer.mlp_norm
        if not isinstance(layer.gate_up, tuple):
            bias, gated = layer.gate_up_bias, self.config.gated
            return self.linear(x, layer.gate_up, index, norm=norm, bias=bias, activation=activation, gated=gated)
        biases = (None, None) if layer.gate_up_bias is None else jnp.split(layer.gate_up_bias, 2, axis=-1)
        gate, up = (
            self.linear(x, weight, index, norm=norm, bias=bias, activation=one)
            for weight, bias, one in zip(layer.gate_up, biases, (activation, None), strict=True)
        )
        return gate * up

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
            return joined if bias is None else joined + _select(bias, index).astype(joined.dtype)
        norm, bias = (None if vector is None else _select(vector, index) for vector in (norm, bias))
        if norm is not None and (self.adapt is not None or self.config.norm == "layer"):  # products fuse RMS norm alone
            x, norm = normalize(self.config, x, norm), None
        if self.adapt is not None:  # it sees what is multiplied: the normalized activations
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
            norm_eps=self.config.norm_eps,
            residual=residual,
            layer=index,
            out_dtype=out_dtype,
            backend=self.backend,
            interpret=self.interpret,
        )


def _select(x: jax.Array, index: jax.Array | None) -> jax.Array:
    """Returns entry `index` of a stacked array, or x where it is not stacked."""
    return x if index is None else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
