"""The static analysis of TPU kernels without a chip: traffic, estimates, reports and the command."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import static_kernels
from golden_schedules import golden
from static_kernels import LENGTHS

from palladion.benchmarks.commands import main
from palladion.benchmarks.static import Examination, Examiner, KernelReport, WorkloadName, examine, workloads
from palladion.benchmarks.static.kernel_calls import kernel_calls
from palladion.benchmarks.static.opaque import Undecided
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu import simulator
from palladion.benchmarks.static.tpu.table import TABLE, believed
from palladion.benchmarks.static.tpu.traffic import count_traffic, divide_among_cores
from palladion.benchmarks.static.tpu.transfers import Traffic
from palladion.kernels.devices import tpu_chips

needs_libtpu = pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")
CHIPS = tuple(tpu_chips())
attention_cases = workloads.named_cases("decode_attention")
UNIT_BYTES = 128 * 256 * 4
"""Bytes of one transfer of the kernel `ring`."""
BLOCK_BYTES = UNIT_BYTES
"""Bytes of one transfer of the kernel `blocks`."""

KERNELS = str(Path(static_kernels.__file__))
examiner = Examiner()


@pytest.fixture(scope="module", autouse=True)
def one_process_for_all() -> Iterator[None]:
    """Runs the compiler that writes listings in one process of its own, so compiling in this one is not slowed down."""
    with examiner:
        yield


@functools.cache
def examined(name: str, chip: str = "v6e") -> Examination:
    """Returns the examination of a function of static_kernels.py."""
    return examiner.examine(WorkloadName("", name, KERNELS), chip)


def report(name: str, chip: str = "v6e") -> KernelReport:
    """Returns the report on the only kernel of a function."""
    row = examined(name, chip)
    assert row.failure is None
    (found,) = row.reports
    assert isinstance(found, KernelReport)
    return found


def asked(name: str, **options: Any) -> dict[str, Traffic]:
    function, arguments, *_ = getattr(static_kernels, name)(**options)
    (call,) = kernel_calls(function, arguments, tpu_compiler.tracing_for("v6e"))
    return count_traffic(call)


@needs_libtpu
class TestTraffic:
    """Transfers counted from a kernel's source, compared with counts by hand."""

    def test_blocks(self):
        counted = asked("blocks", rows=1000, block=128)
        assert counted == {"hbm_to_vmem": Traffic(7, 7 * BLOCK_BYTES), "vmem_to_hbm": Traffic(7, 7 * BLOCK_BYTES)}

    @pytest.mark.parametrize(("lengths", "units"), [(LENGTHS, 11), ((0, 0, 0, 0), 0), ((128, 129, 256, 257), 8)])
    def test_transfers_of_the_kernel_itself(self, lengths: tuple[int, ...], units: int):
        counted = asked("ring", lengths=lengths)
        assert counted.get("hbm_to_vmem", Traffic()) == Traffic(units, units * UNIT_BYTES)
        assert counted["vmem_to_hbm"] == Traffic(4, 4 * 1024)

    def test_blocks_move_when_their_index_changes(self):
        counted = asked("revisits")
        # x [40, 128] has blocks of 16, 16 and 8 rows. Each is fetched for two consecutive steps, once for each of the
        # two columns of blocks. The table is fetched once. One block of sums is written for each column of blocks.
        assert counted == {
            "hbm_to_vmem": Traffic(6 + 1, 2 * 40 * 128 * 4 + 8 * 128 * 4),
            "vmem_to_hbm": Traffic(2, 2 * 8 * 128 * 4),
        }

    def test_a_core_fetches_what_it_needs(self):
        function, arguments = static_kernels.revisits()
        (call,) = kernel_calls(function, arguments, tpu_compiler.tracing_for("v5p"))
        assert count_traffic(call, cores=2)["hbm_to_vmem"].transfers == 6 + 2

    @pytest.mark.parametrize(
        ("grid", "semantics", "shares"),
        [
            ((3, 4), "pp", [[(n, 0), (n, 1)] for n in range(3)]),  # the first axis whose size is even is divided
            ((3, 4), "ap", [[(n, 0), (n, 1)] for n in range(3)]),
            ((2, 3), "pa", [[(0, n)] for n in range(3)]),
            ((3, 1), "pa", [[(n, 0)] for n in range(2)]),  # three steps for two cores: both run the second
        ],
    )
    def test_steps_of_the_first_of_two_cores(self, grid: Any, semantics: str, shares: list[list[Any]]):
        names = ["parallel" if one == "p" else "arbitrary" for one in semantics]
        assert divide_among_cores(grid, names, 2)[0] == [step for steps in shares for step in steps]
        assert {step for share in divide_among_cores(grid, names, 2) for step in share} == set(np.ndindex(*grid))

    @pytest.mark.parametrize("name", ["odd_grid", "odd_grid_of_two"])
    def test_cores_that_cannot_share_evenly(self, name: str):
        assert report(name, "v5p").agrees

    def test_scalars_that_are_not_known(self):
        with pytest.raises(Undecided, match="a scalar that was not given"):
            asked("ring", lengths=None)
        assert asked("decided_by_data")["hbm_to_vmem"].transfers == 1

    def test_it_is_fast(self):
        start = time.perf_counter()
        counted = asked("ring", lengths=(128 * 1000,) * 4)
        assert counted["hbm_to_vmem"].transfers == 4000
        assert time.perf_counter() - start < 4


