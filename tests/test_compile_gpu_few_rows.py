"""The real Triton compiler compiles products of a few rows without spills, in few instructions, with many loads."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import pytest
from compiling import hot_loop

from palladion import matmul, quantized_matmul
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu.compiler import CompiledKernel
from palladion.benchmarks.static.gpu.sass import bytes_awaited
from palladion.kernels.gpu_rows import LOAD_BYTES
from palladion.kernels.matmul.cases import Case as DenseCase
from palladion.kernels.matmul.triton import call as dense_triton
from palladion.kernels.quantized_matmul.cases import Case
from palladion.kernels.quantized_matmul.triton import call as triton
from palladion.kernels.quantized_matmul.triton.config import Config

pytestmark = pytest.mark.skipif(not gpu_compiler.installed(), reason="triton is not installed")

LAYERS: dict[str, dict[str, Any]] = {
    "qkv": {"in_features": 8192, "out_features": 6144},
    "gate-up": {"in_features": 4096, "out_features": 28672, "gated": True, "activation": jax.nn.silu},
    "down": {"in_features": 14336, "out_features": 4096, "residual": True},
}
"""Layers of several trips; a step of int4 divides the `in` of "down" unevenly."""

LOOPS: dict[str, tuple[str, int, str, dict[str, Any], int, float, float]] = {
    # scheme, rows, layer, options, architecture, and the most instructions for a byte of codes: all, those on integers
    "int8": ("int8", 1, "qkv", {}, 90, 3.2, 1.6),
    "int8-80": ("int8", 1, "qkv", {}, 80, 3.2, 1.6),
    "int8-gated": ("int8", 1, "gate-up", {}, 100, 3.2, 1.7),
    "int8-4": ("int8", 4, "qkv", {"block_out": 4}, 90, 9.8, 3.1),
    "int8-bytes": ("int8", 1, "qkv", {"multiply": "bytes"}, 90, 2.0, 1.3),
    "int4-g128": ("int4-g128", 1, "down", {}, 90, 3.9, 3.0),
    "int4-g32-gated": ("int4-g32", 1, "gate-up", {}, 90, 3.4, 2.6),
    "int4-g32-gated-100": ("int4-g32", 1, "gate-up", {}, 100, 3.2, 2.7),
    "int4-floats": ("int4-g128", 1, "qkv", {"multiply": "float", "block_out": 8}, 80, 6.2, 3.4),
    "int4-minimums": ("int4-g32-minimums", 1, "qkv", {}, 80, 3.6, 2.6),
    "int4-float32": ("int4-g32", 1, "qkv", {"dtype": "float32"}, 90, 7.8, 3.1),
    "mxfp4": ("mxfp4", 1, "qkv", {"scale_dtype": "float32"}, 90, 5.2, 4.4),
    "float8": ("float8_e4m3fn", 1, "qkv", {}, 90, 5.3, 2.4),
    "float8-e5m2": ("float8_e5m2", 1, "qkv", {}, 80, 3.9, 0.9),
}
"""Limits a few percent above the counts. An H200 has time for 7.2 instructions a byte, 3.6 of them on integers."""


def assert_streams(kernel: CompiledKernel, channels: int, bytes_of_others: int) -> Counter[str]:
    """Asserts what a trip loads, and that its threads exchange nothing; returns its instructions by pipe."""
    loop = hot_loop(kernel)
    counts = Counter(instruction.opcode for instruction in loop)
    assert kernel.spilled == 0
    assert not [name for name in counts if name.startswith(("STS", "LDS", "SHFL", "BAR.SYNC"))], counts
    wide = sum(count for name, count in counts.items() if name.startswith("LDG.E") and name.endswith(("128", "256")))
    assert channels <= wide <= channels + bytes_of_others // LOAD_BYTES, counts
    awaited = bytes_awaited(loop)
    print(
        f"{kernel.kernel.name}: {kernel.registers} registers, a thread waits for {awaited} bytes; {len(loop)} in a trip"
    )
    assert awaited >= 3 * LOAD_BYTES
    return Counter(instruction.pipe for instruction in loop)


@pytest.mark.parametrize("name", LOOPS)
def test_codes_are_multiplied_in_few_instructions(name: str):
    scheme, rows, layer, options, arch, most, most_on_integers = LOOPS[name]
    changes = {field: value for field, value in options.items() if field in ("dtype", "scale_dtype")}
    chosen = {field: value for field, value in options.items() if field not in changes}
    shape = LAYERS[layer] | {"scale_dtype": "bfloat16"} | changes
    case = Case(name="", rows=rows, scheme=scheme, order="out_in", **shape)
    config = chosen_config(case, arch, chosen)
    call = functools.partial(quantized_matmul, **case.options, backend="triton", config=config, interpret=False)
    (kernel,) = gpu_compiler.compile_for_gpu(lambda inputs: call(**inputs._asdict()), case.shapes(), arch=arch)
    problem = case.problem()
    channels = config.block_out * problem.parts
    x_bytes = rows * LOAD_BYTES * (2 if problem.scheme.packed else 1) * (4 if case.dtype == "float32" else 2)
    pipes = assert_streams(kernel, channels, x_bytes)
    stored = LOAD_BYTES * channels
    on_integers = (pipes["integer"] + pipes["multiply"]) / stored
    print(f"{pipes.total() / stored:.2f} instructions a byte, {on_integers:.2f} of them on integers")
    assert pipes.total() / stored < most
    assert on_integers < most_on_integers


def chosen_config(case: Case, arch: int, changes: dict[str, Any]) -> Config:
    """Returns the heuristic's config with changes."""
    with gpu_compiler.tracing_for(arch):
        found = triton.heuristic(case.problem())
    fields = {"block_out": found.block_out, "num_warps": found.num_warps, "multiply": found.multiply} | changes
    return Config("few_rows", **fields)


@pytest.mark.parametrize(
    ("rows", "layer", "arch", "most"),
    [(1, "gate-up", 80, 1.9), (1, "down", 90, 2.1), (4, "qkv", 90, 4.3), (1, "gate-up", 100, 1.7)],
)
def test_dense_weights_are_multiplied_in_few_instructions(rows: int, layer: str, arch: int, most: float):
    case = DenseCase(name="", rows=rows, order="out_in", **LAYERS[layer])
    with gpu_compiler.tracing_for(arch):
        config = dense_triton.heuristic(case.problem())
    call = functools.partial(matmul, **case.options, backend="triton", interpret=False)
    (kernel,) = gpu_compiler.compile_for_gpu(lambda inputs: call(**inputs._asdict()), case.shapes(), arch=arch)
    channels = config.block_out * case.problem().parts
    pipes = assert_streams(kernel, channels, rows * LOAD_BYTES)
    print(f"{pipes.total() / channels / LOAD_BYTES:.2f} instructions a byte")
    assert pipes.total() / channels / LOAD_BYTES < most
