"""Shapes and constants of a decoder: what the families of models have in common, and where they differ."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Options in which layers of one model differ.

    Attributes:
      windowed: whether the model's sliding window applies.
      rotation: index of the rotary frequencies; None rotates nothing.
    """

    windowed: bool = True
    rotation: int | None = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder with grouped-query attention; the defaults are those of Llama.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_layers: decoder layers.
      q_heads: query heads.
      kv_heads: key/value heads; divides q_heads.
      head_dim: width of a head.
      max_positions: the longest context the model was trained for, in tokens.
      tied_embedding: whether the embedding is also the output head.
      stop_tokens: token ids that end a generation.
      layer_kinds: the shortest sequence of kinds that the layers repeat: layer i has kind i % len(layer_kinds).
      sliding_window: tokens that a query of a windowed layer attends to, itself included; None means all.
      rotary_scales: factor of sines and cosines, for each set of rotary frequencies.
      long_context: a cache with room for more tokens rotates by the second set of frequencies; None if there is none.
      norm: "rms", or "layer" for LayerNorm, which subtracts the mean.
      norm_eps: number added to the mean square, or to the variance, before the root.
      pre_norm: whether the inputs of attention and MLP are normalized.
      post_norm: whether their outputs are normalized, before they are added to the residual stream.
      parallel: whether attention and MLP have the same normalized input, and their outputs are added together.
      qk_norm: queries and keys are normalized before they are rotated: each head, with one weight for all ("head") or
        one each ("heads"), or all heads together ("projection"); None for no norm.
      activation: activation of the MLP.
      gated: whether the activation is that of a gate, which is multiplied by another projection.
      attention_scale: factor of the attention logits; None means 1 / sqrt(head_dim).
      attention_soft_cap: bound of the attention logits, or None.
      logit_soft_cap: bound of the output logits, or None.
      embedding_scale: factor of the embeddings.
      residual_scale: factor of what attention and MLP add to the residual stream.
      logit_scale: factor of the output logits.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    tied_embedding: bool = False
    stop_tokens: tuple[int, ...] = ()
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    sliding_window: int | None = None
    rotary_scales: tuple[float, ...] = (1.0,)
    long_context: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    qk_norm: Literal["head", "heads", "projection"] | None = None
    activation: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    gated: bool = True
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

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
        if not 1 <= len(self.layer_kinds) <= self.num_layers:
            raise ValueError(
                f"ModelConfig.layer_kinds: must have 1 to num_layers = {self.num_layers} kinds, got "
                f"{len(self.layer_kinds)}"
            )


def shortest_period(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """Returns the shortest beginning of a sequence of kinds that, repeated, gives the sequence."""
    for period in range(1, len(kinds)):
        if all(kind == kinds[index % period] for index, kind in enumerate(kinds)):
            return kinds[:period]
    return kinds
