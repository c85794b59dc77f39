"""Shapes of real models, the calls of each operation in a decode step, and the bytes that a step must read.

Bytes and FLOPs of a call come from the operation's `Problem`; those of a model are sums over its calls.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from palladion.kernels.append_kv.cases import Case as AppendCase
from palladion.kernels.append_qkv.cases import Case as JoinedCase
from palladion.kernels.checks import check
from palladion.kernels.decode_attention.cases import Case as AttentionCase
from palladion.kernels.matmul.cases import Case as DenseCase
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase
from palladion.model.config import LayerKind, ModelConfig, shortest_period
from palladion.reference.caches import bytes_per_token
from palladion.reference.scheme import Scheme

ACTIVATIONS: Final = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}

MODEL_ACTIVATIONS: Final[dict[str, Literal["silu", "gelu_tanh"]]] = {"silu": "silu", "gelu": "gelu_tanh"}
"""Names of the same activations in `ModelConfig`."""

DENSE: Final = ("float32", "bfloat16", "float16")
"""Dtypes of weights that are not quantized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's shapes; `model_shapes.json` has those of known models.

    Attributes:
      name: the model's name, "llama3-8b" for example.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP, or of one expert's.
      num_layers: decoder layers.
      q_heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of a head.
      vocab_size: rows of the embedding.
      tied_embedding: whether the output head is the embedding.
      sliding_window: visible tokens in layers with a window; None where no layer has one.
      window_period: one layer in so many, the last of them, has no window; None where every layer has it.
      logits_soft_cap: bound of the attention logits, or None.
      sinks: whether heads have attention sinks.
      activation: activation of the gate, a name in `ACTIVATIONS`.
      experts: MLPs in a layer.
      experts_per_token: MLPs that a token takes.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embedding: bool
    sliding_window: int | None = None
    window_period: int | None = None
    logits_soft_cap: float | None = None
    sinks: bool = False
    activation: str = "silu"
    experts: int = 1
    experts_per_token: int = 1

    @property
    def qkv_features(self) -> int:
        """Output channels of the joined query, key and value projections."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def global_layers(self) -> int:
        """Number of layers without a window."""
        return sum(window is None for window in self.windows())

    def windows(self) -> tuple[int | None, ...]:
        """Returns the window of each layer, None where it attends to everything."""
        period = self.window_period
        return tuple(
            None if period is not None and (layer + 1) % period == 0 else self.sliding_window
            for layer in range(self.num_layers)
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns `(in, out)` of a layer's linear layers, of one expert's MLP, and of the output head."""
        return {
            "qkv": (self.hidden_size, self.qkv_features),
            "output": (self.q_heads * self.head_dim, self.hidden_size),
            "gate-up": (self.hidden_size, 2 * self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
            "head": (self.hidden_size, self.vocab_size),
        }

    def parameters(self) -> int:
        """Returns the number of weights of all linear layers, embeddings and norms, without routers and biases."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        embedding = 0 if self.tied_embedding else self.vocab_size * self.hidden_size
        return embedding + norms + sum(self._count(name, self.experts) for name in self.linears())

    def active_parameters(self) -> int:
        """Returns the number of weights that a token is multiplied by: only those of its experts, and no embedding."""
        return sum(self._count(name, self.experts_per_token) for name in self.linears())

    def _count(self, name: str, experts: int) -> int:
        """Returns the number of weights of a linear layer, in all layers of the model."""
        inputs, outputs = self.linears()[name]
        times = 1 if name == "head" else self.num_layers
        return inputs * outputs * times * (experts if name in ("gate-up", "down") else 1)

    def weight_bytes(self, scheme: str) -> int:
        """Returns the bytes of weights that a decode step of a large batch reads: all linear layers, with all experts.

        Args:
          scheme: scheme of the linear layers for `palladion.quantize`, or a float dtype.
        """
        return sum(self._stored(name, scheme, self.experts) for name in self.linears())

    def stored_bytes(self, scheme: str) -> int:
        """Returns the bytes of all weights in memory, with an untied embedding in bfloat16."""
        embedding = 0 if self.tied_embedding else self.vocab_size * self.hidden_size * jnp.dtype("bfloat16").itemsize
        return self.weight_bytes(scheme) + embedding

    def step_weight_bytes(self, scheme: str, batch: int) -> int:
        """Returns the expected bytes of weights that a decode step reads.

        Tokens choose experts independently and uniformly: an expert is read with probability
        1 - (1 - experts_per_token / experts) ** batch.
        """
        share = 1 - (1 - self.experts_per_token / self.experts) ** batch
        return sum(round(self._stored(name, scheme, self.experts * share)) for name in self.linears())

    def _stored(self, name: str, scheme: str, experts: float) -> int:
        """Returns the bytes of a linear layer in all layers of the model, with so many experts."""
        inputs, outputs = self.linears()[name]
        times = (1 if name == "head" else self.num_layers) * (experts if name in ("gate-up", "down") else 1)
        return round(_matrix_bytes(inputs, outputs, scheme) * times)

    def cache_bytes_per_token(self, kv_dtype: str, context: float | None = None) -> float:
        """Returns the bytes of a token in the cache of all layers, scales included.

        Args:
          kv_dtype: dtype of the cache.
          context: length of the context, to count only what a step reads of it: layers with a window read no more than
            the window. None counts every layer fully.
        """
        seen: float = self.num_layers
        if self.sliding_window is not None and context is not None:
            windowed = self.num_layers - self.global_layers
            seen = self.global_layers + windowed * min(1.0, self.sliding_window / max(context, 1))
        return bytes_per_token(self.kv_heads, self.head_dim, kv_dtype) * seen

    def prefill_flops(self, tokens: int) -> int:
        """Returns the floating-point operations of a prefill: all weights for each token, and causal attention."""
        head = self._count("head", 1)  # applied to the last token only
        linear = 2 * tokens * (self.active_parameters() - head) + 2 * head
        pairs = tokens * (tokens + 1) // 2
        window = min(self.sliding_window or tokens, tokens)
        windowed_pairs = window * (window + 1) // 2 + (tokens - window) * window
        layers = self.global_layers, self.num_layers - self.global_layers
        return linear + 4 * self.q_heads * self.head_dim * (layers[0] * pairs + layers[1] * windowed_pairs)

    def config(self, max_positions: int) -> ModelConfig:
        """Returns the configuration for the minimal LLM, with no other norms than Llama's.

        Raises:
          ValueError: the minimal LLM does not support the model.
        """
        check(self.experts == 1 and not self.sinks, "model", self.name, "a decoder without experts and attention sinks")
        kinds = tuple(LayerKind(windowed=window is not None) for window in self.windows())
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_positions=max_positions,
            layer_kinds=(LayerKind(),) if self.sliding_window is None else shortest_period(kinds),
            sliding_window=self.sliding_window,
            tied_embedding=self.tied_embedding,
            activation=MODEL_ACTIVATIONS[self.activation],
            attention_soft_cap=self.logits_soft_cap,
        )

    def attention_cases(
        self, batch: int, max_len: int, *, dtype: str = "bfloat16", kv_dtype: str | None = None, **changes: Any
    ) -> list[AttentionCase]:
        """Returns the cases of decode_attention in a decode step: one for each kind of layer.

        A layer with a window is "-window"; beside such layers, one without is "-full".
        """
        windows = tuple(dict.fromkeys(self.windows()))
        names = {window: "-full" if window is None else "-window" for window in windows}
        return [
            AttentionCase(
                name=f"{self.name}{'' if windows == (None,) else names[window]}",
                batch=batch,
                q_heads=self.q_heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                max_len=max_len,
                dtype=dtype,
                kv_dtype=kv_dtype,
                sliding_window=window,
                logits_soft_cap=self.logits_soft_cap,
                sinks=self.sinks,
                **changes,
            )
            for window in windows
        ]

    def append_cases(
        self, batch: int, max_len: int, *, dtype: str = "bfloat16", kv_dtype: str | None = None, **changes: Any
    ) -> list[AppendCase]:
        """Returns the case of append_kv in a decode step."""
        return [
            AppendCase(
                name=self.name,
                batch=batch,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                max_len=max_len,
                dtype=dtype,
                kv_dtype=kv_dtype,
                **changes,
            )
        ]

    def append_qkv_cases(
        self, batch: int, max_len: int, *, dtype: str = "bfloat16", kv_dtype: str | None = None, **changes: Any
    ) -> list[JoinedCase]:
        """Returns the case of append_qkv in a decode step."""
        (case,) = self.append_cases(batch, max_len, dtype=dtype, kv_dtype=kv_dtype, **changes)
        return [JoinedCase(**dataclasses.asdict(case), q_heads=self.q_heads)]

    def matmul_cases(
        self, rows: int, scheme: str, *, dtype: str = "bfloat16", scale_dtype: str = "float32", head: bool = True
    ) -> list[MatmulCase]:
        """Returns the cases of quantized_matmul in a decode step: linear layers, one expert's MLP, and the head."""
        gate: Any = {"gated": True, "activation": ACTIVATIONS[self.activation]}
        return [
            MatmulCase(
                name=f"{self.name}-{name}",
                rows=rows,
                in_features=inputs,
                out_features=outputs,
                scheme=scheme,
                dtype=dtype,
                scale_dtype=scale_dtype,
                **(gate if name == "gate-up" else {}),
            )
            for name, (inputs, outputs) in self.linears().items()
            if head or name != "head"
        ]

    def dense_cases(self, rows: int, *, dtype: str = "bfloat16") -> list[DenseCase]:
        """Returns the cases of matmul in a decode step with dense weights: the same layers, with fused operations."""
        fused: dict[str, Any] = {
            "qkv": {"norm": True},
            "output": {"residual": True},
            "gate-up": {"norm": True, "gated": True, "activation": ACTIVATIONS[self.activation]},
            "down": {"residual": True},
            "head": {"norm": True},
        }
        return [
            DenseCase(
                name=f"{self.name}-{name}",
                rows=rows,
                in_features=inputs,
                out_features=outputs,
                dtype=dtype,
                **fused[name],
            )
            for name, (inputs, outputs) in self.linears().items()
        ]


def _matrix_bytes(in_features: int, out_features: int, scheme: str) -> int:
    """Returns the bytes of a matrix, with scales in bfloat16."""
    if scheme in DENSE:
        return in_features * out_features * jnp.dtype(scheme).itemsize
    return Scheme.parse(scheme).nbytes(in_features, out_features)


@functools.cache
def models() -> dict[str, ModelShape]:
    """Returns the known models by name."""
    data = json.loads(importlib.resources.files(__package__).joinpath("model_shapes.json").read_text())
    return {name: ModelShape(name=name, **shape) for name, shape in data["models"].items()}


def model(name: str) -> ModelShape:
    """Returns the model of that name.

    Raises:
      ValueError: there is none; the message lists the names.
    """
    check(name in models(), "model", repr(name), ", ".join(models()))
    return models()[name]
