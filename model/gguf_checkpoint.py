"""Llama-family checkpoints in GGUF files: memory mapped, and kept in the file's own quantization bit for bit."""

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
from palladion.reference.quantization import CODE_DTYPE, QuantizedArray, Scheme

ARCHITECTURE: Final = "llama"
"""The only architecture that is read; Llama, Mistral, SmolLM and their relatives all carry this name."""

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

FREQUENCY_DIVISORS: Final = "rope_freqs.weight"
"""By how much each rotary frequency is divided: Llama 3's scaling, already worked out by whoever wrote the file."""

SCALING_FACTORS: Final = ("rope.scaling.factor", "rope.scale_linear")
"""Where linear scaling's factor stands; the second is the name that old files use."""

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
"""Keys that change what a model computes and that are not applied, with the values under which they change nothing."""

BLOCK: Final = 32
"""Weights in a block of the types that are kept."""

KEPT: Final = {
    "Q4_0": Scheme("int4", BLOCK),
    "Q4_1": Scheme("int4", BLOCK, "minimums"),
    "Q8_0": Scheme("int8", BLOCK),
}
"""The tensor types that a QuantizedArray holds without loss."""

DECODED_AT_ONCE: Final = 1 << 22
"""Weights decoded to float32 at a time: bounds the memory needed besides the result."""


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


class GGUFCheckpoint:
    """An opened GGUF file; the `CheckpointReader` of this format.

    Raises:
      CheckpointError: the file is damaged, of another architecture, or uses what this model does not have.
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
        """Names of the tensors that hold weights."""
        return self._tensors.keys() - {FREQUENCY_DIVISORS}

    def name_of(self, part: str, layer: int | None) -> str:
        """The file's name for a part of the model."""
        return TENSOR_NAMES[part].format(layer=layer)

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of that name, its rows in the order of the half-split rotary form."""
        stored = self._tensors[name]
        kind = stored.tensor_type
        if not _is_decodable(kind):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which the gguf package cannot decode; take a file "
                "in Q4_0, Q4_1, Q8_0, F16, BF16 or F32, or requantize it with llama-quantize --allow-requantize"
            )
        part = name.split(".")[-2]
        heads = {"attn_q": self.config.q_heads, "attn_k": self.config.kv_heads}.get(part)
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
        """The tokenizer whose vocabulary the file holds."""
        return self._tokenizer

    def _check_supported(self) -> None:
        architecture = self._metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise CheckpointError(
                f"{self.path}: architecture {shorten(architecture)} is not supported; supported: {ARCHITECTURE!r} "
                "(Llama, Mistral, SmolLM and others of that form)"
            )
        parts = check_integer(self._metadata.get("split.count", 0), f"{self.path}: metadata key 'split.count'", 0)
        if parts > 1:
            raise CheckpointError(
                f"{self.path}: one of {parts} parts of a split checkpoint; join them with llama-gguf-split --merge"
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
        """A value under `llama.` and what to call it; an array of one number per layer, all equal, is that number."""
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
                # Files write -1 or its unsigned form for a token that they do not have.
                stop_tokens=tuple(t for t in self._tokenizer.stop_tokens if 0 <= t < self._tokenizer.vocab_size),
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.path}: its metadata describe no model: {error}") from error

    def inverse_frequencies(self) -> np.ndarray:
        """The rotary frequencies, `[head_dim / 2]` float32, linear or Llama 3's scaling applied."""
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
        """What linear scaling divides frequencies by, as llama.cpp reads it: 0 and no factor at all are 1."""
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
    return not isinstance(value, bool) and isinstance(value, int | float) and value == 0


def _open(path: Path) -> Any:
    """A GGUFReader over the file, every access checked against its end."""
    with models_extra("reading a GGUF file"):
        import gguf

    size = path.stat().st_size

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # Without this a slice past the end is silently shorter, and a damaged array length loops for hours.
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > size:
                raise EOFError(f"needs {end:,} bytes, has {size:,}")
            # Slices of a plain view cost a third of those of a memmap, and there are several for each vocabulary entry.
            self.data: np.ndarray = np.asarray(self.data)
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = BoundedReader(os.fspath(path))
    except EOFError as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}; download it again") from error
    except Exception as error:  # Whatever the parser trips over in a damaged file, the way out is the same.
        raise CheckpointError(f"{path}: damaged GGUF file ({error}); download it again") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: written in the other byte order; convert it with gguf-convert-endian")
    return reader


def _metadata(path: Path, reader: Any) -> Mapping[str, Any]:
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error}); download it again") from error


def _rows(data: np.ndarray, heads: int | None) -> np.ndarray:
    """A tensor's rows as they are stored, those of query and key projections brought back to half-split order.

    GGUF keeps the two coordinates that a rotary position turns next to each other: row 2 i + h of a head is row
    i + h * head_dim / 2 of the model. Whole rows move, so that quantized ones move without loss.
    """
    if heads is None:
        return data
    pairs = data.reshape(heads, -1, 2, *data.shape[1:])
    return pairs.swapaxes(1, 2).reshape(data.shape)


@functools.cache
def _is_decodable(kind: Any) -> bool:
    """Whether the gguf package knows a tensor type's values: it lists many more types than it decodes."""
    import gguf

    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decode(kind: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of a tensor type in float32; what is not finite is found by whoever takes them."""
    import gguf

    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, kind)


def _read_dense(rows: np.ndarray, shape: tuple[int, ...], kind: Any, dtype: Any, name: str) -> np.ndarray:
    if len(shape) == 1:
        return cast(_decode(kind, rows), dtype, name)
    result = np.empty(shape, dtype)
    step = max(1, DECODED_AT_ONCE // shape[-1])
    for start in range(0, shape[0], step):
        result[start : start + step] = cast(_decode(kind, rows[start : start + step]), dtype, name)
    return result


def _read_quantized(rows: np.ndarray, scheme: Scheme, name: str) -> QuantizedArray:
    """Takes blocks apart (a float16 scale, a float16 minimum where there is one, then codes) and transposes them."""
    header = 4 if scheme.offset == "minimums" else 2
    blocks = rows.reshape(len(rows), -1, header + (BLOCK // 2 if scheme.packed else BLOCK))
    factors = np.ascontiguousarray(blocks[..., :header]).view(np.float16)
    factors = cast(factors, np.float16, name)  # [out, groups, 1 or 2]
    codes = blocks[..., header:].reshape(len(rows), -1).view(CODE_DTYPE[scheme.format])
    minimums = jnp.array(factors[..., 1].T) if scheme.offset == "minimums" else None
    return QuantizedArray(jnp.array(codes.T), jnp.array(factors[..., 0].T), None, minimums, scheme)
