"""Real models as data: their shapes, the calls of each operation that a decode step makes, and what it must read.

A formula stands in one place: bytes and FLOPs of a call are those of the operation's `Problem`, and those of a model
are sums over its calls.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.kernels.append_kv.cases import Case as AppendCase
from palladion.kernels.append_qkv.cases import Case as JoinedCase
from palladion.kernels.checks import check
from palladion.kernels.decode_attention.cases import Case as AttentionCase
from palladion.kernels.matmul.cases import Case as DenseCase
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase
from palladion.model.config import ModelConfig
from palladion.reference.caches import bytes_per_token
from palladion.reference.quantization import Scheme

ACTIVATIONS: Final = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}

DENSE: Final = ("float32", "bfloat16", "float16")
"""What weights may be stored in that are not quantized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's shapes; those of the models known here stand in `models.json`.

    Attributes:
      name: "llama3-8b" for example.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP, or of one expert.
      num_layers: decoder layers.
      q_heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of a head.
      vocab_size: rows of the embedding.
      tied_embedding: whether the output head is the embedding.
      sliding_window: tokens that a query sees in layers with a window; None where no layer has one.
      window_period: every so many layers one sees everything; the others have the window.
      logits_soft_cap: bound of the attention logits, or None.
      sinks: whether heads have attention sinks.
      activation: of the gate, a name in `ACTIVATIONS`.
      experts: MLPs of a layer.
      experts_per_token: of which a token takes so many.
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
    window_period: int = 1
    logits_soft_cap: float | None = None
    sinks: bool = False
    activation: str = "silu"
    experts: int = 1
    experts_per_token: int = 1

    @property
    def qkv_features(self) -> int:
        """Channels of the joined query, key and value projections."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def global_layers(self) -> int:
        """Layers whose queries see everything."""
        return self.num_layers if self.sliding_window is None else self.num_layers // self.window_period

    def linears(self) -> dict[str, tuple[int, int]]:
        """`[in, out]` of a layer's linear layers, of one expert's MLP, and of the head."""
        return {
            "qkv": (self.hidden_size, self.qkv_features),
            "output": (self.q_heads * self.head_dim, self.hidden_size),
            "gate-up": (self.hidden_size, 2 * self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
            "head": (self.hidden_size, self.vocab_size),
        }

    def parameters(self) -> int:
        """Weights of all linear layers, embeddings and norms; routers and biases, which are small, are left out."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        embedding = 0 if self.tied_embedding else self.vocab_size * self.hidden_size
        return embedding + norms + sum(self._count(name, self.experts) for name in self.linears())

    def active_parameters(self) -> int:
        """Weights that a token is multiplied with: of experts only those that it takes, and no embedding."""
        return sum(self._count(name, self.experts_per_token) for name in self.linears())

    def _count(self, name: str, experts: int) -> int:
        """Weights of a linear layer in all layers of the model."""
        inputs, outputs = self.linears()[name]
        times = 1 if name == "head" else self.num_layers
        return inputs * outputs * times * (experts if name in ("gate-up", "down") else 1)

    def weight_bytes(self, scheme: str) -> int:
        """Bytes of all weights that a decode step of a large batch reads: every linear layer, and all experts.

        Args:
          scheme: how linear layers are stored, of `palladion.quantize` or a float dtype.
        """
        return sum(self._stored(name, scheme, self.experts) for name in self.linears())

    def stored_bytes(self, scheme: str) -> int:
        """Bytes of all weights in memory: an untied embedding, which a step hardly reads, is kept in bfloat16."""
        embedding = 0 if self.tied_embedding else self.vocab_size * self.hidden_size * jnp.dtype("bfloat16").itemsize
        return self.weight_bytes(scheme) + embedding

    def step_weight_bytes(self, scheme: str, batch: int) -> int:
        """Bytes of weights that a decode step reads; of experts those that the tokens of a batch are expected to take.

        A token takes its experts independently of the others, each with the same probability: an expert is read with
        probability 1 - (1 - taken / all) ** batch.
        """
        share = 1 - (1 - self.experts_per_token / self.experts) ** batch
        return sum(round(self._stored(name, scheme, self.experts * share)) for name in self.linears())

    def _stored(self, name: str, scheme: str, experts: float) -> int:
        inputs, outputs = self.linears()[name]
        times = (1 if name == "head" else self.num_layers) * (experts if name in ("gate-up", "down") else 1)
        return round(_matrix_bytes(inputs, outputs, scheme) * times)

    def cache_bytes_per_token(self, kv_dtype: str, context: int | None = None) -> float:
        """Bytes that a token of context takes in the cache of all layers, scales included.

        Args:
          kv_dtype: of the cache.
          context: tokens of context, from which on layers with a window read no more; None takes none as long as that.
        """
        seen: float = self.num_layers
        if self.sliding_window is not None and context is not None:
            windowed = self.num_layers - self.global_layers
            seen = self.global_layers + windowed * min(1.0, self.sliding_window / max(context, 1))
        return bytes_per_token(self.kv_heads, self.head_dim, kv_dtype) * seen

    def prefill_flops(self, tokens: int) -> int:
        """Floating-point operations of reading a prompt: all weights for each token, and causal attention."""
        head = self._count("head", 1)  # of the last token only
        linear = 2 * tokens * (self.active_parameters() - head) + 2 * head
        pairs = tokens * (tokens + 1) // 2
        window = min(self.sliding_window or tokens, tokens)
        windowed_pairs = window * (window + 1) // 2 + (tokens - window) * window
        layers = self.global_layers, self.num_layers - self.global_layers
        return linear + 4 * self.q_heads * self.head_dim * (layers[0] * pairs + layers[1] * windowed_pairs)

    def config(self, max_positions: int) -> ModelConfig:
        """As the minimal LLM takes it.

        Raises:
          ValueError: it has what the minimal LLM has not.
        """
        plain = self.experts == 1 and not self.sinks and self.logits_soft_cap is None and self.window_period == 1
        check(plain, "model", self.name, "a plain decoder: no experts, sinks, soft-cap or layers of two kinds")
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_positions=max_positions,
            sliding_window=self.sliding_window,
            tied_embedding=self.tied_embedding,
        )

    def attention_cases(
        self, batch: int, max_len: int, *, dtype: str = "bfloat16", kv_dtype: str | None = None, **changes: Any
    ) -> list[AttentionCase]:
        """What a decode step asks of decode_attention: a case for layers that see everything, one for a window."""
        windows = [None] if self.sliding_window is None else [None, self.sliding_window]
        return [
            AttentionCase(
                name=f"{self.name}{'-window' if window else ''}",
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
        """What a decode step asks of append_kv."""
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
        """What a decode step asks of append_qkv."""
        (case,) = self.append_cases(batch, max_len, dtype=dtype, kv_dtype=kv_dtype, **changes)
        return [JoinedCase(**dataclasses.asdict(case), q_heads=self.q_heads)]

    def matmul_cases(
        self, rows: int, scheme: str, *, dtype: str = "bfloat16", scale_dtype: str = "float32", head: bool = True
    ) -> list[MatmulCase]:
        """What a decode step asks of quantized_matmul: its linear layers, the MLP's of one expert, and the head."""
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
        """What a decode step asks of matmul where weights are dense: the same layers, with what is fused into them."""
        around: dict[str, Any] = {
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
                **around[name],
            )
            for name, (inputs, outputs) in self.linears().items()
        ]


def _matrix_bytes(in_features: int, out_features: int, scheme: str) -> int:
    """Bytes of a matrix, with scales in bfloat16."""
    if scheme in DENSE:
        return in_features * out_features * jnp.dtype(scheme).itemsize
    return Scheme.parse(scheme).nbytes(in_features, out_features)


@functools.cache
def models() -> dict[str, ModelShape]:
    """The models that are known here, by name."""
    data = json.loads(importlib.resources.files(__package__).joinpath("model_shapes.json").read_text())
    return {name: ModelShape(name=name, **shape) for name, shape in data["models"].items()}


def model(name: str) -> ModelShape:
    """A model by name.

    Raises:
      ValueError: there is none of that name; the message lists them.
    """
    check(name in models(), "model", repr(name), ", ".join(models()))
    return models()[name]
