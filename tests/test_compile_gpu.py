"""The real Triton compiler compiles every Triton kernel without spills, for GPUs that need not be present."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from compiling import SAME_BUT_FOR_SIZES, hot_loop

from palladion import append_kv, append_qkv, decode_attention, quantized_matmul
from palladion import matmul as dense_matmul
from palladion.benchmarks.measure import operations as measured_operations
from palladion.benchmarks.static import workloads
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu.compiler import CompiledKernel
from palladion.benchmarks.static.gpu.sass import parse
from palladion.kernels.append_kv.cases import Case as AppendCase
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention.cases import Case as AttentionCase
from palladion.kernels.decode_attention.triton import call as attention_triton
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.matmul.cases import Case as DenseCase
from palladion.kernels.quantized_matmul import cases as matmul_cases
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase
from palladion.kernels.quantized_matmul.triton import call as matmul_triton
from palladion.kernels.quantized_matmul.triton import matrix_blocks

pytestmark = pytest.mark.skipif(not gpu_compiler.installed(), reason="triton is not installed")

QKV: dict[str, Any] = {"in_features": 4096, "out_features": 6144}

Compilable = tuple[Callable[..., Any], tuple[Any, ...]]


def attention(case: AttentionCase, **options: Any) -> Compilable:
    options = case.options | {"backend": "triton", "return_lse": True} | options
    return lambda inputs: decode_attention(**inputs._asdict(), **options), (case.shapes(),)


def matmul(case: MatmulCase, **options: Any) -> Compilable:
    options = case.options | {"backend": "triton"} | options

    def call(inputs: Any) -> Any:
        return quantized_matmul(**inputs._asdict(), **options)

    return call, (dataclasses.replace(case, order="out_in").shapes(),)


def dense(case: DenseCase) -> Compilable:
    case = dataclasses.replace(case, order="out_in")
    return lambda inputs: dense_matmul(**inputs._asdict(), **case.options, backend="pallas"), (case.shapes(),)


def append(case: AppendCase) -> Compilable:
    return lambda inputs: append_kv(**inputs._asdict(), backend="pallas"), (case.shapes(),)


def append_joined(case: AppendCase) -> Compilable:
    return lambda inputs: append_qkv(**inputs._asdict(), backend="pallas"), (case.shapes(),)


def by_its_row(operation: str, case: Any) -> Compilable:
    """Returns the kernel of an operation's row."""
    workload = workloads.load(workloads.WorkloadName(operation, case.name), "triton")
    return workload.function, workload.arguments


CALLS: dict[str, Callable[[Any], Compilable]] = {
    "decode_attention": attention,
    "append_kv": append,
    "append_qkv": append_joined,
    "quantized_matmul": matmul,
    "matmul": dense,
}
"""Calls as models make them; kernels of other operations are called by their rows."""


def compiled_cases() -> Iterator[tuple[str, Callable[[], Compilable]]]:
    """Yields a call for each case of a real model that a kernel takes."""
    for operation in workloads.operations("gpu"):
        for case in workloads.models(operation):
            if operation == "quantized_matmul" and case.name in SAME_BUT_FOR_SIZES:
                continue
            make = CALLS.get(operation, functools.partial(by_its_row, operation))
            if workloads.row(operation, "triton").unsupported(case.problem()) is None:
                yield f"{operation}-{case.name}", functools.partial(make, case)


with gpu_compiler.tracing_for(90):
    OPERATIONS = dict(compiled_cases())
"""Calls compiled for one GPU: the shapes of real models."""

ON_EVERY_GPU = (
    "decode_attention-llama-3-8b-layers",
    "decode_attention-llama-3-8b-paged-int8",
    "append_kv-llama-3-8b-int8",
    "append_qkv-llama-3-8b",
    "matmul-llama-3-8b-gate-up",
    "matmul-llama-3-8b-down",
    "quantized_matmul-llama-3-8b-qkv-1-int8",
    "quantized_matmul-llama-3-8b-gate-up-1-int4-g32",
)
"""Calls compiled for every GPU."""


