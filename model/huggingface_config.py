"""Reads config.json as a `ModelConfig` and the rotary frequencies that go with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from palladion.model.checkpoint_fields import SECTIONS
from palladion.model.checkpoint_files import (
    CheckpointError,
    JsonFile,
    check_head_dim,
    check_real,
    check_window,
    shorten,
)
from palladion.model.config import LayerKind, ModelConfig, shortest_period
from palladion.model.families import Family
from palladion.model.rotary import Llama3Scaling, YarnScaling, check_frequencies, rotary_frequencies

WINDOW_KINDS: Final = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers in `layer_types`, and whether they have the sliding window."""

KIND_NAMES: Final = tuple(map(repr, WINDOW_KINDS))

MOST_LAYERS: Final = 100_000
"""Maximum number of layers whose kinds are listed."""


class Rotary(NamedTuple):
    """Sets of rotary frequencies.

    Attributes:
      frequencies: `[rotary_dim / 2]`, or `[sets, rotary_dim / 2]`.
      scales: factor of sines and cosines of each set.
      long_context: the cache's size beyond which the second set is used, or None.
    """

    frequencies: np.ndarray
    scales: tuple[float, ...]
    long_context: int | None = None


def make_config(path: Path, rotary: Rotary, kinds: tuple[LayerKind, ...], **fields: Any) -> ModelConfig:
    """Returns the configuration that a checkpoint's metadata describe.

    Args:
      path: the file with the metadata.
      rotary: the rotary frequencies.
      kinds: kinds of layers, in order, which are repeated.
      fields: the other fields of `ModelConfig`.

    Raises:
      CheckpointError: the fields contradict each other.
    """
    try:
        return ModelConfig(
            layer_kinds=shortest_period(kinds),
            rotary_scales=rotary.scales,
            long_context=rotary.long_context,
            **fields,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: describes no model: {error}") from error


APPLIED: Final[Mapping[str, tuple[str, Callable[[float], float]]]] = {
    "attention_multiplier": ("attention_scale", lambda value: value),
    "attn_logit_softcapping": ("attention_soft_cap", lambda value: value),
    "embedding_multiplier": ("embedding_scale", lambda value: value),
    "final_logit_softcapping": ("logit_soft_cap", lambda value: value),
    "layer_norm_eps": ("norm_eps", lambda value: value),
    "logit_scale": ("logit_scale", lambda value: value),
    "logits_scaling": ("logit_scale", lambda value: 1 / value),
    "query_pre_attn_scalar": ("attention_scale", lambda value: value**-0.5),
    "residual_multiplier": ("residual_scale", lambda value: value),
}
"""Fields that are numbers: the field of `ModelConfig`, and its value."""


def read_config(
    values: JsonFile, family: Family, rotary: Rotary, *, tied: bool, stop_tokens: tuple[int, ...]
) -> ModelConfig:
    """Returns the configuration that config.json describes; its fields have been checked.

    Args:
      values: config.json, with the family's defaults.
      family: the model's family.
      rotary: its rotary frequencies.
      tied: whether the embedding is also the output head.
      stop_tokens: token ids that end a generation.

    Raises:
      CheckpointError: a field is missing or wrong, or fields contradict each other.
    """
    hidden, q_heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    options: dict[str, Any] = {"norm_eps": values.real("rms_norm_eps", 1e-6)} | dict(family.form)
    for field, (name, convert) in APPLIED.items():
        if field in family.fields and values.content.get(field) is not None:
            options[name] = convert(values.real(field))
    if "use_parallel_residual" in family.fields:
        options["parallel"] = values.boolean("use_parallel_residual", False)
    if "use_qk_norm" in family.fields and values.boolean("use_qk_norm", False):
        options["qk_norm"] = "heads"
    if family.embedding_root:
        options["embedding_scale"] = hidden**0.5
    window, kinds = _read_layers(values, family)
    return make_config(
        values.path,
        rotary,
        kinds,
        vocab_size=values.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=values.integer("intermediate_size"),
        num_layers=values.integer("num_hidden_layers"),
        q_heads=q_heads,
        kv_heads=values.integer("num_key_value_heads", q_heads),
        head_dim=read_head_dim(values),
        max_positions=values.integer("max_position_embeddings", 2048, minimum=2),
        tied_embedding=tied,
        stop_tokens=stop_tokens,
        sliding_window=window,
        **options,
    )


def read_head_dim(values: JsonFile) -> int:
    """Returns the width of a head."""
    default = max(1, values.integer("hidden_size") // values.integer("num_attention_heads"))
    return check_head_dim(values.integer("head_dim", default), values.path)


# ------------------------------------------------------------------------------------------------------ kinds of layers


def _read_layers(values: JsonFile, family: Family) -> tuple[int | None, tuple[LayerKind, ...]]:
    """Returns the sliding window, if any layer has it, and the kind of each layer."""
    layers = values.integer("num_hidden_layers")
    switch = values.boolean("use_sliding_window", False)
    window = None
    if family.windows in ("all", "kinds") or (switch and family.windows == "qwen"):
        given = values.content.get("sliding_window")
        window = None if given is None else check_window(given, f"{values.path}: 'sliding_window'")
    elif switch:
        raise CheckpointError(f"{values.path}: use_sliding_window true is not supported by {family.architecture}")
    windowed = _windowed_layers(values, family, layers, window is not None)
    rotated = _rotated_layers(values, family, windowed)
    local = 1 if family.rotation == "by window" else 0
    kinds = tuple(
        LayerKind(windowed=one, rotation=(local if one else 0) if rotates else None)
        for one, rotates in zip(windowed, rotated, strict=True)
    )
    if not any(windowed):
        # Without a window it makes no difference whether it applies.
        kinds = tuple(LayerKind(rotation=kind.rotation) for kind in kinds)
        window = None
    return window, kinds


def _windowed_layers(values: JsonFile, family: Family, layers: int, has_window: bool) -> list[bool]:
    """Returns for each layer whether it is one of those with a window."""
    if layers > MOST_LAYERS:
        raise CheckpointError(f"{values.path}: 'num_hidden_layers' {layers} is more than any model has")
    expected = [has_window] * layers
    if family.windows == "qwen" and has_window:
        first = values.integer("max_window_layers", minimum=0)
        expected = [index >= first for index in range(layers)]
    elif family.windows == "kinds" and family.window_period:
        period = values.integer("sliding_window_pattern", family.window_period)
        expected = [(index + 1) % period != 0 for index in range(layers)]
    given = values.content.get("layer_types")
    if given is None:
        return expected
    if not isinstance(given, list) or len(given) != layers or any(repr(kind) not in KIND_NAMES for kind in given):
        raise CheckpointError(
            f"{values.path}: layer_types {shorten(given)} is not supported; supported: {' or '.join(KIND_NAMES)} for "
            f"each of {layers} layers"
        )
    windowed = [WINDOW_KINDS[kind] for kind in given]
    free = family.windows == "kinds" or (family.windows == "qwen" and has_window)
    if windowed != expected and not free:
        kind = "sliding_attention" if has_window else "full_attention"
        raise CheckpointError(
            f"{values.path}: layer_types {shorten(given)} is not supported; supported: {kind!r} for every layer, as "
            "the other fields say"
        )
    return windowed


def _rotated_layers(values: JsonFile, family: Family, windowed: list[bool]) -> list[bool]:
    """Returns for each layer whether its queries and keys are rotated."""
    if family.rotation == "windowed":
        return windowed
    if "no_rope_layers" not in family.fields:
        return [True] * len(windowed)
    given = values.content.get("no_rope_layers")
    if given is None:
        interval = values.integer("no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(len(windowed))]
    if not isinstance(given, list) or len(given) != len(windowed) or any(entry not in (0, 1) for entry in given):
        raise CheckpointError(
            f"{values.path}: no_rope_layers {shorten(given)} is not supported; supported: 0 or 1 for each of "
            f"{len(windowed)} layers, 1 where positions are rotated"
        )
    return [bool(entry) for entry in given]


# ----------------------------------------------------------------------------------------------------- rotary positions


def rotary_settings(values: JsonFile) -> JsonFile:
    """Returns the rotary settings: those in `rope_scaling`, or, in newer files, all in `rope_parameters`."""
    rope = values.section("rope_scaling")
    return rope if rope.content else values.section("rope_parameters")


def read_rotary(values: JsonFile, rope: JsonFile, family: Family) -> Rotary:
    """Returns the rotary frequencies.

    Args:
      values: config.json, with the family's defaults.
      rope: its rotary settings.
      family: the model's family.

    Raises:
      CheckpointError: settings are missing or wrong, or give impossible frequencies.
    """
    if family.rotation != "by window":
        return _read_set(values, rope, family)
    # Older files have settings of layers without a window, and one base for the others.
    without, inside = (rope.section(name) for name in SECTIONS)
    sections = (without if without.content else JsonFile(rope.path, content=_flat(rope)), inside)
    local = values.content.get("rope_local_base_freq") or values.content.get("rope_theta")
    bases = (values.content.get("rope_theta"), local)
    sets = [
        _read_set(values, JsonFile(rope.path, content={"rope_theta": base} | section.content), family)
        for base, section in zip(bases, sections, strict=True)
    ]
    if any(one.long_context is not None for one in sets):
        raise CheckpointError(f"{rope.path}: rotary scaling 'longrope' is not supported by kind of layer")
    frequencies = np.stack([one.frequencies for one in sets])
    return Rotary(frequencies, tuple(one.scales[0] for one in sets))


def _flat(rope: JsonFile) -> dict[str, Any]:
    """Returns settings without those of a kind of layer."""
    return {name: value for name, value in rope.content.items() if name not in SECTIONS}


def _read_set(values: JsonFile, rope: JsonFile, family: Family) -> Rotary:
    """Returns the frequencies that one object of settings describes."""
    theta = rope.real("rope_theta", values.real("rope_theta", 10_000.0))
    dim = _rotary_dim(values, rope, family)
    kind = rope.text("rope_type") or rope.text("type")
    if kind is None and rope.content.get("factor") is not None:
        raise CheckpointError(f"{rope.path}: rotary scaling by a 'factor' has no 'rope_type'; take the original file")
    if kind in ("longrope", "su") or (kind == "yarn" and "longrope" in family.fields):
        return _read_longrope(values, rope, dim, theta)
    divisor, scale = 1.0, 1.0
    scaling: Llama3Scaling | YarnScaling | None = None
    if kind == "linear":
        divisor = rope.real("factor")
    elif kind == "llama3":
        scaling = _llama3(values, rope)
    elif kind == "yarn":
        scaling, scale = _yarn(values, rope, theta)
    elif kind not in (None, "default"):
        raise CheckpointError(
            f"{rope.path}: rotary scaling {shorten(kind)} is not supported; supported: 'default', 'linear', 'llama3', "
            "'yarn' and 'longrope'"
        )
    return Rotary(_checked(rope, rotary_frequencies(dim, theta, scaling=scaling, divisors=divisor)), (scale,))


def _rotary_dim(values: JsonFile, rope: JsonFile, family: Family) -> int:
    """Returns the number of a head's features that are rotated."""
    head_dim = read_head_dim(values)
    if "partial_rotary_factor" not in family.fields:
        return head_dim
    share = rope.real("partial_rotary_factor", values.real("partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise CheckpointError(
            f"{values.path}: partial_rotary_factor {share} rotates {dim} of each head's {head_dim} features; "
            "supported: an even number of them"
        )
    return dim


def _checked(rope: JsonFile, frequencies: np.ndarray) -> np.ndarray:
    return check_frequencies(frequencies, str(rope.path))


def _original_positions(values: JsonFile, rope: JsonFile) -> int:
    """Returns the context length that the model was first trained with."""
    trained = values.integer("max_position_embeddings", 2048)
    return values.integer("original_max_position_embeddings", rope.integer("original_max_position_embeddings", trained))


def _llama3(values: JsonFile, rope: JsonFile) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=rope.real("factor"),
        low_frequency_factor=rope.real("low_freq_factor"),
        high_frequency_factor=rope.real("high_freq_factor"),
        original_max_positions=_original_positions(values, rope),
    )
    if scaling.low_frequency_factor >= scaling.high_frequency_factor:
        raise CheckpointError(
            f"{rope.path}: 'low_freq_factor' {scaling.low_frequency_factor} must be below 'high_freq_factor' "
            f"{scaling.high_frequency_factor}; take the original file"
        )
    return scaling


def _yarn(values: JsonFile, rope: JsonFile, theta: float) -> tuple[YarnScaling, float]:
    """Returns YaRN's scaling and the factor of sines and cosines."""
    if theta <= 1.0:
        raise CheckpointError(f"{rope.path}: 'rope_theta' must be above 1 for 'yarn', got {theta}")
    scaling = YarnScaling(
        factor=rope.real("factor"),
        original_max_positions=_original_positions(values, rope),
        beta_fast=rope.real("beta_fast", 32.0),
        beta_slow=rope.real("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
    )
    if rope.content.get("attention_factor") is not None:
        return scaling, rope.real("attention_factor")
    if rope.content.get("mscale") and rope.content.get("mscale_all_dim"):
        return scaling, scaling.attention_factor(rope.real("mscale"), rope.real("mscale_all_dim"))
    return scaling, scaling.attention_factor()


def _read_longrope(values: JsonFile, rope: JsonFile, dim: int, theta: float) -> Rotary:
    """Returns LongRoPE's two sets, for contexts up to the original length and for longer ones."""
    original = _original_positions(values, rope)
    factor = rope.real("factor", values.integer("max_position_embeddings", 2048) / original)
    scale = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    sets = [
        _checked(rope, rotary_frequencies(dim, theta, divisors=_divisors(rope, name, dim // 2)))
        for name in ("short_factor", "long_factor")
    ]
    scale = rope.real("attention_factor", scale)
    return Rotary(np.stack(sets), (scale, scale), original)


def _divisors(rope: JsonFile, name: str, pairs: int) -> np.ndarray:
    """Returns a list of divisors of frequencies."""
    given = rope.content.get(name)
    if not isinstance(given, list) or len(given) != pairs:
        raise CheckpointError(f"{rope.path}: {name!r} must be a list of {pairs} numbers, got {shorten(given)}")
    return np.array([check_real(entry, f"{rope.path}: an entry of {name!r}") for entry in given])
