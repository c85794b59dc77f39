"""The real Triton compiler compiles the tensor-core form of quantized_matmul without spills, in few instructions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import pytest

from palladion import quantized_matmul
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu.compiler import CompiledKernel
from palladion.benchmarks.static.gpu.sass import by_loop, parse
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.quantized_matmul.cases import Case
from palladion.kernels.quantized_matmul.triton import matrix_blocks
from palladion.kernels.quantized_matmul.triton.config import Config

pytestmark = pytest.mark.skipif(not gpu_compiler.installed(), reason="triton is not installed")

LAYERS: dict[str, dict[str, Any]] = {
    "qkv": {"in_features": 4096, "out_features": 6144},
    "gate-up": {"in_features": 4096, "out_features": 28672, "gated": True, "activation": jax.nn.silu},
    "down": {"in_features": 14336, "out_features": 4096},
    "odd": {"in_features": 4080, "out_features": 8000},
    "smollm2": {"in_features": 576, "out_features": 3072, "gated": True, "activation": jax.nn.silu},
}


def compiled(case: Case, arch: int, config: Config | None = None) -> tuple[CompiledKernel, Config]:
    """Compiles a case with a config, or with the heuristic's."""
    with gpu_compiler.tracing_for(arch):
        config = config or matrix_blocks.heuristic(case.problem(), gpu_to_plan_for())
        shapes = case.shapes()
    call = functools.partial(quantized_matmul, **case.options, backend="triton", config=config, interpret=False)
    (kernel,) = gpu_compiler.compile_for_gpu(lambda inputs: call(**inputs._asdict()), shapes, arch=arch)
    return kernel, config


INT8 = {"quantize_x": "int8"}
LOOPS: dict[str, tuple[str, int, str, dict[str, Any], int, float]] = {
    # name: scheme, rows, layer, options, architecture, most instructions for a byte of codes
    "int8": ("int8", 16, "down", {}, 90, 3.4),
    "int8-80": ("int8", 16, "down", {}, 80, 2.9),
    "int8-100": ("int8", 16, "down", {}, 100, 5.8),
    "int8-gated": ("int8", 16, "gate-up", {}, 90, 2.9),
    "int8-64": ("int8", 64, "down", {}, 90, 3.9),
    "int4-g128": ("int4-g128", 16, "down", {}, 90, 5.5),
    "int4-g128-80": ("int4-g128", 16, "down", {}, 80, 5.5),
    "int4-g128-100": ("int4-g128", 16, "qkv", {}, 100, 5.0),
    "int4-g32": ("int4-g32", 16, "down", {}, 90, 7.0),
    "int4-g32-100": ("int4-g32", 16, "down", {}, 100, 12.5),
    "int4-g128-gated-64-80": ("int4-g128", 64, "gate-up", {}, 80, 12),
    "int4-g128-zeros": ("int4-g128-zeros", 16, "down", {}, 90, 7.3),
    "int4-minimums": ("int4-g32-minimums", 16, "qkv", {"scale_dtype": "float32"}, 90, 7.1),
    "int4-float16": ("int4-g128", 64, "qkv", {"dtype": "float16", "scale_dtype": "float16"}, 90, 9.5),
    "float8": ("float8_e4m3fn", 16, "down", {}, 90, 4.8),
    "float8-odd": ("float8_e4m3fn", 17, "odd", {}, 90, 6),
    "mxfp4": ("mxfp4", 16, "down", {"scale_dtype": "float32"}, 90, 9.9),
    "int8-by-int8": ("int8", 16, "down", INT8, 90, 1.1),
    "int4-by-int8": ("int4", 16, "down", INT8, 90, 3.5),
    "prefill-int8": ("int8", 256, "down", {}, 90, 7.4),
    "prefill-int4": ("int4-g128", 512, "qkv", {}, 90, 10.3),
    "prefill-gated": ("int8", 256, "gate-up", {}, 90, 3.2),
    "prefill-gated-80": ("int4-g32-zeros", 256, "gate-up", {}, 80, 13.3),
    "prefill-gated-100": ("int4-g128", 256, "gate-up", {}, 100, 25),
    "smollm2": ("int4-g32-minimums", 16, "smollm2", {"dtype": "float32", "num_layers": 30}, 90, 35),
}
"""Limits a few percent above the counts."""


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_short(name: str):
    scheme, rows, layer, options, arch, most = LOOPS[name]
    case = Case(name=name, rows=rows, scheme=scheme, **{"scale_dtype": "bfloat16"} | LAYERS[layer] | options)
    kernel, config = compiled(case, arch)
    problem = case.problem()
    loops = [loop for _, loop in by_loop(parse(kernel.code)) if any("MMA" in one.name for one in loop)]
    loop = max(loops, key=lambda loop: sum(one.asynchronous for one in loop))
    codes = config.block_out * config.tile * problem.parts // (2 if problem.scheme.packed else 1)
    threads = 32 * config.num_warps
    per_byte = len(loop) * threads / codes
    print(f"{per_byte:.2f} instructions a byte, {kernel.registers} registers, {kernel.shared} bytes; {config}")
    assert kernel.spilled == 0
    assert per_byte < most
    opcodes = [one.opcode for one in loop]
    # Zeros and scales of one byte are read and converted one by one; codes would be as many as there are codes.
    slow = sum(opcode.startswith(("I2F", "F2F.", "LDS.U8", "LDS.S8")) for opcode in opcodes)
    assert slow <= codes // threads // 8, opcodes
    if problem.x_dtype != "float32":  # for which groups of 32 are read one by one
        wide = sum(opcode == "LDGSTS.E.BYPASS.128" for opcode in opcodes)
        assert wide * 16 * threads >= codes


@pytest.mark.parametrize("arch", gpu_compiler.ARCHITECTURES)
def test_the_last_program_adds_up_splits(arch: int):
    """One addition to a counter, at the scope of the GPU, between the sums that are stored and those that are read."""
    case = Case(name="last", rows=16, scheme="int8", residual=True, **LAYERS["down"])
    with gpu_compiler.tracing_for(arch):
        config = matrix_blocks.heuristic(case.problem(), gpu_to_plan_for())
    assert config.splits > 1
    kernel, _ = compiled(case, arch, dataclasses.replace(config, merge="last"))
    assert kernel.spilled == 0
    assert kernel.count("ATOMG.E.ADD.STRONG.GPU") == 1
    opcodes = [one.opcode for one in parse(kernel.code).instructions]
    counted = opcodes.index("ATOMG.E.ADD.STRONG.GPU")
    assert "MEMBAR.ALL.GPU" in opcodes[:counted]
    assert any(opcode.startswith("STG.E.128") for opcode in opcodes[:counted])
    assert sum(opcode.startswith("LDG.E") for opcode in opcodes[counted:]) >= config.splits
