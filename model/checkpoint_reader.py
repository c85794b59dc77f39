"""The interface through which the loader reads a checkpoint of any format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_files import CheckpointError
from palladion.model.config import ModelConfig
from palladion.model.tokenizer import Tokenizer
from palladion.reference.quantization import QuantizedArray


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is not read yet.

    Attributes:
      name: name in the file.
      shape: `[out, in]` of a projection or table, `[n]` of a norm or bias (`[heads, head_dim]` where each head has a
        norm of its own), whatever order the file stores.
      read: reads it as a dense NumPy array of `shape` in a float dtype.
      read_quantized: reads it without loss as a `QuantizedArray`; None for types that it cannot hold.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]
    read_quantized: Callable[[], QuantizedArray] | None = None


class CheckpointReader(Protocol):
    """An opened checkpoint; everything that can be checked without reading weights has been checked.

    Attributes:
      path: the file or folder.
      name: name of the model.
      family: the family's name in the file.
      config: shapes and constants of the model; `stop_tokens` are the tokenizer's.
    """

    path: Path
    name: str
    family: str
    config: ModelConfig

    def tensor_names(self) -> Collection[str]:
        """Returns the names of the tensors that hold weights; those that repeat the config are left out."""

    def tensor_name(self, role: str, layer: int | None) -> str | None:
        """Returns the file's name for a tensor's role in the model ("query", "down_bias", …); None if it has none."""

    def tensor(self, name: str) -> StoredTensor:
        """Returns a tensor that `tensor_names` lists; raises CheckpointError where its type is unsupported."""

    def inverse_frequencies(self) -> np.ndarray:
        """Returns the rotary frequencies, `[rotary_dim / 2]` or `[sets, rotary_dim / 2]` float32, scaled."""

    def tokenizer(self) -> Tokenizer:
        """Returns the checkpoint's tokenizer."""


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Returns `array.astype(dtype)` in new memory.

    Raises:
      CheckpointError: the result is not finite: the file is damaged, or a value overflows the dtype.
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.isfinite(result).all():
        return result
    if np.isfinite(array).all():
        raise CheckpointError(f"{name} has values beyond the range of {jnp.dtype(dtype)}; use dtype='bfloat16'")
    raise CheckpointError(f"{name} has values that are not finite, the file is damaged; download it again")


def half_split(rows: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Returns the rows of a query or key projection, or its biases, in the half-split rotary form.

    Some files have the two coordinates of a rotary pair next to each other: their row 2 i + h of a head is the model's
    row i + h * rotary_dim / 2; rows from rotary_dim on stay. Whole rows are moved, so quantized rows are moved without
    loss.
    """
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    rotated, rest = heads[:, :rotary_dim], heads[:, rotary_dim:]
    pairs = rotated.reshape(len(heads), rotary_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.concatenate([pairs.reshape(rotated.shape), rest], axis=1).reshape(rows.shape)
