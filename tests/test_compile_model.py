"""The engine's programs compiled for chips that are not present, with the shapes of Llama-3-8B."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from palladion import quantize
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.model.config import ModelConfig
from palladion.model.engine import Engine, EngineOptions
from palladion.model.parameters import Layer, Parameters
from palladion.model.sampling import Sampling
from palladion.reference.quantization import order_of_platform

LLAMA_3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    max_positions=8192,
)
BATCH, MAX_LEN = 8, 4096

SMALLEST_WEIGHT = 4096 * 4096
"""Elements of a layer's smallest weight."""

WRITTEN_BY_XLA = re.compile(r"= \w+\[([\d,]+)\]\S* (?!parameter|bitcast\(|custom-call|get-tuple-element)[\w-]+\(")
"""Pattern of an instruction that writes an array: neither a kernel nor a view of an existing array."""


def parameters(scheme: str | None) -> Parameters:
    """Returns the shapes of all weights; `scheme` None leaves them dense."""
    config, order = LLAMA_3_8B, order_of_platform()

    def weight(*shape: int) -> Any:
        dense = jnp.zeros(shape, jnp.bfloat16)
        if scheme is not None:
            return quantize(dense, scheme, scale_dtype=jnp.bfloat16)
        return dense if order == "in_out" else jnp.swapaxes(dense, -1, -2)

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
            order=order,
        )

    shapes: Parameters = jax.eval_shape(make)
    return shapes


def engine(weights: Parameters, kv_dtype: str, there: jax.sharding.Sharding | None = None, **options: Any) -> Engine:
    """Returns an engine whose programs can be compiled for a chip, but not run."""
    shapes = jax.tree.map(lambda leaf: tpu_compiler.described(leaf, there), weights)
    options = {"max_len": MAX_LEN, "dtype": "bfloat16", "kv_dtype": kv_dtype} | options
    return Engine(shapes, LLAMA_3_8B, BATCH, Sampling(), EngineOptions(**options), stop_tokens=(128001, 128009))


@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")
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
        here = engine(parameters(scheme), kv_dtype, jax.sharding.SingleDeviceSharding(tpu_compiler.device(chip)))
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
    # For dense weights XLA's own products are listed together with the slices that they read.
    assert scheme is None or max(made) < SMALLEST_WEIGHT


@pytest.mark.parametrize(("arch", "scheme"), [(80, "int4-g32"), (90, "int8"), (100, None)])
def test_decoding_on_a_gpu_is_one_program_that_moves_neither_weights_nor_cache(arch: int, scheme: str | None):
    with gpu_compiler.tracing_for(arch):
        here = engine(apart(parameters(scheme)), "bfloat16", backend="pallas")
        loop, arguments = here.decode_loop()
        module = gpu_compiler.stablehlo_for_gpu(loop, *arguments, arch=arch)
    operations = list(gpu_compiler.operations_in(module.operation))
    # Triton's kernels and Mosaic's.
    kernels = [one for one in operations if one.name == "stablehlo.custom_call"]
    names = " ".join(str(one.location).split('"')[1] for one in kernels)
    assert "decode_attention" in names
    assert ("quantized_matmul" in names) == (scheme is not None)
    # One dispatch runs many steps, as many as a constant says: the host has nothing to read back in between.
    (steps,) = (one for one in operations if one.name == "stablehlo.while")
    condition = [one.operation.name for one in steps.regions[0].blocks[0].operations]
    assert condition == ["stablehlo.constant", "stablehlo.compare", "stablehlo.return"]
    # Arrays that a step passes on to the next are updated in place.
    (main,) = (one for one in operations if one.name == "func.func" and '"main"' in str(one.attributes["sym_name"]))
    donated = collections.Counter(
        str(of)
        for of, about in zip(main.regions[0].blocks[0].arguments.types, main.attributes["arg_attrs"], strict=True)
        if "tf.aliasing_output" in str(about)
    )
    leaves = jax.tree.leaves(here.cache_like)
    assert donated[f"tensor<{'x'.join(map(str, leaves[0].shape))}xbf16>"] == len(leaves) == 2 * LLAMA_3_8B.num_layers
    assert donated.total() == len(leaves) + 3  # tokens, lengths, finished
    # Loops and calls pass arrays on, kernels read them in place, and a scatter writes into its operand.
    passes_on = ("stablehlo.custom_call", "stablehlo.while", "func.call", "func.func", "stablehlo.scatter")
    made = [one for one in operations if one.name not in passes_on and not _is_view(one)]
    assert not [str(one)[:200] for one in made if max(map(_size, one.results), default=0) >= SMALLEST_WEIGHT]


def apart(stacked: Parameters) -> Parameters:
    """Returns the parameters with separate layers, as they are loaded for a GPU."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked.layers)
    return dataclasses.replace(stacked, layers=(one,) * LLAMA_3_8B.num_layers)


def _size(value: Any) -> int:
    """Returns the number of elements of an MLIR value."""
    return math.prod(getattr(value.type, "shape", ()))


def _is_view(operation: Any) -> bool:
    """Returns whether an operation only gives an array another shape, or is a transposition that a product takes in."""
    if operation.name == "stablehlo.transpose":
        return all(use.owner.name == "stablehlo.dot_general" for use in operation.results[0].uses)
    reshapes = operation.name in ("stablehlo.reshape", "stablehlo.broadcast_in_dim")
    return reshapes and _size(operation.operands[0]) == _size(operation.results[0])
