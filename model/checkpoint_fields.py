"""Checks of config.json: fields that change what a model computes are refused unless this decoder applies them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from palladion.model.checkpoint_files import CheckpointError, JsonFile, shorten
from palladion.model.families import FAMILIES, REFUSED, Family

NOTHING: Final[tuple[Any, ...]] = (False, 0, "", [], {})
"""Values, besides null, that mean that a feature is absent."""

NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    # Scales that other families apply to activations, scores or logits; null means none.
    **dict.fromkeys(
        (
            "attention_in_multiplier",
            "attention_out_multiplier",
            "embedding_multiplier",
            "embedding_scale",
            "key_multiplier",
            "lm_head_multiplier",
            "logit_scale",
            "logits_mup_width_multiplier",
            "logits_scaling",
            "partial_rotary_factor",
            "residual_multiplier",
            "rope_pct",
            "rotary_emb_fraction",
            "rotary_pct",
            "rotary_percent",
            "scale_emb",
        ),
        (1,),
    ),
    "is_causal": (True,),
    "causal": (True,),
    "position_embedding_type": ("rope", "rotary"),
    # Layers, norms, attention or positions that this decoder does not have.
    **dict.fromkeys(
        (
            "add_cross_attention",
            "alibi",
            "attention_chunk_size",
            "attention_k_eq_v",
            "attention_sinks",
            "attention_value_scale",
            "attn_logit_softcapping",
            "attn_scale",
            "attn_temperature_tuning",
            "clip_qkv",
            "final_logit_softcapping",
            "is_encoder_decoder",
            "kv_lora_rank",
            "layer_rope_theta",
            "logits_soft_cap",
            "mlp_layer_types",
            "mlp_multipliers",
            "moe_layers",
            "mup_enabled",
            "n_routed_experts",
            "num_attention_heads_per_layer",
            "num_experts",
            "num_kv_shared_layers",
            "num_local_experts",
            "output_logit_soft_cap",
            "parallel_attn",
            "per_layer_config",
            "q_lora_rank",
            "qk_layernorm",
            "qk_norm",
            "rope_interleave",
            "rope_interleaved",
            "scale_depth",
            "scale_embedding",
            "sliding_window_pattern",
            "swiglu_limit",
            "use_alibi",
            "use_bidirectional_attention",
            "use_mla",
            "use_parallel_residual",
            "use_post_norm",
            "use_qk_norm",
            "use_sandwich_norm",
        ),
        NOTHING,
    ),
}
"""Fields that this decoder does not apply, with the values, besides null, for which they have no effect."""

NEUTRAL_ROTARY_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "llama_4_scaling_beta": NOTHING,
    "partial_rotary_factor": (1,),
}
"""Rotary settings that this decoder does not apply, with the values for which they have no effect."""

EFFECTIVE_NAME: Final = re.compile(r"multiplier|scaling|soft_?cap|qk_?(layer)?norm|rotary|mup_|experts$|lora_rank")
"""Names of fields that are likely to change the result, for families that are not known yet."""

CHECKED_APART: Final = frozenset({"rope_scaling", "attention_multiplier"})
"""Fields that match `EFFECTIVE_NAME`, but are applied, or have a neutral value that depends on other fields."""

ACTIVATION_FIELDS: Final = ("hidden_act", "hidden_activation")
"""Fields that name the MLP's activation."""

SECTIONS: Final = ("full_attention", "sliding_attention")
"""Rotary settings of layers without and with a window, where a family has one each."""

SAME_SCALE: Final = 1e-6
"""Relative difference up to which two scales count as equal: a few roundings of float32."""


def read_family(values: JsonFile) -> Family:
    """Returns the family that `architectures` and `model_type` of a config.json name.

    Raises:
      CheckpointError: the family is not supported, or the two fields name different families.
    """
    named = values.content.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    model_type = values.text("model_type")
    by_name = [family for family in FAMILIES if {family.architecture, family.base_architecture} & set(names)]
    by_type = [family for family in FAMILIES if family.model_type == model_type]
    if by_name and by_type != by_name[:1] and model_type is not None:
        raise CheckpointError(
            f"{values.path}: 'model_type' {shorten(model_type)} is not that of architecture {by_name[0].architecture}, "
            f"which is {by_name[0].model_type!r}; the folder is of another model: take one of a supported architecture"
        )
    families = by_name or ([] if names else by_type)
    if not families:
        given = shorten(", ".join(names) or model_type or "")[1:-1] or "unnamed"
        kinds = {_kind(name) for name in names} | {(model_type or "").replace("_", "")}
        refused = [what for kind, what in REFUSED.items() if kind.replace("_", "") in kinds]
        reason = f"it is {refused[0]}, which this decoder does not have; " if refused else ""
        raise CheckpointError(
            f"{values.path}: architecture {given} is not supported; {reason}supported: "
            f"{', '.join(family.architecture.removesuffix('ForCausalLM') for family in FAMILIES)}"
        )
    return families[0]