@needs_libtpu
class TestExamine:
    @pytest.mark.parametrize("chip", CHIPS)
    def test_blocks(self, chip: str):
        found = report("blocks", chip)
        assert found.grid == (8,)
        assert found.bytes_needed == found.bytes_moved == 2 * 1024 * 256 * 4
        assert {name: one.transfers for name, one in (found.moved or {}).items()} == {
            "hbm_to_vmem": 8,
            "vmem_to_hbm": 8,
        }
        assert found.vmem_bytes == 4 * 128 * 256 * 4
        assert found.bound == "memory"
        assert found.seconds is not None
        assert found.memory_seconds is not None
        assert found.memory_seconds < found.seconds < 10 * found.memory_seconds
        assert found.roofline == pytest.approx(found.memory_seconds / found.seconds)
        assert found.times == 1
        assert found.moved == found.asked
        assert found.agrees

    def test_lengths(self):
        found = report("ring")
        assert found.agrees
        assert (found.moved or {})["hbm_to_vmem"].transfers == 11
        assert found.step is not None
        assert found.step.trips == 11

    def test_lengths_in_64_bits(self):
        found = report("ring_of_wide_lengths")
        assert found.moved == report("ring").moved
        assert found.agrees

    def test_the_installed_compiler_agrees_with_the_golden_listing(self):
        found = report("ring")
        before = golden("v6e")
        assert found.bundles == pytest.approx(len(before.bundles), rel=0.2)

    def test_two_dimensional_tables(self):
        found = report("table")
        assert [loop.trips for loop in found.loops] == [12, 3000, static_kernels.TABLE_SUM]
        assert found.agrees

    def test_twice_the_work(self):
        once, twice = (report(name).busy_cycles for name in ("more_work", "twice_more_work"))
        assert once is not None
        assert twice is not None
        assert 1.8 < twice / once < 2.2

    def test_smaller_blocks_take_more_steps_and_more_time(self):
        large, small = report("large_blocks"), report("small_blocks")
        assert (large.grid, small.grid) == ((8,), (512,))
        assert large.bytes_moved == small.bytes_moved
        assert large.seconds is not None
        assert small.seconds is not None
        assert small.seconds > 2 * large.seconds
        assert large.roofline is not None
        assert large.roofline > 0.7

    def test_two_cores(self):
        one, two = report("one_core", "v5p"), report("two_cores", "v5p")
        assert (one.cores, two.cores) == (1, 2)
        assert one.bytes_moved == two.bytes_moved
        assert one.agrees
        assert two.agrees
        assert one.busy_cycles is not None
        assert two.busy_cycles is not None
        assert 1.7 < one.busy_cycles / two.busy_cycles < 2

    def test_undecided_times_are_unknown(self):
        for found, reason in (
            (report("ring_of_unknown_lengths"), r"argument 0 of the kernel, int32\[4\], which were not given"),
            (report("decided_by_data"), "depends on the result of "),
        ):
            assert found.bound == "UNKNOWN"
            assert found.seconds is found.roofline is found.agrees is None
            assert re.search(reason, found.unknown or "")
            assert found.bundles > 0
            assert found.loops
        assert report("ring_of_unknown_lengths").bytes_moved is None
        assert report("decided_by_data").bytes_moved == 2 * 8 * 128 * 4  # whatever is computed

    def test_several_kernels(self):
        row = examined("two_kernels")
        assert sorted((one.grid, one.times) for one in row.reports) == [((2,), 1), ((4,), 3)]
        assert "is called 3 times" in "\n".join(TABLE.lines(row))

    def test_bytes_needed(self):
        assert report("with_bytes").bytes_needed == 12345
        failure = examined("two_kernels_with_bytes").failure or ""
        assert "ValueError: bytes_needed: got 5 for a function with 2 kernels: blocks." in failure

    def test_again(self):
        assert examiner.examine(WorkloadName("", "blocks", KERNELS), "v6e") == examined("blocks")

    def test_it_must_be_asked_in_time(self, monkeypatch: pytest.MonkeyPatch):
        tpu_compiler.device("v6e")
        monkeypatch.setattr(tpu_compiler, "_listings", None)
        with pytest.raises(RuntimeError, match=r"libtpu is loaded already.*keep_listings\(\) before anything is"):
            examine(*static_kernels.blocks())

    def test_a_workload_that_does_not_compile_fails_alone(self):
        assert "sort" in (examined("refused", "v5e").failure or "")
        assert examined("no_kernel", "v5e").failure == "no Pallas kernel in it"
        crashed = examined("crashes", "v5e")
        assert crashed.failure == "the compiler ended its process: SIGABRT, Check failed: this and that"
        assert TABLE.lines(crashed) == [f"  v5e  {crashed.failure}"]
        assert examined("blocks", "v5e").failure is None


