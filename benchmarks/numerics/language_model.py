"""A language model under every scheme: what weights, activations and caches in few bits do to its predictions.

Every run reads the same text, token by token as it is written, and is compared with float32 at every position:

    perplexity   exp of the mean negative log-likelihood of the next token: what the model is worth on this text
    KL           mean of sum_t p(t) log(p(t) / q(t)), in nats: how far a prediction moved, whatever the text says
    agreement    share of positions at which the most likely token is the same

Perplexity hides errors that cancel; KL is what to rank schemes by. A rounded weight is multiplied in float32 here: that
is what the kernels compute, but for the order of their sums, and it needs one program for all weight schemes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint import Checkpoint, find_model, load_checkpoint
from palladion.model.parameters import Layer, Parameters, Weight
from palladion.model.transformer import empty_cache, forward
from palladion.reference import KVCache, QuantizedArray, dequantize, quantize
from palladion.reference.quantization import quantize_rows
from palladion.reference.quantizers import Method

CHUNK: Final = 256
"""Tokens of a call."""

TOKENS: Final = 512
"""Of the text, for weights and activations."""

CACHE_TOKENS: Final = 1280
"""Of the text, for caches: what they cost grows with the context, or does not."""

LINEAR: Final = ("qkv", "output", "gate_up", "down")
"""The weights of a layer."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to run the model.

    Attributes:
      name: what it is called in results.
      kind: what is studied: "baseline", "weights", "activations" or "cache".
      weights: a scheme, or a float dtype that weights are rounded to.
      method: of `quantize`.
      calibrated: whether errors in weights count by the activations of another text.
      scale_dtype: of scales and minimums.
      head: the scheme of output head and embedding; None means that of the weights.
      activations: float32 or bfloat16 throughout, or int8 or float8_e4m3fn where they are multiplied.
      cache: dtype of the cache.
      tokens: of the text.
    """

    name: str
    kind: str
    weights: str = "float32"
    method: Method = "absmax"
    calibrated: bool = False
    scale_dtype: str = "bfloat16"
    head: str | None = None
    activations: str = "float32"
    cache: str = "float32"
    tokens: int = TOKENS


def _weights(name: str, *methods: str, **options: Any) -> Iterator[Run]:
    for method in methods or ("absmax",):
        found, _, calibrated = method.partition("+")
        title = name if method == "absmax" else f"{name} {method}"
        yield Run(title, "weights", name, found, bool(calibrated), **options)  # type: ignore[arg-type]


def runs() -> list[Run]:
    """All runs, those that most depends on first."""
    found = [Run("float32", "baseline", tokens=CACHE_TOKENS)]
    for name in ("bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"):
        found += _weights(name)
    found += _weights("int4-g32", "absmax", "mse", "mse+text")
    found += _weights("int4-g64", "absmax", "mse", "mse+text")
    for name in ("bfloat16", "int8", "float8_e4m3fn"):
        found.append(Run(f"activations {name}", "activations", activations=name))
    for name in ("bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"):
        found.append(Run(f"cache {name}", "cache", cache=name, tokens=CACHE_TOKENS))
    found += _weights("int4-g64-minimums", "absmax", "mse", "mse+text", "hqq")
    found += _weights("mxfp4", "absmax", "mse")
    found += _weights("int4", "absmax", "mse", "mse+text")
    found.append(Run("int4-g64 mse+text, head int8", "weights", "int4-g64", "mse", True, head="int8"))
    found.append(Run("int8, activations int8", "activations", "int8", activations="int8"))
    found += _weights("int4-g64-zeros")
    found += _weights("int4-g32-minimums")
    found += _weights("int4-g192", "absmax", "mse+text")
    found += _weights("int8-g64")
    found += _weights("float8_e4m3fn-g64")
    found.append(Run("int4-g32, float32 scales", "weights", "int4-g32", scale_dtype="float32"))
    return found


def text(name: str) -> str:
    """A text of the package: "evaluation" or "calibration"."""
    stored = json.loads((importlib.resources.files(__package__) / "texts.json").read_text())
    return "\n\n".join(stored[name]["paragraphs"])


class LanguageModel:
    """A model in float32, and what its predictions become under a `Run`.

    Args:
      model: a checkpoint that `load_checkpoint` takes.
    """

    def __init__(self, model: str = "smollm2") -> None:
        self.checkpoint: Checkpoint = load_checkpoint(model, weights="dequantize", stack=True)
        self.name = find_model(model).name
        self.tokens = self._encode("evaluation")
        self._baseline: list[jax.Array] = []  # log-probabilities of every chunk, [CHUNK, vocab]

    @property
    def parameters(self) -> Parameters:
        """In float32, layers stacked."""
        return self.checkpoint.parameters

    def _encode(self, name: str) -> np.ndarray:
        return np.array(self.checkpoint.tokenizer.encode(text(name)), np.int32)

    @functools.cached_property
    def importance(self) -> dict[str, jax.Array]:
        """Mean square of every activation over the calibration text, by weight: `[num_layers, in]`, or `[in]`."""
        mean_square: dict[str, list[jax.Array]] = {name: [] for name in (*LINEAR, "head")}
        for name, x in self.activations():
            mean_square[name].append(jnp.mean(x * x, axis=0))
        return {name: parts[0] if name == "head" else jnp.stack(parts) for name, parts in mean_square.items()}

    def activations(self) -> list[tuple[str, jax.Array]]:
        """What every weight is multiplied by over the calibration text: its name and `[tokens, in]`, layer by layer."""
        stack = self.parameters.layers
        assert isinstance(stack, Layer)
        count = self.checkpoint.config.num_layers
        layers = tuple(jax.tree.map(lambda leaf, index=index: leaf[index], stack) for index in range(count))
        parameters = dataclasses.replace(self.parameters, layers=layers)
        names = {id(getattr(layer, name)): name for layer in layers for name in LINEAR}
        names[id(parameters.head)] = "head"
        found: list[tuple[str, jax.Array]] = []

        def record(x: jax.Array, weight: Weight) -> jax.Array:
            found.append((names[id(weight)], x.reshape(-1, x.shape[-1])))
            return x

        tokens = self._encode("calibration")[None]
        cache = empty_cache(parameters, self.checkpoint.config, 1, tokens.shape[1], jnp.float32)
        lengths = jnp.array([tokens.shape[1]], jnp.int32)
        # Not under jit: what is recorded are numbers.
        forward(
            parameters, self.checkpoint.config, jnp.asarray(tokens), lengths, cache, every_position=True, adapt=record
        )
        return found

    def rounded(self, run: Run) -> tuple[Parameters, int]:
        """The weights as a run has them, back in float32; and the bytes of them that a decode step reads."""
        stack = self.parameters.layers
        assert isinstance(stack, Layer)
        nbytes = 0

        def of(name: str, weight: Weight, scheme: str) -> jax.Array:
            nonlocal nbytes
            assert isinstance(weight, jax.Array)
            importance = self.importance[name] if run.calibrated and scheme == run.weights else None
            result, size = _round(weight, scheme, run, importance)
            nbytes += size
            return result

        layers = dataclasses.replace(stack, **{name: of(name, getattr(stack, name), run.weights) for name in LINEAR})
        head = of("head", self.parameters.head, run.head or run.weights)
        norms = (stack.attention_norm, stack.mlp_norm, self.parameters.final_norm)
        nbytes += sum(norm.nbytes for norm in norms)
        return dataclasses.replace(self.parameters, layers=layers, head=head), nbytes

    def evaluate(self, run: Run) -> dict[str, Any]:
        """Runs the model over the text; the first run must be the baseline.

        Returns:
          Figures by name, ready for JSON.
        """
        start = time.perf_counter()
        parameters, weight_bytes = (self.parameters, self.parameters.nbytes)
        if run.weights != "float32":
            parameters, weight_bytes = self.rounded(run)
        program = _program(self.checkpoint.config, run.activations)
        cache = self._cache(run.cache)
        bytes_per_token = cache.bytes_per_token
        columns: tuple[list[np.ndarray], ...] = ([], [], [])
        for first in range(0, run.tokens, CHUNK):
            inputs = jnp.asarray(self.tokens[None, first : first + CHUNK])
            targets = jnp.asarray(self.tokens[first + 1 : first + CHUNK + 1])
            predicted, cache = program(parameters, inputs, jnp.array([first + CHUNK], jnp.int32), cache)
            if run.kind == "baseline":
                self._baseline.append(predicted)
            found = _compare(self._baseline[first // CHUNK], predicted, targets)
            for values, part in zip(columns, found, strict=True):
                values.append(np.asarray(part, np.float64))
        likelihood, divergence, agreement = map(np.concatenate, columns)

        def by_chunk(values: np.ndarray) -> list[np.ndarray]:
            return np.split(values, len(values) // CHUNK)

        return {
            **dataclasses.asdict(run),
            "weight_bytes": weight_bytes,
            "cache_bytes_per_token": bytes_per_token,
            "perplexity": math.exp(likelihood.mean()),
            "kl": divergence.mean(),
            "kl_standard_error": divergence.std() / math.sqrt(len(divergence)),
            "agreement": agreement.mean(),
            "perplexity_by_position": [math.exp(part.mean()) for part in by_chunk(likelihood)],
            "kl_by_position": [part.mean() for part in by_chunk(divergence)],
            "seconds": time.perf_counter() - start,
        }

    def _cache(self, dtype: str) -> KVCache:
        cache = empty_cache(self.parameters, self.checkpoint.config, 1, CACHE_TOKENS, jnp.dtype(dtype))
        assert isinstance(cache, KVCache)
        return cache


def _round(weight: jax.Array, scheme: str, run: Run, importance: jax.Array | None) -> tuple[jax.Array, int]:
    if scheme in ("bfloat16", "float16"):
        narrow = weight.astype(scheme)
        return narrow.astype(jnp.float32), narrow.nbytes
    method = run.method if scheme == run.weights else "absmax"
    scale_dtype = jnp.dtype(run.scale_dtype)
    w: QuantizedArray = quantize(weight, scheme, method=method, importance=importance, scale_dtype=scale_dtype)
    return _dequantize(w), w.nbytes


_dequantize = jax.jit(dequantize)


@functools.cache
def _program(config: Any, activations: str) -> Callable[..., Any]:
    """Tokens to log-probabilities `[CHUNK, vocab]`, compiled once for each form of activations and of the cache."""

    def quantized(x: jax.Array, weight: Weight) -> jax.Array:
        del weight
        codes, scales = quantize_rows(x, activations)
        return (codes.astype(jnp.float32) * scales[..., None]).astype(x.dtype)

    whole = activations in ("float32", "bfloat16")

    def run(parameters: Parameters, tokens: jax.Array, lengths: jax.Array, cache: KVCache) -> Any:
        logits, updated = forward(
            parameters,
            config,
            tokens,
            lengths,
            cache,
            every_position=True,
            dtype=activations if whole else jnp.float32,
            backend="xla",
            adapt=None if whole else quantized,
        )
        return jax.nn.log_softmax(logits[0]), updated

    return jax.jit(run, donate_argnums=3)


@jax.jit
def _compare(expected: jax.Array, predicted: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Negative log-likelihoods, divergences and agreements at every position, of log-probabilities."""
    likelihood = -jnp.take_along_axis(predicted, targets[:, None], axis=-1)[:, 0]
    divergence = jnp.sum(jnp.exp(expected) * (expected - predicted), axis=-1)
    return likelihood, divergence, jnp.argmax(expected, axis=-1) == jnp.argmax(predicted, axis=-1)


