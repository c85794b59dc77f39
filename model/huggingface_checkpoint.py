"""Llama-family checkpoints in Hugging Face folders: config.json and safetensors files, whole or in shards."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np

from palladion.model.checkpoint_files import CheckpointError, JsonFile, models_extra
from palladion.model.checkpoint_reader import StoredTensor, cast, rotary_frequencies
from palladion.model.config import ModelConfig, RopeScaling
from palladion.model.tokenizer import Tokenizer

ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM")

TENSOR_NAMES: Final = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "query": "model.layers.{layer}.self_attn.q_proj.weight",
    "key": "model.layers.{layer}.self_attn.k_proj.weight",
    "value": "model.layers.{layer}.self_attn.v_proj.weight",
    "query_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "key_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "value_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "output": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
}

FLOAT_TYPES: Final = ("F64", "F32", "F16", "BF16")

MISTRAL_SLIDING_WINDOW: Final = 4096
"""What a MistralForCausalLM has whose config.json is silent; an explicit null means no window."""


def is_huggingface_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint."""
    return any((path / name).exists() for name in ("config.json", "model.safetensors", "model.safetensors.index.json"))


class HuggingFaceCheckpoint:
    """An opened Hugging Face folder; the `CheckpointReader` of this format.

    Raises:
      CheckpointError: a file is missing or damaged, the architecture is another one, or it uses what this model does
        not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        self._values = JsonFile(path / "config.json")
        _check_supported(self._values)
        self._stored = _list_tensors(path)
        self._tokenizer = Tokenizer.from_folder(path)
        # Both layouts: the rotary settings beside the other keys, or all of them in `rope_parameters`.
        rope = self._values.section("rope_parameters")
        rope = rope if rope.content else self._values.section("rope_scaling")
        scaling, self._divisor = _rope_scaling(rope, self._values.integer("max_position_embeddings", 2048))
        self.config = self._read_config(rope.real("rope_theta", self._values.real("rope_theta", 10_000.0)), scaling)

    def tensor_names(self) -> Collection[str]:
        """Names of the tensors that hold weights: no rotary frequencies, no second copy of a tied head."""
        ignored = {name for name in self._stored if name.endswith(".rotary_emb.inv_freq")}
        if self.config.tied_embedding:
            ignored.add(TENSOR_NAMES["head"])
        return self._stored.keys() - ignored

    def name_of(self, part: str, layer: int | None) -> str:
        """The file's name for a part of the model."""
        return TENSOR_NAMES[part].format(layer=layer)

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of that name."""
        file, shape, kind = self._stored[name]
        if kind not in FLOAT_TYPES:
            raise CheckpointError(
                f"{file}: tensor {name!r} has type {kind}; supported: {', '.join(FLOAT_TYPES)}. Take the model's "
                "unquantized checkpoint and quantize it here, with quantize='int8' for example"
            )
        return StoredTensor(name=name, shape=shape, read=lambda dtype: _read_tensor(file, name, dtype))

    def inverse_frequencies(self) -> np.ndarray:
        """The rotary frequencies, `[head_dim / 2]` float32, linear or Llama 3's scaling applied."""
        config = self.config
        return rotary_frequencies(
            config.head_dim, config.rope_theta, scaling=config.rope_scaling, divisors=self._divisor
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the folder."""
        return self._tokenizer

    def _read_config(self, theta: float, scaling: RopeScaling | None) -> ModelConfig:
        values = self._values
        hidden, q_heads = values.integer("hidden_size"), values.integer("num_attention_heads")
        try:
            return ModelConfig(
                vocab_size=values.integer("vocab_size"),
                hidden_size=hidden,
                intermediate_size=values.integer("intermediate_size"),
                num_layers=values.integer("num_hidden_layers"),
                q_heads=q_heads,
                kv_heads=values.integer("num_key_value_heads", q_heads),
                head_dim=values.integer("head_dim", hidden // q_heads),
                max_positions=values.integer("max_position_embeddings", 2048),
                rope_theta=theta,
                rope_scaling=scaling,
                rms_norm_eps=values.real("rms_norm_eps", 1e-6),
                sliding_window=_sliding_window(values),
                tied_embedding=bool(values.content.get("tie_word_embeddings", False)),
                stop_tokens=self._tokenizer.stop_tokens,
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{values.path}: describes no model: {error}") from error


def _check_supported(values: JsonFile) -> None:
    """Raises CheckpointError for another architecture and for what this model does not have."""
    named = values.content.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    if not set(ARCHITECTURES) & set(names):
        raise CheckpointError(
            f"{values.path}: architecture {', '.join(names) or 'unnamed'} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    if (activation := values.content.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"{values.path}: hidden_act {activation!r} is not supported; supported: 'silu'")
    for source in (values, values.section("rope_parameters")):
        if (partial := source.content.get("partial_rotary_factor", 1.0)) != 1.0:
            raise CheckpointError(f"{values.path}: partial_rotary_factor {partial} is not supported; only 1.0 is")
    if quantization := values.section("quantization_config").content:
        raise CheckpointError(
            f"{values.path}: weights already quantized by {quantization.get('quant_method')!r} are not supported; take "
            "the unquantized checkpoint and quantize it here, with quantize='int8' for example, or take a GGUF file"
        )


def _sliding_window(values: JsonFile) -> int | None:
    """Tokens that a query sees: a setting of Mistral, which Llama ignores."""
    if "MistralForCausalLM" not in values.content["architectures"]:
        return None
    if values.content.get("sliding_window", MISTRAL_SLIDING_WINDOW) is None:
        return None
    return values.integer("sliding_window", MISTRAL_SLIDING_WINDOW)


def _rope_scaling(rope: JsonFile, max_positions: int) -> tuple[RopeScaling | None, float]:
    """Llama 3's scaling or None, and the number by which linear scaling divides all frequencies."""
    kind = rope.text("rope_type") or rope.text("type") or "default"
    if kind == "default":
        return None, 1.0
    if kind == "linear":
        return None, rope.real("factor")
    if kind != "llama3":
        raise CheckpointError(
            f"{rope.path}: rotary scaling {kind!r} is not supported; supported: 'default', 'linear' and 'llama3'"
        )
    scaling = RopeScaling(
        factor=rope.real("factor"),
        low_frequency_factor=rope.real("low_freq_factor"),
        high_frequency_factor=rope.real("high_freq_factor"),
        original_max_positions=rope.integer("original_max_position_embeddings", max_positions),
    )
    if scaling.low_frequency_factor >= scaling.high_frequency_factor:
        raise CheckpointError(
            f"{rope.path}: 'low_freq_factor' {scaling.low_frequency_factor} must be below 'high_freq_factor' "
            f"{scaling.high_frequency_factor}; take the original file"
        )
    return scaling, 1.0


def _list_tensors(path: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """File, shape and type of every tensor of a folder."""
    with models_extra("reading a Hugging Face checkpoint"):
        import safetensors

    found = {}
    for file in _weight_files(path):
        try:
            with safetensors.safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping: it has no iterator
                    entry = tensors.get_slice(name)
                    found[name] = (file, tuple(entry.get_shape()), entry.get_dtype())
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{file}: truncated or damaged ({error}); download it again") from error
    return found


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = JsonFile(index).content.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index}: has no 'weight_map'; download it again")
        files = [path / str(name) for name in sorted(set(shards.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{index}: names files that are not there: {', '.join(missing)}; download them")
        return files
    whole = path / "model.safetensors"
    if whole.exists():
        return [whole]
    if any(path.glob("*.bin")):
        raise CheckpointError(
            f"{path}: holds pickled weights (.bin), which can run code and are never opened; convert them to "
            "safetensors, with save_pretrained of a recent transformers for example"
        )
    raise CheckpointError(f"{path}: has neither model.safetensors nor model.safetensors.index.json; download one")


def _read_tensor(file: Path, name: str, dtype: Any) -> np.ndarray:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            stored = tensors.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: tensor {name!r} is not readable ({error}); download it again") from error
    return cast(stored, dtype, f"{file}: tensor {name!r}")
