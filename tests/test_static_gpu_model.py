"""The model of GPU kernel times against measured times, and the facts that it is made of."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.benchmarks.static.gpu import compiler, measured
from palladion.benchmarks.static.gpu.prediction import TIMINGS, limits, not_estimated, seconds
from palladion.benchmarks.static.gpu.strips import Read, Reads, reads_of
from palladion.benchmarks.static.gpu.trip_counts import count_trips
from palladion.benchmarks.static.gpu.work import Work, work_of

ROOT = Path(__file__).parents[1]
PROVENANCE, KERNELS = measured.read(ROOT / "benchmarks" / "results" / "h200_kernels.jsonl")
TIMING = TIMINGS[PROVENANCE["gpu"]]

WORK = Work(
    multiprocessors=132,
    programs=132,
    resident=2,
    memory_bytes=43_000_000,
    strip_bytes=512,
    strips=100,
    cycles=1980,
    tensor_cycles=0,
    waits=2.0,
    instructions=990,
)
"""10 µs of memory, 0.27 of strips and 1 of issue; a program waits twice and executes 990 instructions."""

HEAD = ".visible .entry kernel(\n.param .u64 .ptr .global .align 1 kernel_param_0\n)\n"


def read_by(body: str, programs: int = 1) -> tuple[Read, ...]:
    """Returns what a program of one warp reads."""
    text = f"{HEAD}{{{body}}}\n"
    grid = (programs, 1, 1)
    return reads_of(text, grid, [None], 1, count_trips(text, grid, [None], 1)).arrays


class TestMeasured:
    def test_most_estimates_are_near(self):
        for members in ([one for one in KERNELS if one.fitted], [one for one in KERNELS if not one.fitted]):
            sizes = [abs(error) for error in measured.errors(members, TIMING)]
            assert len(sizes) > 60
            assert statistics.median(sizes) <= 0.15
            assert max(sizes) <= 0.40

    def test_constants_are_those_that_fit_best(self):
        start = dataclasses.replace(TIMING, **{name: 1.3 * getattr(TIMING, name) for name in measured.FITTED})
        found = measured.fit([one for one in KERNELS if one.fitted], start)
        for name in measured.FITTED:
            assert getattr(found, name) == pytest.approx(getattr(TIMING, name), rel=0.02)

    def test_what_is_not_estimated_was_measured_to_be_different(self):
        others = [one for one in KERNELS if not_estimated(one.work, TIMING) is not None]
        assert {"append_qkv" in one.case or "merge" in one.case or "256 rows" in one.case for one in others} == {True}
        assert statistics.median(abs(seconds(one.work, TIMING) / one.seconds - 1) for one in others) > 0.25

    def test_the_page_has_these_tables(self):
        page = (ROOT / "docs" / "gpu_model.md").read_text()
        for table in (measured.summary(KERNELS, TIMING), measured.table(KERNELS, TIMING)):
            assert table in page, table


class TestWork:
    def work(self, *arrays: Read, total: int = 400, most: int = 4, programs: int = 100) -> Work:
        kernel = compiler.TritonKernel(
            "kernel", (programs, 1, 1), 4, 3, ((2**20, "bf16"), (64, "f32"), (100, "i8")), ""
        )
        reads = Reads(arrays, total, most)
        found = work_of(kernel, multiprocessors=50, resident=2, reads=reads, parts=[], trips={}, cycles={"issue": 7.4})
        assert found is not None
        return found

    def test_bytes_and_strips(self):
        found = self.work(Read(0, strips=16, strip_bytes=128, bytes=2048))
        assert (found.memory_bytes, found.strip_bytes, found.strips, found.cycles) == (
            400 * 2048,
            128,
            16 * 400 // 50,
            7,
        )

    def test_what_programs_read_again_comes_from_caches(self):
        codes = Read(0, strips=16, strip_bytes=128, bytes=2048)
        found = self.work(codes, Read(1, strips=1, strip_bytes=256, bytes=256))
        assert (found.memory_bytes, found.strips) == (400 * 2048 + 256, 16 * 400 // 50)

    def test_idle_programs_read_nothing(self):
        # Programs of twice as many trips as there are bytes for.
        found = self.work(Read(0, strips=16, strip_bytes=128, bytes=2048), total=2048, most=4, programs=512)
        assert (found.memory_bytes, found.strips) == (2**21, round(16 * 1024 * 11 / 512))

    def test_narrow_strips_share_sectors(self):
        found = self.work(Read(0, strips=64, strip_bytes=8, bytes=512))
        assert found.strips == 64 * 400 // 4 // 50

    def test_the_longest_program_counts(self):
        # 97 of 100 programs have one trip, the others 100 together.
        found = self.work(Read(0, strips=16, strip_bytes=128, bytes=2048), total=197, most=98)
        assert found.strips == 16 * 98

    def test_unknown_reads(self):
        kernel = compiler.TritonKernel("kernel", (1, 1, 1), 4, 3, (), "")
        for reads, trips in ((Reads(), {}), (Reads((Read(0, 1, 4, 4),), 1, 1), None)):
            assert work_of(kernel, multiprocessors=1, resident=1, reads=reads, parts=[], trips=trips, cycles={}) is None


class TestTimes:
    def test_limits(self):
        apart = {name: value * 1e6 for name, value in limits(WORK, TIMING).items()}
        program = 2 * TIMING.latency_seconds * 1e6 + 990 * TIMING.cycles_per_instruction / 1980
        fill = WORK.memory_bytes / 132 / 64 / 1980  # bytes of a multiprocessor, 64 in a cycle
        assert apart == pytest.approx({"memory": 10.0, "fill": fill, "strips": 0.27, "issue": 1.0, "waits": program})

    def test_few_multiprocessors_do_not_read_as_fast_as_the_memory(self):
        assert WORK.programs >= 132
        few = dataclasses.replace(WORK, programs=13)
        assert limits(few, TIMING)["fill"] == pytest.approx(WORK.memory_bytes / 13 / 64 / 1.98e9)
        assert seconds(few, TIMING) > limits(few, TIMING)["fill"] > 2 * limits(few, TIMING)["memory"]

    def test_programs_take_turns(self):
        alone = limits(WORK, TIMING)["waits"]
        for programs, turns in ((264, 1.0), (265, 1.5), (528, 2.0)):
            work = dataclasses.replace(WORK, programs=programs)
            assert work.turns == turns
            assert limits(work, TIMING)["waits"] == pytest.approx(turns * alone)

    def test_limits_overlap(self):
        memory = 10e-6 + TIMING.launch_seconds
        assert memory < seconds(WORK, TIMING) < memory + sum(limits(WORK, TIMING).values()) - 10e-6

    def test_other_kinds(self):
        assert not_estimated(WORK, TIMING) is None
        small = dataclasses.replace(WORK, memory_bytes=3_000_000)
        assert "launch is most of its time" in (not_estimated(small, TIMING) or "")
        prefill = dataclasses.replace(WORK, tensor_cycles=1980 * 11)
        assert "tensor cores" in (not_estimated(prefill, TIMING) or "")


class TestStrips:
    def test_rows_of_a_matrix(self):
        # Eight threads read 128 bytes of a row, of 4096 bytes; a program reads four rows.
        body = """
            ld.param.b64 %rd1, [kernel_param_0];
            mov.u32 %r1, %tid.x;
            mov.u32 %r2, %ctaid.x;
            and.b32 %r3, %r1, 7;
            shr.u32 %r4, %r1, 3;
            mul.wide.u32 %rd2, %r3, 16;
            mul.wide.u32 %rd3, %r4, 4096;
            mul.wide.u32 %rd4, %r2, 128;
            add.s64 %rd5, %rd1, %rd2;
            add.s64 %rd6, %rd5, %rd3;
            add.s64 %rd7, %rd6, %rd4;
            ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd7];
            ret;
        """
        assert read_by(body, 32) == (Read(argument=0, strips=4, strip_bytes=128, bytes=512),)

    @pytest.mark.parametrize(("size", "found"), [(16, (Read(0, 1, 512, 512),)), (0, ())])
    def test_copies_of_no_bytes_read_nothing(self, size: int, found: tuple[Read, ...]):
        body = f"""
            ld.param.b64 %rd1, [kernel_param_0];
            mov.u32 %r1, %tid.x;
            mul.wide.u32 %rd2, %r1, 16;
            add.s64 %rd3, %rd1, %rd2;
            mov.b32 %r2, {size};
            cp.async.cg.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x10, %r2;
            ret;
        """
        assert read_by(body) == found

    @pytest.mark.parametrize(("own", "found"), [("%r1", (Read(0, 1, 128, 128),)), ("0", ())])
    def test_pages_from_shared_memory_lie_anywhere(self, own: str, found: tuple[Read, ...]):
        # Threads read 4 bytes each of a page whose number is in shared memory: side by side, or of a page of their own.
        body = f"""
            ld.param.b64 %rd1, [kernel_param_0];
            mov.u32 %r1, %tid.x;
            ld.shared.b32 %r2, [%r9];
            mul.wide.u32 %rd2, %r2, 4096;
            mul.wide.u32 %rd3, {own}, 4;
            add.s64 %rd4, %rd1, %rd2;
            add.s64 %rd5, %rd4, %rd3;
            ld.global.b32 %r3, [%rd5];
            ret;
        """
        assert read_by(body) == found


@pytest.mark.skipif(not compiler.installed(), reason="triton is not installed")
def test_eviction_policies_are_compiled():
    def kernel(x_ref: Any, o_ref: Any) -> None:
        place = jnp.arange(128, dtype=jnp.int32)
        x = plgpu.load(x_ref.at[place], eviction_policy="evict_first")
        plgpu.store(o_ref.at[place], x + 1, eviction_policy="evict_last")

    shape = jax.ShapeDtypeStruct((128,), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, compiler_params=plgpu.CompilerParams(), name="policies")
    (found,) = compiler.compile_for_gpu(call, shape)
    assert "L2::evict_first" in found.ptx
    assert "L2::evict_last" in found.ptx