class TestWorkloads:
    def test_cases_of_models_are_the_default(self):
        everything = workloads.select(None, None)
        assert WorkloadName("decode_attention", "llama-3-8b") in everything
        assert {one.operation for one in everything} == set(workloads.operations())
        assert {one.operation for one in workloads.select(None, "quantized_matmul")} == {"quantized_matmul"}
        assert workloads.select(["gqa", "gqa*"], None) == workloads.select(["gqa*"], None)

    def test_scalars_of_a_case_are_known(self):
        made = workloads.load(WorkloadName("decode_attention", "paged-layers"))
        (inputs,) = made.arguments
        assert inputs.lengths.tolist() == [65, 300]
        assert inputs.page_table.shape == (2, 4)
        assert int(inputs.layer) == 1
        assert not isinstance(inputs.k, np.ndarray)
        full = workloads.load(WorkloadName("decode_attention", "llama-3-8b"))
        assert made.bytes_needed is not None
        assert full.bytes_needed == attention_cases["llama-3-8b"].problem().bytes_moved()
        assert made.bytes_needed < attention_cases["paged-layers"].problem().bytes_moved()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (
                lambda: workloads.select(["no-such"], None),
                r"--cases: got no-such; accepted: patterns, or names of\n  .*llama-3-8b",
            ),
            (lambda: workloads.select(["gqa"], "quantized_matmul"), "--cases: got gqa"),
            (lambda: workloads.select(None, "product"), "--operation: got product; accepted: .*decode_attention"),
            (
                lambda: workloads.select(None, "matmul", "tpu"),
                "--operation: got matmul; accepted: append_kv, append_qkv, decode_attention",
            ),
            (lambda: workloads.from_argument("file.py"), "--file: got file.py; accepted: path/to/file.py:function"),
            (lambda: workloads.from_argument("none.py:f"), "none.py; accepted: a Python file that exists"),
        ],
    )
    def test_wrong_names(self, wrong: Any, message: str):
        with pytest.raises(ValueError, match=message):
            wrong()

    def test_wrong_functions(self):
        with pytest.raises(ValueError, match=r"absent; accepted: one of its functions: .*blocks.*, two_kernels"):
            workloads.from_argument(f"{KERNELS}:absent")
        with pytest.raises(ValueError, match=r"nonsense\(\): got 5; accepted: \(function, arguments\) or"):
            workloads.from_argument(f"{KERNELS}:nonsense")


