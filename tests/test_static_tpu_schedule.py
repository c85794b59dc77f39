"""A TPU kernel's schedule: listings are parsed, its scalar instructions executed, its transfers timed."""

from __future__ import annotations

import numpy as np
import pytest
from golden_schedules import golden
from static_kernels import GOLDEN, LENGTHS

from palladion.benchmarks.static.opaque import Opaque, Undecided, either, select
from palladion.benchmarks.static.tpu.layouts import words_in_memory
from palladion.benchmarks.static.tpu.scalar_core import Execution, Operand, ScalarCore
from palladion.benchmarks.static.tpu.schedule import parse_bundles, parse_schedule, parse_vmem_report
from palladion.benchmarks.static.tpu.transfers import Rate, Transfers
from palladion.kernels.devices import tpu_chips

CHIPS = tuple(tpu_chips())
RATE = Rate(bytes_per_cycle=1000.0, latency_cycles=500.0, granule_bytes=32)
UNIT_BYTES = 128 * 256 * 4
"""Bytes of one transfer of the kernel `ring`."""


def execute(chip: str, lengths: tuple[int, ...] | None) -> Execution:
    words = None if lengths is None else (*lengths, *[0] * (128 - len(lengths)))
    return ScalarCore(golden(chip)).run({0: Operand(words, "the lengths")}, rate=RATE)


class TestSchedule:
    @pytest.mark.parametrize("chip", CHIPS)
    def test_the_structure_of_a_kernel(self, chip: str):
        schedule = golden(chip)
        grid, inner = schedule.loops()
        assert (grid.depth, inner.depth) == (1, 2)
        assert grid.first < inner.first < inner.last < grid.last < len(schedule.bundles)
        assert inner.trips is None  # it depends on the lengths
        granule = tpu_chips()[chip].dma_granule_bytes
        sizes = [(one.direction, (one.granules or 0) * granule) for one in schedule.transfers()]
        assert sizes == [
            ("hbm_to_smem", 512),
            ("hbm_to_vmem", UNIT_BYTES),
            ("hbm_to_vmem", UNIT_BYTES),
            ("vmem_to_hbm", 1024),
        ]
        assert schedule.spills() == (0, 0)
        assert len(schedule.use) == len(schedule.bundles)
        assert "MXU" in schedule.units
        assert all(used <= most for row in schedule.use for used, most in zip(row, schedule.capacity, strict=True))

    def test_instructions(self):
        text = (
            "  0x10   : > { %s5_s20 = smov (!%p32_p0, %s31_s20), 7 /* a; comment } */  ;;"
            "  %v1_v2 = vadd.f32 %v3_v4, %v5_v6 }\n"
            "  0x11 LB: >> { %7 = sst [smem:[#allocation5 + $0x4]] %s5_s20  ;;"
            "  %9 = sbr.rel (%p1_p2) target bundleno = 16 (0x10), region = 3 } /* End region 3 */\n"
            "  0x12   :  {}\n"
        )
        first, second, third = parse_bundles(text)
        (move,) = first.instructions
        assert (move.opcode, move.destination, move.operands) == ("smov", "%s5_s20", ("7",))
        assert move.predicate is not None
        assert (move.predicate.name, move.predicate.negated, move.predicate.otherwise) == ("%p32_p0", True, "%s31_s20")
        assert move.comment == "a; comment }"
        store, branch = second.instructions
        assert store.operands == ("[smem:[#allocation5 + $0x4]]", "%s5_s20")
        assert branch.target == 16
        assert (first.depth, second.depth, second.label, third.instructions) == (1, 2, "LB", ())

    def test_transfers_with_a_false_predicate_are_left_out(self):
        text = "  0   :  {{ %1 = dma.hbm_to_vmem [thread:$0]  {}/*hbm=*/%s1_s1, 256, %s2_s2, %s3_s3 }}\n"
        for condition, count in (("", 1), ("(1), ", 1), ("(!0), ", 1), ("(0), ", 0), ("(!1), ", 0)):
            (bundle,) = parse_bundles(text.format(condition))
            assert [one.operands[1] for one in bundle.instructions] == ["256"] * count

    def test_vmem(self):
        sizes = parse_vmem_report((GOLDEN / "ring_v6e_vmem_report.html").read_text())
        assert sizes["ring.1"] == 2 * UNIT_BYTES + 2 * 1024

    def test_other_texts_are_refused(self):
        with pytest.raises(ValueError, match="no bundles"):
            parse_bundles("Schedule analysis:")
        with pytest.raises(ValueError, match="the compiler lists 1 bundles, but the utilization of 2"):
            parse_schedule("  0   :  {}\n", "== CAPACITY:\nMXU\n 2\n== UTILIZATION:\n0\n0\n", 4)


