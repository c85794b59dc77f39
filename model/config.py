"""Shapes and constants of a Llama-family model."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder with grouped-query attention, rotary positions, RMSNorm and a SwiGLU MLP.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_layers: decoder layers.
      q_heads: query heads.
      kv_heads: key/value heads; divides q_heads.
      head_dim: width of a head.
      max_positions: the longest context the model was trained for, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Llama 3's frequency scaling, or None.
      rms_norm_eps: constant added to the mean square before the root.
      sliding_window: tokens that a query attends to, itself included; None means all.
      tied_embedding: whether the embedding is also the output head.
      stop_tokens: token ids that end a generation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tied_embedding: bool = False
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "q_heads",
            "kv_heads",
            "head_dim",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"ModelConfig.{field}: must be at least 1, got {getattr(self, field)}")
        if self.max_positions < 2:
            raise ValueError(
                f"ModelConfig.max_positions: must be at least 2, a token to read and one to write, got "
                f"{self.max_positions}"
            )
        if self.q_heads % self.kv_heads:
            raise ValueError(f"ModelConfig: q_heads = {self.q_heads} is not a multiple of kv_heads = {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim: rotary positions need an even head_dim, got {self.head_dim}")
