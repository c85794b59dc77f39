"""Checkpoints in Hugging Face folders: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_fields import check_fields, read_family
from palladion.model.checkpoint_files import CheckpointError, JsonFile, check_regular, exists, models_extra, shorten
from palladion.model.checkpoint_reader import StoredTensor, cast, half_split_tensor
from palladion.model.checkpoint_tensors import BIASES, module_of
from palladion.model.families import HUGGING_FACE_MODULES
from palladion.model.huggingface_config import read_config, read_rotary, rotary_settings
from palladion.model.quantized_codes import stored_tensor
from palladion.model.quantized_methods import FLOAT_TYPES, Method, parts_of_modules, read_method
from palladion.model.stored_quantized import PARTS, VALUES, read_scheme, stored_quantized
from palladion.model.tokenizer import Tokenizer
from palladion.reference.saving import DTYPES, LENGTH_BYTES
from palladion.reference.scheme import Scheme

EMBEDDING: Final = f"{HUGGING_FACE_MODULES['embedding']}.weight"
HEAD: Final = f"{HUGGING_FACE_MODULES['head']}.weight"
"""Names of the two tables, of which a tied model may have either."""

CACHE_SCALES: Final = (".k_scale", ".v_scale")
"""Endings of scales for a quantized KV cache, which has scales of its own here."""

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
        given = JsonFile(path / "config.json")
        self._family = read_family(given)
        self.family = self._family.model_type
        self._values = values = JsonFile(given.path, content={**self._family.defaults, **given.content})
        self._modules = HUGGING_FACE_MODULES | dict(self._family.modules)
        rope = rotary_settings(values)
        scheme, method = read_scheme(values), read_method(values)
        check_fields(values, rope, self._family)
        self._rotary = read_rotary(values, rope, self._family)
        self._stored = _list_tensors(path)
        self.nbytes = sum(file.stat().st_size for file in {stored.file for stored in self._stored.values()})
        self._quantized = {} if scheme is None else self._take_quantized(scheme)
        if method is not None:
            self._quantized = self._take_coded(method)
        self._tokenizer = Tokenizer.from_folder(path)
        tied = values.boolean("tie_word_embeddings", False) and self._has_one_table()
        stops = self._tokenizer.stop_tokens
        self.config = read_config(values, self._family, self._rotary, tied=tied, stop_tokens=stops)
        self._check_biases()
        self._check_added_tokens()

    def tensor_names(self) -> Collection[str]:
        """Implements `CheckpointReader.tensor_names`: without rotary frequencies and a tied head's second copy."""
        ignored = {name for name in self._stored if name.endswith(".rotary_emb.inv_freq")}
        if self.config.tied_embedding:
            ignored.add(HEAD if EMBEDDING in self._stored else EMBEDDING)
        return self._stored.keys() - ignored

    def tensor_name(self, role: str, layer: int | None) -> str | None:
        """Implements `CheckpointReader.tensor_name`; a tied table may have either of its two names."""
        if role == "embedding" and self.config.tied_embedding and EMBEDDING not in self._stored:
            role = "head"
        if role in BIASES and BIASES[role] not in self._family.biases:
            return None
        part, suffix = module_of(role)
        module = self._modules.get(part)
        return None if module is None else f"{module.format(layer=layer)}.{suffix}"

    def tensor(self, name: str) -> StoredTensor:
        """Implements `CheckpointReader.tensor`; rows of queries and keys are in the half-split rotary order."""
        if name in self._quantized:
            return self._quantized[name]
        stored = self._stored[name]
        if stored.kind not in FLOAT_TYPES:
            raise CheckpointError(
                f"{stored.file}: tensor {shorten(name)} has type {stored.kind}; supported: {', '.join(FLOAT_TYPES)}. "
                "Take the model's unquantized checkpoint and quantize it here, with quantize='int8' for example"
            )
        offset = self._family.norm_offset if name.endswith("norm.weight") else 0.0

        def read(dtype: Any) -> np.ndarray:
            array = self._rotary_rows(name, _read_tensor(stored, dtype))
            return array + np.asarray(offset, array.dtype) if offset else array

        return StoredTensor(name=name, shape=stored.shape, read=read)

    def raw(self, name: str) -> np.ndarray:
        """Returns a tensor as the file holds it."""
        return _read_raw(self._stored[name])

    def inverse_frequencies(self) -> np.ndarray:
        """Implements `CheckpointReader.inverse_frequencies`."""
        return self._rotary.frequencies

    def tokenizer(self) -> Tokenizer:
        """Implements `CheckpointReader.tokenizer`."""
        return self._tokenizer

    def _take_quantized(self, scheme: Scheme) -> dict[str, StoredTensor]:
        """Returns the weights that `palladion quantize` wrote, whose parts then count as one tensor."""
        quantized = {}
        for name in [name.removesuffix(VALUES) for name in self._stored if name.endswith(VALUES)]:
            parts = {part: self._stored.pop(full) for part in PARTS if (full := f"{name}.{part}") in self._stored}
            read = functools.partial(_read_parts, parts)
            quantized[name] = tensor = stored_quantized(name, scheme, parts["values"].shape, read)
            self._stored[name] = Location(parts["values"].file, name, tensor.shape, str(scheme))
        return quantized

    def _take_coded(self, method: Method) -> dict[str, StoredTensor]:
        """Returns the weights that were quantized by a published method, whose parts then count as one tensor."""
        quantized, locations = {}, dict(self._stored)
        for parts, layout in parts_of_modules(locations, method, lambda name: _read_raw(locations[name])):
            weight, name = layout.open(parts), f"{parts.module}.weight"
            file = next(iter(parts.stored.values())).file
            for part in parts.stored:
                del self._stored[f"{parts.module}.{part}"]
            reorder = functools.partial(self._rotary_rows, name)
            quantized[name] = stored_tensor(name, f"{file}: tensor {shorten(name)}", weight, reorder)
            self._stored[name] = Location(file, name, weight.shape, weight.label)
        for name in [name for name in self._stored if name.endswith(CACHE_SCALES)]:
            del self._stored[name]
        return quantized

    def _rotary_rows(self, name: str, array: np.ndarray) -> np.ndarray:
        """Returns a tensor with queries and keys in the half-split rotary order."""
        if not self._family.interleaved:
            return array
        rotary_dim = 2 * self._rotary.frequencies.shape[-1]
        return half_split_tensor(array, name, ("q_proj", "k_proj"), self.config.head_dim, rotary_dim)

    def _check_biases(self) -> None:
        """Checks biases against the fields about them: transformers would ignore or invent what contradicts them."""
        layers = range(min(self.config.num_layers, len(self._stored)))
        for role, group in BIASES.items():
            field = self._family.biases.get(group)
            names = [self.tensor_name(role, layer) for layer in layers]
            if not field or None in names or not self._modules_stored(role):
                continue
            stated = self._values.content.get(field)
            for name in names:
                if stated is True and name not in self._stored:
                    raise CheckpointError(
                        f"{self._values.path}: {field!r} is true, but there is no tensor {shorten(name)}; take the "
                        "original files"
                    )
                if stated is False and name in self._stored and self.tensor(str(name)).read(np.float32).any():
                    raise CheckpointError(
                        f"{self._values.path}: {field!r} is false, but there is a tensor {shorten(name)}; set it to "
                        "true if the model was trained with biases"
                    )

    def _modules_stored(self, role: str) -> bool:
        """Returns whether the first layer has the weight that goes with a bias."""
        return self.tensor_name(role.removesuffix("_bias"), 0) in self._stored

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
        embedding, head = self._stored.get(EMBEDDING), self._stored.get(HEAD)
        if embedding is None or head is None:
            return True
        if (embedding.shape, embedding.kind) != (head.shape, head.kind):
            return False
        if embedding.kind not in FLOAT_TYPES or len(embedding.shape) != 2:
            return True  # Reading the table reports what is wrong with it.
        pairs = zip(_raw_rows(embedding), _raw_rows(head), strict=True)
        return all(np.array_equal(first, second) for first, second in pairs)


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
    return HEAD if name == BASE_PREFIX + HEAD else name


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
    """Reads a tensor in a dtype."""
    return cast(_read_raw(stored), dtype, f"{stored.file}: tensor {shorten(stored.name)}")


def _read_raw(stored: Location) -> np.ndarray:
    """Reads a tensor."""
    if stored.kind.startswith("F8"):
        return _read_float8(stored)
    with _opened(stored) as tensors:
        array: np.ndarray = tensors.get_tensor(stored.name)
    return array


def _read_float8(stored: Location) -> np.ndarray:
    """Reads a tensor of floats of one byte, which the package safetensors cannot give to NumPy."""
    with open(stored.file, "rb") as file:
        header = int.from_bytes(file.read(LENGTH_BYTES), "little")
        begin, end = json.loads(file.read(header))[stored.name]["data_offsets"]
        file.seek(LENGTH_BYTES + header + begin)
        return np.fromfile(file, np.uint8, end - begin).view(jnp.dtype(DTYPES[stored.kind])).reshape(stored.shape)


def _read_parts(parts: Mapping[str, Location]) -> dict[str, np.ndarray]:
    """Reads the parts of a quantized weight."""
    return {part: _read_raw(stored) for part, stored in parts.items()}


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
