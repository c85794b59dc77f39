"""The benchmark commands: their help, their error messages, and the files that they write."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from measurements import measurement, write

from palladion.benchmarks.commands import (
    COMMANDS,
    PROGRAM,
    check,
    decode_peers,
    main,
    model,
    options,
    overview,
    report,
    run,
    suite,
)
from palladion.benchmarks.measure import bench, decode_steps, peers, records
from palladion.benchmarks.measure.decode_steps import TINY, BatchPoint
from palladion.benchmarks.measure.device_time import Event
from palladion.benchmarks.measure.operations import OPERATIONS
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.benchmarks.measure.records import Measurement
from palladion.kernels.quantized_matmul import IMPLEMENTATIONS
from palladion.model.engine import EngineOptions

pytestmark = pytest.mark.usefixtures("small_probes")


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
    page = capsys.readouterr().out
    assert (module.__doc__ or "").splitlines()[0] in page
    # Examples name the program as it is called, and the command itself.
    assert f"\nusage: {PROGRAM} {name}" in f"\n{page}"
    examples = [line for line in page.splitlines() if line.startswith("  ") and PROGRAM in line]
    assert all(f"{PROGRAM} {name}" in line for line in examples)
    assert examples


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "command: got 'fly'; accepted: suite, check, run"),
        (["run", "fly"], "operation: got 'fly'; accepted: decode_attention, quantized_matmul, matmul, append_kv"),
        (["run", "decode_attention", "--model=x"], "--model: got x; accepted: smollm2-135m"),
        (["run", "decode_attention", "--cases=x"], "--cases: got x; accepted: patterns, or llama-3-8b"),
        (["run", "decode_attention", "--peers=x"], "--peers: got x; accepted: all, none, fast, slow, jax-nn-xla"),
        (["run", "append_kv", "--backends=triton_x"], "--backends: got triton_x; accepted: mosaic_tpu"),
        (["run", "decode_attention", "--q-heads=8"], "heads by hand: got q_heads; accepted: all of q_heads, kv_heads"),
        (["run", "quantized_matmul", "--in=8"], "sizes by hand: got (8, None); accepted: both of --in and --out"),
        (["run", "quantized_matmul", "--layers=x"], "--layers: got x; accepted: qkv, output, gate-up, down, head"),
        (["run", "decode_attention", '--config={"x": 1}'], "--config: got with 0 kernels; accepted: with one kernel"),
        (
            ["run", "decode_attention", "--backends=triton", '--config={"x": 1}'],
            """--config: got {'x': 1}; accepted: {"field": value} of block_kv""",
        ),
        (
            ["check"],
            "--interpret: got none on a cpu, for which no kernel can be compiled (mosaic_gpu for a gpu, mosaic",
        ),
        (["check", "append_qkv", "--backends=triton"], "can be compiled (triton for a gpu); accepted: --interpret"),
        (["check", "--interpret", "--cases=x"], "--cases: got ('x',); accepted: patterns of the names of test cases"),
        (["model", "--model=x"], "model: got 'x'; accepted: smollm2-135m"),
        (["plan", "--chips=x"], "--chips: got x; accepted: v4, v5e"),
        (["plan", "--mfu=2"], "--mfu: got 2.0; accepted: more than 0, up to 1"),
        (["compare", "/nowhere/a", "/nowhere/b"], "No such file or directory: '/nowhere/a'"),
        (["suite", "--minutes=0", "--out=/nowhere"], "--minutes: got 0.0; accepted: more than 0"),
        (["suite", "--tiny", "--only=x", "--out=/nowhere"], "--only: got x; accepted: check, tune-products"),
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
            cases = options.selected(OPERATIONS[arguments.operation], arguments)
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
            (out / "second.json").write_text('{"points": []}')
            raise KeyboardInterrupt
        write(out / "first.jsonl", [measurement("xla", (0.1, 0.1))])
        return 0

    monkeypatch.setattr(suite, "_run_phase", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.run_phases([suite.Phase(name, 1, ()) for name in ("first", "second")], tmp_path, minutes=1, tiny=True)
    page = (tmp_path / "README.md").read_text()
    assert "## decode_attention (first.jsonl)" in page
    assert "## second.json\n\nCannot be read: KeyError" in page
    assert "decode_attention (cut.jsonl)" not in page
    said = json.loads((tmp_path / "suite.json").read_text())["phases"]
    assert [(one["phase"], one["status"]) for one in said] == [("first", 0), ("second", "interrupted")]


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [measurement("xla", (0.1, 0.1)), measurement("triton", (0.1, 0.1))])
    path.write_text(path.read_text()[:-20])
    assert [one.contender for one in records.read(path)[2]] == ["xla"]


def test_an_interrupted_model_prints_the_batches_that_it_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def measured(engine: Any, *_: Any, **__: Any) -> BatchPoint:
        if engine.batch == 2:
            raise KeyboardInterrupt
        return BatchPoint(1, (1e-3, 1e-3, 1e-3), 10**6, (1e-3,), 10**6, 4, 1e12, None)

    monkeypatch.setattr(model, "random_parameters", lambda *_, **__: None)
    monkeypatch.setattr(model, "engines", lambda *_: (SimpleNamespace(batch=batch) for batch in (1, 2)))
    monkeypatch.setattr(model, "measure_batch", measured)
    assert main(["model", "--model=tiny", "--batch=1,2", "--prompt=4", "--steps=2"]) == 130
    assert "Up to 1 sequences a step takes" in capsys.readouterr().out


def test_what_decoders_did_before_an_interruption_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    rates = iter((5.0, 6.0))

    def turn() -> float:
        for rate in rates:
            return rate
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_peers, "find_model", lambda name: Path(name))
    monkeypatch.setattr(decode_peers, "palladion", lambda *_: iter([decode_peers.Decoder("palladion", turn)]))
    monkeypatch.setattr(decode_peers, "PEERS", (lambda *_: iter([decode_peers.Decoder("peer", turn)]),))
    file = tmp_path / "decode.json"
    assert main(["decode_peers", "--model=some.gguf", f"--json={file}"]) == 130
    record = records.read_record(file)
    assert record is not None
    assert record["tokens_per_second"] == {"palladion": [5.0], "peer": [6.0]}
    assert "| palladion" not in capsys.readouterr().err
    page = tmp_path / "page.md"
    assert main(["report", str(file), f"--out={page}", "--without-pictures"]) == 0
    assert f"| peer | 6.0 | 6.0 to 6.0 | 0.83 x |\n\n{decode_peers.WARMING_UP}" in page.read_text()


def test_a_config_on_the_command_line_is_completed_by_the_heuristic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.jsonl"
    command = ["run", "matmul", "--cases=few,bfloat16", "--backends=triton", "--interpret", "--peers=none"]
    monkeypatch.setenv(run.TURN_FILE, str(tmp_path / "turn"))
    assert main([*command, '--config={"num_warps": 2}', f"--json={file}"]) == 0
    assert [one.config for one in records.read(file)[2]] == ["block_out=1 num_warps=2", "block_out=2 num_warps=2"]


def test_the_page_lists_what_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entries = [
        SimpleNamespace(
            kind="int8 1", sizes={"in": 64}, implementation=name, seconds=seconds, clock="device", config=config
        )
        for name, seconds, config in (("triton", 2e-6, {"block_out": 8}), ("xla", 1e-6, None))
    ]
    monkeypatch.setattr(report.tuning, "load", lambda _: entries)
    tuned = tmp_path / "tuned" / "quantized_matmul" / "some_gpu.json"
    tuned.parent.mkdir(parents=True)
    tuned.write_text('{"entries": [\n]}\n')
    suite._report(tmp_path, [{"phase": "tune-products", "status": 0, "seconds": 3.0}], pictures=False)
    page = (tmp_path / "README.md").read_text()
    assert "## Tuned: quantized_matmul (some_gpu.json)" in page
    first, second = (
        page.index("| int8 1 in=64 | xla | 1 µs | device |  |"),
        page.index("| triton | 2 µs | device | block_out=8 |"),
    )
    assert first < second
    assert "| tune-products | done | 3 s |" in page


def test_peers_that_compile_for_long_can_be_left_to_the_end():
    fast, slow = peers.select(["fast"], "decode_attention"), peers.select(["slow"], "decode_attention")
    assert [peer.name for peer in slow] == ["torch-flex"]
    assert {peer.name for peer in (*fast, *slow)} == {peer.name for peer in peers.select(None, "decode_attention")}


def test_checking_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    command = ["check", "quantized_matmul", "--cases=one-row", "--backends=triton", "--interpret"]
    command.append(f"--json={tmp_path / 'a.jsonl'}")
    assert main(command) == 0
    assert "1 of 1 cases checked: 1 right" in capsys.readouterr().out
    found = records.read(tmp_path / "a.jsonl")[2]
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
    monkeypatch.setattr(check, "target_platform", lambda: "gpu")
    assert main(command) == 1
    kernels = sum(row.platform is not None for row in IMPLEMENTATIONS)
    said = capsys.readouterr().out  # there is no accelerator
    assert f"3 of 3 cases checked: {3 * kernels} skipped\nNo kernel was found right" in said
    assert main([*command, "--minutes=0"]) == 1
    assert "0 of 3 cases checked: nothing\nNo kernel was found right" in capsys.readouterr().out

    def lost(chosen: Any, case: Any, plan_: bench.RunOptions) -> list[Measurement]:
        del chosen
        plan_.on_turn("triton")
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
    command = ["model", "--model=tiny", "--batch=2", "--prompt=4", "--steps=15", "--runs=3", f"--json={record}"]
    assert main([*command, "--steps-per-dispatch=8", "--profile", str(tmp_path / "profile")]) == 0
    found = records.read_record(record)
    assert found is not None
    (point,) = (BatchPoint.from_record(one) for one in found["points"])
    # A sample is a run of two dispatches.
    assert (point.batch, len(point.step_seconds), point.steps) == (2, 3, 16)
    assert point.tokens_per_second == 2 / point.step.median
    assert point.idle_seconds is None  # a CPU's kernels are not traced
    parameters = random_parameters(TINY, "int8", dtype="float32")
    # The prompt's 4 tokens and a first dispatch of 8, then 16 steps, each with its own token in the cache.
    context = 4 + 8 + (16 + 1) / 2
    cached = round(2 * context * TINY.cache_bytes_per_token("float32"))
    assert point.step_bytes == parameters.bytes_per_step(2) + cached
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    output = capsys.readouterr().out
    assert "Up to" in output
    rows = write(tmp_path / "rows.jsonl", [measurement("xla", (0.1, 0.1)), measurement("b|ar", (0.2, 0.2))])
    assert main(["report", str(record), str(rows), f"--out={pages}", "--without-pictures"]) == 0
    text = pages.read_text()
    assert "| sequences | step |" in text
    assert "b\\|ar" in text
    if importlib.util.find_spec("matplotlib"):
        assert main(["report", str(record), str(rows), f"--out={pages}"]) == 0
        pictures = {path.name for path in tmp_path.glob("*.png")}
        assert pictures == {"model-scaling.png", "rows-bandwidth.png", "rows-roofline.png"}


def test_on_an_accelerator_all_batch_sizes_are_compiled_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_steps, "target_platform", lambda: "tpu")
    shape = dataclasses.replace(TINY, num_layers=1)
    parameters = random_parameters(shape, "float32", dtype="float32")
    given = EngineOptions(max_len=64, dtype="float32", kv_dtype="float32", steps_per_dispatch=2)
    made = decode_steps.engines(parameters, shape, given, (1, 2), prompt=20)
    assert [engine.batch for engine in made] == [1, 2]
    assert all(set(engine.programs) == {("prefill", 16), "decode"} for engine in made)
    point = decode_steps.measure_batch(made[1], shape, parameters, 20, steps=3, runs=1)
    assert (point.batch, point.steps, point.idle_seconds) == (2, 4, None)


def test_a_step_is_kernels_and_time_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_steps, "target_platform", lambda: "gpu")
    point = BatchPoint(1, (110e-6, 120e-6, 130e-6), 10**6, (1e-3,), 10**6, 4, 1e12, 0.0, steps=8)
    assert decode_steps.with_trace(point, [], 2) == point
    # Two steps of two kernels, 2 µs between the kernels and 50 µs between the steps.
    events = [
        Event(start * 1e-6, seconds * 1e-6, name)
        for start, seconds, name in ((0, 70, "product"), (72, 30, "sum"), (152, 70, "product"), (224, 30, "sum"))
    ]
    point = decode_steps.with_trace(point, events, 2)
    assert point.busy_seconds == pytest.approx(100e-6)
    assert point.idle_seconds == pytest.approx(20e-6)  # of 120 µs by wall clock, whatever gaps the trace has
    assert (point.launch_gap_seconds, point.wait_seconds, point.waits) == (
        pytest.approx(2e-6),
        pytest.approx(25e-6),
        0.5,
    )
    record = {"points": [dataclasses.asdict(point)], "limits": {"matrix_rate": 1e12}, "model": "tiny", "title": "tiny"}
    headings, (line,) = model.table_of(record)
    assert line[headings.index("idle")] == "16.7%"
    product, total, nothing = model.kernel_lines(BatchPoint.from_record(record["points"][0]))
    assert product == ("product", "70 µs", "58.3%", "1")
    assert total[0] == "sum"
    assert nothing[1:3] == ("20 µs", "16.7%")
    provenance = {"device": "d", "versions": {}, "command": "c", "time": "t", "commit": "x", "load": 1, "cores": 2}
    limits = {"bandwidth": 1e12, "matrix_rate": 1e12, "matrix_dtype": "bfloat16"}
    records.write_record(tmp_path / "model.json", record | {"provenance": provenance, "limits": limits})
    page = tmp_path / "page.md"
    assert main(["report", str(tmp_path / "model.json"), f"--out={page}", "--without-pictures"]) == 0
    assert "| product | 70 µs | 58.3% | 1 |" in page.read_text()
    old = {name: value for name, value in record["points"][0].items() if name != "steps"}
    assert BatchPoint.from_record(old).kernels == ()  # those of a dispatch
    monkeypatch.setattr(decode_steps, "target_platform", lambda: "tpu")
    assert decode_steps.with_trace(BatchPoint.from_record(old), events, 2).kernels


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
    record = records.read_record(file)
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


def test_a_checkout_with_jax_alone_is_enough():
    """Other packages serve plots and peers only, so every command starts without them."""
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
assert "torch is not installed" in {{peer.unavailable() for peer in peers().values()}}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_checks_take_turns():
    names = [one.name for one, _ in list(check._in_turns(list(OPERATIONS.values()), None, None))[: len(OPERATIONS)]]
    assert names == list(OPERATIONS)
