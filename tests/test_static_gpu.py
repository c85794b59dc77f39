"""The static analysis of GPU kernels without a chip: machine code, trip counts of loops, reports and the command."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import static_gpu_kernels
from static_gpu_kernels import BLOCK_BYTES, GOLDEN, LENGTHS

from palladion.benchmarks.commands import main
from palladion.benchmarks.static import Examination, Examiner, GpuReport, WorkloadName, workloads
from palladion.benchmarks.static import examiner as static_examiner
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.static.gpu.compiler import gpu_of
from palladion.benchmarks.static.gpu.loops import natural_loops
from palladion.benchmarks.static.gpu.occupancy import Occupancy, occupancy
from palladion.benchmarks.static.gpu.prediction import TIMINGS, seconds
from palladion.benchmarks.static.gpu.sass import Code, Instruction, parse
from palladion.benchmarks.static.gpu.table import TABLE
from palladion.benchmarks.static.gpu.trip_counts import TripCounts, count_trips
from palladion.benchmarks.static.opaque import Undecided
from palladion.kernels.devices import gpus

needs_triton = pytest.mark.skipif(not gpu_compiler.installed(), reason="triton is not installed")
needs_plugin = pytest.mark.skipif(not gpu_program.installed(), reason="jax-cuda12-plugin is not installed")
ARCHS = tuple(gpu_compiler.ARCHITECTURES)
KERNELS = str(Path(static_gpu_kernels.__file__))
WARPS = 4
"""Warps of a program of the kernel `sums`."""

examiner = Examiner()


@pytest.fixture(scope="module", autouse=True)
def one_process_for_all() -> Iterator[None]:
    """Compiles all kernels in one process of its own."""
    with examiner:
        yield


@functools.cache
def golden(arch: int) -> Code:
    """Returns the machine code of the kernel `sums`."""
    return parse((GOLDEN / f"sums_sm_{arch}.sass").read_text())


def trips(arch: int, lengths: tuple[int, ...] | None) -> TripCounts:
    known = None if lengths is None else np.asarray(lengths, np.int32)
    return count_trips((GOLDEN / f"sums_sm_{arch}.ptx").read_text(), (4, 1, 1), (known, None), WARPS)


@functools.cache
def examined(name: str, chip: str = "sm_90") -> Examination:
    """Returns the examination of a function of static_gpu_kernels.py."""
    return examiner.examine(WorkloadName("", name, KERNELS), chip)


def report(name: str, chip: str = "sm_90") -> GpuReport:
    """Returns the report on the only kernel of a function."""
    row = examined(name, chip)
    assert row.failure is None
    (found,) = row.reports
    assert isinstance(found, GpuReport)
    return found


def instruction(opcode: str, guard: str = "", operands: str = "") -> Instruction:
    return Instruction(opcode, guard, operands, None)


class TestMachineCode:
    @pytest.mark.parametrize("arch", ARCHS)
    def test_the_loop_of_a_kernel(self, arch: int):
        code = golden(arch)
        (loop,) = code.loops
        inside = code.inside(loop)
        assert loop.depth == 1
        assert 0 < loop.first < len(code.instructions) - len(inside)
        assert [one.opcode for one in inside if one.thread_bytes] == ["LDG.E.128"] * 8
        assert sum(one.thread_bytes or 0 for one in inside) * 32 * WARPS == BLOCK_BYTES
        # Together, the instructions inside and outside the loop are all instructions.
        assert len(code.inside(None)) + len(inside) == len(code.instructions)
        assert sum(one.name == "EXIT" for one in code.inside(None)) >= 1

    @pytest.mark.parametrize(
        ("opcode", "size", "pipe"),
        [
            ("LDG.E", 4, "load/store"),
            ("LDG.E.U8.CONSTANT", 1, "load/store"),
            ("LDG.E.64", 8, "load/store"),
            ("LDG.E.ENL2.256", 32, "load/store"),
            ("LDGSTS.E.BYPASS.LTC128B.128", 16, "load/store"),
            ("UTMALDG.2D", None, "issue"),
            ("UBLKCP.S.G", None, "issue"),
            ("UBLKCP.G.S", 0, "issue"),
            ("UTMASTG.2D", 0, "issue"),
            ("LDS.128", 0, "load/store"),
            ("LDSM.16.MT88.4", 0, "load/store"),
            ("LDGDEPBAR", 0, "issue"),
            ("I2F.S8", 0, "special"),
            ("I2FP.F32.S32", 0, "integer"),
            ("PRMT", 0, "integer"),
            ("IMAD.WIDE", 0, "multiply"),
            ("FFMA.FTZ", 0, "float"),
            ("HGMMA.64x128x16.F32.BF16", 0, "tensor"),
            ("UTCHMMA", 0, "tensor"),
            ("ULEA", 0, "issue"),
        ],
    )
    def test_instructions(self, opcode: str, size: int | None, pipe: str):
        assert instruction(opcode).thread_bytes == size
        assert instruction(opcode).pipe == pipe

    def test_fillers_read_nothing(self):
        assert instruction("LDG.E.128", "!PT").thread_bytes == 0
        assert instruction("LDG.E.128", "P0").thread_bytes == 16

    def test_loads_and_stores_move_128_bytes_in_a_cycle(self):
        opcodes = ("LDS.U8", "LDS", "LDS.64", "STS.128", "LDSM.16.M88", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128")
        assert [instruction(one).load_store_cycles for one in opcodes] == [1, 1, 2, 4, 1, 4, 4]

    def test_flops_of_tensor_cores(self):
        operations = 2 * 16 * 8 * 16
        assert instruction("HMMA.16816.F32.BF16").tensor_flops == operations
        assert instruction("HMMA.1688.F32.TF32").tensor_flops == operations  # half as many, at half the rate
        assert instruction("IMMA.16832.S8.S8").tensor_flops == operations  # twice as many, at twice the rate
        assert instruction("QMMA.16832.F32.E4M3.E4M3").tensor_flops == operations
        assert instruction("HGMMA.64x64x16.F32.BF16").tensor_flops == 8 * operations
        assert instruction("UTCHMMA").tensor_flops == 0  # the shape is in a register
        (listed,) = parse("        /*0c10*/   HGMMA.64x64x16.F32.BF16 R24, R96, gdesc[UR16], R24 ;").instructions
        assert listed.tensor_flops == 8 * operations

    def test_other_texts_are_refused(self):
        with pytest.raises(ValueError, match="no instructions in the listing, which begins: 'nothing"):
            parse("nothing")


class TestLoops:
    def test_nested_loops(self):
        # 0 → 1 → 2 ⇄ 3 → back to 1 → 4
        inner, outer = sorted(natural_loops([[1], [2], [3], [2, 1, 4], []]), key=lambda loop: len(loop.body))
        assert (outer.first, set(outer.body), outer.depth) == (1, {1, 2, 3}, 1)
        assert (inner.first, set(inner.body), inner.depth) == (2, {2, 3}, 2)

    def test_a_jump_back_from_outside_is_no_loop(self):
        # The compiler puts waits after the end: 1 goes to 3, which goes back to 2, and 1 also goes to 2.
        assert natural_loops([[1], [2, 3], [], [2]]) == ()

    def test_a_program_without_branches(self):
        assert natural_loops([[1], [2], []]) == ()


class TestTrips:
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("lengths", [LENGTHS, (0, 0, 0, 0), (1024, 1024, 1024, 1024), (31, 32, 33, 64)])
    def test_lengths_decide(self, arch: int, lengths: tuple[int, ...]):
        blocks = [-(-length // 32) for length in lengths]
        found = trips(arch, lengths)
        assert (found.total, found.most) == ((sum(blocks),), (max(blocks),))
        assert found.loads == (8,)

    @pytest.mark.parametrize("arch", ARCHS)
    def test_unknown_arguments_are_not_guessed(self, arch: int):
        with pytest.raises(Undecided, match="depends on the values of argument 0 of the kernel, which were not given"):
            trips(arch, None)

    def test_instructions(self):
        body = """
            ld.param.b64 %rd1, [kernel_param_0];
            mov.u32 %r1, %ctaid.x;
            mul.wide.u32 %rd2, %r1, 4;
            add.s64 %rd3, %rd1, %rd2;
            ld.global.b32 { %r2 }, [ %rd3 + 4 ];
            shr.s32 %r3, %r2, 1;
            cvt.s64.s32 %rd4, %r3;
            mov.b64 {%r4, %r5}, %rd4;
            bfe.u32 %r6, %r4, 1, 2;
            setp.lt.s32 %p1, %r2, 0;
            selp.b32 %r7, 5, %r6, %p1;
            setp.eq.b32 %p2, %r7, 0;
            @%p2 bra $done;
            $loop:
            sub.s32 %r7, %r7, 1;
            ld.global.v2.b32 {%r8, %r9}, [%rd1];
            setp.gt.s32 %p3, %r7, 0;
            @%p3 bra $loop;
            $done:
            ret;
        """
        text = f".visible .entry kernel(\n.param .u64 .ptr .global .align 1 kernel_param_0\n)\n{{{body}}}\n"
        # (n >> 1 >> 1) & 3 trips, and 5 for negative n.
        values = np.array([99, 12, -8, 3], np.int32)
        found = count_trips(text, (3, 1, 1), [values], 1)
        assert (found.total, found.most, found.loads) == ((3 + 5,), (5,), (1,))
        assert found.longest == (1, 0, 0)

    def test_a_branch_around_a_loop(self):
        # Two of three programs leave before the loop, by a jump that a branch passes over.
        body = """
            mov.u32 %r1, %ctaid.x;
            setp.eq.b32 %p1, %r1, 1;
            @%p1 bra $enter;
            bra.uni $done;
            $enter:
            mov.b32 %r2, 4;
            $loop:
            sub.s32 %r2, %r2, 1;
            setp.gt.s32 %p2, %r2, 0;
            @%p2 bra $loop;
            $done:
            ret;
        """
        found = count_trips(f".visible .entry kernel(\n)\n{{{body}}}\n", (3, 1, 1), [], 1)
        assert (found.total, found.most, found.longest) == ((4,), (4,), (1, 0, 0))


class TestOccupancy:
    """Examples of NVIDIA's CUDA C++ Best Practices Guide, whose GPUs have as many registers and warps."""

    def test_registers(self):
        a100 = gpus()["a100"]
        # With 37 registers a thread, 12 programs of 128 threads fit (75 % of the warps), or four of 320 (63 %).
        assert occupancy(a100, registers=37, shared_bytes=0, num_warps=4) == Occupancy(12, "registers", 48)
        assert occupancy(a100, registers=37, shared_bytes=0, num_warps=10) == Occupancy(4, "registers", 40)

    def test_other_limits(self):
        h200 = gpus()["h200"]
        assert occupancy(h200, registers=24, shared_bytes=0, num_warps=8) == Occupancy(8, "warps", 64)
        assert occupancy(h200, registers=16, shared_bytes=0, num_warps=1) == Occupancy(32, "programs", 32)
        # A multiprocessor has 228 KiB, and each program takes 1 KiB more than it asks for.
        assert occupancy(h200, registers=32, shared_bytes=75 * 1024, num_warps=4) == Occupancy(3, "shared memory", 12)
        assert occupancy(h200, registers=32, shared_bytes=75 * 1024 + 1, num_warps=4).programs == 2
        assert occupancy(h200, registers=32, shared_bytes=228 * 1024, num_warps=4) == Occupancy(0, "shared memory", 0)

    def test_each_architecture_is_a_gpu_that_is_known(self):
        assert [gpu_of(arch).compute_capability for arch in ARCHS] == list(ARCHS)
        with pytest.raises(ValueError, match="arch: got 70; accepted: 80, 90, 100"):
            gpu_of(70)


