"""The families of models: one row each, with what differs from Llama in config.json, in GGUF, and in tensors' names.

BUILD.md says how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal

HUGGING_FACE_MODULES: Final = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{layer}.input_layernorm",
    "query": "model.layers.{layer}.self_attn.q_proj",
    "key": "model.layers.{layer}.self_attn.k_proj",
    "value": "model.layers.{layer}.self_attn.v_proj",
    "query_norm": "model.layers.{layer}.self_attn.q_norm",
    "key_norm": "model.layers.{layer}.self_attn.k_norm",
    "output": "model.layers.{layer}.self_attn.o_proj",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "gate": "model.layers.{layer}.mlp.gate_proj",
    "up": "model.layers.{layer}.mlp.up_proj",
    "down": "model.layers.{layer}.mlp.down_proj",
}
"""Llama's names, in safetensors, of the modules that hold each part; a tensor's name ends in ".weight" or ".bias"."""

GGUF_MODULES: Final = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "blk.{layer}.attn_norm",
    "query": "blk.{layer}.attn_q",
    "key": "blk.{layer}.attn_k",
    "value": "blk.{layer}.attn_v",
    "query_norm": "blk.{layer}.attn_q_norm",
    "key_norm": "blk.{layer}.attn_k_norm",
    "output": "blk.{layer}.attn_output",
    "attention_post_norm": "blk.{layer}.post_attention_norm",
    "mlp_norm": "blk.{layer}.ffn_norm",
    "gate": "blk.{layer}.ffn_gate",
    "up": "blk.{layer}.ffn_up",
    "down": "blk.{layer}.ffn_down",
    "mlp_post_norm": "blk.{layer}.post_ffw_norm",
}
"""The same names in GGUF."""

SANDWICH: Final = {
    "attention_post_norm": "model.layers.{layer}.post_attention_layernorm",
    "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
}
"""Names of norms in families that normalize outputs."""

FUSED_QKV: Final = {"qkv": "model.layers.{layer}.self_attn.qkv_proj"}
FUSED_GATE_UP: Final = {"gate_up": "model.layers.{layer}.mlp.gate_up_proj"}

ATTENTION_BIASES: Final = {"qkv": "attention_bias", "output": "attention_bias"}
ALL_BIASES: Final = ATTENTION_BIASES | {"mlp": "mlp_bias"}
"""Fields of config.json that say whether projections have biases."""

GELU_TANH: Final = ("gelu_pytorch_tanh",)

PATTERN: Final = "attention.sliding_window_pattern"
"""Key in GGUF that says which layers have the sliding window."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFForm:
    """The form of a family's GGUF files, where it differs from that of Llama's.

    Attributes:
      architecture: the file's name of the family.
      interleaved: whether rows of queries and keys have the coordinates of a rotary pair next to each other.
      modules: names that differ from `GGUF_MODULES`.
      keys: keys that are applied besides those of Llama.
      defaults: values of keys that a file may lack.
      divides_logits: whether the key of the logits' scale is a divisor.
    """

    architecture: str
    interleaved: bool = False
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    divides_logits: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models for which this decoder gives the same results as transformers.

    Attributes:
      model_type: name of the family in config.json.
      architecture: class that config.json names for a whole model.
      base_architecture: class that config.json names for a decoder saved without its output head.
      form: fields of `ModelConfig` that all models of the family share.
      fields: fields of config.json that are applied besides those of Llama.
      defaults: values of fields that config.json may lack.
      activations: names of the activation in config.json; they all mean that of `form`.
      windows: layers with a sliding window: none, all, those that `layer_types` names (without it, all but each
        `window_period`-th), or as in Qwen, which also has a switch and a first layer.
      window_period: one layer in so many has no window; 0 means that all have one.
      rotation: rotary frequencies of a layer: one set for all; one for layers without a window and another for those
        with one ("by window"); or none for layers without a window ("windowed").
      modules: names that differ from `HUGGING_FACE_MODULES`.
      biases: projections that may have biases, and the field that says whether they do; "" where they always do.
      interleaved: whether the coordinates of a rotary pair are next to each other in safetensors.
      norm_offset: what is added to the weights of norms.
      embedding_root: whether embeddings are multiplied by the root of hidden_size.
      gguf: the form of GGUF files, or None.
    """

    model_type: str
    architecture: str
    base_architecture: str
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activations: tuple[str, ...] = ("silu", "swish")
    windows: Literal["none", "all", "kinds", "qwen"] = "none"
    window_period: int = 0
    rotation: Literal["one", "by window", "windowed"] = "one"
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    embedding_root: bool = False
    gguf: GGUFForm | None = None


def _family(model_type: str, prefix: str, base: str | None = None, **options: Any) -> Family:
    """Returns a row; classes are named after the prefix."""
    return Family(
        model_type=model_type,
        architecture=f"{prefix}ForCausalLM",
        base_architecture=base or f"{prefix}Model",
        **options,
    )


LLAMA_GGUF: Final = GGUFForm(architecture="llama", interleaved=True)

QWEN_DEFAULTS: Final = {"rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28}

GEMMA: Final[dict[str, Any]] = {
    "defaults": {"tie_word_embeddings": True, "head_dim": 256},
    "activations": GELU_TANH,
    "biases": ATTENTION_BIASES,
    "norm_offset": 1.0,
    "embedding_root": True,
}

OLMO: Final[Mapping[str, Any]] = {
    "form": {"pre_norm": False, "post_norm": True, "qk_norm": "projection"},
    "modules": {name: SANDWICH[name] for name in ("attention_post_norm", "mlp_post_norm")},
    "biases": ATTENTION_BIASES,
    "gguf": GGUFForm(architecture="olmo2", keys=(PATTERN,)),
}

GEMMA_2_DEFAULTS: Final = GEMMA["defaults"] | {"sliding_window": 4096, "query_pre_attn_scalar": 256}

GLM: Final[Mapping[str, Any]] = {
    "fields": ("partial_rotary_factor",),
    "defaults": {"partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7},
    "biases": {"qkv": "attention_bias"},
    "interleaved": True,
}

COHERE: Final[Mapping[str, Any]] = {
    "form": {"norm": "layer", "parallel": True},
    "biases": ATTENTION_BIASES,
    "interleaved": True,
}
COHERE_FIELDS: Final = ("logit_scale", "layer_norm_eps", "position_embedding_type")
COHERE_DEFAULTS: Final = {"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}

FAMILIES: Final = (
    _family("llama", "Llama", biases=ALL_BIASES, gguf=LLAMA_GGUF),
    _family("mistral", "Mistral", windows="all", defaults={"sliding_window": 4096}, gguf=LLAMA_GGUF),
    _family("ministral", "Ministral", windows="kinds", defaults={"sliding_window": 4096}),
    _family(
        "qwen2",
        "Qwen2",
        windows="qwen",
        defaults=QWEN_DEFAULTS,
        biases={"qkv": ""},
        gguf=GGUFForm(architecture="qwen2"),
    ),
    _family(
        "qwen3",
        "Qwen3",
        form={"qk_norm": "head"},
        windows="qwen",
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        biases=ATTENTION_BIASES,
        gguf=GGUFForm(architecture="qwen3"),
    ),
    # Files of the first Gemma say "gelu" and mean the approximation.
    _family(
        "gemma",
        "Gemma",
        **(GEMMA | {"activations": ("gelu", *GELU_TANH)}),
        form={"activation": "gelu_tanh"},
        gguf=GGUFForm(architecture="gemma"),
    ),
    _family(
        "gemma2",
        "Gemma2",
        **(GEMMA | {"defaults": GEMMA_2_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}}),
        form={"activation": "gelu_tanh", "post_norm": True},
        fields=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        windows="kinds",
        window_period=2,
        modules=SANDWICH,
        gguf=GGUFForm(
            architecture="gemma2",
            keys=("attn_logit_softcapping", "final_logit_softcapping", PATTERN),
            defaults={
                "attention.sliding_window": 4096,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
        ),
    ),
    _family(
        "gemma3_text",
        "Gemma3",
        "Gemma3TextModel",
        **(GEMMA | {"defaults": GEMMA_2_DEFAULTS | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}}),
        form={"activation": "gelu_tanh", "post_norm": True, "qk_norm": "head"},
        fields=("query_pre_attn_scalar", "final_logit_softcapping", "sliding_window_pattern"),
        windows="kinds",
        window_period=6,
        rotation="by window",
        modules=SANDWICH,
        gguf=GGUFForm(architecture="gemma3", keys=("final_logit_softcapping", PATTERN)),
    ),
    _family(
        "phi3",
        "Phi3",
        fields=("partial_rotary_factor", "longrope"),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        windows="all",
        modules=FUSED_QKV | FUSED_GATE_UP,
        gguf=GGUFForm(architecture="phi3", modules={"qkv": "blk.{layer}.attn_qkv", "gate_up": "blk.{layer}.ffn_up"}),
    ),
    _family(
        "smollm3",
        "SmolLM3",
        fields=("no_rope_layers", "no_rope_layer_interval"),
        defaults={"no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        biases=ALL_BIASES,
        gguf=GGUFForm(architecture="smollm3", interleaved=True),
    ),
    _family(
        "granite",
        "Granite",
        fields=("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
        defaults={"attention_multiplier": 1.0},
        biases=ALL_BIASES,
        gguf=GGUFForm(
            architecture="granite",
            interleaved=True,
            keys=("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
            divides_logits=True,
        ),
    ),
    _family("olmo2", "Olmo2", defaults={"rms_norm_eps": 1e-5}, **OLMO),
    _family(
        "olmo3",
        "Olmo3",
        **OLMO,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
        windows="kinds",
        window_period=4,
        rotation="by window",
    ),
    _family("glm", "Glm", modules=FUSED_GATE_UP, **GLM),
    _family(
        "glm4",
        "Glm4",
        **GLM,
        form={"post_norm": True},
        modules=FUSED_GATE_UP
        | {
            "attention_post_norm": "model.layers.{layer}.post_self_attn_layernorm",
            "mlp_post_norm": "model.layers.{layer}.post_mlp_layernorm",
        },
        gguf=GGUFForm(architecture="glm4", interleaved=True, modules={"gate_up": "blk.{layer}.ffn_up"}),
    ),
    _family(
        "cohere",
        "Cohere",
        **COHERE,
        fields=(*COHERE_FIELDS, "use_qk_norm"),
        defaults=COHERE_DEFAULTS | {"rope_theta": 5e5},
        gguf=GGUFForm(architecture="command-r", interleaved=True, keys=("logit_scale",)),
    ),
    _family(
        "cohere2",
        "Cohere2",
        **COHERE,
        fields=(*COHERE_FIELDS, "sliding_window_pattern"),
        defaults=COHERE_DEFAULTS | {"sliding_window": 4096},
        windows="kinds",
        window_period=4,
        rotation="windowed",
        gguf=GGUFForm(architecture="cohere2", interleaved=True, keys=("logit_scale", PATTERN)),
    ),
    _family(
        "stablelm",
        "StableLm",
        form={"norm": "layer"},
        fields=("partial_rotary_factor", "layer_norm_eps", "use_parallel_residual"),
        defaults={"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
        biases={"qkv": "use_qkv_bias"},
        gguf=GGUFForm(architecture="stablelm", keys=("use_parallel_residual",)),
    ),
    _family(
        "helium",
        "Helium",
        defaults={"head_dim": 128, "rope_theta": 1e5, "rms_norm_eps": 1e-8},
        biases={"qkv": "attention_bias", "mlp": "mlp_bias"},
        interleaved=True,
    ),
    _family(
        "arcee",
        "Arcee",
        form={"activation": "relu2", "gated": False},
        defaults={"rms_norm_eps": 1e-5},
        activations=("relu2",),
        biases=ALL_BIASES,
        gguf=GGUFForm(architecture="arcee", interleaved=True),
    ),
    _family(
        "seed_oss",
        "SeedOss",
        biases={"qkv": "attention_bias", "output": "attention_out_bias", "mlp": "mlp_bias"},
        gguf=GGUFForm(architecture="seed_oss", modules={"mlp_norm": "blk.{layer}.post_attention_norm"}),
    ),
)
"""The families, Llama's first."""

EXPERTS: Final = "a mixture of experts"
LATENT: Final = "a mixture of experts with latent attention"
NO_ATTENTION: Final = "no decoder with attention in every layer"

REFUSED: Final = {
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS,
    "gpt_oss": EXPERTS,
    "granitemoe": EXPERTS,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "glm4_moe": EXPERTS,
    "llama4": EXPERTS,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "kimi_k2": LATENT,
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "gemma3n": "a decoder with per-layer embeddings",
    "gemma3": "a model of text and images",
}
"""Known families that are not there, by `model_type`, and what they are."""
