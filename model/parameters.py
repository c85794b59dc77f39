"""The weights of a model as a pytree, and the bytes of them that one decode step reads."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from palladion.reference.quantization import Order, QuantizedArray

Weight = jax.Array | QuantizedArray
"""The weight of a linear layer, logically `[in, out]`: a dense array or a QuantizedArray."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer; projections of the same input are joined along `out`, so that one product reads them all.

    A norm is `[hidden]`, or `[2, hidden]` with the factors and the biases of a LayerNorm. What a family lacks is None.

    Attributes:
      attention_norm: norm of attention's input.
      qkv: query, key and value projections in this order, `out` = (q_heads + 2 * kv_heads) * head_dim; a tuple of
        weights, whose outputs are concatenated, where a checkpoint stores them in different formats.
      qkv_bias: `[(q_heads + 2 * kv_heads) * head_dim]`.
      qk_norm: `[q_heads + kv_heads, head_dim]`, the norm of queries and keys.
      output: `in` = q_heads * head_dim, `out` = hidden.
      output_bias: `[hidden]`.
      attention_post_norm: norm of attention's output.
      mlp_norm: norm of the MLP's input.
      gate_up: gate and up projections in this order, `out` = 2 * intermediate; or a tuple, as for qkv. An MLP without
        gate has the up projection alone.
      gate_up_bias: biases of gate_up.
      down: `in` = intermediate, `out` = hidden.
      down_bias: `[hidden]`.
      mlp_post_norm: norm of the MLP's output.
    """

    attention_norm: jax.Array | None
    qkv: Weight | tuple[Weight, ...]
    qkv_bias: jax.Array | None
    qk_norm: jax.Array | None = None
    output: Weight
    output_bias: jax.Array | None = None
    attention_post_norm: jax.Array | None = None
    mlp_norm: jax.Array | None
    gate_up: Weight | tuple[Weight, ...]
    gate_up_bias: jax.Array | None = None
    down: Weight
    down_bias: jax.Array | None = None
    mlp_post_norm: jax.Array | None = None


class LayerStack:
    """Collects layers one at a time, stacked or as a list; a stack is filled in place, so no weight is held twice."""

    def __init__(self, num_layers: int, stacked: bool) -> None:
        self._num_layers = num_layers
        self._stacked = stacked
        self._stack: Layer | None = None
        self._count = 0
        self._list: list[Layer] = []

    def append(self, layer: Layer) -> None:
        """Adds the next layer; one of another structure, shape or dtype turns the stack into a list."""
        if self._stack is not None and not _same_form(layer, self._stack):
            self._list = [_read(self._stack, index) for index in range(self._count)]
            self._stack, self._stacked = None, False
        if not self._stacked:
            self._list.append(layer)
            return
        if self._stack is None:
            self._stack = jax.tree.map(lambda leaf: jnp.zeros((self._num_layers, *leaf.shape), leaf.dtype), layer)
        self._stack = _write(self._stack, layer, self._count)
        self._count += 1

    def result(self) -> Layer | tuple[Layer, ...]:
        """Returns all layers: one `Layer` of stacked arrays, or a tuple."""
        return tuple(self._list) if self._stack is None else self._stack


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: Layer, layer: Layer, index: int) -> Layer:
    """Writes a layer into a stack."""

    def write(stacked: jax.Array, leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, leaf, index, 0)

    return jax.tree.map(write, stack, layer)


def _read(stack: Layer, index: int) -> Layer:
    """Returns a layer of a stack."""
    return jax.tree.map(lambda stacked: stacked[index], stack)


def _same_form(layer: Layer, stack: Layer) -> bool:
    """Returns whether a layer has the structure, shapes and dtypes of the layers in a stack."""
    if len({jax.tree.structure(layer), jax.tree.structure(stack)}) > 1:
        return False
    pairs = zip(jax.tree.leaves(layer), jax.tree.leaves(stack), strict=True)
    return all(leaf.shape == stacked.shape[1:] and leaf.dtype == stacked.dtype for leaf, stacked in pairs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """All weights of a model.

    Attributes:
      embedding: token embedding, one row per token: dense `[vocab, hidden]`, or a QuantizedArray of `in` = hidden and
        `out` = vocab; None where it is tied: its rows are then the channels of `head`.
      layers: the decoder layers: a tuple, or one `Layer` of stacked arrays, `[num_layers, ...]`.
      final_norm: `[hidden]`, or `[2, hidden]` for a LayerNorm.
      head: the output head, `in` = hidden, `out` = vocab.
      inverse_frequencies: `[rotary_dim / 2]` float32, the rotary frequencies, any scaling already applied; or
        `[sets, rotary_dim / 2]` where layers differ, or long contexts do.
      order: storage order of all dense weights; a QuantizedArray has an order of its own.
    """

    embedding: Weight | None
    layers: tuple[Layer, ...] | Layer
    final_norm: jax.Array
    head: Weight
    inverse_frequencies: jax.Array
    order: Order = dataclasses.field(default="in_out", metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def bytes_per_step(self, batch: int) -> int:
        """Returns the bytes of weights that a decode step reads: all, but only `batch` rows of an untied embedding."""
        if self.embedding is None:
            return self.nbytes
        table = self.embedding.nbytes
        rows = self.embedding.shape[-1] if isinstance(self.embedding, QuantizedArray) else self.embedding.shape[0]
        return self.nbytes - table + batch * (table // rows)


def without_float16_scales(parameters: Parameters) -> Parameters:
    """Converts float16 scales to float32: TPUs have no float16."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, QuantizedArray) and leaf.scales.dtype == "float16":
            return leaf.with_scale_dtype("float32")
        return leaf

    return jax.tree.map(convert, parameters, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