@needs_triton
class TestExamine:
    @pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
    def test_sums(self, chip: str):
        found = report("sums", chip)
        assert (found.grid, found.times, found.num_warps, found.spilled) == ((4, 1, 1), 1, WARPS, 0)
        assert (found.wide_loads, found.wide_copies, found.narrow_loads, found.tensor) == (8, 0, 1, 0)
        assert (found.trip.total, found.trip.most) == (35, 32)
        assert found.trip.bytes_loaded == BLOCK_BYTES
        assert found.bytes_loaded == 35 * BLOCK_BYTES
        assert found.bytes_needed == 4 * 4 + 4 * 1024 * 128 * 4 + 4 * 128 * 4
        # One program of four warps runs on a multiprocessor; the assembler moved half of the loads after the first use.
        assert found.bytes_in_flight == found.trip.awaited * WARPS * 32 == BLOCK_BYTES // 2
        assert found.idle_multiprocessors == found.gpu.multiprocessors - 4
        assert found.waves == pytest.approx(4 / found.gpu.multiprocessors / found.occupancy.programs)
        assert found.idle_in_last_wave == pytest.approx(1 - (found.waves or 0))
        # The longest program alone takes at least its trips.
        assert found.cycles["issue"] >= 32 * found.trip.use["issue"] > 0
        assert found.instructions_per_byte == pytest.approx(found.trip.instructions * WARPS * 32 / BLOCK_BYTES)
        assert found.memory_seconds == pytest.approx(found.bytes_needed / (found.gpu.hbm_bytes_per_second or 1))
        # Rows of 512 bytes follow each other.
        assert found.strip_bytes == BLOCK_BYTES
        assert found.work is not None
        assert (found.work.memory_bytes, found.work.strips) == (35 * BLOCK_BYTES, 32)
        assert found.seconds is found.roofline is None
        reason = "reads less than 4 MB" if chip == "sm_90" else "no kernel was measured on the NVIDIA"
        assert reason in (found.not_estimated or "")

    def test_the_installed_compiler_agrees_with_the_golden_listing(self):
        before = golden(90)
        found = report("sums")
        assert found.trip.instructions == pytest.approx(len(before.inside(before.loops[0])), rel=0.2)

    def test_nested_loops(self):
        found = report("nested")
        assert (found.trip.total, found.trip.most) == (3 * 35, 3 * 32)

    def test_without_a_loop(self):
        found = report("doubles")
        assert (found.trip.total, found.trip.most) == (64, 1)
        assert found.bytes_loaded == 64 * 256 * 4
        assert found.strip_bytes == 256 * 4

    def test_estimates(self):
        for name, strip in (("columns", 32), ("wide_columns", 512)):
            found = report(name)
            assert found.strip_bytes == strip
            assert found.work is not None
            assert found.work.memory_bytes == 2**26
            assert found.not_estimated is None
            assert found.seconds == pytest.approx(seconds(found.work, TIMINGS["h200"]))
            assert (
                found.bound == {32: "strips", 512: "memory"}[strip] == max(found.limits, key=found.limits.__getitem__)
            )
            assert found.roofline == pytest.approx((found.memory_seconds or 0) / (found.seconds or 1))
        assert (report("columns").seconds or 0) > 1.5 * (report("wide_columns").seconds or 0)
        assert report("columns", "sm_80").seconds is None
        (line,) = [line for line in TABLE.lines(examined("columns", "sm_80")) if "columns [" in line]
        assert line.split("  columns [")[0].split()[-3:] == ["-", "-", "-"]

    def test_undecided_times_are_unknown(self):
        for name, reason in (
            ("sums_of_unknown_lengths", "the values of argument 0 of the kernel, which were not given"),
            ("decided_by_data", "it depends on what is in shared memory"),
        ):
            found = report(name)
            assert reason in (found.unknown or "")
            assert found.bound == "UNKNOWN"
            assert found.seconds is found.work is found.roofline is found.bytes_loaded is None
            assert found.memory_seconds is not None
            assert found.trip.instructions > 0
            assert "trips are UNKNOWN" in "\n".join(TABLE.lines(examined(name)))

    def test_several_kernels(self):
        row = examined("two_kernels")
        assert sorted((one.grid[0], one.times) for one in row.reports) == [(32, 3), (64, 1)]
        assert "is called 3 times" in "\n".join(TABLE.lines(row))

    def test_bytes_needed(self):
        assert report("with_bytes").bytes_needed == 12345

    def test_workloads_are_made_for_the_chip(self):
        assert report("made_for_a_gpu").name == "doubles"

    def test_a_workload_that_does_not_compile_fails_alone(self):
        assert "sort" in (examined("refused").failure or "")
        assert "no Pallas kernel for GPUs in it: pallas_call takes Triton" in (examined("no_kernel").failure or "")
        assert examined("sums").failure is None

    def test_cases_of_operations(self):
        row = examiner.examine(WorkloadName("quantized_matmul", "llama-3-8b-qkv-1-int8"), "sm_90")
        assert row.failure is None, row.failure
        found = max(row.reports, key=lambda one: one.bytes_needed or 0)
        assert isinstance(found, GpuReport)
        assert (
            found.bytes_needed == workloads.named_cases("quantized_matmul")[row.workload.name].problem().bytes_moved()
        )
        assert found.unknown is None
        assert found.spilled == 0
        # Hardly anything but the codes is loaded.
        codes = 4096 * 6144
        assert codes <= (found.bytes_loaded or 0) < 2 * codes


