"""The interface through which the loader reads a checkpoint of any format."""

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
"""Highest rotary frequency in radians per token: beyond it float32 cannot tell angles one radian apart."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is not read yet.

    Attributes:
      name: name in the file.
      shape: `[out, in]` of a projection or table, `[n]` of a norm or bias, whatever order the file stores.
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
      config: shapes and constants of the model; `stop_tokens` are the tokenizer's.
    """

    path: Path
    name: str
    config: ModelConfig

    def tensor_names(self) -> Collection[str]:
        """Returns the names of the tensors that hold weights; those that repeat the config are left out."""

    def tensor_name(self, role: str, layer: int | None) -> str:
        """Returns the file's name for a tensor's role in the model ("query", "down", "embedding", …)."""

    def tensor(self, name: str) -> StoredTensor:
        """Returns a tensor that `tensor_names` lists; raises CheckpointError where its type is unsupported."""

    def inverse_frequencies(self) -> np.ndarray:
        """Returns the rotary frequencies, `[head_dim / 2]` float32, any scaling applied."""

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


def rotary_frequencies(
    head_dim: int, theta: float, *, scaling: RopeScaling | None = None, divisors: np.ndarray | float = 1.0
) -> np.ndarray:
    """Returns the rotary frequencies of a head: theta ** (-2 i / head_dim), scaled.

    Args:
      head_dim: width of a head, even.
      theta: base of the frequencies.
      scaling: Llama 3's scaling, or None.
      divisors: divisor of each frequency, `[head_dim / 2]`, or one number for all (linear scaling).

    Returns:
      `[head_dim / 2]` float32, computed in float64.
    """
    with np.errstate(all="ignore"):  # Damaged constants give infinities, which check_frequencies reports.
        frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if scaling is not None:
            # Frequencies that turn seldom within the original context are scaled, those that turn often are kept.
            turns = scaling.original_max_positions * frequencies / (2 * np.pi)
            kept = (turns - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            kept = np.clip(kept, 0.0, 1.0)
            frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
        return (frequencies / divisors).astype(np.float32)


def check_frequencies(frequencies: np.ndarray, label: str) -> np.ndarray:
    """Returns the frequencies unchanged; `label` names the file in an error.

    Raises:
      CheckpointError: they are not finite, all zero, or too high for float32 angles.
    """
    if not np.isfinite(frequencies).all() or not 0 < frequencies.max() <= HIGHEST_FREQUENCY:
        raise CheckpointError(
            f"{label}: its rotary base and scaling factors give frequencies from {frequencies.min():g} to "
            f"{frequencies.max():g}; the highest of a trained model is about 1: take the original file"
        )
    return frequencies