class TestSimulator:
    """The simulator of libtpu, whose results count only where its transfers are right."""

    def test_its_output_is_read(self, tmp_path: Path):
        profile = 'profiles {\n  hlo_op_name: "blocks.1"\n  estimated_cycles: 1234\n}\n'
        (tmp_path / "blocks.1_TPU v5 lite_static_llo_profile.textproto").write_text(profile)
        (unlisted,) = simulator.read(tmp_path, "v5e", ["blocks.1", "other.2"])
        assert unlisted == simulator.Simulation("blocks.1", 1234, None)
        transfer = "  %7 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1_s1, /*size_in_granules=*/4096, /*vmem=*/%s2_s2\n"
        (tmp_path / "blocks.1_bundles.txt").write_text(f"0x1 :\n{transfer}0x2 :\n{transfer}")
        (listed,) = simulator.read(tmp_path, "v5e", ["blocks.1"])
        assert listed.moved == {"hbm_to_vmem": Traffic(2, 2 * BLOCK_BYTES)}
        (tmp_path / "blocks.1_bundles.txt").write_text(transfer.replace("4096", "%s3_s3"))
        assert simulator.read(tmp_path, "v5e", ["blocks.1"])[0].moved is None

    @needs_libtpu
    def test_it_is_believed_where_its_transfers_are_right(self):
        found = report("blocks")
        eight = Traffic(8, 8 * BLOCK_BYTES)
        right = simulator.Simulation("blocks.1", 5000, {"hbm_to_vmem": eight, "vmem_to_hbm": eight})
        wrong = simulator.Simulation("blocks.1", 5000, {"hbm_to_vmem": Traffic(1, BLOCK_BYTES), "vmem_to_hbm": eight})
        assert believed(found, right) is True
        assert believed(found, wrong) is False
        assert believed(found, simulator.Simulation("blocks.1", 5000, None)) is None
        row = Examination(WorkloadName("", "blocks"), "v6e", (found,), None, simulations=(wrong,))
        assert any("is not believed: it moves" in line for line in TABLE.lines(row))
        (kernel,) = TABLE.record(row)["simulations"]
        assert kernel["believed"] is False

    @needs_libtpu
    def test_it_agrees_with_the_executed_schedule_where_compute_is_the_bound(self):
        (simulated,) = simulator.simulate(WorkloadName("", "compute_bound", KERNELS), "v6e")
        found = report("compute_bound")
        assert found.instruction == simulated.name
        assert found.cycles == pytest.approx(simulated.cycles, rel=0.02)

    def test_there_is_none_for_v4(self):
        with pytest.raises(simulator.SimulatorFailed, match="no simulator for v4"):
            simulator.simulate(WorkloadName("", "blocks", KERNELS), "v4")


@needs_libtpu
class TestCommand:
    def test_the_whole_command(self, tmp_path: Path):
        results = tmp_path / "results.json"
        chosen = ("--operation=decode_attention", "--cases=llama-3-8b", "--chips=v6e")
        run = command("tpu", *chosen, f"--json={results}")
        assert run.returncode == 0, run.stderr
        assert "decode_attention/llama-3-8b" in run.stdout
        assert "All times are estimated" in run.stdout
        (row,) = json.loads(results.read_text())
        (kernel,) = row["kernels"]
        assert (row["workload"], row["chip"], row["failure"]) == ("decode_attention/llama-3-8b", "v6e", None)
        assert kernel["agrees"] is True
        assert kernel["estimated"] is True
        assert 0.5 < kernel["roofline"] <= 1
        assert kernel["bytes_moved"] == pytest.approx(kernel["bytes_needed"], rel=0.01)

    def test_pictures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        rows = [
            Examination(WorkloadName("", name), chip, (report(name, chip),), None)
            for name in ("blocks", "ring")
            for chip in ("v5e", "v6e")
        ]
        unknown = Examination(WorkloadName("", "unknown"), "v6e", (report("decided_by_data"),), None)
        if importlib.util.find_spec("matplotlib"):
            written = TABLE.plot([*rows, unknown], tmp_path / "roofline.png")
            assert [path.name for path in written] == ["roofline-v5e.png", "roofline-v6e.png"]
            assert all(path.stat().st_size > 10_000 for path in written)
            assert TABLE.plot(rows[:1], tmp_path / "one.png") == [tmp_path / "one.png"]
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ImportError, match="--plot needs matplotlib: pip install"):
            TABLE.plot(rows, tmp_path / "roofline.png")

    def test_an_interrupted_run_keeps_what_it_has(self, tmp_path: Path):
        results = tmp_path / "results.json"
        line, environment = command_line("tpu", "--operation=decode_attention", "--chips=v6e", f"--json={results}")
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(line, env=environment, **pipes) as process:
            assert process.stdout is not None
            for text in process.stdout:
                if text.lstrip().startswith("v6e"):
                    process.terminate()  # a process in the background may have been told to ignore SIGINT
                    break
            _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "interrupted after" in said
        rows = json.loads(results.read_text())
        assert 1 <= len(rows) < len(workloads.select(None, "decode_attention"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["npu"], "got npu; accepted: tpu, gpu"),
            ([], "got nothing; accepted: tpu, gpu"),
            (["tpu", "--chips=v3"], "--chips: got v3; accepted: v4, v5e, v5p, v6e, v7x"),
        ],
    )
    def test_wrong_commands(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
        assert main(["static", *arguments]) == 2
        assert message in capsys.readouterr().err


def command_line(*arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return [sys.executable, "-m", "palladion.benchmarks.static", *arguments], environment


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line, environment = command_line(*arguments)
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, env=environment)
