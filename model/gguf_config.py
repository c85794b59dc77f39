"""Reads the metadata of a GGUF file as a `ModelConfig` and the rotary frequencies that go with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from palladion.model.checkpoint_files import (
    CheckpointError,
    check_head_dim,
    check_integer,
    check_real,
    check_window,
    shorten,
)
from palladion.model.config import LayerKind, ModelConfig
from palladion.model.families import FAMILIES, PATTERN, Family
from palladion.model.huggingface_config import Rotary, make_config
from palladion.model.rotary import YarnScaling, check_frequencies, rotary_frequencies

FREQUENCY_DIVISORS: Final = "rope_freqs.weight"
"""Tensor with the divisor of each rotary frequency: Llama 3's scaling, computed by the converter."""

SHORT_DIVISORS: Final = "rope_factors_short.weight"
LONG_DIVISORS: Final = "rope_factors_long.weight"
"""Tensors with LongRoPE's divisors, for contexts up to the original length and for longer ones."""

DIVISOR_TENSORS: Final = frozenset({FREQUENCY_DIVISORS, SHORT_DIVISORS, LONG_DIVISORS})

SCALING_FACTORS: Final = ("rope.scaling.factor", "rope.scale_linear")
"""Keys of linear scaling's factor; old files use the second."""

LARGE_GEMMA: Final = (46, 62)
"""Layers of the Gemma models whose attention is scaled by the width of hidden_size / q_heads, which no key says."""

NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.key_length_mla": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    PATTERN: (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
"""Keys that only some families apply, with the values for which they have no effect on the others."""

APPLIED: Final[Mapping[str, tuple[str, Callable[[float], float]]]] = {
    "attention.scale": ("attention_scale", lambda value: value),
    "attn_logit_softcapping": ("attention_soft_cap", lambda value: value),
    "embedding_scale": ("embedding_scale", lambda value: value),
    "final_logit_softcapping": ("logit_soft_cap", lambda value: value),
    "logit_scale": ("logit_scale", lambda value: value),
    "residual_scale": ("residual_scale", lambda value: value),
}
"""Keys that are numbers: the field of `ModelConfig`, and its value."""


