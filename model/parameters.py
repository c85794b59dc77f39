"""The weights of a model as a pytree, and how many bytes of them one decode step reads."""

from __future__ import annotations

import dataclasses

import jax

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
