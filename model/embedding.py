"""Embeddings of tokens, read from a table that may be quantized, transposed or the output head."""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.model.parameters import Parameters
from palladion.reference import QuantizedArray, dequantize
from palladion.reference.bits import from_bits, to_bits
from palladion.reference.quantization import Order

FEW_TOKENS: Final = 4
"""Up to this many tokens, embeddings are sliced one by one: XLA on a CPU makes a slow loop of a gather of columns."""


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
