"""A model of a known shape with random weights: its speed is that of the trained one, and there is nothing to load."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from palladion.benchmarks.measure.model_shapes import DENSE, ModelShape
from palladion.model.parameters import Layer, LayerStack, Parameters, Weight
from palladion.reference import quantize
from palladion.reference.platforms import target_platform


def random_parameters(shape: ModelShape, scheme: str, *, dtype: str, max_positions: int = 8192) -> Parameters:
    """Normal-distributed weights, in the form in which the generator would hold a checkpoint's.

    Args:
      shape: of the model.
      scheme: how linear layers are stored, of `palladion.quantize` or a float dtype.
      dtype: of an embedding that is not tied, and of scales.
      max_positions: the longest context.

    Raises:
      ValueError: there is no such scheme, or the minimal LLM has not all that this model has.
    """
    config = shape.config(max_positions)
    # As `Generator.load` does: a GPU's XLA would copy dense weights out of a stack.
    layers = LayerStack(config.num_layers, stacked=target_platform() != "gpu")
    linears = shape.linears()

    def linear(name: str, number: int) -> Weight:
        key = jax.random.fold_in(jax.random.key(number), hash_of(name))
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
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, jnp.float32) / config.head_dim)
    return Parameters(
        embedding=embedding,
        layers=layers.result(),
        final_norm=jnp.ones(config.hidden_size),
        head=linear("head", config.num_layers),
        inverse_frequencies=frequencies,
    )


def hash_of(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(name.encode()[:4], "little")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _weight(key: jax.Array, in_features: int, out_features: int, scheme: str, dtype: str) -> Any:
    dense = jax.random.normal(key, (in_features, out_features)) * in_features**-0.5
    return dense.astype(scheme) if scheme in DENSE else quantize(dense, scheme, scale_dtype=jnp.dtype(dtype))
