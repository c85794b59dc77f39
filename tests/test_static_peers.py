"""Ours beside others' kernels: who takes part, what is kept, what is said. No peer needs to be installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from static_pages import static_page

from palladion.benchmarks.static import Examination, Examiner, WorkloadName, workloads
from palladion.benchmarks.static.peers import estimates, packages, table
from palladion.benchmarks.static.peers.attention import CONTESTS as ATTENTION
from palladion.benchmarks.static.peers.by_name import CONTESTS, workload_name
from palladion.benchmarks.static.peers.contests import OURS, Contest
from palladion.benchmarks.static.peers.estimates import Estimate
from palladion.benchmarks.static.peers.matmul import CONTESTS as MATMUL
from palladion.benchmarks.static.tpu import compiler as tpu_compiler

FIGURES = Path(__file__).parents[1] / "benchmarks" / "results" / "static_tpu_peers.json"

CONTEST = CONTESTS["decode_attention/8x4096-32x8x128-bfloat16-pages-of-64"]


def result(contender: str, setting: str = "", seconds: float | None = 1e-4, **changes: str | None) -> Estimate:
    one = Estimate(
        contest=CONTEST.name,
        chip="v6e",
        contender=contender,
        package="",
        setting=setting,
        kernels=1,
        bytes_needed=CONTEST.bytes_needed,
        bytes_moved=CONTEST.bytes_needed,
        compute_seconds=seconds,
        seconds=seconds,
        unknown=None,
        failure=None,
    )
    return dataclasses.replace(one, **changes)  # type: ignore[arg-type]


class Silent:
    """Examines nothing, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def examine(self, workload: WorkloadName, chip: str) -> Examination:
        self.asked.append(f"{workload.name} | {chip}")
        return Examination(workload, chip, (), "ValueError: INTERNAL: Mosaic is not asked")


def hold(*contests: Contest, examiner: Silent, **options: object) -> list[Estimate]:
    """All results of contests on v6e."""
    found: dict[tuple[str, str], list[Estimate]] = {}
    for contest, chip, so_far in estimates.hold_contests(contests, ["v6e"], examiner, **options):  # type: ignore[arg-type]
        found[contest.name, chip] = list(so_far)
    return [one for several in found.values() for one in several]


def test_every_name_leads_to_its_workload():
    assert len(CONTESTS) == len(ATTENTION) + len(MATMUL)
    for contest in (CONTEST, MATMUL[0]):
        (ours,) = (contender for contender in contest.contenders if contender.name == OURS)
        for setting in ours.settings(contest.case):
            made = workloads.load(workload_name(contest, ours, setting))
            assert callable(made.function)
    with pytest.raises(ValueError, match="--file"):
        workloads.load(dataclasses.replace(workload_name(CONTEST, ours, ""), name="nobody"))


def test_results_come_one_by_one_and_are_not_asked_for_twice():
    examiner = Silent()
    sizes = [len(list(so_far)) for _, _, so_far in estimates.hold_contests([CONTEST], ["v6e"], examiner)]
    assert sizes == list(range(1, len(examiner.asked) + 1))
    everything = hold(CONTEST, examiner=Silent())
    assert {one.contender for one in everything} == {contender.name for contender in CONTEST.contenders}
    again = Silent()
    others = [one for one in everything if not one.is_ours]
    assert hold(CONTEST, examiner=again, known=others) == everything
    assert all(f"| {OURS} |" in asked for asked in again.asked)
    assert again.asked


def test_only_those_who_take_part():
    found = hold(CONTEST, examiner=Silent(), takes_part=lambda contender: contender.package == "jax")
    assert {one.package for one in found} == {"jax"}


def test_peers_are_left_out_where_they_do_not_cover_a_case():
    int8 = CONTESTS["decode_attention/8x4096-32x8x128-int8-pages-of-64"]
    assert "tpu-inference batched_rpa" not in {one.contender for one in hold(int8, examiner=Silent())}


def test_the_best_setting_of_each_is_compared():
    mine = [result(OURS, "paged", 2e-4), result(OURS, "dense", 1e-4)]
    theirs = [result("slow", seconds=4e-4), result("fast", "a", 3e-4), result("fast", "b", 0.5e-4)]
    hidden = result("hidden", seconds=None, unknown="data decide")
    broken = result("broken", seconds=None, failure="not for this chip")
    everything = [*mine, *theirs, hidden, broken]
    best = {one.contender: one.setting for one in estimates.best_of_each(everything)}
    assert (best[OURS], best["fast"]) == ("dense", "b")
    assert estimates.ratio(estimates.best_peer(everything), estimates.ours(everything)) == pytest.approx(0.5)
    assert estimates.best_peer([*mine, hidden, broken]) is None
    assert estimates.ratio(None, mine[0]) is None
    text = "\n".join(table.lines(everything))
    assert "0.50 x  fast, b" in text
    assert "4.00 x  slow" in text
    assert "times are UNKNOWN: data decide" in text
    assert "broken: not for this chip" in text
    assert "0.50 x  fast, b" in "\n".join(table.summary([CONTEST], everything))


def test_messages_are_one_line():
    message = "ValueError: INTERNAL: Mosaic failed to compile TPU kernel with MLIR module name `f`: no such\n tile"
    assert estimates.short_message(message) == "no such tile"
    assert len(estimates.short_message("x" * 1000)) == estimates.LONGEST


def test_records_can_be_read_again():
    one = result("peer", "setting")
    assert estimates.from_record(json.loads(json.dumps(one.record()))) == one


def test_the_kept_table_is_of_contests_that_there_are():
    kept = json.loads(FIGURES.read_text())
    found = [estimates.from_record(one) for one in kept["results"]]
    assert {one.contest for one in found} <= set(CONTESTS)
    for one in found:
        assert one.bytes_needed == CONTESTS[one.contest].bytes_needed
        assert one.seconds is None or one.seconds >= 0.99 * one.needed_seconds, "faster than the memory"


@pytest.mark.parametrize("operation", ["decode_attention", "quantized_matmul"])
def test_the_page_has_the_kept_table(operation: str):
    kept = [estimates.from_record(one) for one in json.loads(FIGURES.read_text())["results"]]
    expected = table.markdown(operation, kept)
    assert expected in static_page(operation), expected


def test_packages_that_are_not_there():
    assert packages.versions(["no-such-package"]) == {}
    assert packages.how_to_get("tokamax") == "pip install --no-deps tokamax"
    if not packages.installed("tokamax"):
        with pytest.raises(ImportError, match="tokamax is not installed: pip install --no-deps tokamax"):
            packages.kernels_of("tokamax", "nothing")


@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")
def test_ours_is_examined():
    """Through the process and the compiler, as the command does."""
    contest = CONTESTS["decode_attention/1x4096-32x8x128-bfloat16-pages-of-64"]
    with Examiner() as examiner:
        *_, (_, _, found) = estimates.hold_contests(
            [contest], ["v6e"], examiner, takes_part=lambda contender: contender.name == OURS
        )
    assert [one.setting for one in found] == ["paged", "dense"]
    for one in found:
        assert one.failure is None, one
        assert one.roofline is not None
        assert 0.7 < one.roofline <= 1.0
