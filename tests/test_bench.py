"""Contenders are checked before they are timed, and a contender that fails does not affect the others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion.benchmarks.commands import run
from palladion.benchmarks.measure import bench, peers
from palladion.benchmarks.measure.device_time import KernelTime, KernelTimes
from palladion.benchmarks.measure.operations import OPERATIONS, Operation, products, verdict_of
from palladion.benchmarks.measure.operations.appends import identical
from palladion.benchmarks.measure.peers import Peer
from palladion.benchmarks.measure.timing import CallRunner, Runner
from palladion.reference import compare as acceptance
from palladion.reference import oracle

pytestmark = pytest.mark.usefixtures("small_probes")


TINY = OPERATIONS["quantized_matmul"].cases.Case(
    name="tiny", rows=4, in_features=128, out_features=64, scheme="int8", dtype="float32"
)


def peer(name: str, make: Callable[[str, Any, Any], Runner], **given: Any) -> Peer:
    return Peer(
        name, "quantized_matmul", **{"unavailable": lambda: None, "unsupported": lambda _: None, "make": make} | given
    )


def of_values(change: Callable[[Any], Any]) -> Callable[[str, Any, Any], Runner]:
    """Returns a function that makes a contender with a changed copy of the reference's result."""

    def make(name: str, case: Any, inputs: Any) -> Runner:
        result = OPERATIONS["quantized_matmul"].function(case, backend="xla")(inputs)
        runner: Any = CallRunner(name, lambda x: x, [0])
        runner.result = change(result)
        return runner

    return make


def test_only_what_is_right_is_timed():
    def crash(*_: Any) -> Runner:
        raise RuntimeError("no such\n symbol")

    contenders = (
        peer("good", of_values(lambda y: y)),
        peer("wrong", of_values(lambda y: y * 1.01)),
        peer("broken", crash),
        peer("absent", crash, unavailable=lambda: "is not installed"),
        peer("narrow", crash, unsupported=lambda _: "int8"),
        peer("gone", crash),
    )
    plan_ = bench.RunOptions(
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


def test_device_time_stands_beside_wall_clock(monkeypatch: pytest.MonkeyPatch):
    options = bench.RunOptions(
        backends=("xla",), peers=(peer("good", of_values(lambda y: y)),), rounds=2, sample_seconds=0.001
    )

    def traced(runners: Any, repetitions: int) -> dict[str, KernelTimes]:
        assert [one.name for one in runners] == ["memory", "xla", "good"]
        times = {"memory": 1e-3, "xla": 2e-3}
        return {name: KernelTimes((t,) * repetitions, 8, (KernelTime("k", 1, t),)) for name, t in times.items()}

    monkeypatch.setattr(bench, "kernel_seconds", traced)
    rows = {row.contender: row for row in bench.run_workload(OPERATIONS["quantized_matmul"], TINY, options)}
    assert (rows["xla"].device_seconds, rows["xla"].kernels) == ((2e-3,) * 2, "k 2 ms")
    assert len(rows["xla"].seconds) == len(rows["good"].seconds) == 2
    assert rows["good"].device_seconds == ()  # it launches no kernel
    assert rows["xla"].bandwidth == pytest.approx(bench.probe_bytes() / 1e-3)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(bench, "kernel_seconds", fails)
    (row, _) = bench.run_workload(OPERATIONS["quantized_matmul"], TINY, options)
    assert (row.status, row.reason) == ("ok", "no device time: RuntimeError: no CUPTI")
    assert row.seconds


def test_what_is_compiled_ahead_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch):
    chosen = OPERATIONS["quantized_matmul"]
    turns: list[str | None] = []
    plan_ = bench.RunOptions(backends=("triton", "xla"), rounds=1, sample_seconds=0.001, on_turn=turns.append)
    assert bench.compile_ahead([(chosen, TINY, plan_)]) == {}  # on a CPU
    # The platform is an accelerator other than a GPU, so the Triton kernel cannot take part.
    monkeypatch.setattr(bench, "target_platform", lambda: "other")
    crashed = dataclasses.replace(plan_, crashed={bench.COMPILING: "ended its process by SIGSEGV"})
    assert bench.compile_ahead([(chosen, TINY, crashed)]) == {}
    assert turns == [None, None]
    ahead = bench.compile_ahead([(chosen, TINY, plan_)])
    assert list(ahead) == [(chosen.name, TINY.name, "xla")]
    assert turns[2:] == [bench.COMPILING, None]
    monkeypatch.setattr(bench, "compile_implementation", None)
    rows = {row.contender: row for row in bench.run_workload(chosen, TINY, dataclasses.replace(plan_, compiled=ahead))}
    assert {name: row.status for name, row in rows.items()} == {"triton": "skipped", "xla": "ok"}