def _kind(architecture: str) -> str:
    """Returns the family in the name of a class: "qwen3moe" of "Qwen3MoeForCausalLM"."""
    return architecture.split("For")[0].lower()


def check_fields(values: JsonFile, rope: JsonFile, family: Family) -> None:
    """Checks that no field requests a computation that this decoder does not have.

    Args:
      values: config.json.
      rope: the rotary settings in config.json.
      family: the model's family, whose own fields are applied.

    Raises:
      CheckpointError: a field does; the message names it.
    """
    for name, value in values.content.items():
        if name in family.fields:
            continue
        if name in ACTIVATION_FIELDS:
            _check_neutral(values, name, value, family.activations)
        elif name in NEUTRAL_VALUES:
            _check_neutral(values, name, value, NEUTRAL_VALUES[name])
        elif EFFECTIVE_NAME.search(name) and name not in CHECKED_APART:
            _check_neutral(values, name, value, (*NOTHING, 1))
    _check_relative_scales(values, family)
    if "no_rope_layers" not in family.fields:
        _check_layers_without_positions(values)
    sections = SECTIONS if family.rotation == "by window" else ()
    for section in (rope, *(rope.section(name) for name in sections)):
        _check_rotary_fields(section, family, sections if section is rope else ())
    for name in sorted({"attention_bias", "mlp_bias", "attention_out_bias", *family.biases.values()} - {""}):
        values.boolean(name, False)  # The reader compares it with the tensors.


def _check_rotary_fields(rope: JsonFile, family: Family, sections: tuple[str, ...]) -> None:
    """Checks rotary settings; `sections` are the names of objects that they may hold."""
    for name, value in rope.content.items():
        if isinstance(value, dict) and name not in sections:
            raise CheckpointError(
                f"{rope.path}: rotary settings by kind of layer ({shorten(name)}) are not supported; supported: one "
                "for all layers"
            )
        if name in NEUTRAL_ROTARY_VALUES and name not in family.fields:
            _check_neutral(rope, name, value, NEUTRAL_ROTARY_VALUES[name])


def _check_neutral(values: JsonFile, name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value is None or value in neutral:
        return
    accepted = "null" if neutral == NOTHING else " or ".join(map(repr, neutral))
    raise CheckpointError(
        f"{values.path}: {name} {shorten(value)} is not supported: this decoder does not apply "
        f"it; supported: {accepted}"
    )


def _check_relative_scales(values: JsonFile, family: Family) -> None:
    """Checks scales that have no effect if they equal the ones that this decoder uses."""
    hidden, heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    head_dim = values.integer("head_dim", max(1, hidden // heads))
    expected = {
        "attention_multiplier": head_dim**-0.5,
        "query_pre_attn_scalar": head_dim,
        "dim_model_base": hidden,
    }
    for name, value in expected.items():
        if name in family.fields or values.content.get(name) is None:
            continue
        if abs(values.real(name) / value - 1) > SAME_SCALE:
            raise CheckpointError(
                f"{values.path}: {name} {values.real(name)} is not supported: this decoder does not apply it; "
                f"supported: {value:g}, for heads of {head_dim} and a hidden_size of {hidden}"
            )


def _check_layers_without_positions(values: JsonFile) -> None:
    """Checks that every layer has rotary positions: a 1 in `no_rope_layers`, which overrides the interval."""
    layers = values.content.get("no_rope_layers")
    if layers is not None:
        if not isinstance(layers, list) or not all(layers):
            raise CheckpointError(
                f"{values.path}: no_rope_layers {shorten(layers)} is not supported; supported: 1 for every layer"
            )
        return
    interval = values.content.get("no_rope_layer_interval")
    if interval is not None and values.integer("no_rope_layer_interval") <= values.integer("num_hidden_layers"):
        raise CheckpointError(
            f"{values.path}: no_rope_layer_interval {interval} is not supported; supported: no_rope_layers with a 1 "
            "for every layer"
        )
