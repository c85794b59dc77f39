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
      format: name of the quantization that the file has it in, for messages; empty for floats.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]
    read_quantized: Callable[[], QuantizedArray] | None = None
    format: str = ""


class CheckpointReader(Protocol):
    """An opened checkpoint; everything that can be checked without reading weights has been checked.

    Attributes:
      path: the file or folder.
      name: name of the model.
      family: the family's name in the file.
      config: shapes and constants of the model; `stop_tokens` are the tokenizer's.
      nbytes: size of the tensors in the file or files.
    """

    path: Path
    name: str
    family: str
    config: ModelConfig
    nbytes: int

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


def half_split_tensor(
    array: np.ndarray, name: str, modules: tuple[str, str], head_dim: int, rotary_dim: int
) -> np.ndarray:
    """Returns a tensor with queries and keys in the half-split rotary form; others are returned as they are.

    Some files have the two coordinates of a rotary pair next to each other: their row 2 i + h of a head is the model's
    row i + h * rotary_dim / 2; rows from rotary_dim on stay. Whole rows are moved, so quantized rows are moved without
    loss.

    Args:
      array: a projection or its bias, rows first, or a norm `[heads, head_dim]`.
      name: the tensor's name.
      modules: names of the modules of queries and keys; a matrix in a module whose name ends in "_norm" is their norm.
      head_dim: width of a head.
      rotary_dim: features of a head that are rotated.
    """
    module = name.split(".")[-2]
    if module in modules and array.shape[0] % head_dim == 0:
        return _half_split(array, head_dim, rotary_dim)
    if module.endswith("_norm") and array.ndim == 2 and array.shape[1] == head_dim:
        return _half_split(array.T, head_dim, rotary_dim).T
    return array


def _half_split(rows: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Reorders the rows of each head."""
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    rotated, rest = heads[:, :rotary_dim], heads[:, rotary_dim:]
    pairs = rotated.reshape(len(heads), rotary_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.concatenate([pairs.reshape(rotated.shape), rest], axis=1).reshape(rows.shape)