class Metadata:
    """The metadata of a file, whose values are checked when they are read.

    Attributes:
      path: the file.
      values: everything by key.
      architecture: the file's name of the family, the prefix of most keys.
      family: the family.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        self.architecture = str(values.get("general.architecture"))
        rows = [family for family in FAMILIES if family.gguf and family.gguf.architecture == self.architecture]
        if not rows:
            names = sorted({family.gguf.architecture for family in FAMILIES if family.gguf})
            raise CheckpointError(
                f"{path}: architecture {shorten(values.get('general.architecture'))} is not supported; supported: "
                f"{', '.join(map(repr, names))} (in which Mistral, SmolLM and others of that form are 'llama')"
            )
        self.family: Family = rows[0]
        # Where two families share a name, the last one is that with a sliding window.
        if not is_zero(self.value("attention.sliding_window", 0)[0]):
            self.family = rows[-1]

    def check(self) -> None:
        """Raises CheckpointError for parts of a file, experts, and keys that the family does not apply."""
        files = check_integer(self.values.get("split.count", 0), f"{self.path}: metadata key 'split.count'", 0)
        if files > 1:
            raise CheckpointError(
                f"{self.path}: one of {files} parts of a split checkpoint; join them with llama-gguf-split --merge"
            )
        if experts := self.integer("expert_count", 0, minimum=0):
            raise CheckpointError(f"{self.path}: a mixture of {experts} experts is not supported; take a dense model")
        assert self.family.gguf is not None  # it was found by it
        for key, neutral in NEUTRAL_VALUES.items():
            value, label = self.value(key, neutral[0])
            if value not in neutral and key not in self.family.gguf.keys:
                raise CheckpointError(
                    f"{label} is {shorten(value)}, which is not supported; supported: {' or '.join(map(str, neutral))}"
                )

    def value(self, key: str, default: Any) -> tuple[Any, str]:
        """Returns a value and its name for errors; a list of equal numbers counts as one of them."""
        assert self.family.gguf is not None  # it was found by it
        value = self.values.get(f"{self.architecture}.{key}", self.family.gguf.defaults.get(key, default))
        label = f"{self.path}: metadata key '{self.architecture}.{key}'"
        if value is None:
            raise CheckpointError(f"{label} is missing; convert the model again")
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        return value, label

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """Returns an integer of at least `minimum`."""
        return check_integer(*self.value(key, default), minimum)

    def real(self, key: str, default: float | None = None) -> float:
        """Returns a positive number."""
        return check_real(*self.value(key, default))

    def has(self, key: str) -> bool:
        """Returns whether the file has a key of its architecture."""
        return f"{self.architecture}.{key}" in self.values

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        default = max(1, self.integer("embedding_length") // self.integer("attention.head_count"))
        return check_head_dim(self.integer("attention.key_length", default), self.path)

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        head_dim = self.head_dim
        rotated = self.integer("rope.dimension_count", head_dim)
        partial = "partial_rotary_factor" in self.family.fields and rotated % 2 == 0 and rotated <= head_dim
        if rotated != head_dim and not partial:
            raise CheckpointError(
                f"{self.path}: rotates {rotated} of each head's {head_dim} dimensions; only full rotation is supported"
            )
        return rotated


def read_config(
    metadata: Metadata, rotary: Rotary, *, vocab_size: int, tensors: Collection[str], stop_tokens: tuple[int, ...]
) -> ModelConfig:
    """Returns the configuration that the metadata describe.

    Args:
      metadata: the file's metadata.
      rotary: its rotary frequencies.
      vocab_size: number of tokens.
      tensors: names of the file's tensors: some options are told by them alone.
      stop_tokens: token ids that end a generation.

    Raises:
      CheckpointError: a value is missing or wrong.
    """
    hidden, q_heads, head_dim = (
        metadata.integer("embedding_length"),
        metadata.integer("attention.head_count"),
        metadata.head_dim,
    )
    value_dim = metadata.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise CheckpointError(
            f"{metadata.path}: value heads are {value_dim} wide, key heads {head_dim}; only equal widths are supported"
        )
    layers = metadata.integer("block_count")
    options = _options(metadata, hidden, q_heads, layers)
    if "use_qk_norm" in metadata.family.fields and "blk.0.attn_q_norm.weight" in tensors:
        options["qk_norm"] = "heads"
    window, label = metadata.value("attention.sliding_window", 0)
    window = None if is_zero(window) else check_window(window, label)
    return make_config(
        metadata.path,
        rotary,
        _read_layers(metadata, layers, window is not None),
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=metadata.integer("feed_forward_length"),
        num_layers=layers,
        q_heads=q_heads,
        kv_heads=metadata.integer("attention.head_count_kv", q_heads),
        head_dim=head_dim,
        max_positions=metadata.integer("context_length", minimum=2),
        tied_embedding="output.weight" not in tensors,
        stop_tokens=stop_tokens,
        sliding_window=window,
        **options,
    )


def _options(metadata: Metadata, hidden: int, q_heads: int, layers: int) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` in which families differ."""
    family = metadata.family
    assert family.gguf is not None  # it was found by it
    options: dict[str, Any] = dict(family.form)
    kind = "layer_norm_epsilon" if options.get("norm") == "layer" else "layer_norm_rms_epsilon"
    options["norm_eps"] = metadata.real(f"attention.{kind}")
    for key, (name, convert) in APPLIED.items():
        if key in family.gguf.keys and not is_zero(metadata.value(key, 0)[0]):
            options[name] = convert(metadata.real(key))
    if family.gguf.divides_logits:
        options["logit_scale"] = 1 / options.get("logit_scale", 1.0)
    if "use_parallel_residual" in family.gguf.keys:
        options["parallel"] = metadata.value("use_parallel_residual", False)[0] is True
    if family.embedding_root:
        options["embedding_scale"] = hidden**0.5
        if layers in LARGE_GEMMA:
            options["attention_scale"] = (hidden / q_heads) ** -0.5
    return options