@functools.cache
def compiled(name: str, arch: int = 90) -> list[CompiledKernel]:
    """Returns the kernels of one of `OPERATIONS`."""
    function, arguments = OPERATIONS[name]()
    return gpu_compiler.compile_for_gpu(function, *arguments, arch=arch)


@pytest.mark.parametrize(
    ("name", "arch"),
    [pytest.param(name, 90, id=f"{name}-90") for name in OPERATIONS]
    + [pytest.param(name, arch, id=f"{name}-{arch}") for name in ON_EVERY_GPU for arch in (80, 100)]
    + [pytest.param("decode_attention-llama-3-8b-float8", 100, id="decode_attention-llama-3-8b-float8-100")],
)
def test_compiles_without_spills(name: str, arch: int):
    kernels = compiled(name, arch)
    *before, main = [kernel for kernel in kernels if not kernel.kernel.name.startswith("decode_attention_merge")]
    assert all(kernel.kernel.name.startswith("rms_norm") for kernel in before), "a call is one kernel"
    for kernel in kernels:
        print(f"{kernel.kernel.name}: {kernel.registers} registers, {kernel.shared} bytes of shared memory")
        assert kernel.spilled == 0
        assert kernel.registers > 0
    if name.startswith("decode_attention"):
        assert_streams(main)
    if name.startswith("append"):
        assert main.count("STG.E.128") >= 2


@pytest.mark.parametrize("operation", CALLS)
def test_lowers_every_small_case(operation: str):
    """The interpreter takes more than Triton does: a masked load of 8-bit floats needs a zero of their dtype."""
    with gpu_compiler.tracing_for(90):
        row, measured = workloads.row(operation, "triton"), measured_operations.OPERATIONS[operation]
        stored = [measured.stored_for(case, "gpu") for case in measured.cases.TESTS]
        cases = [case for case in stored if row.unsupported(case.problem()) is None]
    assert cases
    for case in cases:
        function, arguments = CALLS[operation](case)
        assert gpu_compiler.lower_for_gpu(function, *arguments, arch=90), case.name


def assert_streams(kernel: CompiledKernel) -> None:
    """Asserts that keys and values are copied 16 bytes at a time, past the registers.

    Only scales and page tables have narrower copies.
    """
    counts = {name: count for name, count in kernel.instructions.items() if name.startswith("LDGSTS")}
    wide = counts.pop("LDGSTS.E.BYPASS.128")
    print(f"{wide} copies of 16 bytes, others: {counts}")
    assert set(counts) <= {"LDGSTS.E"}
    assert sum(counts.values()) <= wide / 2
    assert kernel.count("LDS.U8") == kernel.count("LDS.S8") == 0, "bytes are gathered one by one"
    assert kernel.count("F2F.") == 0, "numbers are converted at a sixteenth of the rate"
    if "float32" not in kernel.kernel.name and kernel.kernel.operands[2][1] == "bf16":
        assert kernel.count("HMMA") + kernel.count("HGMMA") + kernel.count("UTCHMMA") > 0


@pytest.mark.parametrize(
    ("name", "arch", "products", "conversions", "most", "in_all"),
    [
        # Conversions of a code, of keys and of values: 0 and 1.25 (a quarter of it an XOR, which is not counted);
        # 0.5 and 0.5 for float8; 1.25 and 1.25 where there are no integer tensor cores.
        ("llama-3-8b-int8", 90, "IMMA", ("PRMT", "HADD2"), 0.55, 3.2),
        ("llama-3-8b-int8", 80, "IMMA", ("PRMT", "HADD2"), 0.55, 3.2),
        ("llama-3-8b-float8", 90, "HMMA", ("F2FP.F16.E4M3",), 0.55, 2.9),
        ("llama-3-8b-int8", 100, "HMMA", ("PRMT", "HADD2"), 1.05, 3.5),
    ],
)
def test_codes_become_operands_in_few_instructions(
    name: str, arch: int, products: str, conversions: tuple[str, ...], most: float, in_all: float
):
    kernel, _ = compiled(f"decode_attention-{name}", arch)
    loop = [instruction.opcode for instruction in hot_loop(kernel)]
    assert any(instruction.startswith(products) for instruction in loop)
    codes = 16 * sum(instruction.startswith("LDGSTS.E.BYPASS.128") for instruction in loop)  # of a thread
    found = sum(instruction.startswith(conversions) for instruction in loop)
    print(f"{found / codes:.2f} instructions to convert a code, {len(loop) / codes:.2f} in all")
    assert found / codes <= most
    assert len(loop) / codes <= in_all


