"""Llama-family checkpoints in Hugging Face folders: config.json and safetensors files, whole or in shards."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from palladion.model.checkpoint_fields import check_fields, read_family, read_sliding_window
from palladion.model.checkpoint_files import CheckpointError, JsonFile, check_regular, exists, models_extra, shorten
from palladion.model.checkpoint_reader import StoredTensor, cast, rotary_frequencies
from palladion.model.config import ModelConfig, RopeScaling
from palladion.model.tokenizer import Tokenizer

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

ATTENTION_BIASES: Final = ("q_proj.bias", "k_proj.bias", "v_proj.bias")

FLOAT_TYPES: Final = ("F64", "F32", "F16", "BF16")

BASE_PREFIX: Final = "model."
"""What the names of a decoder's tensors start with, unless it was saved without its output head."""

BASE_PARTS: Final = ("embed_tokens.", "layers.", "norm.")
"""What names start with that were saved without the prefix."""

NAMED_FILES: Final = 8
"""Missing files that an error names."""

COMPARED_ROWS: Final = 4096
"""Rows that are read at a time to see whether two tables are the same."""


class StoredAs(NamedTuple):
    """Where a tensor is: its file, its name there, its shape and its type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


def is_huggingface_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint."""
    return any(exists(path / name) for name in ("config.json", "model.safetensors", "model.safetensors.index.json"))


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
        self._family = read_family(self._values)
        # Both layouts: the rotary settings beside the other keys, or all of them in `rope_parameters`.
        rope = self._values.section("rope_scaling")
        rope = rope if rope.content else self._values.section("rope_parameters")
        _check_unquantized(self._values)
        check_fields(self._values, rope)
        self._stored = _list_tensors(path)
        self._tokenizer = Tokenizer.from_folder(path)
        scaling, self._divisor = _rope_scaling(rope, self._values.integer("max_position_embeddings", 2048))
        self.config = self._read_config(rope.real("rope_theta", self._values.real("rope_theta", 10_000.0)), scaling)
        self._check_biases()
        self._check_added_tokens()

    def tensor_names(self) -> Collection[str]:
        """Names of the tensors that hold weights: no rotary frequencies, no second copy of a tied head."""
        ignored = {name for name in self._stored if name.endswith(".rotary_emb.inv_freq")}
        if self.config.tied_embedding:
            ignored.add(TENSOR_NAMES["head" if TENSOR_NAMES["embedding"] in self._stored else "embedding"])
        return self._stored.keys() - ignored

    def name_of(self, part: str, layer: int | None) -> str:
        """The name for a part of the model; a tied table may stand under either of its two names."""
        if part == "embedding" and self.config.tied_embedding and TENSOR_NAMES["embedding"] not in self._stored:
            part = "head"
        return TENSOR_NAMES[part].format(layer=layer)

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of that name."""
        stored = self._stored[name]
        if stored.kind not in FLOAT_TYPES:
            raise CheckpointError(
                f"{stored.file}: tensor {shorten(name)} has type {stored.kind}; supported: {', '.join(FLOAT_TYPES)}. "
                "Take the model's unquantized checkpoint and quantize it here, with quantize='int8' for example"
            )
        return StoredTensor(name=name, shape=stored.shape, read=lambda dtype: _read_tensor(stored, dtype))

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
                max_positions=values.integer("max_position_embeddings", 2048, minimum=2),
                rope_theta=theta,
                rope_scaling=scaling,
                rms_norm_eps=values.real("rms_norm_eps", 1e-6),
                sliding_window=read_sliding_window(values, self._family),
                tied_embedding=values.boolean("tie_word_embeddings", False) and self._has_one_table(),
                stop_tokens=self._tokenizer.stop_tokens,
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{values.path}: describes no model: {error}") from error

    def _check_biases(self) -> None:
        """Checks that no biases are there of which config.json says that there are none: transformers drops them."""
        if self._values.boolean("attention_bias", True) or self._family.model_type == "qwen2":
            return
        for name in sorted(self._stored):
            if name.endswith(ATTENTION_BIASES) and self.tensor(name).read(np.float32).any():
                raise CheckpointError(
                    f"{self._values.path}: 'attention_bias' is false, but there is a tensor {shorten(name)}; set it to "
                    "true if the model was trained with biases, as those of the Qwen family are"
                )

    def _check_added_tokens(self) -> None:
        """Checks the tokens that every text is given; others beyond the embedding's rows may never be used."""
        beyond = [token for token in self._tokenizer.encode("") if token >= self.config.vocab_size]
        if beyond:
            raise CheckpointError(
                f"{self.path}: its tokenizer adds token {beyond[0]} to every text, but 'vocab_size' is "
                f"{self.config.vocab_size}; tokenizer and config are of different models"
            )

    def _has_one_table(self) -> bool:
        """Whether embedding and output head are one table; as in transformers, two that differ are not tied."""
        embedding, head = (self._stored.get(TENSOR_NAMES[part]) for part in ("embedding", "head"))
        if embedding is None or head is None:
            return True
        if (embedding.shape, embedding.kind) != (head.shape, head.kind):
            return False
        if embedding.kind not in FLOAT_TYPES or len(embedding.shape) != 2:
            return True  # Whoever reads the table says what is wrong with it.
        pairs = zip(_raw_rows(embedding), _raw_rows(head), strict=True)
        return all(np.array_equal(first, second) for first, second in pairs)


