"""Loads a checkpoint, a GGUF file or a Hugging Face folder, as config, weights and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from palladion.model.checkpoint_files import CheckpointError, check_regular
from palladion.model.checkpoint_reader import CheckpointReader, StoredTensor
from palladion.model.checkpoint_summary import WeightSummary
from palladion.model.checkpoint_tensors import TensorKey, find_tensors
from palladion.model.config import ModelConfig
from palladion.model.gguf_checkpoint import GGUFCheckpoint, is_gguf
from palladion.model.huggingface_checkpoint import HuggingFaceCheckpoint, is_huggingface_folder
from palladion.model.locate import find_model
from palladion.model.parameters import Layer, LayerStack, Parameters, Weight
from palladion.model.tokenizer import Tokenizer
from palladion.reference.quantization import Order, QuantizedArray, check_order, order_of_platform, out_axis
from palladion.reference.quantizers import quantize
from palladion.reference.scheme import Scheme

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "open_checkpoint", "quantized_tensors"]

DTYPES: Final = ("float32", "bfloat16", "float16")
"""Dtypes of dense weights."""

PROJECTIONS: Final = ("query", "key", "value", "qkv", "output", "gate", "up", "gate_up", "down")
"""Roles of a layer's weights, which `quantize` quantizes."""

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that hold pickled weights."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
      config: shapes and constants.
      parameters: the weights.
      tokenizer: the tokenizer, with the chat template.
      name: name of the model.
      summary: one line: the size of the weights in the file, what a step reads, and formats that differ.
    """

    config: ModelConfig
    parameters: Parameters
    tokenizer: Tokenizer
    name: str
    summary: str


def load_checkpoint(
    path: str | Path | CheckpointReader,
    *,
    dtype: Any = "float32",
    weights: Literal["keep", "dequantize"] = "keep",
    quantize: str | Scheme | None = None,
    stack: bool = False,
    order: Order | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Checkpoint:
    """Loads a model of one of the families in `model/families.py`.

    Weights are read one at a time onto JAX's default device, so that the memory needed beside the result is that of the
    largest weight. Everything that can be checked without reading weights is checked first.

    Args:
      path: a .gguf file; a Hugging Face folder (config.json, safetensors, tokenizer.json); a name that `find_model`
        knows; or what `open_checkpoint` returned.
      dtype: dtype of dense weights and biases: "float32", "bfloat16" or "float16". Norms are always float32.
      weights: "keep" keeps weights that the checkpoint has quantized, where a scheme holds them without loss, and
        dequantizes others; "dequantize" makes every weight dense. `Checkpoint.summary` says what became of them.
      quantize: scheme, for example "int8" or "int4-g32", to quantize projections, output head and a tied embedding to
        while they are read. An untied embedding stays dense, because a step reads only a few of its rows.
      stack: whether the weights of all layers are stacked, `[num_layers, ...]`, as a loop over layers needs. Layers
        that differ in their formats, as in some GGUF files, stay a tuple.
      order: storage order of the weights, "in_out" or "out_in"; None means that of the platform's kernels. Checkpoints
        have "out_in", so on GPUs nothing is transposed.
      progress: called with the part just loaded and the fraction done, 0 to 1.

    Returns:
      The `Checkpoint`.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, incomplete or unsupported; the message says which, and what
        to do.
      ValueError: `dtype`, `weights`, `quantize` or `order` is not among the accepted values.
      ImportError: the packages of `palladion[models]` are not installed.
    """
    if (name := getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))) not in DTYPES:
        raise ValueError(f"load_checkpoint: dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    if weights not in ("keep", "dequantize"):
        raise ValueError(f"load_checkpoint: weights must be 'keep' or 'dequantize', got {weights!r}")
    scheme = None if quantize is None else Scheme.parse(quantize)
    order = order_of_platform() if order is None else order
    check_order(order)
    reader = open_checkpoint(path) if isinstance(path, str | Path) else path
    loader = _Loader(reader, find_tensors(reader), jnp.dtype(name), weights == "keep", scheme, order)
    parameters = _load_parameters(loader, stack, progress or _no_report)
    text = loader.summary.text(reader.nbytes, parameters.bytes_per_step(batch=1))
    return Checkpoint(reader.config, parameters, reader.tokenizer(), reader.name, text)


def quantized_tensors(reader: CheckpointReader, scheme: Scheme) -> Iterator[tuple[str, QuantizedArray | None]]:
    """Yields the name of each tensor and its weight, quantized as `load_checkpoint` does it; None where it stays dense.

    Args:
      reader: the opened checkpoint.
      scheme: scheme to quantize to; weights have the order "out_in", as checkpoints store them.
    """
    tensors = find_tensors(reader)
    loader = _Loader(reader, tensors, jnp.dtype("float32"), False, scheme, "out_in")
    head = "embedding" if reader.config.tied_embedding else "head"
    for (role, layer), tensor in tensors.items():
        weight = loader.weight(role, layer) if role in PROJECTIONS or role == head else None
        assert weight is None or isinstance(weight, QuantizedArray)  # the loader has a scheme
        yield tensor.name, weight


def open_checkpoint(model: str | Path) -> CheckpointReader:
    """Opens a checkpoint with the reader for its format, which its content decides, not its name; reads no weights.

    Args:
      model: as `load_checkpoint` takes it.

    Raises:
      CheckpointError: the checkpoint is missing, damaged or unsupported.
      ImportError: the packages of `palladion[models]` are not installed.
    """
    path = find_model(model)
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


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Reads tensors in the requested form.

    Attributes:
      reader: the opened checkpoint.
      tensors: its tensors.
      dtype: dtype of dense weights and biases.
      keep: whether weights stay in the file's own quantization, where a `QuantizedArray` can hold it.
      scheme: scheme to quantize weights to, or None.
      order: storage order of weights.
      summary: collects what weights are read as.
    """

    reader: CheckpointReader
    tensors: dict[TensorKey, StoredTensor]
    dtype: Any
    keep: bool
    scheme: Scheme | None
    order: Order
    summary: WeightSummary = dataclasses.field(default_factory=WeightSummary)

    def vector(self, role: str, layer: int | None, dtype: Any = jnp.float32) -> jax.Array:
        """Reads a norm or a bias."""
        return jnp.array(self.tensors[role, layer].read(dtype))

    def norm(self, role: str, layer: int | None = None) -> jax.Array | None:
        """Reads a norm, with its biases where it is a LayerNorm; None where the model has none."""
        if (role, layer) not in self.tensors:
            return None
        weight = self.vector(role, layer)
        if self.reader.config.norm == "rms":
            return weight
        has_bias = (f"{role}_bias", layer) in self.tensors
        return jnp.stack([weight, self.vector(f"{role}_bias", layer) if has_bias else jnp.zeros_like(weight)])

    def query_key_norm(self, layer: int) -> jax.Array | None:
        """Reads the norms of queries and keys, with a row for each head."""
        config = self.reader.config
        if config.qk_norm is None:
            return None
        heads = (("query_norm", config.q_heads), ("key_norm", config.kv_heads))
        rows = [(self.vector(role, layer).reshape(-1, config.head_dim), count) for role, count in heads]
        return jnp.concatenate([jnp.broadcast_to(row, (count, config.head_dim)) for row, count in rows])

    def bias(self, roles: Sequence[str], layer: int) -> jax.Array | None:
        """Reads biases, joined; None where the layer has none."""
        given = [f"{role}_bias" for role in roles]
        if (given[0], layer) not in self.tensors:
            return None
        return jnp.concatenate([self.vector(role, layer, self.dtype) for role in given])

    def weight(self, role: str, layer: int | None = None) -> Weight:
        """Reads a weight in the loader's order; checkpoints store `[out, in]`."""
        tensor = self.tensors[role, layer]
        weight: Weight
        if self.scheme is not None:
            try:
                weight = _quantize_transposed(jnp.asarray(tensor.read(jnp.float32)), self.scheme, self.order)
            except ValueError as error:
                raise CheckpointError(f"{self.reader.path}: quantize: tensor {tensor.name!r}: {error}") from error
        elif self.keep and tensor.read_quantized is not None:
            weight = tensor.read_quantized().with_order(self.order)
        else:
            dense = tensor.read(self.dtype)
            weight = jnp.array(dense.T if self.order == "in_out" else dense)
        self.summary.add(tensor, weight, kept=self.scheme is None)
        return weight

    def joined(self, roles: Sequence[str], layer: int) -> Weight | tuple[Weight, ...]:
        """Reads weights of the same input, joined along `out`, or as a tuple where their formats differ."""
        weights = [self.weight(role, layer) for role in roles]
        if len(weights) == 1:
            return weights[0]
        formats = {
            (jax.tree.structure(weight), *(leaf.dtype for leaf in jax.tree.leaves(weight))) for weight in weights
        }
        if len(formats) > 1:
            return tuple(weights)
        # `out` is the same axis of codes, scales and dense weights.
        joined: Weight = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=out_axis(self.order)), *weights)
        return joined

    def table(self, role: str) -> Weight:
        """Reads an embedding table: `[rows, width]` as checkpoints store it, or in the file's own quantization."""
        tensor = self.tensors[role, None]
        weight: Weight
        if self.scheme is None and self.keep and tensor.read_quantized is not None:
            weight = tensor.read_quantized().with_order(self.order)
        else:
            weight = jnp.array(tensor.read(self.dtype))
        self.summary.add(tensor, weight, kept=True)
        return weight

    def layer(self, layer: int) -> Layer:
        """Reads a decoder layer."""
        qkv = [role for role in ("query", "key", "value", "qkv") if (role, layer) in self.tensors]
        gate_up = [role for role in ("gate", "up", "gate_up") if (role, layer) in self.tensors]
        return Layer(
            attention_norm=self.norm("attention_norm", layer),
            qkv=self.joined(qkv, layer),
            qkv_bias=self.bias(qkv, layer),
            qk_norm=self.query_key_norm(layer),
            output=self.weight("output", layer),
            output_bias=self.bias(["output"], layer),
            attention_post_norm=self.norm("attention_post_norm", layer),
            mlp_norm=self.norm("mlp_norm", layer),
            gate_up=self.joined(gate_up, layer),
            gate_up_bias=self.bias(gate_up, layer),
            down=self.weight("down", layer),
            down_bias=self.bias(["down"], layer),
            mlp_post_norm=self.norm("mlp_post_norm", layer),
        )