FORMS = [
    # Among them: more sequences than a program has threads, many rows, more than one tile of features.
    ("llama-3-8b", {}, {"merge": "last"}, 90),
    ("llama-3-8b-32k", {}, {"merge": "last"}, 90),
    ("llama-3-8b-paged-int8", {}, {"merge": "last"}, 80),
    ("llama-3-8b-paged-int8", {}, {"merge": "last"}, 100),
    ("llama-3-8b", {"batch": 256, "max_len": 1024}, {"merge": "last"}, 90),
    ("llama-3-8b", {"batch": 1000, "max_len": 1024}, {}, 90),
    ("llama-3-8b", {"batch": 4096, "max_len": 1024}, {}, 90),
    ("llama-3-8b-float8", {}, {"balanced": False, "num_warps": 2}, 90),
    ("llama-3-8b-prefill", {"batch": 2}, {"merge": "last", "balanced": True}, 90),
    ("head-dim-192", {}, {"merge": "last"}, 90),
]


@pytest.mark.parametrize(("name", "changes", "config", "arch"), FORMS)
def test_ways_to_share_and_merge_compile_without_spills(
    name: str, changes: dict[str, Any], config: dict[str, Any], arch: int
):
    case = dataclasses.replace({case.name: case for case in attention_cases.MODELS}[name], **changes)
    with gpu_compiler.tracing_for(arch):
        chosen = dataclasses.replace(attention_triton.heuristic(case.problem()), **config)
    function, arguments = attention(case, config=chosen)
    kernels = gpu_compiler.compile_for_gpu(function, *arguments, arch=arch)
    assert len(kernels) == (1 if chosen.merge == "last" else 2)
    for kernel in kernels:
        print(f"{kernel.kernel.name}: {kernel.registers} registers, {kernel.shared} bytes of shared memory")
        assert kernel.spilled == 0
    assert_streams(kernels[0])
    if chosen.merge == "last":
        assert_counts_after_its_results(kernels[0])


def assert_counts_after_its_results(kernel: CompiledKernel) -> None:
    """Asserts that all threads' results are in memory before a program counts itself, and read after it."""
    names = [instruction.opcode for instruction in parse(kernel.code).instructions]
    (counted,) = (place for place, name in enumerate(names) if name.startswith("ATOMG"))
    before, after = names[:counted], names[counted:]
    stored = max(place for place, name in enumerate(before) if name.startswith("STG"))
    assert any(name.startswith("BAR.SYNC") for name in before[stored:])
    assert any(name.startswith("MEMBAR") for name in before[stored:])
    invalidated, *_ = (place for place, name in enumerate(after) if name.startswith("CCTL.IVALL"))
    loaded = min(place for place, name in enumerate(after) if name.startswith("LDG.E"))
    assert invalidated < loaded
    assert any(name.startswith("BAR.SYNC") for name in after[invalidated:loaded])


def test_caches_beyond_4_gib():
    # Addresses of 64 bits take more registers.
    case = {case.name: case for case in attention_cases.MODELS}["llama-3-8b-paged-int8"]
    function, arguments = attention(dataclasses.replace(case, num_layers=40, max_len=16384))
    kernel, _ = gpu_compiler.compile_for_gpu(function, *arguments)
    assert kernel.kernel.operands[3][0] > 2**32
    assert kernel.spilled == 0
    assert_streams(kernel)