def test_a_device_that_is_lost_ends_the_process():
    def lost(*_: Any) -> Runner:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    plan_ = bench.RunOptions(backends=("xla",), peers=(peer("lost", lost),), rounds=0)
    with pytest.raises(bench.DeviceLostError, match="illegal memory access"):
        bench.run_workload(OPERATIONS["quantized_matmul"], TINY, plan_)


def test_a_crash_costs_one_contender_and_the_work_goes_on(monkeypatch: pytest.MonkeyPatch):
    given: list[dict[str, str]] = []

    def process(command: list[str], env: dict[str, str], check: bool) -> Any:
        del command, check
        given.append(json.loads(env[run.CRASHED]))
        turn = {0: "torch-int8", 1: "dense-dot"}.get(len(given) - 1)
        if turn:
            Path(env[run.TURN_FILE]).write_text(turn)
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


@pytest.mark.parametrize("name", ["quantized_matmul", "matmul"])
@pytest.mark.parametrize("order", ["in_out", "out_in"])
def test_the_judge_of_products_reads_both_storage_orders(name: str, order: str):
    operation = OPERATIONS[name]
    sizes = {"rows": 3, "in_features": 128, "out_features": 96, "dtype": "float32", "gated": True}
    case = operation.cases.Case(name="small", order=order, **sizes, **({} if name == "matmul" else {"scheme": "int8"}))
    inputs = operation.inputs(case)
    right = operation.function(case, backend="xla")(inputs)
    assert operation.judge(case, inputs, right, right).right
    assert not operation.judge(case, inputs, np.asarray(right)[:, ::-1], right).right


def test_append_must_be_exact():
    operation = OPERATIONS["append_kv"]
    case = operation.named_cases()["verify-int8"]
    inputs = operation.inputs(case)
    right = operation.function(case, backend="xla")(*operation.split(inputs))
    assert operation.judge(case, inputs, right, right).units == 0
    wrong = dataclasses.replace(right, k=right.k.at[0, 0, 0, 0].add(1))
    assert operation.judge(case, inputs, wrong, right).description == "differs from the definition: result.k"


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
        ("torch-int4", "quantized_matmul", {"scheme": "int4-g32", "order": "out_in"}),
        ("torch-int8", "quantized_matmul", {"scheme": "int8", "order": "out_in"}),
    ],
)
def test_peers_compute_the_same(name: str, operation: str, changes: dict[str, Any]):
    chosen = peers.peers()[name]
    if reason := chosen.unavailable():
        pytest.skip(reason)
    small = {
        "decode_attention": {"batch": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 32, "max_len": 64},
        "quantized_matmul": {"rows": 3, "in_features": 128, "out_features": 64, "scheme": "int8"},
    }[operation]
    case = OPERATIONS[operation].cases.Case(**{"name": "small", "dtype": "bfloat16", **small, **changes})
    assert chosen.unsupported(case) is None
    plan_ = bench.RunOptions(backends=(), peers=(chosen,), rounds=1, sample_seconds=1e-4)
    (row,) = bench.run_workload(OPERATIONS[operation], case, plan_)
    assert row.status == "ok", row.reason
    assert len(row.seconds) == 1


def test_every_peer_says_what_it_lacks_or_does_not_cover():
    for one in peers.peers().values():
        operation = OPERATIONS[one.operation]
        assert one.unavailable() is None or isinstance(one.unavailable(), str)
        for case in operation.cases.TESTS:
            assert one.unsupported(case) is None or len(one.unsupported(case) or "") > 3


def test_an_operation_of_one_result_needs_a_name_its_cases_and_its_package(monkeypatch: pytest.MonkeyPatch):
    class Twice(Operation):
        name = "twice"
        package = SimpleNamespace(twice=lambda x, by, **_: by * x)

    class Inputs(NamedTuple):
        x: np.ndarray

    monkeypatch.setattr(oracle, "twice", lambda x, by: by * x.astype(np.float64), raising=False)
    chosen, case, inputs = Twice(), SimpleNamespace(options={"by": 2}), Inputs(np.ones(3, np.float32))
    result = chosen.function(case, backend="xla")(inputs)
    assert chosen.judge(case, inputs, result, result).right
    assert not chosen.judge(case, inputs, 1.01 * result, result).right


@pytest.mark.parametrize(("name", "case"), [("quantized_matmul", "int4-minimums"), ("matmul", "norm-residual")])
def test_inputs_made_by_one_program_are_those_of_the_case(name: str, case: str, monkeypatch: pytest.MonkeyPatch):
    """On an accelerator, where compiling the parts one by one takes seconds."""
    operation = OPERATIONS[name]
    chosen = operation.named_cases()[case]
    expected = operation.inputs(chosen)
    monkeypatch.setattr(products, "target_platform", lambda: "gpu")
    found = operation.inputs(chosen)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        values = [np.asarray(leaf).astype(np.float32) for leaf in (one, other)]
        # An operation that is fused may round a number otherwise, and so a code to its neighbour.
        close = np.isclose(*values, rtol=2.0**-7, atol=0, equal_nan=True)
        assert np.mean(close) > 0.99
