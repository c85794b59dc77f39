"""A language model under every scheme: the effect of weights, activations and caches in few bits on its predictions.

Every run reads the same text, and its prediction at every position is compared with that of float32:

    perplexity   exp of the mean negative log-likelihood of the next token
    KL           mean of sum_t p(t) log(p(t) / q(t)), in nats: the change of the prediction, whatever the text says
    agreement    share of positions at which the most likely token is the same

Perplexity hides errors that cancel, so schemes are ranked by KL. Rounded weights are multiplied in float32 here:
kernels compute the same but for the order of their sums, and one program serves all weight schemes.
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

from palladion.model.checkpoint import Checkpoint, load_checkpoint
from palladion.model.locate import find_model
from palladion.model.parameters import Layer, Parameters, Weight
from palladion.model.transformer import empty_cache, forward
from palladion.reference import KVCache, QuantizedArray, dequantize, quantize
from palladion.reference.quantization import quantize_rows
from palladion.reference.quantizers import Method

CHUNK: Final = 256
"""Tokens in a call of the model."""

TOKENS: Final = 512
"""Tokens of the text in runs on weights and activations."""

CACHE_TOKENS: Final = 1280
"""Tokens of the text in runs on caches, whose error may grow with the context."""

LINEAR: Final = ("qkv", "output", "gate_up", "down")
"""Names of a layer's weights."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings under which the model is run.

    Attributes:
      name: its name in results.
      kind: what is studied: "baseline", "weights", "activations" or "cache".
      weights: scheme of the weights, or a float dtype that they are rounded to.
      method: method of `quantize`.
      calibrated: whether errors of weights are weighted by the activations of another text.
      scale_dtype: dtype of scales and minimums.
      head: scheme of the output head and the embedding; None means that of the weights.
      activations: float32 or bfloat16 throughout, or int8 or float8_e4m3fn as operands of products.
      cache: dtype of the cache.
      tokens: number of tokens of the text.
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
    """Returns all runs, the baseline and the most important ones first."""
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
    """Returns one of the packaged texts: "evaluation" or "calibration"."""
    stored = json.loads((importlib.resources.files(__package__) / "texts.json").read_text())
    return "\n\n".join(stored[name]["paragraphs"])


class LanguageModel:
    """A model in float32, which can be evaluated under any `Run`.

    Args:
      model: a checkpoint, as `load_checkpoint` takes it.
    """

    def __init__(self, model: str = "smollm2") -> None:
        self.checkpoint: Checkpoint = load_checkpoint(model, weights="dequantize", stack=True)
        self.name = find_model(model).name
        self.tokens = self._encode("evaluation")
        self._baseline: list[jax.Array] = []  # log-probabilities of every chunk, [CHUNK, vocab]

    @property
    def parameters(self) -> Parameters:
        """Weights in float32, with layers stacked."""
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
        """Returns each weight's name and the activations `[tokens, in]` that it is multiplied by, layer by layer."""
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
        # Not under jit, so that numbers are recorded.
        forward(
            parameters, self.checkpoint.config, jnp.asarray(tokens), lengths, cache, every_position=True, adapt=record
        )
        return found

    def rounded(self, run: Run) -> tuple[Parameters, int]:
        """Returns the weights as a run rounds them, in float32, and the bytes of them that a decode step reads."""
        stack = self.parameters.layers
        assert isinstance(stack, Layer)
        nbytes = 0

        def round_weight(name: str, weight: Weight, scheme: str) -> jax.Array:
            nonlocal nbytes
            assert isinstance(weight, jax.Array)
            importance = self.importance[name] if run.calibrated and scheme == run.weights else None
            result, size = _round(weight, scheme, run, importance)
            nbytes += size
            return result

        layers = dataclasses.replace(
            stack, **{name: round_weight(name, getattr(stack, name), run.weights) for name in LINEAR}
        )
        head = round_weight("head", self.parameters.head, run.head or run.weights)
        norms = (stack.attention_norm, stack.mlp_norm, self.parameters.final_norm)
        nbytes += sum(norm.nbytes for norm in jax.tree.leaves(norms))
        return dataclasses.replace(self.parameters, layers=layers, head=head), nbytes

    def evaluate(self, run: Run) -> dict[str, Any]:
        """Runs the model over the text; the baseline must be the first run.

        Returns:
          Figures by name, as JSON takes them.
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
    """Returns a function of tokens to log-probabilities `[CHUNK, vocab]`, compiled for each dtype of activations."""

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
    """Returns negative log-likelihood, divergence and agreement at every position, from log-probabilities."""
    likelihood = -jnp.take_along_axis(predicted, targets[:, None], axis=-1)[:, 0]
    divergence = jnp.sum(jnp.exp(expected) * (expected - predicted), axis=-1)
    return likelihood, divergence, jnp.argmax(expected, axis=-1) == jnp.argmax(predicted, axis=-1)


def study(path: Path, model: str = "smollm2", report: Callable[[dict[str, Any]], None] = lambda _: None) -> dict:
    """Evaluates every run that is not in a file yet, and writes the file after each.

    Args:
      path: a JSON file, which need not exist. Runs of another model or text in it are made again.
      model: a checkpoint.
      report: called with the figures of each run.

    Returns:
      The content of the file.
    """
    asked = runs()
    setting = {"model": find_model(model).name, "text": text("evaluation")[:60], "chunk": CHUNK}
    stored = json.loads(path.read_text()) if path.exists() else {}
    kept = stored.get("runs", {}) if stored.get("setting") == setting else {}
    kept = {run.name: kept[run.name] for run in asked if run.name in kept and _same(run, kept[run.name])}
    if missing := [run for run in asked if run.name not in kept]:
        subject = LanguageModel(model)
        # All runs are compared with the predictions of the baseline, so it is always evaluated first.
        for run in missing if missing[0].kind == "baseline" else [asked[0], *missing]:
            kept[run.name] = subject.evaluate(run)
            report(kept[run.name])
            ordered = {run.name: kept[run.name] for run in asked if run.name in kept}
            path.write_text(json.dumps({"setting": setting, "runs": ordered}, indent=1) + "\n")
    return json.loads(path.read_text())


def _same(run: Run, stored: dict[str, Any]) -> bool:
    return all(stored.get(key) == value for key, value in dataclasses.asdict(run).items())
