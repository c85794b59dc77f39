"""Rotary positions: the frequencies of every kind of scaling, and the angles of tokens.

Sources: RoFormer (arXiv 2104.09864); linear scaling (arXiv 2306.15595); YaRN (arXiv 2309.00071); LongRoPE (arXiv
2402.13753); Llama 3's scaling (arXiv 2407.21783).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_files import CheckpointError
from palladion.model.config import ModelConfig

HIGHEST_FREQUENCY: Final = 2.0**24
"""Highest rotary frequency in radians per token: beyond it float32 cannot tell angles one radian apart."""


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of the rotary frequencies to longer contexts.

    Attributes:
      factor: divisor of low frequencies.
      low_frequency_factor: wavelengths above original_max_positions / low_frequency_factor are stretched by `factor`.
      high_frequency_factor: wavelengths below original_max_positions / high_frequency_factor are unchanged.
      original_max_positions: context length that the model was first trained with.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the scaled frequencies: those that turn seldom within the original context are divided."""
        del theta
        turns = self.original_max_positions * frequencies / (2 * np.pi)
        kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        return _blend(frequencies, np.clip(kept, 0.0, 1.0), self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's scaling: a ramp over the frequencies' indices, from those that are kept to those that are divided.

    Attributes:
      factor: divisor of low frequencies.
      original_max_positions: context length that the model was first trained with.
      beta_fast: frequencies with more turns within the original context are unchanged.
      beta_slow: frequencies with fewer turns are divided by `factor`.
      truncate: whether the ends of the ramp are rounded to whole indices.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the scaled frequencies."""
        pairs = len(frequencies)

        def index_of(turns: float) -> float:
            """Returns the index of the frequency that turns so often, as a real number."""
            return pairs * math.log(self.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

        first, last = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        divided = np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0.0, 1.0)
        return _blend(frequencies, 1.0 - divided, self.factor)

    def attention_factor(self, numerator: float = 1.0, denominator: float = 0.0) -> float:
        """Returns the factor of sines and cosines: a ratio of two temperatures, each 0.1 * m * log(factor) + 1.

        Args:
          numerator: m of the numerator.
          denominator: m of the denominator.
        """
        logarithm = 0.1 * math.log(max(self.factor, 1.0))
        return (numerator * logarithm + 1.0) / (denominator * logarithm + 1.0)


def _blend(frequencies: np.ndarray, kept: np.ndarray, factor: float) -> np.ndarray:
    """Returns frequencies whose shares `kept` are unchanged and whose other shares are divided by `factor`."""
    return frequencies * (kept + (1.0 - kept) / factor)


def rotary_frequencies(
    rotary_dim: int,
    theta: float,
    *,
    scaling: Llama3Scaling | YarnScaling | None = None,
    divisors: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Returns the rotary frequencies of a head: theta ** (-2 i / rotary_dim), scaled.

    Args:
      rotary_dim: features of a head that are rotated, an even number.
      theta: base of the frequencies.
      scaling: Llama 3's scaling, YaRN's, or None.
      divisors: divisor of each frequency, `[rotary_dim / 2]`, or one number for all (linear scaling).

    Returns:
      `[rotary_dim / 2]` float32, computed in float64.
    """
    with np.errstate(all="ignore"):  # Damaged constants give infinities, which check_frequencies reports.
        frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
        if scaling is not None:
            frequencies = scaling.scale(frequencies, theta)
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


class Rotation(NamedTuple):
    """The rotary angles of the new tokens.

    Attributes:
      cosine: float32 `[batch, q_len, rotary_dim / 2]`.
      sine: float32 `[batch, q_len, rotary_dim / 2]`.
    """

    cosine: jax.Array
    sine: jax.Array


def rotate(
    config: ModelConfig, lengths: jax.Array, q_len: int, inverse_frequencies: jax.Array, room: int
) -> tuple[Rotation, ...]:
    """Returns the rotary angles of each sequence's last q_len tokens, by each set of frequencies that a layer may use.

    Args:
      config: has the scales of the sets.
      lengths: int32 `[batch]`, tokens of each sequence.
      q_len: new tokens of each sequence.
      inverse_frequencies: `[rotary_dim / 2]`, or `[sets, rotary_dim / 2]`.
      room: tokens that the cache has room for.
    """
    position = lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)  # [batch, q_len]
    sets = list(zip(jnp.atleast_2d(inverse_frequencies), config.rotary_scales, strict=True))
    if config.long_context is not None:
        sets = sets[1:] if room > config.long_context else sets[:1]
    angles = [(position[..., None].astype(jnp.float32) * frequencies, scale) for frequencies, scale in sets]
    return tuple(Rotation(jnp.cos(angle) * scale, jnp.sin(angle) * scale) for angle, scale in angles)
