"""The real Triton compiler takes every Triton kernel, for GPUs that need not be there, and spills nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest

from palladion import decode_attention, quantized_matmul
from palladion.benchmarks import gpu_compiler
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention import triton as attention_triton
from palladion.kernels.decode_attention.cases import Case as AttentionCase
from palladion.kernels.quantized_matmul import cases as matmul_cases
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase

pytestmark = pytest.mark.skipif(not gpu_compiler.installed(), reason="triton is not installed")

Compilable = tuple[Callable[..., Any], tuple[Any, ...]]


def attention(case: AttentionCase) -> Compilable:
    options = case.options | {"backend": "pallas", "return_lse": True}
    return lambda inputs: decode_attention(**inputs._asdict(), **options), (case.shapes(),)


def matmul(case: MatmulCase) -> Compilable:
    options = case.options | {"backend": "pallas"}

    def call(inputs: Any) -> Any:
        return quantized_matmul(inputs.x, inputs.w, bias=inputs.bias, layer=inputs.layer, **options)

    return call, (case.shapes(),)


OPERATIONS: dict[str, Callable[[], Compilable]] = {
    f"decode_attention-{case.name}": functools.partial(attention, case)
    for case in attention_cases.MODELS
    if attention_triton.unsupported(case.problem()) is None
} | {f"quantized_matmul-{case.name}": functools.partial(matmul, case) for case in matmul_cases.MODELS}
"""What is compiled for one GPU: a row for every case that models ask for."""

ON_EVERY_GPU = (
    "decode_attention-llama-3-8b-layers",
    "quantized_matmul-llama-3-8b-qkv-1-int8",
    "quantized_matmul-llama-3-8b-gate-up-1-int4-g32",
)
"""What is compiled for all of them."""


@pytest.mark.parametrize(
    ("name", "arch"),
    [pytest.param(name, 90, id=f"{name}-90") for name in OPERATIONS]
    + [pytest.param(name, arch, id=f"{name}-{arch}") for name in ON_EVERY_GPU for arch in (80, 100)],
)
def test_compiles_without_spills(name: str, arch: int):
    function, arguments = OPERATIONS[name]()
    kernels = gpu_compiler.compile_for_gpu(function, *arguments, arch=arch)
    assert len(kernels) == 1
    print(f"{kernels[0].kernel.name}: {kernels[0].registers} registers, {kernels[0].shared} bytes of shared memory")
    assert kernels[0].spilled == 0
    assert kernels[0].count("EXIT") >= 1


def test_half_precision_is_multiplied_by_tensor_cores():
    for name in ("decode_attention-llama-3-8b-layers", "quantized_matmul-llama-3-8b-qkv-1-int8"):
        function, arguments = OPERATIONS[name]()
        (kernel,) = gpu_compiler.compile_for_gpu(function, *arguments)
        assert kernel.count("HMMA") + kernel.count("HGMMA") > 0
        assert kernel.count("LDGSTS") > 0, "no load is asynchronous"


def test_offsets_fit_into_32_bits():
    """Pallas takes 64 bits for an array of more than 4 GiB: one-byte codes of 2 to 4 GiB would be read elsewhere."""
    case = {case.name: case for case in matmul_cases.MODELS}["llama-3-8b-gate-up-1-int8"]
    for num_layers, passed_on in ((16, 16), (32, 1), (64, 64)):
        function, arguments = matmul(dataclasses.replace(case, num_layers=num_layers))
        (kernel,) = gpu_compiler.lower_for_gpu(function, *arguments)
        assert (passed_on * 4096 * 28672, "i8") in kernel.operands


def test_unknown_architectures():
    with pytest.raises(ValueError, match="arch: got 70; accepted: 80, 90, 100"):
        gpu_compiler.lower_for_gpu(lambda x: x, 1.0, arch=70)
