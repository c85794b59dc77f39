"""Llama-family checkpoints in GGUF files: memory-mapped, and kept in the file's own quantization bit for bit."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_files import (
    CheckpointError,
    check_integer,
    check_real,
    check_window,
    models_extra,
    shorten,
)
from palladion.model.checkpoint_reader import StoredTensor, cast, rotary_frequencies
from palladion.model.config import ModelConfig
from palladion.model.tokenizer import Tokenizer
from palladion.reference.quantization import QuantizedArray
from palladion.reference.scheme import CODE_DTYPE, Scheme

ARCHITECTURE: Final = "llama"
"""The one supported architecture; Llama, Mistral, SmolLM and similar models all have this name."""

TENSOR_NAMES: Final = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "blk.{layer}.attn_norm.weight",
    "query": "blk.{layer}.attn_q.weight",
    "key": "blk.{layer}.attn_k.weight",
    "value": "blk.{layer}.attn_v.weight",
    "query_bias": "blk.{layer}.attn_q.bias",
    "key_bias": "blk.{layer}.attn_k.bias",
    "value_bias": "blk.{layer}.attn_v.bias",
    "output": "blk.{layer}.attn_output.weight",
    "mlp_norm": "blk.{layer}.ffn_norm.weight",
    "gate": "blk.{layer}.ffn_gate.weight",
    "up": "blk.{layer}.ffn_up.weight",
    "down": "blk.{layer}.ffn_down.weight",
}
"""The file's name for each tensor's role in the model."""

FREQUENCY_DIVISORS: Final = "rope_freqs.weight"
"""Tensor with the divisor of each rotary frequency: Llama 3's scaling, computed by the converter."""

SCALING_FACTORS: Final = ("rope.scaling.factor", "rope.scale_linear")
"""Keys of linear scaling's factor; old files use the second."""

NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.key_length_mla": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window_pattern": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "use_parallel_residual": (False,),
}
"""Keys that this decoder does not apply, with the values for which they have no effect."""

BLOCK: Final = 32
"""Weights per block of the types in `KEPT`."""

KEPT: Final = {
    "Q4_0": Scheme("int4", BLOCK),
    "Q4_1": Scheme("int4", BLOCK, "minimums"),
    "Q8_0": Scheme("int8", BLOCK),
}
"""Tensor types that a QuantizedArray holds without loss."""

DECODED_AT_ONCE: Final = 1 << 22
"""Weights decoded to float32 at a time, which bounds the memory needed beside the result."""