def _check_unquantized(values: JsonFile) -> None:
    if quantization := values.section("quantization_config").content:
        raise CheckpointError(
            f"{values.path}: weights already quantized by {shorten(quantization.get('quant_method'))} are not "
            "supported; take the unquantized checkpoint and quantize it here, with quantize='int8' for example, or "
            "take a GGUF file"
        )


def _rope_scaling(rope: JsonFile, max_positions: int) -> tuple[RopeScaling | None, float]:
    """Llama 3's scaling or None, and the number by which linear scaling divides all frequencies."""
    kind = rope.text("rope_type") or rope.text("type")
    if kind is None and rope.content.get("factor") is not None:
        raise CheckpointError(f"{rope.path}: rotary scaling by a 'factor' has no 'rope_type'; take the original file")
    if kind in (None, "default"):
        return None, 1.0
    if kind == "linear":
        return None, rope.real("factor")
    if kind != "llama3":
        raise CheckpointError(
            f"{rope.path}: rotary scaling {shorten(kind)} is not supported; supported: 'default', 'linear' and 'llama3'"
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


def _list_tensors(path: Path) -> dict[str, StoredAs]:
    """Every tensor of a folder by the name that a whole model has for it."""
    with models_extra("reading a Hugging Face checkpoint"):
        import safetensors

    found: dict[str, StoredAs] = {}
    for file in _weight_files(path):
        try:
            with safetensors.safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping: it has no iterator
                    entry = tensors.get_slice(name)
                    stored = StoredAs(file, name, tuple(entry.get_shape()), entry.get_dtype())
                    other = found.setdefault(_full_name(name), stored)
                    if other.name != name:
                        raise CheckpointError(
                            f"{file}: has tensor {shorten(name)} as {shorten(other.name)} too; take the original file"
                        )
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{file}: truncated or damaged ({error}); download it again") from error
    return found


def _full_name(name: str) -> str:
    """A tensor's name in a whole model: a decoder saved without its output head lacks the prefix."""
    if name.startswith(BASE_PARTS):
        return BASE_PREFIX + name
    return TENSOR_NAMES["head"] if name == BASE_PREFIX + TENSOR_NAMES["head"] else name


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights; as in transformers, a whole file counts before an index of shards."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if exists(whole):
        check_regular(whole)
        return [whole]
    if exists(index):
        return _shards(path, index)
    if any(path.glob("*.bin")):
        raise CheckpointError(
            f"{path}: holds pickled weights (.bin), which can run code and are never opened; convert them to "
            "safetensors, with save_pretrained of a recent transformers for example"
        )
    raise CheckpointError(f"{path}: has neither model.safetensors nor model.safetensors.index.json; download one")


def _shards(path: Path, index: Path) -> list[Path]:
    shards = JsonFile(index).content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: has no 'weight_map'; download it again")
    if wrong := [name for name in shards.values() if not isinstance(name, str)]:
        raise CheckpointError(
            f"{index}: 'weight_map' must give a file's name for each tensor, got {shorten(wrong[0])}; download it again"
        )
    names = sorted(set(shards.values()))
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise CheckpointError(f"{index}: names a file outside its folder: {shorten(outside[0])}; download it again")
    files = [path / name for name in names]
    if missing := [shorten(file.name)[1:-1] for file in files if not exists(file)]:
        others = f" and {len(missing) - NAMED_FILES} more" if len(missing) > NAMED_FILES else ""
        raise CheckpointError(
            f"{index}: names files that are not there: {', '.join(missing[:NAMED_FILES])}{others}; download them"
        )
    for file in files:
        check_regular(file)
    return files


def _raw_rows(stored: StoredAs) -> Iterator[np.ndarray]:
    """A table's bytes, some rows at a time."""
    with _opened(stored) as tensors:
        rows = tensors.get_slice(stored.name)
        for start in range(0, stored.shape[0], COMPARED_ROWS):
            taken = rows[start : min(start + COMPARED_ROWS, stored.shape[0])]
            yield np.ascontiguousarray(taken).view(np.uint8)


def _read_tensor(stored: StoredAs, dtype: Any) -> np.ndarray:
    with _opened(stored) as tensors:
        array = tensors.get_tensor(stored.name)
    return cast(array, dtype, f"{stored.file}: tensor {shorten(stored.name)}")


@contextlib.contextmanager
def _opened(stored: StoredAs) -> Iterator[Any]:
    """The file of a tensor, open; raises CheckpointError where it cannot be read."""
    import safetensors

    try:
        with safetensors.safe_open(stored.file, framework="numpy") as tensors:
            yield tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{stored.file}: tensor {shorten(stored.name)} is not readable ({error}); download it again"
        ) from error
