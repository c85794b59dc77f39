"""The weights of a model as a pytree, and how many bytes of them one decode step reads."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from palladion.reference.quantization import QuantizedArray

Weight = jax.Array | QuantizedArray
"""A linear layer's weight `[in, out]`: a dense array or a QuantizedArray."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer. Projections of the same input are joined along `out`, so that a step reads them in one pass.

    Attributes:
      attention_norm: `[hidden]`.
      qkv: query, key and value projections, `out` = (q_heads + 2 * kv_heads) * head_dim in this order; a tuple of
        weights, their outputs to be concatenated, where a checkpoint's formats differ and cannot be joined.
      qkv_bias: `[(q_heads + 2 * kv_heads) * head_dim]` or None.
      output: `in` = q_heads * head_dim, `out` = hidden.
      mlp_norm: `[hidden]`.
      gate_up: gate and up projections, `out` = 2 * intermediate, the gate first; a tuple as for qkv.
      down: `in` = intermediate, `out` = hidden.
    """

    attention_norm: jax.Array
    qkv: Weight | tuple[Weight, ...]
    qkv_bias: jax.Array | None
    output: Weight
    mlp_norm: jax.Array
    gate_up: Weight | tuple[Weight, ...]
    down: Weight


class LayerStack:
    """Collects layers one at a time, stacked or apart; a stack is filled in place, so that no weight is held twice."""

    def __init__(self, num_layers: int, stacked: bool) -> None:
        self._num_layers = num_layers
        self._stacked = stacked
        self._stack: Layer | None = None
        self._count = 0
        self._apart: list[Layer] = []

    def append(self, layer: Layer) -> None:
        """Takes the next layer; one that differs in form from those before it breaks the stack up."""
        if self._stack is not None and not _same_form(layer, self._stack):
            self._apart = [_take(self._stack, index) for index in range(self._count)]
            self._stack, self._stacked = None, False
        if not self._stacked:
            self._apart.append(layer)
            return
        if self._stack is None:
            self._stack = jax.tree.map(lambda leaf: jnp.zeros((self._num_layers, *leaf.shape), leaf.dtype), layer)
        self._stack = _put(self._stack, layer, self._count)
        self._count += 1

    def result(self) -> Layer | tuple[Layer, ...]:
        """All layers: one `Layer` of stacked arrays, or a tuple."""
        return tuple(self._apart) if self._stack is None else self._stack


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Layer, layer: Layer, index: int) -> Layer:
    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)

    return jax.tree.map(put, stack, layer)


def _take(stack: Layer, index: int) -> Layer:
    return jax.tree.map(lambda whole: whole[index], stack)


def _same_form(layer: Layer, stack: Layer) -> bool:
    """Whether a layer has the structure, shapes and dtypes of those in a stack."""
    if len({jax.tree.structure(layer), jax.tree.structure(stack)}) > 1:
        return False
    pairs = zip(jax.tree.leaves(layer), jax.tree.leaves(stack), strict=True)
    return all(part.shape == whole.shape[1:] and part.dtype == whole.dtype for part, whole in pairs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """All weights of a model.

    Attributes:
      embedding: token embedding, one row per token: dense `[vocab, hidden]`, or a QuantizedArray of `in` = hidden and
        `out` = vocab; None where it is tied, its rows the columns of `head`.
      layers: the decoder layers: a tuple, or one `Layer` whose arrays are stacked, `[num_layers, ...]`.
      final_norm: `[hidden]`.
      head: the output head, `in` = hidden, `out` = vocab.
      inverse_frequencies: `[head_dim / 2]` float32, the rotary frequencies, any scaling already applied.
    """

    embedding: Weight | None
    layers: tuple[Layer, ...] | Layer
    final_norm: jax.Array
    head: Weight
    inverse_frequencies: jax.Array

    @property
    def nbytes(self) -> int:
        """Bytes that the weights occupy."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def bytes_per_step(self, batch: int) -> int:
        """Bytes of weights that a decode step must read: all, but only `batch` rows of an untied embedding."""
        if self.embedding is None:
            return self.nbytes
        table = self.embedding.nbytes
        rows = self.embedding.shape[-1] if isinstance(self.embedding, QuantizedArray) else self.embedding.shape[0]
        return self.nbytes - table + batch * (table // rows)
