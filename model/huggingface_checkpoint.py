"""Llama-family checkpoints in Hugging Face folders: config.json and safetensors, in one file or in shards."""

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
"""The name of each tensor's role in the model."""

ATTENTION_BIASES: Final = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
"""Endings of the names of attention's biases."""

FLOAT_TYPES: Final = ("F64", "F32", "F16", "BF16")
"""Supported tensor types."""

BASE_PREFIX: Final = "model."
"""Prefix of a decoder's tensor names, absent where it was saved without its output head."""

BASE_MODULES: Final = ("embed_tokens.", "layers.", "norm.")
"""First components of names that lack `BASE_PREFIX`."""

NAMED_FILES: Final = 8
"""Maximum number of missing files that an error names."""

COMPARED_ROWS: Final = 4096
"""Rows read at a time when two tables are compared."""


class Location(NamedTuple):
    """Location of a tensor.

    Attributes:
      file: the safetensors file.
      name: name in that file.
      shape: shape of the tensor.
      kind: type of its numbers, as safetensors names it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


def is_huggingface_folder(path: Path) -> bool:
    """Returns whether a folder looks like a Hugging Face checkpoint."""
    return any(exists(path / name) for name in ("config.json", "model.safetensors", "model.safetensors.index.json"))


class HuggingFaceCheckpoint:
    """The `CheckpointReader` for Hugging Face folders.

    Raises:
      CheckpointError: a file is missing or damaged, or the architecture or a feature is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        self._values = JsonFile(path / "config.json")
        self._family = read_family(self._values)
        # Rotary settings are in `rope_scaling` and beside it, or, in newer files, all in `rope_parameters`.
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
        """Implements `CheckpointReader.tensor_names`: without rotary frequencies and a tied head's second copy."""
        ignored = {name for name in self._stored if name.endswith(".rotary_emb.inv_freq")}
        if self.config.tied_embedding:
            ignored.add(TENSOR_NAMES["head" if TENSOR_NAMES["embedding"] in self._stored else "embedding"])
        return self._stored.keys() - ignored

    def tensor_name(self, role: str, layer: int | None) -> str:
        """Implements `CheckpointReader.tensor_name`; a tied table may have either of its two names."""
        by_head = role == "embedding" and self.config.tied_embedding and TENSOR_NAMES["embedding"] not in self._stored
        return TENSOR_NAMES["head" if by_head else role].format(layer=layer)

    def tensor(self, name: str) -> StoredTensor:
        """Implements `CheckpointReader.tensor`."""
        stored = self._stored[name]
        if stored.kind not in FLOAT_TYPES:
            raise CheckpointError(
                f"{stored.file}: tensor {shorten(name)} has type {stored.kind}; supported: {', '.join(FLOAT_TYPES)}. "
                "Take the model's unquantized checkpoint and quantize it here, with quantize='int8' for example"
            )
        return StoredTensor(name=name, shape=stored.shape, read=lambda dtype: _read_tensor(stored, dtype))

    def inverse_frequencies(self) -> np.ndarray:
        """Implements `CheckpointReader.inverse_frequencies`."""
        config = self.config
        return rotary_frequencies(
            config.head_dim, config.rope_theta, scaling=config.rope_scaling, divisors=self._divisor
        )

    def tokenizer(self) -> Tokenizer:
        """Implements `CheckpointReader.tokenizer`."""
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
        """Checks that there are no biases if config.json says so: transformers would ignore them."""
        if self._values.boolean("attention_bias", True) or self._family.model_type == "qwen2":
            return
        for name in sorted(self._stored):
            if name.endswith(ATTENTION_BIASES) and self.tensor(name).read(np.float32).any():
                raise CheckpointError(
                    f"{self._values.path}: 'attention_bias' is false, but there is a tensor {shorten(name)}; set it to "
                    "true if the model was trained with biases, as those of the Qwen family are"
                )

    def _check_added_tokens(self) -> None:
        """Checks that the tokens added to every text have rows in the embedding; others may never be used."""
        beyond = [token for token in self._tokenizer.encode("") if token >= self.config.vocab_size]
        if beyond:
            raise CheckpointError(
                f"{self.path}: its tokenizer adds token {beyond[0]} to every text, but 'vocab_size' is "
                f"{self.config.vocab_size}; tokenizer and config are of different models"
            )

    def _has_one_table(self) -> bool:
        """Returns whether embedding and output head are equal; as in transformers, others are not tied."""
        embedding, head = (self._stored.get(TENSOR_NAMES[role]) for role in ("embedding", "head"))
        if embedding is None or head is None:
            return True
        if (embedding.shape, embedding.kind) != (head.shape, head.kind):
            return False
        if embedding.kind not in FLOAT_TYPES or len(embedding.shape) != 2:
            return True  # Reading the table reports what is wrong with it.
        pairs = zip(_raw_rows(embedding), _raw_rows(head), strict=True)
        return all(np.array_equal(first, second) for first, second in pairs)