def is_gguf(path: Path) -> bool:
    """Returns whether a file starts with the magic of GGUF."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


class GGUFCheckpoint:
    """The `CheckpointReader` for GGUF files.

    Raises:
      CheckpointError: the file is damaged, or has an architecture or a feature that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self._metadata = _metadata(path, reader)
        name = self._metadata.get("general.name")
        self.name = name if isinstance(name, str) else path.stem
        self._check_supported()
        self._tokenizer = Tokenizer.from_gguf(self._metadata, source=str(path))
        self.config = self._read_config()

    def tensor_names(self) -> Collection[str]:
        """Implements `CheckpointReader.tensor_names`."""
        return self._tensors.keys() - {FREQUENCY_DIVISORS}

    def tensor_name(self, role: str, layer: int | None) -> str:
        """Implements `CheckpointReader.tensor_name`."""
        return TENSOR_NAMES[role].format(layer=layer)

    def tensor(self, name: str) -> StoredTensor:
        """Implements `CheckpointReader.tensor`; rows of queries and keys are in the half-split rotary order."""
        stored = self._tensors[name]
        kind = stored.tensor_type
        if not _is_decodable(kind):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which the gguf package cannot decode; take a file "
                "in Q4_0, Q4_1, Q8_0, F16, BF16 or F32, or requantize it with llama-quantize --allow-requantize"
            )
        module = name.split(".")[-2]
        heads = {"attn_q": self.config.q_heads, "attn_k": self.config.kv_heads}.get(module)
        shape = tuple(int(size) for size in reversed(stored.shape))
        rows = functools.partial(_rows, stored.data, heads)
        label = f"{self.path}: tensor {name!r}"
        return StoredTensor(
            name=name,
            shape=shape,
            read=lambda dtype: _read_dense(rows(), shape, kind, dtype, label),
            read_quantized=(lambda: _read_quantized(rows(), KEPT[kind.name], label)) if kind.name in KEPT else None,
        )

    def tokenizer(self) -> Tokenizer:
        """Implements `CheckpointReader.tokenizer`."""
        return self._tokenizer

    def _check_supported(self) -> None:
        architecture = self._metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise CheckpointError(
                f"{self.path}: architecture {shorten(architecture)} is not supported; supported: {ARCHITECTURE!r} "
                "(Llama, Mistral, SmolLM and others of that form)"
            )
        files = check_integer(self._metadata.get("split.count", 0), f"{self.path}: metadata key 'split.count'", 0)
        if files > 1:
            raise CheckpointError(
                f"{self.path}: one of {files} parts of a split checkpoint; join them with llama-gguf-split --merge"
            )
        if experts := self._integer("expert_count", 0, minimum=0):
            raise CheckpointError(f"{self.path}: a mixture of {experts} experts is not supported; take a dense model")
        for key, neutral in NEUTRAL_VALUES.items():
            value, label = self._value(key, neutral[0])
            if value not in neutral:
                raise CheckpointError(
                    f"{label} is {shorten(value)}, which is not supported; supported: {' or '.join(map(str, neutral))}"
                )

    def _value(self, key: str, default: Any) -> tuple[Any, str]:
        """Returns a value under `llama.` and its name for errors; a list of equal numbers counts as one of them."""
        value = self._metadata.get(f"{ARCHITECTURE}.{key}", default)
        label = f"{self.path}: metadata key '{ARCHITECTURE}.{key}'"
        if value is None:
            raise CheckpointError(f"{label} is missing; convert the model again")
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        return value, label

    def _integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        return check_integer(*self._value(key, default), minimum)

    def _real(self, key: str, default: float | None = None) -> float:
        return check_real(*self._value(key, default))

    def _read_config(self) -> ModelConfig:
        hidden = self._integer("embedding_length")
        q_heads = self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", hidden // q_heads)
        rotated = self._integer("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise CheckpointError(
                f"{self.path}: rotates {rotated} of each head's {head_dim} dimensions; only full rotation is supported"
            )
        value_dim = self._integer("attention.value_length", head_dim)
        if value_dim != head_dim:
            raise CheckpointError(
                f"{self.path}: value heads are {value_dim} wide, key heads {head_dim}; only equal widths are supported"
            )
        window, window_label = self._value("attention.sliding_window", 0)
        try:
            return ModelConfig(
                vocab_size=self._tokenizer.vocab_size,
                hidden_size=hidden,
                intermediate_size=self._integer("feed_forward_length"),
                num_layers=self._integer("block_count"),
                q_heads=q_heads,
                kv_heads=self._integer("attention.head_count_kv", q_heads),
                head_dim=head_dim,
                max_positions=self._integer("context_length", minimum=2),
                rope_theta=self._real("rope.freq_base", 10_000.0),
                rms_norm_eps=self._real("attention.layer_norm_rms_epsilon"),
                sliding_window=None if _is_zero(window) else check_window(window, window_label),
                tied_embedding=TENSOR_NAMES["head"] not in self._tensors,
                # Some files have -1, or its unsigned form, for a token that does not exist.
                stop_tokens=tuple(t for t in self._tokenizer.stop_tokens if 0 <= t < self._tokenizer.vocab_size),
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.path}: its metadata describe no model: {error}") from error

    def inverse_frequencies(self) -> np.ndarray:
        """Implements `CheckpointReader.inverse_frequencies`."""
        divisors: np.ndarray | float = self._linear_divisor()
        if FREQUENCY_DIVISORS in self._tensors:
            factors = self.tensor(FREQUENCY_DIVISORS).read(np.float64)
            if factors.shape != (self.config.head_dim // 2,) or not (factors > 0).all():
                raise CheckpointError(
                    f"{self.path}: tensor {FREQUENCY_DIVISORS!r} must hold {self.config.head_dim // 2} positive "
                    f"numbers for a head_dim of {self.config.head_dim}, has shape {list(factors.shape)}; convert the "
                    "model again"
                )
            divisors = divisors * factors
        return rotary_frequencies(self.config.head_dim, self.config.rope_theta, divisors=divisors)

    def _linear_divisor(self) -> float:
        """Returns the divisor of linear scaling, read as llama.cpp does: 1 for a factor of 0, or without a factor."""
        kind, _ = self._value("rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise CheckpointError(
                f"{self.path}: rotary scaling {shorten(kind)} is not supported; supported: none, linear and Llama 3's "
                f"(a tensor {FREQUENCY_DIVISORS!r})"
            )
        given = [key for key in SCALING_FACTORS if f"{ARCHITECTURE}.{key}" in self._metadata]
        if kind == "none" or not given:
            return 1.0
        factor, label = self._value(given[0], None)
        return 1.0 if _is_zero(factor) else check_real(factor, label)


def _is_zero(value: Any) -> bool:
    """Returns whether a value is the number 0; False is not."""
    return not isinstance(value, bool) and isinstance(value, int | float) and value == 0


def _open(path: Path) -> Any:
    """Returns a GGUFReader of the file that checks every access against the file's size."""
    with models_extra("reading a GGUF file"):
        import gguf

    size = path.stat().st_size

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # A slice past the end would be silently shorter, and a damaged array length would loop for hours.
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > size:
                raise EOFError(f"needs {end:,} bytes, has {size:,}")
            # Slicing an array takes a third of the time of slicing a memmap; each token takes several slices.
            self.data: np.ndarray = np.asarray(self.data)
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = BoundedReader(os.fspath(path))
    except EOFError as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}; download it again") from error
    except Exception as error:  # A damaged file may raise anything in the parser; the remedy is the same.
        raise CheckpointError(f"{path}: damaged GGUF file ({error}); download it again") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: written in the other byte order; convert it with gguf-convert-endian")
    return reader