class TestExecution:
    @pytest.mark.parametrize("chip", CHIPS)
    @pytest.mark.parametrize("lengths", [LENGTHS, (0, 0, 0, 0), (1, 1, 1, 1), (1024, 1024, 1024, 1024)])
    def test_lengths_decide(self, chip: str, lengths: tuple[int, ...]):
        units = sum(-(-length // 128) for length in lengths)
        found = execute(chip, lengths)
        moved = found.moved.get("hbm_to_vmem")
        assert (0 if moved is None else moved.transfers) == units
        grid, inner = golden(chip).loops()
        assert found.counts[inner.first] == units
        assert found.counts[grid.first] == len(lengths) + 1  # the pipeline of outputs takes a trip more
        assert found.moved["vmem_to_hbm"].transfers == len(lengths)
        assert found.cycles == pytest.approx(found.busy + sum(found.stalls.values()))

    def test_time_grows_with_the_lengths(self):
        short, medium, long = (execute("v6e", (units * 128,) * 4) for units in (2, 4, 8))
        assert 2 * (medium.busy - short.busy) == long.busy - medium.busy > 0
        assert short.cycles < medium.cycles < long.cycles

    def test_unknown_arguments_are_not_guessed(self):
        with pytest.raises(Undecided, match="depends on the values of the lengths, which were not given"):
            execute("v6e", None)

    def test_newer_compilers_name_the_type_of_a_move(self):
        bundles, utilization = ((GOLDEN / f"ring_v6e_{name}.txt").read_text() for name in ("bundles", "utilization"))
        schedule = parse_schedule(bundles.replace("= smov ", "= smov.u32 "), utilization, 4)
        assert "smov.u32" in {one.opcode for bundle in schedule.bundles for one in bundle.instructions}
        words = (*LENGTHS, *[0] * (128 - len(LENGTHS)))
        assert ScalarCore(schedule).run({0: Operand(words, "the lengths")}, rate=RATE) == execute("v6e", LENGTHS)

    def test_opaque_scalars(self):
        unknown = Opaque("why")
        assert (unknown & 0, 0 & unknown, either(unknown, 1), either(0, 1)) == (0, 0, 1, 1)
        assert all(one is unknown for one in (unknown + 1, 1 - unknown, unknown < 2, select(unknown, 1, 2)))
        assert all(one is unknown for one in (unknown >> 1, 1 << unknown))
        assert either(unknown, 0) is unknown
        with pytest.raises(Undecided, match="why"):
            bool(unknown == 3)

    def test_arrays_in_memory(self):
        def of(value: np.ndarray, layout: str) -> tuple[int, ...]:
            words = words_in_memory(value, layout)
            assert words is not None
            return words

        value = np.arange(10 * 300, dtype=np.int32).reshape(10, 300)
        words = of(value, "1,0:T(8,128)")
        assert len(words) == 16 * 384
        assert words[128 * 3] == value[3, 0]
        assert words[8 * 128] == value[0, 128]
        assert words[3 * 8 * 128 + 128] == value[9, 0]
        assert of(value, "1,0")[300:302] == (300, 301)
        assert of(np.int32(7), "") == (7,)
        assert of(np.array([1, -1], np.int32), "0:T(128)") == (1, 2**32 - 1, *[0] * 126)
        # Four rows of one-byte numbers share their words.
        bytes_ = np.arange(2 * 5 * 3, dtype=np.int8).reshape(2, 5, 3)
        words = of(bytes_, "2,1,0:T(8,128)(4,1)")
        assert len(words) == 2 * 8 * 128 // 4
        assert words[1] == sum(int(bytes_[0, row, 1]) << 8 * row for row in range(4))
        assert words[128] == bytes_[0, 4, 0]
        assert words[256] & 0xFF == bytes_[1, 0, 0]
        for layout in ("0,1:T(8,128)", "1,0:T(8,128)(2,1)(2,1)", "1,0:X"):
            assert words_in_memory(value, layout) is None


class TestTransfers:
    def test_transfers_share_the_bandwidth_and_overlap_their_latencies(self):
        transfers = Transfers(RATE)
        transfers.start(0.0, "hbm_to_vmem", 1000, semaphore=1)  # 32 cycles of 1000 bytes
        transfers.start(0.0, "hbm_to_vmem", 1000, semaphore=2)
        assert transfers.wait(0.0, 1, 1000) == pytest.approx(532)
        assert transfers.wait(532.0, 2, 1000) == pytest.approx(564)
        assert transfers.stalls["hbm_to_vmem"] == pytest.approx(564)
        assert (transfers.moved["hbm_to_vmem"].transfers, transfers.moved["hbm_to_vmem"].bytes) == (2, 64_000)

    def test_semaphores_count(self):
        transfers = Transfers(RATE)
        for _ in range(2):
            transfers.start(0.0, "hbm_to_vmem", 1000, semaphore=1)
        assert transfers.wait(0.0, 1, 2000) == pytest.approx(564)
        transfers.add(600.0, 1, 2**32 - 1500)
        assert transfers.wait(600.0, 1, 500) == 600
        with pytest.raises(Undecided, match="waits for a signal"):
            transfers.wait(600.0, 1, 501)
        transfers.add(700.0, 1, 1)
        assert transfers.wait(600.0, 1, 501) == 700