def _check_unquantized(values: JsonFile) -> None:
    """Raises CheckpointError for quantized weights."""
    if quantization := values.section("quantization_config").content:
        raise CheckpointError(
            f"{values.path}: weights already quantized by {shorten(quantization.get('quant_method'))} are not "
            "supported; take the unquantized checkpoint and quantize it here, with quantize='int8' for example, or "
            "take a GGUF file"
        )


def _rope_scaling(rope: JsonFile, max_positions: int) -> tuple[RopeScaling | None, float]:
    """Returns Llama 3's scaling or None, and the divisor of linear scaling."""
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


def _list_tensors(path: Path) -> dict[str, Location]:
    """Returns the location of every tensor, by its name in a whole model."""
    locations: dict[str, Location] = {}
    for stored in (tensor for file in _weight_files(path) for tensor in _list_tensors_of(file)):
        other = locations.setdefault(_full_name(stored.name), stored)
        if other.name != stored.name:
            raise CheckpointError(
                f"{stored.file}: has tensor {shorten(stored.name)} as {shorten(other.name)} too; take the original file"
            )
    return locations


def _list_tensors_of(file: Path) -> list[Location]:
    """Returns the location of every tensor of a safetensors file."""
    with models_extra("reading a Hugging Face checkpoint"):
        import safetensors

    def locate(tensors: Any, name: str) -> Location:
        entry = tensors.get_slice(name)
        return Location(file, name, tuple(entry.get_shape()), entry.get_dtype())

    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            return [locate(tensors, name) for name in tensors.keys()]  # noqa: SIM118  # not a mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); download it again") from error


def _full_name(name: str) -> str:
    """Returns a tensor's name in a whole model: a decoder saved without its output head lacks the prefix."""
    if name.startswith(BASE_MODULES):
        return BASE_PREFIX + name
    return TENSOR_NAMES["head"] if name == BASE_PREFIX + TENSOR_NAMES["head"] else name


def _weight_files(path: Path) -> list[Path]:
    """Returns the files with the weights; as in transformers, a single file takes precedence over shards."""
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
    """Returns the files that an index of shards names, which exist."""
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


def _raw_rows(stored: Location) -> Iterator[np.ndarray]:
    """Yields a table's bytes, some rows at a time."""
    with _opened(stored) as tensors:
        rows = tensors.get_slice(stored.name)
        for start in range(0, stored.shape[0], COMPARED_ROWS):
            taken = rows[start : min(start + COMPARED_ROWS, stored.shape[0])]
            yield np.ascontiguousarray(taken).view(np.uint8)


def _read_tensor(stored: Location, dtype: Any) -> np.ndarray:
    """Reads a tensor."""
    with _opened(stored) as tensors:
        array = tensors.get_tensor(stored.name)
    return cast(array, dtype, f"{stored.file}: tensor {shorten(stored.name)}")


@contextlib.contextmanager
def _opened(stored: Location) -> Iterator[Any]:
    """Opens a tensor's file; raises CheckpointError where it cannot be read."""
    import safetensors

    try:
        with safetensors.safe_open(stored.file, framework="numpy") as tensors:
            yield tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{stored.file}: tensor {shorten(stored.name)} is not readable ({error}); download it again"
        ) from error
