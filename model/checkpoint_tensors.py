"""The tensors that a model needs, and their shapes: held against what a checkpoint has before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import jax.numpy as jnp

from palladion.model.checkpoint_files import CheckpointError, shorten
from palladion.model.checkpoint_reader import CheckpointReader, StoredTensor
from palladion.model.config import ModelConfig

TensorKey = tuple[str, int | None]
"""A tensor's role in the model ("query", "embedding", …) and its layer, None outside the layers."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes by role."""

BIASES: Final = {
    "query_bias": "qkv",
    "key_bias": "qkv",
    "value_bias": "qkv",
    "qkv_bias": "qkv",
    "output_bias": "output",
    "gate_bias": "mlp",
    "up_bias": "mlp",
    "gate_up_bias": "mlp",
    "down_bias": "mlp",
}
"""Biases of projections, and the group of which a layer has all or none."""

FUSED: Final = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Projections that some files store as one tensor, and those that are joined in it."""


def module_of(role: str) -> tuple[str, str]:
    """Returns the part of the model that holds a tensor, and the ending of the tensor's name."""
    return (role.removesuffix("_bias"), "bias") if role.endswith("_bias") else (role, "weight")


def find_tensors(reader: CheckpointReader) -> dict[TensorKey, StoredTensor]:
    """Returns every tensor that the config requires, and those biases that there are.

    Raises:
      CheckpointError: one is missing or has the wrong shape, or there is another one that would change the result.
    """
    names = set(reader.tensor_names())
    tensors: dict[TensorKey, StoredTensor] = {}
    for (role, layer), shape in _expected_shapes(reader, names):
        name = reader.tensor_name(role, layer)
        assert name is not None, role  # `_expected_shapes` yields what the family has
        if name not in names:
            raise CheckpointError(f"{reader.path}: tensor {name!r} is missing; {_missing_advice(reader, names, role)}")
        tensor = reader.tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{reader.path}: tensor {name!r} has shape {list(tensor.shape)}, but the checkpoint's config asks for "
                f"{list(shape)} ({_sizes(reader.config)}); weights and config are of different models"
            )
        tensors[role, layer] = tensor
    for name in sorted(names - {tensor.name for tensor in tensors.values()}):
        # A bias of zeros changes nothing; untrained and converted checkpoints have such.
        if not name.endswith(".bias") or reader.tensor(name).read(jnp.float32).any():
            raise CheckpointError(
                f"{reader.path}: tensor {shorten(name)} has no place in this model, which is of the family "
                f"{reader.family!r}; take a checkpoint whose config names the family that it is of"
            )
    return tensors


def _sizes(config: ModelConfig) -> str:
    """Returns the sizes in a config, for an error message."""
    fields = [field.name for field in dataclasses.fields(config)]
    return ", ".join(f"{name}={getattr(config, name)}" for name in fields[: fields.index("max_positions")])


def _missing_advice(reader: CheckpointReader, names: set[str], role: str) -> str:
    """Returns what the user can do about a missing tensor."""
    if names and not any(reader.tensor_name(other, 0) in names for other in _layer_shapes(reader)):
        return f"tensors are named otherwise, {shorten(min(names))} for example: take a checkpoint of a supported model"
    if role != "head":
        return "download the checkpoint again"
    return (
        "take the whole model's checkpoint, or set tie_word_embeddings to true where its embedding is the output head"
    )


def _expected_shapes(reader: CheckpointReader, names: set[str]) -> Iterator[tuple[TensorKey, tuple[int, ...]]]:
    """Yields the tensors that the config requires, and the optional ones that there are, with their shapes."""

    def present(shapes: Shapes, layer: int | None) -> Iterator[tuple[TensorKey, tuple[int, ...]]]:
        biases = {role: reader.tensor_name(role, layer) for role in shapes if module_of(role)[1] == "bias"}
        groups = {BIASES.get(role, role) for role, name in biases.items() if name in names}
        for role, shape in shapes.items():
            if role not in biases or (BIASES.get(role, role) in groups and biases[role] is not None):
                yield (role, layer), shape

    yield from present(_model_shapes(reader.config), None)
    for layer in range(reader.config.num_layers):
        yield from present(_layer_shapes(reader), layer)


def _model_shapes(config: ModelConfig) -> Shapes:
    """Returns the shapes of the tensors outside the layers; biases are optional."""
    shapes: Shapes = {"embedding": (config.vocab_size, config.hidden_size)}
    shapes |= _norm_shapes(config, "final_norm")
    return shapes if config.tied_embedding else shapes | {"head": (config.vocab_size, config.hidden_size)}


def _norm_shapes(config: ModelConfig, role: str) -> Shapes:
    hidden = (config.hidden_size,)
    return {role: hidden} if config.norm == "rms" else {role: hidden, f"{role}_bias": hidden}


def _layer_shapes(reader: CheckpointReader) -> Shapes:
    """Returns the shapes of one layer's tensors, `[out, in]`; biases are optional."""
    config = reader.config
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.q_heads * head_dim, config.kv_heads * head_dim
    shapes: Shapes = _norm_shapes(config, "attention_norm") if config.pre_norm else {}
    outputs = {"query": queries, "key": keys, "value": keys}
    if config.gated:
        outputs["gate"] = intermediate
    outputs["up"] = intermediate
    for fused, parts in FUSED.items():
        if reader.tensor_name(fused, 0) is not None:
            outputs[fused] = sum(outputs.pop(part) for part in parts)
    for role, out in outputs.items():
        shapes |= {role: (out, hidden), f"{role}_bias": (out,)}
    shapes |= {"output": (hidden, queries), "output_bias": (hidden,)}
    shapes |= {"down": (hidden, intermediate), "down_bias": (hidden,)}
    if config.qk_norm is not None:
        sizes = {"head": [(head_dim,)] * 2, "projection": [(queries,), (keys,)]}
        sizes["heads"] = [(config.q_heads, head_dim), (config.kv_heads, head_dim)]  # type: ignore[list-item]
        shapes |= dict(zip(("query_norm", "key_norm"), sizes[config.qk_norm], strict=True))
    if config.pre_norm and not config.parallel:
        shapes |= _norm_shapes(config, "mlp_norm")
    if config.post_norm:
        shapes |= _norm_shapes(config, "attention_post_norm") | _norm_shapes(config, "mlp_post_norm")
    return shapes
