"""A whole model through the real TPU compiler: what the engine runs on a chip, with Llama-3-8B's shapes."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from palladion import quantize
from palladion.benchmarks import tpu_compiler
from palladion.model.config import ModelConfig
from palladion.model.engine import Engine, EngineOptions
from palladion.model.parameters import Layer, Parameters
from palladion.model.sampling import Sampling

pytestmark = pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")

LLAMA_3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    max_positions=8192,
    rope_theta=500_000.0,
)
BATCH, MAX_LEN = 8, 4096

SMALLEST_WEIGHT = 4096 * 4096
"""Numbers in the smallest of a layer's weights."""

WRITTEN_BY_XLA = re.compile(r"= \w+\[([\d,]+)\]\S* (?!parameter|bitcast\(|custom-call|get-tuple-element)[\w-]+\(")
"""An instruction that makes an array; kernels and views of what is there left out."""


def parameters(scheme: str | None) -> Parameters:
    """Shapes of all weights; `scheme` None leaves them dense."""
    config = LLAMA_3_8B

    def weight(*shape: int) -> Any:
        dense = jnp.zeros(shape, jnp.bfloat16)
        return dense if scheme is None else quantize(dense, scheme, scale_dtype=jnp.bfloat16)

    def make() -> Parameters:
        layers, hidden, wide = config.num_layers, config.hidden_size, config.intermediate_size
        heads = config.q_heads + 2 * config.kv_heads
        stack = Layer(
            attention_norm=jnp.ones((layers, hidden)),
            qkv=weight(layers, hidden, heads * config.head_dim),
            qkv_bias=None,
            output=weight(layers, config.q_heads * config.head_dim, hidden),
            mlp_norm=jnp.ones((layers, hidden)),
            gate_up=weight(layers, hidden, 2 * wide),
            down=weight(layers, wide, hidden),
        )
        return Parameters(
            embedding=jnp.zeros((config.vocab_size, hidden), jnp.bfloat16),
            layers=stack,
            final_norm=jnp.ones(hidden),
            head=weight(hidden, config.vocab_size),
            inverse_frequencies=jnp.ones(config.head_dim // 2),
        )

    shapes: Parameters = jax.eval_shape(make)
    return shapes


def engine(chip: str, scheme: str | None, kv_dtype: str) -> Engine:
    """An engine whose programs can be compiled for a chip, but not run."""
    there = jax.sharding.SingleDeviceSharding(tpu_compiler.device(chip))
    shapes = jax.tree.map(lambda leaf: tpu_compiler.described(leaf, there), parameters(scheme))
    options = EngineOptions(max_len=MAX_LEN, dtype="bfloat16", kv_dtype=kv_dtype)
    return Engine(shapes, LLAMA_3_8B, BATCH, Sampling(), options, stop_tokens=(128001, 128009))


@pytest.mark.parametrize(
    ("chip", "scheme", "kv_dtype"),
    [
        ("v4", "int8", "bfloat16"),
        ("v5e", "float8_e4m3fn", "float8_e4m3fn"),
        ("v5p", "int4-g128-zeros", "int8"),
        ("v6e", "int4-g32-minimums", "int8"),
        ("v6e", None, "bfloat16"),
        ("v7x", "int4-g64", "float8_e4m3fn"),
    ],
)
def test_decoding_copies_neither_weights_nor_cache(chip: str, scheme: str | None, kv_dtype: str):
    with tpu_compiler.tracing_for(chip):
        here = engine(chip, scheme, kv_dtype)
        here.compile(chunks=())
    (program,) = here.programs.values()
    names = " ".join(tpu_compiler.kernel_names(program))
    assert "append_kv" in names
    assert "decode_attention" in names
    assert ("quantized_matmul" in names) == (scheme is not None)
    memory = program.memory_analysis()
    cache_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(here.cache_like))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < SMALLEST_WEIGHT // 2
    made = [math.prod(map(int, shape.split(","))) for shape in WRITTEN_BY_XLA.findall(program.as_text())]
    # XLA's own products of dense weights are listed with the slices that they read.
    assert scheme is None or max(made) < SMALLEST_WEIGHT
