"""The benchmarks: formulas of cost, clocks, judgement of contenders, results and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion import KVCache, quantize
from palladion.benchmarks.commands import (
    COMMANDS,
    check,
    compare,
    decode_peers,
    main,
    model,
    overview,
    plan,
    run,
    suite,
)
from palladion.benchmarks.commands import options as workloads
from palladion.benchmarks.measure import bench, peers, profile, timing
from palladion.benchmarks.measure import records as results
from palladion.benchmarks.measure.model_shapes import ModelShape, models
from palladion.benchmarks.measure.operations import OPERATIONS, verdict_of
from palladion.benchmarks.measure.operations.appends import identical
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.peers import Contender, Peer
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.benchmarks.measure.records import Limits, Row
from palladion.benchmarks.measure.timing import CallRunner, JaxRunner, Samples, measure, quantile, ratio
from palladion.kernels import devices
from palladion.kernels.devices import gpus, tpu_chips
from palladion.reference import compare as acceptance
from palladion.reference.caches import bytes_per_token
from palladion.reference.quantization import Scheme

SCHEMES = (
    "int8",
    "int8-g32",
    "int8-zeros",
    "int4-g32",
    "int4-g64-zeros",
    "int4-g32-minimums",
    "float8_e4m3fn",
    "mxfp4",
)
LIMITS = Limits(bandwidth=1e11, matrix_rate=1e13, matrix_dtype="bfloat16")

# --- Formulas: each is held against something that counts for itself ---


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    """What a machine can do is measured in no time."""
    monkeypatch.setitem(devices.READ_BYTES, "cpu", 2**22)
    monkeypatch.setitem(devices.SQUARE, "cpu", 64)
    yield
    devices.measured_bandwidth.cache_clear()
    devices.measured_matrix_rate.cache_clear()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama3-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("qwen3-4b", 4.02e9),
        ("gemma2-9b", 9.24e9),
        ("gemma3-4b", 3.88e9),
        ("gpt-oss-20b", 20.9e9),
    ],
)
def test_models_have_as_many_weights_as_their_authors_say(name: str, parameters: float):
    given = models()[name].parameters()
    assert given == (parameters if isinstance(parameters, int) else pytest.approx(parameters, rel=0.003))


def test_a_mixture_of_experts_reads_what_its_tokens_take():
    shape = models()["gpt-oss-20b"]
    assert shape.active_parameters() == pytest.approx(3.6e9, rel=0.01)
    one, many = (shape.step_weight_bytes("mxfp4", batch) for batch in (1, 1000))
    assert one < 0.3 * many
    assert many == pytest.approx(shape.weight_bytes("mxfp4"), rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "scale_dtype"),
    [*((scheme, "float32") for scheme in SCHEMES), ("int4-g32-minimums", "bfloat16"), ("mxfp4", "bfloat16")],
)
def test_bytes_of_a_weight_are_those_of_its_arrays(scheme: str, scale_dtype: str):
    weight = quantize(jnp.ones((128, 48)), scheme, scale_dtype=jnp.dtype(scale_dtype))
    assert Scheme.parse(scheme).nbytes(128, 48, scale_dtype) == weight.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e5m2"])
def test_bytes_of_a_token_are_those_of_the_cache(dtype: str):
    cache = KVCache.dense(2, 3, 16, 64, dtype)
    assert bytes_per_token(3, 64, dtype) == cache.bytes_per_token == cache.nbytes // (2 * 16)


@pytest.mark.parametrize("scheme", ["int4-g32", "float32"])
def test_bytes_of_a_step_are_those_of_the_parameters(scheme: str):
    parameters = random_parameters(model.TINY, scheme, dtype="bfloat16")
    norms = (2 * model.TINY.num_layers + 1) * model.TINY.hidden_size * 4
    frequencies = parameters.inverse_frequencies.nbytes
    assert parameters.bytes_per_step(1) == model.TINY.weight_bytes(scheme) + norms + frequencies


def compiled(operation: Any, case: Any) -> Any:
    donated, rest = operation.split(case.shapes())
    function = jax.jit(operation.function(case, backend="xla"))
    return function.lower(*((rest,) if donated is None else (donated, rest))).compile()


@pytest.mark.parametrize("name", ["decode_attention", "quantized_matmul"])
def test_operations_cost_what_xla_counts(name: str):
    operation = OPERATIONS[name]
    case = {
        "decode_attention": lambda cases: cases.Case(
            name="x", batch=4, q_heads=8, kv_heads=8, head_dim=128, max_len=128, dtype="float32"
        ),
        "quantized_matmul": lambda cases: cases.Case(
            name="x", rows=64, in_features=512, out_features=768, scheme="int8", dtype="float32"
        ),
    }[name](operation.cases)
    program = compiled(operation, case)
    memory = program.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # Lengths, and the log-sum-exp that the call does not return, are not worth counting.
    assert operation.bytes_moved(case) == pytest.approx(moved, rel=0.002)
    counted = program.cost_analysis()["flops"]
    # XLA also counts what is done to each logit and each code.
    assert 0.95 * operation.flops(case) <= counted <= 1.35 * operation.flops(case)


def test_attention_costs_what_its_lengths_and_window_say():
    cases = OPERATIONS["decode_attention"].cases
    case = cases.Case(name="x", batch=2, q_heads=4, kv_heads=2, head_dim=64, max_len=1000, lengths=(10, 600))
    token, queries = 2 * 2 * 64 * 2, 2 * 2 * 4 * 64 * 2
    assert OPERATIONS["decode_attention"].bytes_moved(case) == 610 * token + queries
    assert OPERATIONS["decode_attention"].flops(case) == 610 * 4 * 64 * 4
    windowed = dataclasses.replace(case, sliding_window=100)
    assert OPERATIONS["decode_attention"].bytes_moved(windowed) == 110 * token + queries


def test_a_prompt_costs_its_weights_and_its_pairs():
    shape = ModelShape(
        name="x",
        hidden_size=8,
        intermediate_size=16,
        num_layers=3,
        q_heads=2,
        kv_heads=1,
        head_dim=4,
        vocab_size=32,
        tied_embedding=True,
    )
    layer = 8 * 16 + 8 * 8 + 8 * 32 + 16 * 8
    pairs = sum(i + 1 for i in range(5))
    assert shape.prefill_flops(5) == 2 * 5 * 3 * layer + 2 * 8 * 32 + 3 * pairs * 4 * 2 * 4
    windowed = dataclasses.replace(shape, sliding_window=2, window_period=3)
    pairs_in_window = sum(min(i + 1, 2) for i in range(5))
    expected = 2 * 5 * 3 * layer + 2 * 8 * 32 + (pairs + 2 * pairs_in_window) * 4 * 2 * 4
    assert windowed.prefill_flops(5) == expected


def test_a_plan_follows_from_the_datasheet():
    shape, chip = models()["llama3-8b"], gpus()["h100"]
    found = plan.outlook(shape, chip, scheme="bfloat16", kv_dtype="bfloat16", batch=4, context=1000, efficiency=1.0)
    assert found is not None
    assert found.chips == 1
    read = 2 * shape.active_parameters() + 4 * 1000 * 2 * 8 * 128 * 2 * 32
    assert found.step_seconds == pytest.approx(read / 3350e9, rel=1e-6)
    assert found.bound == "memory"
    assert found.memory == 2 * (shape.active_parameters() + 128256 * 4096) + 4 * 1000 * 131072
    many = plan.outlook(shape, chip, scheme="bfloat16", kv_dtype="bfloat16", batch=4000, context=1, mfu=1.0)
    assert many is not None
    assert many.bound == "compute"
    big = plan.outlook(
        models()["llama3-70b"], tpu_chips()["v5e"], scheme="bfloat16", kv_dtype="bfloat16", batch=1, context=1
    )
    assert big is not None
    assert big.chips == 16  # 141 GB, in 14.4 GB of each


def test_the_matrix_rate_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("palladion.kernels.devices._least_seconds", lambda function, x: 1e-3)  # noqa: ARG005
    devices.measured_matrix_rate.cache_clear()
    assert devices.measured_matrix_rate("float32") == pytest.approx(2 * 64**3 / 1e-3)


# --- The clock ---


class Scripted:
    """A runner whose calls take what a script says."""

    def __init__(self, name: str, turns: list[str], takes: Callable[[int], float]) -> None:
        self.name, self._turns, self._takes, self._count = name, turns, takes, 0
        self.calls: list[int] = []

    def seconds(self, calls: int) -> float:
        self._turns.append(self.name)
        self.calls.append(calls)
        self._count += 1
        return self._takes(self._count)


def test_contenders_take_turns_there_and_back():
    turns: list[str] = []
    runners = [Scripted(name, turns, lambda _: 0.01) for name in "abc"]
    found = measure(runners, rounds=3, sample_seconds=0.02)
    assert "".join(turns[-9:]) == "abccbaabc"
    assert found["a"].seconds == (0.01,) * 3
    assert found["a"].calls == 2


def test_samples_are_as_long_as_asked_for():
    runner = Scripted("a", [], lambda _: 1e-5)
    found = measure([runner], rounds=2, sample_seconds=0.02)["a"]
    assert found.calls * found.median == pytest.approx(0.02, rel=0.01)


def test_a_contender_that_raises_is_left_out():
    def breaks(count: int) -> float:
        if count > 2:
            raise RuntimeError("device lost")
        return 0.1

    said: list[str] = []
    runners = [Scripted("good", [], lambda _: 0.1), Scripted("bad", [], breaks)]
    found = measure(runners, rounds=4, failed=lambda runner, error: said.append(f"{runner.name}: {error}"))
    assert list(found) == ["good"]
    assert len(found["good"].seconds) == 4
    assert said == ["bad: device lost"]
    with pytest.raises(RuntimeError, match="device lost"):
        measure([Scripted("bad", [], breaks)], rounds=4)


def test_a_deadline_ends_the_rounds_but_not_the_first():
    runner = Scripted("a", [], lambda _: 1.0)
    assert len(measure([runner], rounds=9, deadline=time.perf_counter() - 1)["a"].seconds) == 1


def test_medians_spreads_and_ratios():
    samples = Samples((3.0, 1.0, 2.0, 5.0, 4.0, 6.0), 1)
    assert (samples.median, samples.p20, samples.p80) == (3.5, 2.0, 5.0)
    assert samples.spread == pytest.approx(3 / 3.5)
    assert samples.noisy
    assert quantile([1.0], 0.8) == 1.0
    # A slow minute is slow for both.
    assert ratio(Samples((2.0, 20.0, 2.0), 1), Samples((1.0, 10.0, 1.0), 1)) == 2.0


def test_the_clock_waits_for_the_result():
    def slow(x: jax.Array) -> jax.Array:
        def wait(x: np.ndarray) -> np.ndarray:
            time.sleep(0.03)
            return x

        return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    runner = JaxRunner.of("slow", slow, jnp.ones(4), copies=1)
    assert runner.seconds(3) >= 0.03
    runner = JaxRunner.of("fast", lambda x: x + 1, jnp.ones(4), copies=1)
    assert runner.seconds(50) < 0.03


def test_other_functions_are_waited_for_by_their_own_means():
    log: list[str] = []
    runner = CallRunner("a", log.append, ["x", "y"], synchronize=lambda: log.append("wait"))
    runner.seconds(3)
    assert log == ["wait", "x", "y", "x", "wait"]


def test_inputs_pass_by_in_turns_that_no_cache_holds():
    assert timing.copies_of(2**20, "cpu") * 2**20 > timing.CACHE_BYTES["cpu"]
    assert timing.copies_of(2**40, "cpu") == 1
    runner = JaxRunner.of("a", lambda x: x + 1, jnp.zeros(2**18), copies=3)
    pointers = {inputs[0].unsafe_buffer_pointer() for inputs in runner._inputs}
    assert len(pointers) == 3


def test_what_is_donated_is_updated_in_place_call_after_call():
    runner = JaxRunner.of("a", lambda total, x: total + x, jnp.ones(4), donated=jnp.zeros(4), copies=1)
    np.testing.assert_array_equal(runner.result, 1)
    runner.seconds(3)
    np.testing.assert_array_equal(runner._donated[0][0], 4)


def test_on_an_accelerator_several_calls_are_one_program_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "target_platform", lambda: "gpu")
    calls: list[float] = []

    def seen(x: np.ndarray) -> np.ndarray:
        calls.append(time.perf_counter())
        time.sleep(0.01)
        return x

    def slow(x: jax.Array) -> jax.Array:
        return jax.pure_callback(seen, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    runner = JaxRunner.of("a", slow, jnp.ones(4), copies=4)
    calls.clear()
    took = runner.seconds(6)  # two programs of four
    assert len(calls) == 8
    assert took >= 0.01
    assert np.diff(calls).min() >= 0.009
    # What is donated goes with its own inputs.
    runner = JaxRunner.of("b", lambda total, x: total + x, jnp.ones(4), donated=jnp.zeros(4), copies=2)
    runner.seconds(4)
    np.testing.assert_array_equal(np.asarray(runner._donated[0]), 3)


def test_a_program_takes_longer_than_its_dispatch(monkeypatch: pytest.MonkeyPatch):
    assert timing.Layout.of(2**20) == timing.Layout(1, 1, timing.copies_of(2**20))
    monkeypatch.setattr(timing, "target_platform", lambda: "gpu")
    short, long = timing.Layout.of(25 * 2**20), timing.Layout.of(2**30)
    assert short.width == timing.CALLS_IN_A_PROGRAM
    assert short.width * 25 * 2**20 > timing.PROGRAM_BYTES / 2
    assert (long.width, long.groups) == (1, 2)  # one passes by while the other is not used
    assert timing.Layout.of(25 * 2**20, copies=1) == timing.Layout(1, 1, 1)
    # A call that updates a large cache touches little of it: many calls on few copies.
    assert timing.Layout.of(2**10, 2**30) == timing.Layout(timing.CALLS_IN_A_PROGRAM, 2, 1)


def test_calls_take_turns_with_what_is_donated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "target_platform", lambda: "gpu")
    monkeypatch.setattr(timing, "copies_of", lambda _: 2)
    monkeypatch.setattr(timing, "CALLS_IN_A_PROGRAM", 5)
    traced: list[None] = []

    def add(total: jax.Array, x: jax.Array) -> jax.Array:
        traced.append(None)
        return total + x

    runner = JaxRunner.of("a", add, jnp.ones(4), donated=jnp.zeros(4))
    assert len(traced) == 1
    first, second = runner._donated[0]  # type: ignore[index]
    np.testing.assert_array_equal(first, 3)
    np.testing.assert_array_equal(second, 2)
    np.testing.assert_array_equal(runner.result, 3)


def test_a_program_is_compiled_from_shapes():
    program = timing.Program.of(lambda x: x + 1, jax.ShapeDtypeStruct((4,), jnp.float32), copies=1)
    np.testing.assert_array_equal(JaxRunner("a", program, jnp.ones(4)).result, 2)


def test_jobs_are_done_side_by_side_and_told_of_in_order():
    together = threading.Barrier(3)

    def job(number: int) -> int:
        together.wait(timeout=30)
        if number == 1:
            raise KeyError(number)
        return number

    jobs = [functools.partial(job, number) for number in range(3)]
    zero, error, two = side_by_side(jobs, workers=3)
    assert (zero, repr(error), two) == (0, "KeyError(1)", 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_do_not_begin_when_nobody_listens_any_more(workers: int):
    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        time.sleep(0.01)
        return number

    outcomes = side_by_side([functools.partial(job, number) for number in range(50)], workers)
    assert next(outcomes) == 0
    outcomes.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(begun) < 10


def test_the_memory_probe_reads_what_it_says():
    (array,) = jax.tree.leaves(timing.memory_probe()._inputs)
    assert array.nbytes == timing.probe_bytes()


# --- Contenders are judged before they are timed ---

TINY = OPERATIONS["quantized_matmul"].cases.Case(
    name="tiny", rows=4, in_features=128, out_features=64, scheme="int8", dtype="float32"
)


def peer(name: str, make: Callable[[str, Any, Any], Contender], **given: Any) -> Peer:
    return Peer(name, "quantized_matmul", **{"missing": lambda: None, "refuses": lambda _: None, "make": make} | given)


def of_values(change: Callable[[Any], Any]) -> Callable[[str, Any, Any], Contender]:
    """A contender whose result is that of the reference, changed."""

    def make(name: str, case: Any, inputs: Any) -> Contender:
        result = OPERATIONS["quantized_matmul"].function(case, backend="xla")(inputs)
        return Contender(CallRunner(name, lambda x: x, [0]), change(result))

    return make


def test_only_what_is_right_is_timed():
    def crash(*_: Any) -> Contender:
        raise RuntimeError("no such\n symbol")

    contenders = (
        peer("good", of_values(lambda y: y)),
        peer("wrong", of_values(lambda y: y * 1.01)),
        peer("broken", crash),
        peer("absent", crash, missing=lambda: "is not installed"),
        peer("narrow", crash, refuses=lambda _: "int8"),
        peer("gone", crash),
    )
    plan_ = bench.Plan(
        backends=("triton", "xla"),
        peers=contenders,
        interpret=True,
        rounds=2,
        sample_seconds=0.001,
        crashed={"gone": "ended its process by SIGSEGV"},
    )
    rows = {row.contender: row for row in bench.run_workload(OPERATIONS["quantized_matmul"], TINY, plan_)}
    assert {name: row.status for name, row in rows.items()} == {
        "triton": "untimed",
        "xla": "ok",
        "good": "ok",
        "wrong": "wrong",
        "broken": "failed",
        "absent": "skipped",
        "narrow": "skipped",
        "gone": "failed",
    }
    assert [name for name, row in rows.items() if row.seconds] == ["xla", "good"]
    assert rows["broken"].reason == "RuntimeError: no such symbol"
    assert rows["gone"].reason == "ended its process by SIGSEGV"
    assert rows["wrong"].units is not None
    assert rows["wrong"].units > 1
    assert rows["triton"].config_source == "heuristic"
    assert "block_out=" in rows["triton"].config
    assert rows["xla"].bytes == TINY.problem().bytes_moved()
    assert rows["xla"].bandwidth is not None


def test_what_is_compiled_ahead_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch):
    chosen = OPERATIONS["quantized_matmul"]
    turns: list[str | None] = []
    plan_ = bench.Plan(backends=("triton", "xla"), rounds=1, sample_seconds=0.001, before=turns.append)
    assert bench.compile_ahead([(chosen, TINY, plan_)]) == {}  # on a CPU
    # As on an accelerator that is no GPU: its kernel cannot take part.
    monkeypatch.setattr(bench, "target_platform", lambda: "other")
    crashed = dataclasses.replace(plan_, crashed={bench.COMPILING: "ended its process by SIGSEGV"})
    assert bench.compile_ahead([(chosen, TINY, crashed)]) == {}
    assert turns == [None, None]
    ahead = bench.compile_ahead([(chosen, TINY, plan_)])
    assert list(ahead) == [(chosen.name, TINY.name, "xla")]
    assert turns[2:] == [bench.COMPILING, None]
    monkeypatch.setattr(bench, "compiled", None)
    rows = {row.contender: row for row in bench.run_workload(chosen, TINY, dataclasses.replace(plan_, compiled=ahead))}
    assert {name: row.status for name, row in rows.items()} == {"triton": "skipped", "xla": "ok"}


def test_a_device_that_is_lost_ends_the_process():
    def lost(*_: Any) -> Contender:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    plan_ = bench.Plan(backends=("xla",), peers=(peer("lost", lost),), rounds=0)
    with pytest.raises(bench.DeviceLostError, match="illegal memory access"):
        bench.run_workload(OPERATIONS["quantized_matmul"], TINY, plan_)


def test_a_crash_costs_one_contender_and_the_work_goes_on(monkeypatch: pytest.MonkeyPatch):
    given: list[dict[str, str]] = []

    def process(command: list[str], env: dict[str, str], check: bool) -> Any:
        del command, check
        given.append(json.loads(env[run.CRASHED]))
        turn = {0: "torch-int8", 1: "dense-dot"}.get(len(given) - 1)
        if turn:
            Path(env[run.MARK]).write_text(turn)
            return SimpleNamespace(returncode=-11 if turn == "torch-int8" else run.LOST_STATUS)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.subprocess, "run", process)
    assert run.supervise(OPERATIONS["quantized_matmul"], ["run"]) == 0
    assert [list(one) for one in given] == [[], ["torch-int8"], ["torch-int8", "dense-dot"]]
    assert "SIGSEGV" in given[1]["torch-int8"]


def test_errors_are_told_in_units_of_what_is_accepted():
    oracle = np.array([1.0, -0.5])
    reference = np.asarray(oracle + 1e-6, np.float32)
    bound = 2 * 1e-6 + 2 * float(np.finfo(np.float32).eps)
    for factor in (0.5, 3.0):
        result = np.asarray(oracle + factor * bound, np.float32)
        verdict = verdict_of(acceptance.compare(result, reference, oracle))
        assert verdict.units == pytest.approx(factor, rel=0.1)
        assert verdict.right == (factor < 1)
    assert verdict_of(acceptance.compare(np.float32([np.nan, 0]), reference, oracle)).units == np.inf


@pytest.mark.parametrize("name", ["paged-layers", "window-sinks-soft-cap"])
def test_the_sampled_judge_of_attention_finds_a_wrong_sequence(name: str):
    operation = OPERATIONS["decode_attention"]
    case = operation.named_cases()[name]
    inputs = operation.inputs(case)
    right = np.asarray(operation.function(case, backend="xla")(inputs))
    assert operation.judge(case, inputs, right, right).right
    wrong = right.copy()
    wrong[int(np.argmax(case.filled))] *= 1.1
    assert not operation.judge(case, inputs, wrong, right).right


def test_append_must_be_exact():
    operation = OPERATIONS["append_kv"]
    case = operation.named_cases()["verify-int8"]
    inputs = operation.inputs(case)
    right = operation.function(case, backend="xla")(*operation.split(inputs))
    assert operation.judge(case, inputs, right, right).units == 0
    wrong = dataclasses.replace(right, k=right.k.at[0, 0, 0, 0].add(1))
    assert operation.judge(case, inputs, wrong, right).said == "differs from the definition: result.k"


def test_a_nan_may_change_its_bits_and_nothing_else_may():
    values = np.array([0x7F, 0x7E, 0x3C], np.uint8).view(jnp.float8_e5m2)
    other_nan = np.array([0x7E, 0x7E, 0x3C], np.uint8).view(jnp.float8_e5m2)
    assert identical(values, other_nan)
    assert not identical(values, np.array([0x7F, 0x7E, 0x3D], np.uint8).view(jnp.float8_e5m2))
    assert not identical(values, np.array([0x7F, 0x3C, 0x3C], np.uint8).view(jnp.float8_e5m2))
    assert not identical(np.float32([0.0]), np.float32([-0.0]))


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "operation", "changes"),
    [
        ("jax-nn-xla", "decode_attention", {}),
        ("jax-nn-xla", "decode_attention", {"lengths": (5, 64)}),
        ("torch-sdpa", "decode_attention", {"lengths": (5, 64)}),
        ("dense-dot", "quantized_matmul", {"gated": True, "activation": jax.nn.silu}),
        ("torch-linear", "quantized_matmul", {"gated": True, "activation": jax.nn.silu}),
        ("torch-int8", "quantized_matmul", {"scheme": "int8"}),
        ("torch-int4", "quantized_matmul", {"scheme": "int4-g32"}),
    ],
)
def test_peers_compute_the_same(name: str, operation: str, changes: dict[str, Any]):
    chosen = peers.peers()[name]
    if reason := chosen.missing():
        pytest.skip(reason)
    small = {
        "decode_attention": {"batch": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 32, "max_len": 64},
        "quantized_matmul": {"rows": 3, "in_features": 128, "out_features": 64, "scheme": "int8"},
    }[operation]
    case = OPERATIONS[operation].cases.Case(**{"name": "small", "dtype": "bfloat16", **small, **changes})
    assert chosen.refuses(case) is None
    plan_ = bench.Plan(backends=(), peers=(chosen,), rounds=1, sample_seconds=1e-4)
    (row,) = bench.run_workload(OPERATIONS[operation], case, plan_)
    assert row.status == "ok", row.reason
    assert len(row.seconds) == 1


def test_every_peer_says_what_it_lacks_or_does_not_cover():
    for one in peers.peers().values():
        operation = OPERATIONS[one.operation]
        assert one.missing() is None or isinstance(one.missing(), str)
        for case in operation.cases.TESTS:
            assert one.refuses(case) is None or len(one.refuses(case) or "") > 3


# --- Results ---


def row(contender: str, seconds: tuple[float, ...], **changes: Any) -> Row:
    given: dict[str, Any] = {"kind": "reference" if contender == "xla" else "peer", "status": "ok"}
    return Row(
        operation="decode_attention",
        workload="w",
        shape="batch=1",
        contender=contender,
        seconds=seconds,
        calls=1,
        **{"bytes": 10**9, "flops": 10**9, "bandwidth": 1e11, "units": 0.5} | given | changes,
    )


def write(path: Path, rows: list[Row], **provenance: Any) -> Path:
    given = {"device": "d", "versions": {}, "command": "c", "time": "t", "commit": "x", "load": 1, "cores": 2}
    with results.Writer(path, given | provenance, LIMITS) as writer:
        for one in rows:
            writer.write(one)
    return path


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    rows = [row("xla", (0.1, 0.2)), row("a", (), status="wrong", units=math.inf, error=math.inf, reason="off")]
    provenance, limits, found = results.read(write(tmp_path / "a.jsonl", rows))
    assert (found, limits, provenance["device"]) == (rows, LIMITS, "d")


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    writer = results.Writer(path, {}, LIMITS)
    writer.write(row("xla", (0.1,)))
    # On disk before the next one, whatever becomes of the writer.
    assert [one.contender for one in results.read(path)[2]] == ["xla"]
    writer.write(row("peer", (0.1,)))
    assert len(results.read(path)[2]) == 2
    writer.close()


@pytest.mark.parametrize("text", ["", "{}", '{"provenance": {}, "limits": {}}', "no"])
def test_what_is_no_file_of_results_is_said(tmp_path: Path, text: str):
    (tmp_path / "a").write_text(text)
    with pytest.raises(ValueError, match="a: not a file of results"):
        results.read(tmp_path / "a")


def test_the_table_of_a_workload():
    rows = [
        row("xla", (0.02, 0.02, 0.02)),
        row("kernel", (0.0125,) * 3, kind="kernel", config="block=1", config_source="tuned"),
        row("fast", (0.01, 0.01, 0.04)),
        row("slow", (0.1,) * 3),
        row("bad", (), status="wrong", reason="error 1"),
    ]
    limits = dataclasses.replace(LIMITS, datasheet="h", datasheet_bandwidth=2e11)
    lines = [dict(zip(results.HEADINGS, line, strict=True)) for line in results.cells(rows, limits)]
    kernel = lines[1]
    assert (kernel["time"], kernel["GB/s"], kernel["of measured"], kernel["of datasheet"]) == (
        "12.5 ms",
        "80",
        "80%",
        "40%",
    )
    assert (kernel["x xla"], kernel["x peer"], kernel["TFLOP/s"]) == ("1.60", "0.80", "")
    assert kernel["blocks"] == "block=1 (tuned)"
    assert "noisy" in lines[2]["p20 to p80"]
    assert lines[4]["p20 to p80"] == "WRONG: error 1"
    text = results.table(results.HEADINGS, results.cells(rows, limits)).splitlines()
    assert len(text) == 6
    assert "TFLOP/s" not in text[0]  # nothing is bound by arithmetic
    busy = results.cells([row("xla", (0.1,), flops=10**12)], limits)[0]
    assert busy[results.HEADINGS.index("TFLOP/s")] == "10"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5, "1.5 s"), (0.0125, "12.5 ms"), (0.001, "1 ms"), (3.21e-5, "32.1 µs"), (5e-8, "50 ns"), (1234.0, "1234 s")],
)
def test_times_are_read_easily(seconds: float, text: str):
    assert results.duration(seconds) == text


# --- Comparison of two files ---


@pytest.mark.parametrize(
    ("new", "change", "status"),
    [
        (row("xla", (0.5, 0.5, 0.5)), "faster", 0),
        (row("xla", (2.0, 2.0, 2.0)), "slower", 1),
        (row("xla", (1.02, 1.03, 1.04)), "same", 0),
        (row("xla", (0.9, 0.95, 1.5, 1.6, 2.0)), "same", 0),  # slower by its median, within the noise
        (row("xla", (), status="wrong"), "wrong now", 1),
        (row("xla", (), status="skipped"), "gone", 1),
        (None, "not measured", 0),
        (row("other", (1.0,)), "gone", 1),
    ],
)
def test_what_changed_beyond_noise(tmp_path: Path, new: Row | None, change: str, status: int):
    old = [row("xla", (0.9, 1.0, 1.1))]
    files = [write(tmp_path / "old", old), write(tmp_path / "new", [new] if new else [])]
    difference, *_ = compare.compare(old, [new] if new else [])
    assert difference.change == change
    assert main(["compare", *map(str, files)]) == status


def test_comparisons_beside_the_memory_of_the_same_minutes():
    old, new = [row("xla", (1.0,) * 3)], [row("xla", (2.0,) * 3, bandwidth=0.5e11)]
    assert compare.compare(old, new)[0].change == "slower"
    beside = compare.compare(old, new, by_memory=True)[0]
    assert (beside.change, beside.factor) == ("same", pytest.approx(1.0))
    assert compare.compare([], new)[0].change == "new"
    slower = compare.compare([row("torch", (1.0,) * 3)], [row("torch", (9.0,) * 3)])[0]
    assert (slower.change, slower.worse) == ("slower", False)  # a peer's affair


# --- Commands ---


def test_one_page_of_help(capsys: pytest.CaptureFixture[str]):
    page = overview()
    assert all(name in page for name in COMMANDS)
    assert len(page.splitlines()) < 40
    assert main([]) == main(["--help"]) == 0
    assert page in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    module = importlib.import_module(COMMANDS[name])
    assert len(module.HELP) < 110  # a line of the page
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert (module.__doc__ or "").splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "command: got 'fly'; accepted: suite, check, run"),
        (["run", "fly"], "operation: got 'fly'; accepted: decode_attention, quantized_matmul, matmul, append_kv"),
        (["run", "decode_attention", "--model=x"], "--model: got x; accepted: smollm2-135m"),
        (["run", "decode_attention", "--cases=x"], "--cases: got x; accepted: patterns, or llama-3-8b"),
        (["run", "decode_attention", "--peers=x"], "--peers: got x; accepted: all, none, jax-nn-xla"),
        (["run", "append_kv", "--backends=triton_x"], "--backends: got triton_x; accepted: mosaic_tpu"),
        (["run", "decode_attention", "--q-heads=8"], "heads by hand: got q_heads; accepted: all of q_heads, kv_heads"),
        (["run", "quantized_matmul", "--in=8"], "sizes by hand: got (8, None); accepted: both of --in and --out"),
        (["run", "quantized_matmul", "--layers=x"], "--layers: got x; accepted: qkv, output, gate-up, down, head"),
        (["run", "decode_attention", '--config={"x": 1}'], "--config: got with 0 kernels; accepted: with one kernel"),
        (
            ["run", "decode_attention", "--backends=triton", '--config={"x": 1}'],
            """--config: got {'x': 1}; accepted: {"field": value} of block_kv""",
        ),
        (["check", "--cases=x"], "--cases: got ('x',); accepted: patterns of the names of test cases"),
        (["model", "--model=x"], "model: got 'x'; accepted: smollm2-135m"),
        (["plan", "--chips=x"], "--chips: got x; accepted: v4, v5e"),
        (["plan", "--mfu=2"], "--mfu: got 2.0; accepted: more than 0, up to 1"),
        (["compare", "/nowhere/a", "/nowhere/b"], "No such file or directory: '/nowhere/a'"),
        (["suite", "--minutes=0", "--out=/nowhere"], "--minutes: got 0.0; accepted: more than 0"),
        (["suite", "--tiny", "--only=x", "--out=/nowhere"], "--only: got x; accepted: check, attention"),
    ],
)
def test_what_is_not_known_is_answered_with_what_is(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def parsed(command: tuple[str, ...]) -> argparse.Namespace:
    module = importlib.import_module(COMMANDS[command[0]])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    given = [part.format(minutes="1", name="x") for part in command[1:]]
    return parser.parse_args(given)


@pytest.mark.parametrize(("platform", "tiny"), [("gpu", False), ("tpu", False), ("cpu", False), ("cpu", True)])
def test_every_phase_of_the_suite_is_a_command_that_exists(platform: str, tiny: bool):
    names = []
    for phase in suite.phases(platform, tiny=tiny):
        arguments = parsed(phase.command)
        names.append(phase.name)
        if phase.command[0] in ("run", "tune"):
            cases = workloads.selected(OPERATIONS[arguments.operation], arguments)
            assert cases
            assert len({case.name for case in cases}) == len(cases)
    assert len(set(names)) == len(names)


def test_the_suite_keeps_to_its_time_and_says_what_became_of_each_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(suite, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(suite, "GRACE_SECONDS", 0.2)
    phases = [
        suite.Phase("late", 0.001, ("plan",)),
        suite.Phase("plan", 99, ("plan", "--model=qwen3-4b")),
    ]
    assert suite.run_phases(phases, tmp_path, minutes=3, tiny=False) == 1
    said = json.loads((tmp_path / "suite.json").read_text())["phases"]
    assert [(one["phase"], one["status"]) for one in said] == [("late", "interrupted: its time was over"), ("plan", 0)]
    assert "qwen3-4b in int8: 4.02 billion weights" in (tmp_path / "plan.log").read_text()


def test_an_interrupted_suite_makes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(phase: suite.Phase, out: Path, *_: Any, **__: Any) -> int:
        if phase.name == "second":
            raise KeyboardInterrupt
        write(out / "first.jsonl", [row("xla", (0.1, 0.1))])
        return 0

    monkeypatch.setattr(suite, "_run_phase", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.run_phases([suite.Phase(name, 1, ()) for name in ("first", "second")], tmp_path, minutes=1, tiny=True)
    assert "xla" in (tmp_path / "README.md").read_text()
    assert [one["phase"] for one in json.loads((tmp_path / "suite.json").read_text())["phases"]] == ["first"]


def test_checking_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    command = ["check", "quantized_matmul", "--cases=one-row", "--backends=triton", "--interpret"]
    command.append(f"--json={tmp_path / 'a.jsonl'}")
    assert main(command) == 0
    assert "1 of 1 cases checked: 1 right" in capsys.readouterr().out
    found = results.read(tmp_path / "a.jsonl")[2]
    assert [(one.contender, one.status) for one in found] == [("triton", "untimed")]
    (broken,) = (one for one in OPERATIONS["quantized_matmul"].table if one.name == "triton")
    monkeypatch.setattr(
        OPERATIONS["quantized_matmul"].package.api,
        "IMPLEMENTATIONS",
        tuple(
            dataclasses.replace(one, run=lambda *a, **o: 1.02 * broken.run(*a, **o)) if one is broken else one
            for one in OPERATIONS["quantized_matmul"].table
        ),
    )
    assert main(command) == 1
    assert "one-row: triton wrong: error" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_cases_are_checked_side_by_side_until_the_device_is_lost(
    workers: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = ["check", "quantized_matmul", "--cases=int8,int4,one-row", f"--workers={workers}"]
    assert main(command) == 0
    assert "3 of 3 cases checked: 6 skipped" in capsys.readouterr().out  # there is no accelerator
    assert main([*command, "--minutes=0"]) == 0
    assert "0 of 3 cases checked: nothing" in capsys.readouterr().out

    def lost(chosen: Any, case: Any, plan_: bench.Plan) -> list[Row]:
        del chosen
        plan_.before("triton")
        if case.name == "int4":
            raise bench.DeviceLostError("an illegal memory access was encountered")
        return []

    monkeypatch.setattr(bench, "run_workload", lost)
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "quantized_matmul int4: triton: an illegal memory access" in said
    assert ("--workers=1 tells which" in said) == (workers > 1)


def test_a_model_is_measured_and_a_page_made_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = tmp_path / "model.json"
    pages = tmp_path / "page.md"
    command = ["model", "--model=tiny", "--batch=2", "--prompt=4", "--steps=16", f"--json={record}", "--profile"]
    assert main([*command, str(tmp_path / "profile")]) == 0
    found = results.record(record)
    assert found is not None
    (point,) = (model.Point(**one) for one in found["points"])
    assert (point.batch, len(point.step_seconds)) == (2, 1)
    assert point.tokens_per_second == 2 / point.step_seconds[0]
    parameters = random_parameters(model.TINY, "int8", dtype="float32")
    # The prompt's 4 tokens and a first dispatch of 16, then 16 steps, each with its own token in the cache.
    context = 4 + 16 + (16 + 1) / 2
    cached = round(2 * context * model.TINY.cache_bytes_per_token("float32"))
    assert point.step_bytes == parameters.bytes_per_step(2) + cached
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    output = capsys.readouterr().out
    assert "Up to" in output
    rows = write(tmp_path / "rows.jsonl", [row("xla", (0.1, 0.1)), row("b|ar", (0.2, 0.2))])
    assert main(["report", str(record), str(rows), f"--out={pages}", "--without-pictures"]) == 0
    text = pages.read_text()
    assert "| sequences | step |" in text
    assert "b\\|ar" in text
    if importlib.util.find_spec("matplotlib"):
        assert main(["report", str(record), str(rows), f"--out={pages}"]) == 0
        pictures = {path.name for path in tmp_path.glob("*.png")}
        assert pictures == {"model-scaling.png", "rows-bandwidth.png", "rows-roofline.png"}


def test_decoders_take_turns_and_one_that_fails_costs_nobody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    rates = {"palladion gguf": iter((1.0, 6, 9, 8)), "quick": iter((1.0, 12, 3, 4))}  # the first turn warms up

    def decoder(name: str) -> decode_peers.Decoder:
        return decode_peers.Decoder(name, lambda: next(rates[name]))

    def broken(*_: Any) -> Iterator[decode_peers.Decoder]:
        yield decode_peers.Decoder("broken", lambda: 1 / 0)

    def absent(*_: Any) -> Iterator[decode_peers.Decoder]:
        raise ImportError("no module named absent")

    monkeypatch.setattr(decode_peers, "find_model", lambda name: Path(name))
    monkeypatch.setattr(decode_peers, "palladion", lambda *_: iter([decoder("palladion gguf")]))
    monkeypatch.setattr(decode_peers, "PEERS", (broken, absent, lambda *_: iter([decoder("quick")])))
    file = tmp_path / "decode.json"
    assert main(["decode_peers", "--model=some.gguf", "--rounds=3", f"--json={file}"]) == 0
    output = capsys.readouterr()
    assert "broken: left out, it failed (ZeroDivisionError" in output.err
    assert "absent: left out (no module named absent)" in output.err
    record = results.record(file)
    assert record is not None
    assert record["tokens_per_second"] == {"palladion gguf": [6, 9, 8], "quick": [12, 3, 4]}
    # The ratios of the rounds are 0.5, 3 and 2.
    lines = {line[0]: line[1:] for line in decode_peers.table_of(record)[1]}
    assert lines == {
        "palladion gguf": ("8.0", "6.0 to 9.0", "1.00 x"),
        "quick": ("4.0", "3.0 to 12.0", "2.00 x"),
    }
    page = tmp_path / "page.md"
    assert main(["report", str(file), f"--out={page}", "--without-pictures"]) == 0
    assert "| quick | 4.0 | 3.0 to 12.0 | 2.00 x |" in page.read_text()
    if importlib.util.find_spec("matplotlib"):
        assert main(["report", str(file), f"--out={page}"]) == 0
        assert (tmp_path / "decode-decoders.png").is_file()


def test_a_profile_adds_up_what_the_device_ran():
    def event(name: str, duration: float) -> Any:
        return SimpleNamespace(name=name, duration_ns=duration)

    def plane(name: str, **lines: list[Any]) -> Any:
        named = [SimpleNamespace(name=line.replace("_", " "), events=events) for line, events in lines.items()]
        return SimpleNamespace(name=name, lines=named)

    gpu = plane(
        "/device:GPU:0",
        Stream_7=[event("dot.1", 5), event("dot.2.1", 7)],
        XLA_Modules=[event("jit", 99)],
        XLA_Ops=[event("dot", 99)],
    )
    host = plane("/host:CPU", Stream_7=[event("python", 99)])
    tpu = plane("/device:TPU:0", XLA_Ops=[event("fusion", 3)])
    found = list(profile._events(SimpleNamespace(planes=[gpu, host, tpu])))
    assert found == [("dot", 5e-9), ("dot", 7e-9), ("fusion", 3e-9)]


def test_a_checkout_with_jax_alone_is_enough():
    """What else there is makes pictures and peers: nothing that a command begins with."""
    absent = (
        "torch",
        "transformers",
        "matplotlib",
        "rich",
        "libtpu",
        "triton",
        "scipy",
        "tokenizers",
        "gguf",
        "jinja2",
    )
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
from palladion.benchmarks.commands import COMMANDS, overview
page = overview()
assert "cannot be run here" not in page, page
from palladion.benchmarks.measure.peers import peers
assert "torch is not installed" in {{peer.missing() for peer in peers().values()}}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_checks_take_turns():
    names = [one.name for one, _ in list(check._in_turns(list(OPERATIONS.values()), None))[: len(OPERATIONS)]]
    assert names == list(OPERATIONS)
