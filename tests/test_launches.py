"""Launches and copies of a decode step, in programs that XLA's compiler makes for a GPU that is not present."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from palladion import append_kv, decode_attention, quantize, quantized_matmul
from palladion.benchmarks.commands import launches, main
from palladion.benchmarks.measure import model_shapes as models
from palladion.benchmarks.measure.decode_steps import TINY
from palladion.benchmarks.measure.operations import OPERATIONS
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.benchmarks.measure.timing import calls_of
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.decode_attention import Inputs
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention.triton import call as attention_triton
from palladion.model.engine import Engine, EngineOptions
from palladion.model.sampling import Sampling
from palladion.reference import KVCache

needs_plugin = pytest.mark.skipif(not gpu_program.installed(), reason="jax-cuda12-plugin is not installed")

LISTING = """001: kCopy         [source       | next=003 (2)] kCopy
002: kCustomKernel [source       | next=003 (1)] fusion grid: [2, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
003: kWhile        [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    005: kMemzero      [source       | next=010 (5) ] zeros
    006: kCustomKernel [prev=005 (1) | sink] matmul_s8 grid: [48, 8, 1] threads: [128, 1, 1]  shared_memory: 512 bytes
"""


def test_a_listing_is_read():
    copy, before, condition, zeros, kernel = gpu_program.launches_in(LISTING)
    assert (copy.name, copy.kind, copy.loops, copy.grid) == ("kCopy", "Copy", 0, None)
    assert (before.name, before.loops) == ("fusion", 0)
    assert (condition.name, condition.loops) == ("loop_and_fusion", 1)
    assert (zeros.name, zeros.kind, zeros.loops) == ("zeros", "Memzero", 1)
    assert kernel == gpu_program.Launch("matmul_s8", "CustomKernel", 1, (48, 8, 1), (128, 1, 1), 512)


@needs_plugin
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_program_is_compiled_with_its_kernels_and_what_xla_adds(arch: int):
    w = jax.eval_shape(lambda: quantize(jnp.ones((512, 256)), "int8", order="out_in"))
    x = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sort(quantized_matmul(x, w, activation=jax.nn.silu, backend="triton"))

    program = gpu_program.compile_program(function, x, w, arch=arch)
    names = [launch.name for launch in program.launches]
    assert any(name.startswith("quantized_matmul_tensor_core_int8") for name in names), names
    assert len(names) > 1, names


@needs_plugin
@pytest.mark.parametrize(("scheme", "arch"), [("int8", 80), ("int8", 90), ("int4-g32", 90), ("mxfp4", 100)])
def test_xlas_own_triton_keeps_a_row_of_bytes_in_registers(scheme: str, arch: int):
    """Shared memory serves only the final sum over threads; older Tritons also moved operands between threads in it."""
    w = jax.eval_shape(lambda: quantize(jnp.ones((4096, 6144)), scheme, order="out_in"))
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    program = gpu_program.compile_program(lambda x, w: quantized_matmul(x, w, backend="pallas"), x, w, arch=arch)
    (launch,) = program.launches
    assert launch.name.startswith("quantized_matmul_few_rows")
    assert launch.shared <= 1024


@needs_plugin
@pytest.mark.parametrize(
    ("name", "case", "kernels"),
    [
        ("decode_attention", "llama-3-8b", ("decode_attention_r16", "decode_attention_merge")),
        ("decode_attention", "llama-3-8b-int8", ("decode_attention_r16", "decode_attention_merge")),
        ("quantized_matmul", "llama-3-8b-qkv-1-int8", ("quantized_matmul_few_rows",)),
        ("append_kv", "llama-3-8b", ("append_kv",)),
        ("append_qkv", "llama-3-8b", ("append_qkv",)),
    ],
)
def test_a_timed_program_launches_only_the_calls(name: str, case: str, kernels: tuple[str, ...]):
    """A program of three calls launches only them; two copies of the donated array take turns and are not copied."""
    operation = OPERATIONS[name]
    stored = operation.stored_for(operation.named_cases()[case], "gpu")
    donated, inputs = operation.split(stored.shapes())
    function = operation.function(stored, backend="triton")
    arguments = ((inputs,) * 3,) if donated is None else ((donated,) * 2, (inputs,) * 3)
    program = gpu_program.compile_program(calls_of(function, donates=donated is not None), *arguments)
    names = [launch.name for launch in program.launches]
    assert len(names) == 3 * len(kernels), names
    assert all(name.startswith(kernel) for name, kernel in zip(names, 3 * kernels, strict=True)), names
    # Everything is aliased except the array of queries, which is a new result.
    assert program.aliased_bytes >= 0.999 * 2 * sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(donated)
    )


@needs_plugin
@pytest.mark.parametrize(
    ("name", "arch"), [("llama-3-8b", 90), ("llama-3-8b-paged-int8", 80), ("llama-3-8b-int8", 100)]
)
def test_counters_of_the_last_program_are_filled_before_the_first_layer(name: str, arch: int):
    """Merging in the same launch leaves one launch a call, and counters wait for nothing that a call computes."""
    case = next(case for case in attention_cases.MODELS if case.name == name)
    with gpu_compiler.tracing_for(arch):
        config = dataclasses.replace(attention_triton.heuristic(case.problem()), merge="last")

    def layers(inputs: Inputs) -> jax.Array:
        for _ in range(3):
            q = decode_attention(**inputs._asdict(), **case.options, backend="pallas", config=config)
            inputs = inputs._replace(q=q)
        return inputs.q

    program = gpu_program.compile_program(layers, case.shapes(), arch=arch)
    names = [launch.name for launch in program.launches]
    assert [name.startswith("decode_attention_r16") for name in names[-3:]] == [True] * 3, names
    assert 1 <= len(names) - 3 <= 3, names
    assert not any("attention" in name for name in names[:-3]), names


@needs_plugin
def test_a_donated_cache_stays_where_it_is():
    cache = jax.eval_shape(lambda: KVCache.dense(1, 8, 4096, 128, jnp.bfloat16))
    new = jax.ShapeDtypeStruct((1, 8, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    append = jax.jit(lambda cache, *new: append_kv(cache, *new, backend="pallas"), donate_argnums=0)
    program = gpu_program.compile_program(append, cache, new, new, lengths)
    assert program.aliased_bytes == 2 * 8 * 4096 * 128 * 2
    assert program.temporary_bytes < 2**16
    assert [launch.name for launch in program.launches] == ["append_kv_r8"]


@needs_plugin
def test_the_command_lists_a_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    small = dataclasses.replace(models.model("llama3-8b"), num_layers=2)
    monkeypatch.setattr(models, "model", lambda _: small)
    file = tmp_path / "step.json"
    assert main(["launches", "--scheme=int4-g32", "--context=1024", f"--json={file}"]) == 0
    printed = capsys.readouterr().out
    (record,) = json.loads(file.read_text())
    count = len(record["launches"])
    assert f"{count} launches a step, {count / 2:.1f} for each of 2 layers" in printed
    assert f"{record['bound']:.0%} of the bandwidth at most" in printed
    reads = record["step_bytes"] / record["bandwidth"]
    assert record["bound"] == pytest.approx(reads / (reads + launches.LAUNCH_SECONDS * count))
    assert sum("decode_attention_r" in launch["name"] for launch in record["launches"]) == 2
    assert {launch["loops"] for launch in record["launches"]} == {1}


@needs_plugin
def test_the_steps_of_a_dispatch_are_graphs_that_the_host_launches_without_waiting(tmp_path: Path):
    """XLA knows how many steps there are, and so reads nothing back; it records all kernels of a step into a graph."""
    shape = dataclasses.replace(TINY, num_layers=1)
    options = EngineOptions(max_len=128, dtype="bfloat16", kv_dtype="bfloat16", backend="xla", steps_per_dispatch=8)
    with gpu_compiler.tracing_for(90):
        parameters = jax.eval_shape(lambda: random_parameters(shape, "bfloat16", dtype="bfloat16", max_positions=128))
        loop, arguments = Engine(parameters, shape.config(128), 1, Sampling(), options, (5,)).decode_loop()
    there = jax.sharding.SingleDeviceSharding(gpu_program.device(90))
    arguments = jax.tree.map(lambda leaf: tpu_compiler.described(leaf, there), arguments)
    lowered = gpu_compiler.lowered_for_gpu(loop, *arguments, arch=90)
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    assert '"known_trip_count":{"n":"8"}' in (compiled.as_text() or "")
    (listing,) = tmp_path.glob("*thunk_sequence_after*.txt")
    _, body = listing.read_text().split("  body:\n", 1)
    first, *recorded = body.splitlines()
    assert "kCommandBuffer" in first
    assert len(recorded) > 10
    assert all(line.startswith(" " * 8) for line in recorded)


ATTENTION = ["append_qkv", "decode_attention", "decode_attention_merge"]
A_LAYER = ["matmul", *ATTENTION, "matmul", "rms_norm", "matmul", "matmul", "rms_norm"]
"""Launches from a layer's first product in a decode step of one sequence: rotations, sums and additions are fused."""


@needs_plugin
@pytest.mark.parametrize(("scheme", "arch"), [("int8", 90), ("bfloat16", 90), ("int4-g32", 80)])
def test_a_layer_is_nine_launches(scheme: str, arch: int):
    shape = models.model("llama3-8b")
    steps = [
        launches.compile_step(
            dataclasses.replace(shape, num_layers=count), scheme=scheme, batch=1, context=8192, arch=arch
        )
        for count in (1, 2)
    ]
    assert len(steps[1].launches) - len(steps[0].launches) == len(A_LAYER)
    assert steps[1].temporary_bytes < 2**20
    names = [launch.name for launch in steps[1].launches]
    first = next(number for number, name in enumerate(names) if "matmul" in name)
    for number, name in enumerate(A_LAYER * 2):
        assert name in names[first + number], names[first : first + 18]


@needs_plugin
def test_many_sequences_take_no_more_than_xla_needs():
    """Tensor cores multiply 16 sequences; XLA normalizes, rotates and sums splits: 13 launches a layer, no copies."""
    shape = models.model("llama3-8b")
    counts = [
        len(
            launches.compile_step(
                dataclasses.replace(shape, num_layers=count), scheme="int8", batch=16, context=1024, arch=90
            ).launches
        )
        for count in (1, 2)
    ]
    assert counts[1] - counts[0] <= 13


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--archs=sm_75", "--archs: got sm_75; accepted: sm_80"),
        ("--batch=0", "--batch: got 0"),
        ("--backend=cuda", "--backend: got cuda"),
        ("--model=gpt-5", "gpt-5"),
    ],
)
def test_wrong_options_are_named(option: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["launches", option]) == 2
    assert message in capsys.readouterr().err


def test_without_the_plugin_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_program, "installed", lambda: False)
    assert main(["launches"]) == 2
    assert "pip install jax-cuda12-plugin" in capsys.readouterr().err
