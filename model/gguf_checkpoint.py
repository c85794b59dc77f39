"""Checkpoints in GGUF files: memory-mapped, and kept in the file's own quantization where a scheme holds it exactly."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_files import CheckpointError, models_extra
from palladion.model.checkpoint_reader import StoredTensor, cast, half_split_tensor
from palladion.model.checkpoint_tensors import module_of
from palladion.model.families import GGUF_MODULES
from palladion.model.gguf_blocks import BLOCK_FORMATS, BlockFormat, split_rows
from palladion.model.gguf_config import DIVISOR_TENSORS, Metadata, read_config, read_rotary
from palladion.model.tokenizer import Tokenizer
from palladion.reference.quantization import QuantizedArray

FLOAT_TYPES: Final = ("F64", "F32", "F16", "BF16")
"""Tensor types that are not quantized."""

DECODED_AT_ONCE: Final = 1 << 22
"""Weights decoded at a time, which bounds the memory needed beside the result."""


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
        self.nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        values = _metadata(path, reader)
        name = values.get("general.name")
        self.name = name if isinstance(name, str) else path.stem
        metadata = Metadata(path, values)
        metadata.check()
        self.family = metadata.architecture
        assert metadata.family.gguf is not None  # it was found by it
        self._form = metadata.family.gguf
        self._modules = GGUF_MODULES | dict(self._form.modules)
        self._head_dim, self._rotary_dim = metadata.head_dim, metadata.rotary_dim
        divisors = {name: self.tensor(name).read(np.float64) for name in DIVISOR_TENSORS & self._tensors.keys()}
        self._rotary = read_rotary(metadata, divisors)
        self._tokenizer = tokenizer = Tokenizer.from_gguf(values, source=str(path))
        self.config = read_config(
            metadata,
            self._rotary,
            vocab_size=tokenizer.vocab_size,
            tensors=self._tensors.keys(),
            # Some files have -1, or its unsigned form, for a token that does not exist.
            stop_tokens=tuple(t for t in tokenizer.stop_tokens if 0 <= t < tokenizer.vocab_size),
        )

    def tensor_names(self) -> Collection[str]:
        """Implements `CheckpointReader.tensor_names`."""
        return self._tensors.keys() - DIVISOR_TENSORS

    def tensor_name(self, role: str, layer: int | None) -> str | None:
        """Implements `CheckpointReader.tensor_name`."""
        part, suffix = module_of(role)
        module = self._modules.get(part)
        return None if module is None else f"{module.format(layer=layer)}.{suffix}"

    def tensor(self, name: str) -> StoredTensor:
        """Implements `CheckpointReader.tensor`; rows of queries and keys are in the half-split rotary order."""
        stored = self._tensors[name]
        kind = stored.tensor_type
        if not _is_decodable(kind):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which the gguf package cannot decode; take a file "
                f"in one of {', '.join(BLOCK_FORMATS)}, F16, BF16 or F32, or requantize it with llama-quantize "
                "--allow-requantize"
            )
        shape = tuple(int(size) for size in reversed(stored.shape))

        def rows() -> np.ndarray:
            if not self._form.interleaved:
                return stored.data
            return half_split_tensor(stored.data, name, ("attn_q", "attn_k"), self._head_dim, self._rotary_dim)

        label, kept = f"{self.path}: tensor {name!r}", BLOCK_FORMATS.get(kind.name)
        return StoredTensor(
            name=name,
            shape=shape,
            read=lambda dtype: _read_dense(rows(), shape, kind, dtype, label),
            read_quantized=None if kept is None else lambda: _read_quantized(rows(), shape[-1], kept, label),
            format="" if kind.name in FLOAT_TYPES else kind.name,
        )

    def tokenizer(self) -> Tokenizer:
        """Implements `CheckpointReader.tokenizer`."""
        return self._tokenizer

    def inverse_frequencies(self) -> np.ndarray:
        """Implements `CheckpointReader.inverse_frequencies`."""
        return self._rotary.frequencies


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


def _read_quantized(rows: np.ndarray, in_features: int, block_format: BlockFormat, name: str) -> QuantizedArray:
    """Splits blocks into the arrays of the order "out_in"."""
    with np.errstate(all="ignore"):  # what is not finite is reported by `cast`
        parts = split_rows(rows, in_features, block_format, DECODED_AT_ONCE)
    scales, minimums = (
        None if part is None else jnp.array(cast(part, part.dtype, name)) for part in (parts.scales, parts.minimums)
    )
    assert scales is not None  # every type has them
    return QuantizedArray(jnp.array(parts.values), scales, None, minimums, block_format.scheme, "out_in")
