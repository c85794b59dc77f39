"""What the loader needs of a checkpoint, whatever its files look like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final, Protocol

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_files import CheckpointError
from palladion.model.config import ModelConfig, RopeScaling
from palladion.model.tokenizer import Tokenizer
from palladion.reference.quantization import QuantizedArray

HIGHEST_FREQUENCY: Final = 2.0**24
"""Radians a token, beyond which float32 has less than one number for each radian."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, not read yet.

    Attributes:
      name: its name in the file.
      shape: `[out, in]` of a projection or table, `[n]` of a norm or bias, whatever the file's own order.
      read: reads it as a dense NumPy array of `shape` in a float dtype.
      read_quantized: reads it without loss as a `QuantizedArray`, or None where the file's format has no such form.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]
    read_quantized: Callable[[], QuantizedArray] | None = None


class CheckpointReader(Protocol):
    """An opened checkpoint: everything is checked that can be checked without reading the weights.

    Attributes:
      path: the file or folder.
      name: what the model calls itself.
      config: shapes and constants; `stop_tokens` are the tokenizer's.
    """

    path: Path
    name: str
    config: ModelConfig

    def tensor_names(self) -> Collection[str]:
        """Names of the tensors that hold weights; those that repeat what the config says are left out."""

    def name_of(self, part: str, layer: int | None) -> str:
        """The file's name for a part of the model ("query", "down", "embedding", …)."""

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of that name, which `tensor_names` lists; raises CheckpointError where its type is unsupported."""

    def inverse_frequencies(self) -> np.ndarray:
        """The rotary frequencies, `[head_dim / 2]` float32, any scaling applied."""

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array.astype(dtype)` in new memory.

    Raises:
      CheckpointError: the result has infinities or NaN: no trained weight is one, and a narrow dtype may make some.
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.isfinite(result).all():
        return result
    if np.isfinite(array).all():
        raise CheckpointError(f"{name} has values beyond the range of {jnp.dtype(dtype)}; use dtype='bfloat16'")
    raise CheckpointError(f"{name} has values that are not finite, the file is damaged; download it again")


def rotary_frequencies(
    head_dim: int, theta: float, *, scaling: RopeScaling | None = None, divisors: np.ndarray | float = 1.0
) -> np.ndarray:
    """The rotary frequencies of a head: theta ** (-2 i / head_dim), stretched.

    Args:
      head_dim: width of a head, even.
      theta: base of the frequencies.
      scaling: Llama 3's scaling, or None.
      divisors: what each frequency is divided by, `[head_dim / 2]` or one number for all (linear scaling).

    Returns:
      `[head_dim / 2]` float32, computed in float64.
    """
    with np.errstate(all="ignore"):  # Damaged constants give what is not finite, and check_frequencies finds it.
        frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if scaling is not None:
            # How many turns a frequency makes within the original context: few are stretched, many are left alone.
            turns = scaling.original_max_positions * frequencies / (2 * np.pi)
            kept = (turns - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            kept = np.clip(kept, 0.0, 1.0)
            frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
        return (frequencies / divisors).astype(np.float32)


def check_frequencies(frequencies: np.ndarray, label: str) -> np.ndarray:
    """The frequencies as they are; `label` names the file in an error.

    Raises:
      CheckpointError: they are not finite, all zero, or so high that even the second token has no angle in float32.
    """
    if not np.isfinite(frequencies).all() or not 0 < frequencies.max() <= HIGHEST_FREQUENCY:
        raise CheckpointError(
            f"{label}: its rotary base and scaling factors give frequencies from {frequencies.min():g} to "
            f"{frequencies.max():g}; the highest of a trained model is about 1: take the original file"
        )
    return frequencies