@needs_triton
@needs_plugin
class TestMosaic:
    """Kernels in Mosaic GPU are beside those in Triton, with what is known of them."""

    def test_both_backends_in_one_function(self):
        row = examined("both_backends")
        assert row.failure is None, row.failure
        triton, mosaic = row.reports
        assert isinstance(triton, GpuReport)
        assert isinstance(mosaic, GpuReport)
        assert [(one.backend, one.name, one.times) for one in (triton, mosaic)] == [
            ("triton", "doubles", 1),
            ("mosaic_gpu", "copies", 3),
        ]
        assert (triton.tma_loads, triton.tma_stores, triton.wide_loads + triton.narrow_loads > 0) == (0, 0, True)
        assert sorted(mosaic.grid) == [1, 1, 2]
        assert (mosaic.num_warps, mosaic.spilled, mosaic.tensor, mosaic.bytes_loaded) == (4, 0, 0, None)
        assert (mosaic.tma_loads, mosaic.tma_prefetches, mosaic.tma_stores) == (1, 0, 1)
        assert mosaic.wide_loads == mosaic.wide_copies == mosaic.narrow_loads == 0
        assert 64 * 128 * 4 <= mosaic.shared_bytes < 64 * 128 * 4 + 4096
        assert mosaic.bytes_needed == 2 * 128 * 128 * 4
        assert mosaic.seconds is mosaic.roofline is None
        text = "\n".join(TABLE.lines(row))
        assert "1+0+1" in text
        assert "UNKNOWN" not in text
        assert "examined for sm_90, sm_100; got sm_80" in (examined("both_backends", "sm_80").failure or "")

    def test_cases_of_operations(self):
        row = examiner.examine(WorkloadName("quantized_matmul", "llama-3-8b-qkv-1-int8"), "sm_90", "mosaic_gpu")
        assert row.failure is None, row.failure
        (found,) = row.reports
        assert isinstance(found, GpuReport)
        case = workloads.named_cases("quantized_matmul")[row.workload.name]
        assert found.bytes_needed == case.problem().bytes_moved()
        assert (found.backend, found.spilled, row.backend) == ("mosaic_gpu", 0, "mosaic_gpu")
        # The longest loop is that of the products, in which TMA fills a stage with codes.
        assert found.trip.use["tensor"] > 0
        assert found.tma_loads > found.tma_stores > 0
        assert found.occupancy.programs == (228 << 10) // (found.shared_bytes + 1024)
        (entry,) = TABLE.figures([row])
        assert (entry["backend"], entry["tma"][0], entry["tensor"]) == ("mosaic_gpu", found.tma_loads, found.tensor)
        assert examiner.examine(WorkloadName("append_kv", "llama-3-8b"), "sm_90", "mosaic_gpu").failure == (
            "mosaic_gpu: append_kv has no kernel of it yet"
        )