def _metadata(path: Path, reader: Any) -> Mapping[str, Any]:
    """Returns the metadata as plain Python values, by key."""
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error}); download it again") from error


def _rows(data: np.ndarray, heads: int | None) -> np.ndarray:
    """Returns a tensor's rows, those of query and key projections reordered to the half-split rotary form.

    GGUF stores the two coordinates of a rotary pair next to each other: its row 2 i + h of a head is the model's row
    i + h * head_dim / 2. Whole rows are moved, so quantized rows are moved without loss.
    """
    if heads is None:
        return data
    pairs = data.reshape(heads, -1, 2, *data.shape[1:])
    return pairs.swapaxes(1, 2).reshape(data.shape)


@functools.cache
def _is_decodable(kind: Any) -> bool:
    """Returns whether the gguf package can decode a tensor type: it lists many more types than it decodes."""
    import gguf

    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decode(kind: Any, rows: np.ndarray) -> np.ndarray:
    """Decodes rows of a tensor type to float32; the caller checks that they are finite."""
    import gguf

    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, kind)


def _read_dense(rows: np.ndarray, shape: tuple[int, ...], kind: Any, dtype: Any, name: str) -> np.ndarray:
    """Decodes a tensor some rows at a time."""
    if len(shape) == 1:
        return cast(_decode(kind, rows), dtype, name)
    result = np.empty(shape, dtype)
    step = max(1, DECODED_AT_ONCE // shape[-1])
    for start in range(0, shape[0], step):
        result[start : start + step] = cast(_decode(kind, rows[start : start + step]), dtype, name)
    return result


def _read_quantized(rows: np.ndarray, scheme: Scheme, name: str) -> QuantizedArray:
    """Splits blocks (a float16 scale, a float16 minimum if any, codes) into the arrays of the order "out_in"."""
    header = 4 if scheme.offset == "minimums" else 2
    blocks = rows.reshape(len(rows), -1, header + (BLOCK // 2 if scheme.packed else BLOCK))
    factors = np.ascontiguousarray(blocks[..., :header]).view(np.float16)
    factors = cast(factors, np.float16, name)  # [out, groups, 1 or 2]
    codes = blocks[..., header:].reshape(len(rows), -1).view(CODE_DTYPE[scheme.format])
    minimums = jnp.array(factors[..., 1]) if scheme.offset == "minimums" else None
    return QuantizedArray(jnp.array(codes), jnp.array(factors[..., 0]), None, minimums, scheme, "out_in")