def study(path: Path, model: str = "smollm2", report: Callable[[dict[str, Any]], None] = lambda _: None) -> dict:
    """Makes every run that a file does not have yet, and writes the file after each.

    Args:
      path: JSON, made where there is none. What it has of another model or text is made again.
      model: a checkpoint.
      report: called with the figures of each run.

    Returns:
      What the file then holds.
    """
    asked = runs()
    setting = {"model": find_model(model).name, "text": text("evaluation")[:60], "chunk": CHUNK}
    stored = json.loads(path.read_text()) if path.exists() else {}
    kept = stored.get("runs", {}) if stored.get("setting") == setting else {}
    kept = {run.name: kept[run.name] for run in asked if run.name in kept and _same(run, kept[run.name])}
    if missing := [run for run in asked if run.name not in kept]:
        subject = LanguageModel(model)
        # The baseline is what all others are compared with: its predictions are needed again.
        for run in missing if missing[0].kind == "baseline" else [asked[0], *missing]:
            kept[run.name] = subject.evaluate(run)
            report(kept[run.name])
            ordered = {run.name: kept[run.name] for run in asked if run.name in kept}
            path.write_text(json.dumps({"setting": setting, "runs": ordered}, indent=1) + "\n")
    return json.loads(path.read_text())


def _same(run: Run, stored: dict[str, Any]) -> bool:
    return all(stored.get(key) == value for key, value in dataclasses.asdict(run).items())
