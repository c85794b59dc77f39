"""Random weights in the shapes of a model: as fast as the trained ones, and nothing has to be loaded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from palladion.benchmarks.measure.model_shapes import DENSE, ModelShape
from palladion.model.parameters import Layer, LayerStack, Parameters, Weight
from palladion.model.rotary import rotary_frequencies
from palladion.reference import quantize
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import order_of_platform


def random_parameters(shape: ModelShape, scheme: str, *, dtype: str, max_positions: int = 8192) -> Parameters:
    """Returns normal-distributed weights, in the form in which `Generator` holds those of a checkpoint.

    Args:
      shape: the model's shapes.
      scheme: scheme of the linear layers for `palladion.quantize`, or a float dtype.
      dtype: dtype of an untied embedding and of scales.
      max_positions: maximum context length.

    Raises:
      ValueError: there is no such scheme, or the minimal LLM does not support the model.
    """
    config = shape.config(max_positions)
    # As in `Generator.load`: XLA on a GPU would copy dense weights out of a stack.
    layers = LayerStack(config.num_layers, stacked=target_platform() != "gpu")
    linears = shape.linears()

    def linear(name: str, number: int) -> Weight:
        key = jax.random.fold_in(jax.random.key(number), stable_hash(name))
        return _weight(key, *linears[name], scheme, dtype)

    for number in range(config.num_layers):
        layers.append(
            Layer(
                attention_norm=jnp.ones(config.hidden_size),
                qkv=linear("qkv", number),
                qkv_bias=None,
                output=linear("output", number),
                mlp_norm=jnp.ones(config.hidden_size),
                gate_up=linear("gate-up", number),
                down=linear("down", number),
            )
        )
    embedding = None
    if not config.tied_embedding:
        key = jax.random.key(config.num_layers + 1)
        embedding = jax.random.normal(key, (config.vocab_size, config.hidden_size), jnp.dtype(dtype))
    return Parameters(
        embedding=embedding,
        layers=layers.result(),
        final_norm=jnp.ones(config.hidden_size),
        head=linear("head", config.num_layers),
        inverse_frequencies=jnp.array(rotary_frequencies(config.head_dim, 10_000.0)),
        order=order_of_platform(),
    )


def stable_hash(name: str) -> int:
    """Returns a number for a name that is the same in every process."""
    return int.from_bytes(name.encode()[:4], "little")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _weight(key: jax.Array, in_features: int, out_features: int, scheme: str, dtype: str) -> Any:
    dense = jax.random.normal(key, (in_features, out_features)) * in_features**-0.5
    if scheme not in DENSE:
        return quantize(dense, scheme, scale_dtype=jnp.dtype(dtype))
    return (dense if order_of_platform() == "in_out" else dense.T).astype(scheme)