@needs_triton
class TestCommand:
    def test_the_whole_command(self, tmp_path: Path):
        results, figures = tmp_path / "results.json", tmp_path / "figures.jsonl"
        run = command("gpu", f"--file={KERNELS}:sums", "--archs=sm_80", f"--json={results}", f"--figures={figures}")
        assert run.returncode == 0, run.stderr
        assert "static_gpu_kernels.py/sums" in run.stdout
        assert "nothing was measured" in run.stdout
        (row,) = json.loads(results.read_text())
        (kernel,) = row["kernels"]
        assert (row["workload"], row["chip"], row["failure"]) == ("static_gpu_kernels.py/sums", "sm_80", None)
        assert (kernel["estimated"], kernel["gpu"], kernel["trip"]["most"]) == (True, "a100", 32)
        versions, short = map(json.loads, figures.read_text().splitlines())
        assert versions.keys() == {"jax", "triton"}
        assert (short["kernel"], short["busiest"]) == ("sums", kernel["busiest"])

    def test_wrong_commands(self, capsys: pytest.CaptureFixture[str]):
        assert main(["static", "gpu", "--archs=sm_70"]) == 2
        assert "--archs: got sm_70; accepted: sm_80, sm_90, sm_100" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ("", {("sm_80", "triton"), *itertools.product(("sm_90", "sm_100"), ("triton", "mosaic_gpu"))}),
            ("--backends=mosaic_gpu", {("sm_90", "mosaic_gpu"), ("sm_100", "mosaic_gpu")}),
            ("--backends=triton --archs=sm_80", {("sm_80", "triton")}),
        ],
    )
    def test_backends(self, monkeypatch: pytest.MonkeyPatch, options: str, expected: set[tuple[str, str]]):
        asked: list[static_examiner.Task] = []
        monkeypatch.setattr(static_examiner, "examine_all", lambda tasks, **_: asked.extend(tasks) or ())
        monkeypatch.setattr(gpu_program, "installed", lambda: True)
        main(["static", "gpu", "--operation=quantized_matmul", "--cases=llama-3-8b-qkv-1-int8", *options.split()])
        assert {(task.chip, task.backend) for task in asked} == expected

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("gpu --backends=cuda", "--backends: got cuda; accepted: triton, mosaic_gpu"),
            (
                "gpu --backends=mosaic_gpu --operation=append_kv",
                "accepted: mosaic_gpu for sm_90, sm_100 and operations that",
            ),
            ("gpu --backends=mosaic_gpu --archs=sm_80", "accepted: mosaic_gpu for sm_90"),
            ("gpu --backends=triton --file=a.py:f", "--file: got a.py:f; accepted: without --cases, --operation and"),
            ("tpu --backends=triton", "--backends: got tpu; accepted: gpu"),
        ],
    )
    def test_wrong_backends(self, capsys: pytest.CaptureFixture[str], options: str, message: str):
        assert main(["static", *options.split()]) == 2
        assert message in capsys.readouterr().err

    def test_mosaic_gpu_needs_its_compiler(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(gpu_program, "installed", lambda: False)
        assert main(["static", "gpu", "--backends=mosaic_gpu"]) == 2
        assert "jax-cuda12-plugin is not installed" in capsys.readouterr().err

    def test_pictures(self, tmp_path: Path):
        pytest.importorskip("matplotlib")
        rows = [examined("columns"), examined("sums", "sm_80"), examined("sums_of_unknown_lengths")]
        written = TABLE.plot(rows, tmp_path / "roofline.png")
        assert [path.name for path in written] == ["roofline-sm_90.png", "roofline-sm_80.png"]
        assert all(path.stat().st_size > 10_000 for path in written)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "palladion.benchmarks.static", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, env=environment)