def _load_parameters(loader: _Loader, stack: bool, report: Callable[[str, float], None]) -> Parameters:
    """Reads all weights, and reports progress."""
    config = loader.reader.config
    steps = config.num_layers + 2
    frequencies = jnp.array(loader.reader.inverse_frequencies())
    # Each part is waited for before it is reported: only then is the memory that was read for it freed.
    embedding = None if config.tied_embedding else jax.block_until_ready(loader.table("embedding"))
    report("embedding", 1 / steps)
    layers = LayerStack(config.num_layers, stack)
    for index in range(config.num_layers):
        layers.append(jax.block_until_ready(loader.layer(index)))
        report(f"layer {index + 1} of {config.num_layers}", (index + 2) / steps)
    head = jax.block_until_ready(loader.weight("embedding" if config.tied_embedding else "head"))
    final_norm = loader.norm("final_norm")
    assert final_norm is not None  # every model has one
    report("output head", 1.0)
    return Parameters(
        embedding=embedding,
        layers=layers.result(),
        final_norm=final_norm,
        head=head,
        inverse_frequencies=frequencies,
        order=loader.order,
    )


@functools.partial(jax.jit, static_argnames=("scheme", "order"))
def _quantize_transposed(weight: jax.Array, scheme: Scheme, order: Order) -> QuantizedArray:
    """Quantizes a weight `[out, in]`; jitted, so that few float32 copies of it exist."""
    return quantize(weight.T, scheme, order=order)