def _read_layers(metadata: Metadata, layers: int, has_window: bool) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers, as long as they do not repeat."""
    family = metadata.family
    period = 1
    windowed = [has_window]
    if family.windows == "kinds" and has_window:
        given, label = metadata.value(PATTERN, family.window_period)
        if isinstance(given, list):
            if len(given) != layers or any(not isinstance(entry, bool) for entry in given):
                raise CheckpointError(f"{label} must say for each of {layers} layers whether it has a window")
            windowed = given
        else:
            period = min(check_integer(given, label), layers)
            windowed = [(index + 1) % check_integer(given, label) != 0 for index in range(period)]
    rotated = [True] * len(windowed)
    if family.rotation == "windowed":
        rotated = windowed
    elif "no_rope_layers" in family.fields:
        interval = int(family.defaults["no_rope_layer_interval"])
        rotated = [(index + 1) % interval != 0 for index in range(min(interval, layers))]
        windowed = windowed * len(rotated)
    local = 1 if family.rotation == "by window" else 0
    return tuple(
        LayerKind(windowed=one or not has_window, rotation=(local if one else 0) if rotates else None)
        for one, rotates in zip(windowed, rotated, strict=True)
    )


def read_rotary(metadata: Metadata, divisors: Mapping[str, np.ndarray]) -> Rotary:
    """Returns the rotary frequencies.

    Args:
      metadata: the file's metadata.
      divisors: the tensors among `DIVISOR_TENSORS` that the file has.

    Raises:
      CheckpointError: a value is wrong, or gives impossible frequencies.
    """
    path, dim, theta = metadata.path, metadata.rotary_dim, metadata.real("rope.freq_base", 10_000.0)
    for name, values in divisors.items():
        if values.shape != (dim // 2,) or not (values > 0).all():
            raise CheckpointError(
                f"{path}: tensor {name!r} must hold {dim // 2} positive numbers for {dim} rotated dimensions, has "
                f"shape {list(values.shape)}; convert the model again"
            )
    divisor, scaling, scale = _scaling(metadata, theta)

    def frequencies(base: float, by: np.ndarray | float, yarn: YarnScaling | None = None) -> np.ndarray:
        return check_frequencies(rotary_frequencies(dim, base, scaling=yarn, divisors=by), str(path))

    if LONG_DIVISORS in divisors or SHORT_DIVISORS in divisors:
        if len(divisors) != len(DIVISOR_TENSORS) - 1:
            raise CheckpointError(f"{path}: has one of {SHORT_DIVISORS!r} and {LONG_DIVISORS!r}; convert it again")
        sets = [frequencies(theta, divisors[name]) for name in (SHORT_DIVISORS, LONG_DIVISORS)]
        original = metadata.integer("rope.scaling.original_context_length", metadata.integer("context_length"))
        return Rotary(np.stack(sets), (scale, scale), original)
    first = frequencies(theta, divisor * divisors.get(FREQUENCY_DIVISORS, 1.0), scaling)
    if metadata.family.rotation != "by window":
        return Rotary(first, (scale,))
    local = metadata.real("rope.freq_base_swa", metadata.family.defaults.get("rope_local_base_freq", theta))
    return Rotary(np.stack([first, frequencies(local, 1.0)]), (scale, 1.0))


def _scaling(metadata: Metadata, theta: float) -> tuple[float, YarnScaling | None, float]:
    """Returns the divisor of linear scaling, YaRN's scaling, and the factor of sines and cosines.

    As in llama.cpp, a factor of 0, or none, means 1.
    """
    kind, _ = metadata.value("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise CheckpointError(
            f"{metadata.path}: rotary scaling {shorten(kind)} is not supported; supported: none, linear, yarn, "
            f"longrope and Llama 3's (a tensor {FREQUENCY_DIVISORS!r})"
        )
    given = [key for key in SCALING_FACTORS if metadata.has(key)]
    factor = 1.0
    if kind in ("linear", "yarn") and given and not is_zero(metadata.value(given[0], None)[0]):
        factor = metadata.real(given[0])
    scale = metadata.real("rope.scaling.attn_factor", 1.0)
    if kind != "yarn":
        return factor, None, scale
    if theta <= 1.0:
        raise CheckpointError(f"{metadata.path}: the base of 'yarn' must be above 1, got {theta}")
    yarn = YarnScaling(
        factor=factor,
        original_max_positions=metadata.integer(
            "rope.scaling.original_context_length", metadata.integer("context_length")
        ),
        beta_fast=metadata.real("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=metadata.real("rope.scaling.yarn_beta_slow", 1.0),
    )
    if scale != 1.0:
        # Converters write the whole factor, or one that llama.cpp multiplies by YaRN's own: a file does not say which.
        raise CheckpointError(
            f"{metadata.path}: rotary scaling 'yarn' with an attn_factor of {scale:g} is not supported; take the "
            "model's Hugging Face folder"
        )
    return 1.0, yarn, yarn.attention_factor()


def is_zero(value: Any) -> bool:
    """Returns whether a value is the number 0; False is not."""
    return not isinstance(value, bool) and isinstance(value, int | float) and value == 0