@pytest.mark.parametrize(
    ("name", "num_stages"),
    [("llama-3-8b-int8", 3), ("llama-3-8b-float8", 4), *(("llama-3-8b-paged-int8", stages) for stages in (2, 4, 5))],
)
def test_shared_memory_is_known_before_compiling(name: str, num_stages: int):
    case = {case.name: case for case in attention_cases.MODELS}[name]
    problem = case.problem()
    with gpu_compiler.tracing_for(90):
        config = dataclasses.replace(attention_triton.heuristic(problem), block_kv=64, num_stages=num_stages)
    function, arguments = attention(case, config=config)
    kernel, *_ = gpu_compiler.compile_for_gpu(function, *arguments, arch=90)
    operands = attention_triton.operand_bytes(problem, config.block_rows, config.block_kv)
    known = attention_triton.loaded_bytes(problem, config) + operands
    assert known - 2048 <= kernel.shared <= known + 512


def test_configs_that_the_tuner_leaves_out_exceed_shared_memory():
    """The shared memory computed for block sizes is close to what the compiler allocates."""
    case = {case.name: case for case in attention_cases.MODELS}["llama-3-8b-layers"]
    with gpu_compiler.tracing_for(90):
        space, most = attention_triton.space(case.problem()), gpu_to_plan_for().program_shared_bytes
    assert space.start in space
    for block_kv, num_stages, there in ((128, 4, True), (128, 5, False), (256, 3, False)):
        config = dataclasses.replace(space.start, block_kv=block_kv, num_stages=num_stages)
        known = attention_triton.loaded_bytes(case.problem(), config)
        assert (config in space) == there == (known <= most)
        function, arguments = attention(case, config=config)
        kernel, *_ = gpu_compiler.compile_for_gpu(function, *arguments, arch=90)
        assert known <= kernel.shared <= known + 16 * 1024
    product = MatmulCase(name="", rows=16, scheme="int8", **QKV)
    with gpu_compiler.tracing_for(90):
        space = matmul_triton.space(product.problem())
        vector = matmul_triton.space(dataclasses.replace(product, rows=1).problem())
    assert space.start in space
    for num_stages, there in ((4, True), (5, False)):
        config = dataclasses.replace(space.start, block_out=256, tile=256, num_warps=8, num_stages=num_stages)
        known = matrix_blocks.loaded_bytes(product.problem(), config)
        assert (config in space) == there == (known <= most)
        function, arguments = matmul(product, config=config)
        kernel, *_ = gpu_compiler.compile_for_gpu(function, *arguments, arch=90)
        assert known <= kernel.shared <= known + 16 * 1024
    # The tuner does not vary fields that the vector form does not use.
    assert {(config.tile, config.num_stages) for config in vector.neighbours(vector.start)} == {
        (vector.start.tile, vector.start.num_stages)
    }


def test_half_precision_is_multiplied_by_tensor_cores():
    for name in ("decode_attention-llama-3-8b-layers", "quantized_matmul-llama-3-8b-down-16-int4-g128-zeros"):
        kernel, *_ = compiled(name)
        assert kernel.count("HMMA") + kernel.count("HGMMA") > 0
        assert kernel.count("LDGSTS") > 0, "no load is asynchronous"


def test_offsets_fit_into_32_bits():
    """Pallas uses 64-bit offsets only beyond 4 GiB, so reads of one-byte codes of 2 to 4 GiB would go astray."""
    case = {case.name: case for case in matmul_cases.MODELS}["llama-3-8b-gate-up-1-int8"]
    for num_layers, passed_on in ((16, 16), (32, 1), (64, 64)):
        function, arguments = matmul(dataclasses.replace(case, num_layers=num_layers))
        (kernel,) = gpu_compiler.lower_for_gpu(function, *arguments)
        assert (passed_on * 4096 * 28672, "i8") in kernel.operands


def test_unknown_architectures():
    with pytest.raises(ValueError, match="arch: got 70; accepted: 80, 90, 100"):
        gpu_compiler.lower_for_gpu(lambda x: x, 1.0, arch=70)
