"""The search for block sizes finds good ones in few trials, and resumes where it was interrupted."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from block_sizes import Config, Problem, on_h200, space

from palladion.benchmarks.commands import main, tune
from palladion.benchmarks.measure import costs
from palladion.benchmarks.measure.bench import DeviceLostError
from palladion.benchmarks.measure.costs import MeasuredCost
from palladion.benchmarks.measure.device_time import KernelTimes
from palladion.benchmarks.measure.operations import OPERATIONS, Operation, Verdict
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.samples import Samples
from palladion.benchmarks.measure.search import (
    Budget,
    Contender,
    ContendersLostError,
    RejectedError,
    Trial,
    accepted,
    best_of,
    certain_gain,
    finalists,
    search,
    settle,
)
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels import tuning
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention.triton import call as triton
from palladion.kernels.devices import target_device_kind, tpu_chips
from palladion.kernels.search_space import Space
from palladion.kernels.tuning import Entry


class Costs:
    """A cost model that computes every cost from a function."""

    origin, clock = "measured", "wall"

    def __init__(self, cost: Callable[[Any], float | None]) -> None:
        self.cost = cost
        self.asked: list[Any] = []

    def samples(self, contenders: Sequence[Contender], *, thorough: bool) -> dict[Contender, Samples | RejectedError]:
        if not thorough:
            self.asked += [one.config for one in contenders]
        costs = {one: self.cost(one.config) for one in contenders}
        rejected = RejectedError("does not compile")
        return {one: rejected if cost is None else Samples((cost,), 1) for one, cost in costs.items()}


def found(tried: Space, cost_model: Costs, trials: int = 60, **options: Any) -> list[Trial]:
    """Returns the trials of a search with a budget in trials."""
    return search("triton", tried, cost_model, Budget(trials, seconds=60), **options)


def valley(config: Config) -> float:
    """Returns a cost that is least at 512 and 8 warps, with a bump at 256 that the search has to cross."""
    bump = 3.0 if config.block == 256 else 0.0
    return 1.0 + abs(config.block.bit_length() - 10) + 0.1 * abs(config.warps - 8) + bump


# --- Synthetic surfaces ---


@dataclasses.dataclass(frozen=True)
class Four:
    """Block sizes with as many axes as a product's."""

    block: int
    splits: int
    warps: int
    stages: int


AXES = {"block": range(6), "splits": range(7), "warps": range(5), "stages": range(4)}
STARTS = (Four(0, 0, 0, 0), Four(5, 0, 3, 2), Four(1, 6, 2, 0), Four(3, 3, 4, 3))
"""Heuristics: how good one is should matter little."""


def bowl(config: Four, *best: int, slopes: Sequence[float] = (0.3, 0.2, 0.15, 0.1)) -> float:
    """Returns a cost of 1 at the best config, which grows exponentially with the steps from there."""
    steps = zip(dataclasses.astuple(config), best, slopes, strict=True)
    return math.exp(sum(slope * abs(place - least) for place, least, slope in steps))


def minima(config: Four) -> float:
    """Returns a cost with four minima of different depth."""
    local = (1.9 * bowl(config, 0, 0, 0, 0), 1.6 * bowl(config, 5, 0, 3, 3), 1.5 * bowl(config, 1, 6, 3, 0))
    return min(*local, bowl(config, 4, 5, 1, 2))


def ridge(config: Four) -> float:
    """Returns a cost in which blocks and splits make up for each other: off the diagonal it is steep, along it flat."""
    return bowl(config, config.block, config.splits, 1, 2) * math.exp(
        0.5 * abs(config.block + config.splits - 7) + 0.15 * abs(config.block - 4)
    )


def holes(config: Four) -> float | None:
    """Returns the cost of a bowl of which two configs in five are rejected, among them most around the heuristics."""
    best = (4, 4, 2, 1)
    if dataclasses.astuple(config) != best and random.Random(repr(config)).random() < 0.4:
        return None
    return bowl(config, *best)


def waves(config: Four) -> float:
    """Returns a cost like that of a one-row product on a GPU: width of what is read, balance, and enough warps."""
    block, splits, warps = 16 << config.block, 1 << config.splits, 1 << config.warps
    efficiency = min(0.25 * 1.6**config.block, 0.93)
    programs = -(-4096 // block) * splits
    resident = min(-(-programs // 132), 48 // warps)
    efficiency *= min(1.0, resident * warps / 32) ** 0.7 * (1 - 0.03 * abs(config.stages - 2))
    balance = -(-programs // 132) * 132 / programs
    return 1.5 + 14 * balance / efficiency + (1.1 + 0.05 * splits if splits > 1 else 0)


def walk(tried: Space, cost_model: Costs, trials: int) -> float:
    """Returns the least cost of a walk from the heuristic by single steps, taken as soon as one is better."""
    costs: dict[Any, float] = {}

    def cost(config: Any) -> float:
        if config not in costs:
            costs[config] = math.inf if len(costs) >= trials else cost_model.cost(config) or math.inf
        return costs[config]

    best, better = tried.start, tried.start
    while better is not None:
        best = better
        singles = [*itertools.chain(*list(tried.rings(best))[::2])]
        better = next((one for one in singles if cost(one) < cost(best)), None)
    return cost(best)


def ratios(surface: Callable[[Any], float | None], how: Callable[[Space, Costs], float]) -> list[float]:
    """Returns, for each heuristic, what is found in parts of the best cost."""
    spaces = [Space(start, AXES) for start in STARTS]
    best = min(filter(None, map(surface, spaces[0].spread())))
    return [how(one, Costs(surface)) / best for one in spaces]


@pytest.mark.parametrize("surface", [minima, ridge, holes, waves])
def test_sixty_trials_of_840_find_the_best_within_ten_percent(surface: Callable[[Any], float | None]):
    def least(tried: Space, cost_model: Costs) -> float:
        trials = found(tried, cost_model)
        assert len(cost_model.asked) == len(set(cost_model.asked)) == len(trials) == 60
        (best,) = best_of(trials, 1)
        assert best.seconds is not None
        return best.seconds

    assert max(ratios(surface, least)) <= 1.1
    # From some of the heuristics a walk by single steps ends far from there.
    assert max(ratios(surface, functools.partial(walk, trials=60))) > 1.3


def test_a_space_is_spread_evenly_and_completely():
    tried = Space(STARTS[0], AXES)
    everything = list(tried.spread())
    assert len(everything) == len(set(everything)) == 6 * 7 * 5 * 4
    for name, values in AXES.items():
        counts = [sum(getattr(one, name) == value for one in everything[:42]) for value in values]
        assert max(counts) <= 2 * min(counts), name


def test_each_form_has_its_turn_however_few_configs_of_it_fit():
    @dataclasses.dataclass(frozen=True)
    class Formed(Four):
        form: str = "matrix"

    def fits(config: Formed) -> bool:
        """Returns whether the vector form, which has neither splits nor stages, leaves these as they are."""
        return config.form == "matrix" or (config.splits, config.stages) == (0, 0)

    tried = Space(Formed(0, 0, 0, 0), {**AXES, "form": ("matrix", "vector")}, fits)
    everything = list(tried.spread())
    assert len(everything) == len(set(everything)) == 840 + 30
    vectors = [config for config in everything[:24] if config.form == "vector"]
    assert len(vectors) == 12
    assert len({config.block for config in vectors}) >= 5
    assert len({config.warps for config in vectors}) == 5


# --- The search ---


def test_the_search_finds_the_best_behind_a_bump():
    cost_model = Costs(valley)
    trials = found(space(Problem(4096)), cost_model)
    assert best_of(trials, 1) == [Trial(Config(512, 8), 1.0)]
    assert len(trials) == len(set(cost_model.asked)) == 24, "a small space is tried wholly"


def test_the_heuristic_is_tried_first_and_a_part_of_the_budget_is_kept_for_the_best():
    cost_model = Costs(lambda config: bowl(config, 4, 5, 1, 2))
    found(Space(STARTS[0], AXES), cost_model)
    assert cost_model.asked[0] == STARTS[0]
    assert cost_model.asked[1:24] == [one for one in Space(STARTS[0], AXES).spread() if one != STARTS[0]][:23]
    assert Four(4, 5, 1, 2) in cost_model.asked[24:]


def test_configs_that_do_not_compile_or_fit_are_never_the_best():
    cost_model = Costs(lambda config: None if config.block >= 256 else valley(config))
    trials = found(space(Problem(4096)), cost_model)
    assert best_of(trials, 1)[0].config == Config(128, 8)
    assert {trial.reason for trial in trials if trial.seconds is None} == {"does not compile"}
    cost_model = Costs(valley)
    found(space(Problem(128 * 3)), cost_model)
    assert all(128 * 3 % config.block == 0 for config in cost_model.asked)


def test_where_nothing_is_accepted_there_is_no_best():
    cost_model = Costs(lambda _: None)
    trials = found(space(Problem(4096)), cost_model)
    assert len(trials) == 24
    assert best_of(trials, 3) == []
    assert finalists("triton", space(Problem(4096)), trials) == []


def test_a_search_stops_when_told_and_resumes():
    cost_model = Costs(valley)
    seen: list[Trial] = []
    trials = found(space(Problem(4096)), cost_model, trials=3, on_trial=seen.append)
    assert trials == seen
    assert len(cost_model.asked) == 3
    again = Costs(valley)
    trials = found(space(Problem(4096)), again, known={trial.config: trial for trial in seen})
    assert best_of(trials, 1)[0].config == Config(512, 8)
    assert set(seen) <= set(trials)
    assert not set(again.asked) & {trial.config for trial in seen}


def test_configs_that_take_the_device_down_are_remembered():
    class Losing(Costs):
        def samples(self, contenders: Sequence[Contender], *, thorough: bool) -> Any:
            lost = [one for one in contenders if one.config.block == 128]
            if lost:
                raise ContendersLostError(lost, "an illegal memory access was encountered")
            return super().samples(contenders, thorough=thorough)

    seen: list[Trial] = []
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        found(space(Problem(4096)), Losing(valley), on_trial=seen.append)
    assert {(trial.config.block, trial.reason) for trial in seen if trial.reason} == {
        (128, "an illegal memory access was encountered")
    }
    again = Costs(valley)
    found(space(Problem(4096)), again, known={trial.config: trial for trial in seen})
    assert not {trial.config for trial in seen} & set(again.asked)


def test_a_budget_in_seconds_ends_a_search():
    assert search("triton", Space(STARTS[0], AXES), Costs(waves), Budget(60, seconds=0)) == []
    budget = Budget(60, seconds=10, begin=time.perf_counter() - 5)
    assert (budget.left(7), budget.left(7, share=0.4)) == (53, 0)
    assert Budget(60, seconds=10).left(7, share=0.4) == 17
    assert budget.left(60) == budget.left(61) == 0
    cost_model = Costs(waves)
    search("triton", Space(STARTS[0], AXES), cost_model, budget)
    assert cost_model.asked[:2] == list(Space(STARTS[0], AXES).spread())[:2], "nothing is known to search around"


def test_a_lucky_sample_does_not_win():
    tried = space(Problem(4096))
    start, lucky = Contender("triton", tried.start), Contender("triton", Config(512, 8))

    def settled(new: tuple[float, ...], old: tuple[float, ...]) -> Contender:
        return settle({lucky: Samples(new, 1), start: Samples(old, 1)}, start)

    assert settled(new=(1.1,), old=(1.0,)) == start
    assert settled(new=(1.0,), old=(1.01,)) == start
    assert settled(new=(1.0,) * 5, old=(1.2, 1.2, 1.2, 0.9, 0.9)) == start, "in three rounds of five"
    assert settled(new=(1.0,) * 5, old=(1.2, 1.2, 1.2, 1.2, 0.9)) == lucky
    # Where the heuristic's block sizes are rejected, any others are better.
    assert settle({lucky: Samples((9.0,), 1)}, start) == lucky
    trials = [Trial(Config(32), 3.0), Trial(tried.start, 4.0), Trial(Config(16), None), Trial(lucky.config, 1.0)]
    assert finalists("triton", tried, trials) == [lucky, Contender("triton", Config(32)), start]


def test_noise_is_no_gain():
    rng = random.Random(0)
    same = [Samples(tuple(1 + rng.random() for _ in range(15)), 1) for _ in range(2)]
    assert certain_gain(*same) <= 1.0
    # Where the machine slows down in the middle, it slows down for both.
    pace = [1.0] * 7 + [3.0] * 8
    better, start = (Samples(tuple(p * each * (1 + rng.random() / 50) for p in pace), 1) for each in (1.0, 1.3))
    assert certain_gain(better, start) == pytest.approx(1.3, rel=0.05)


# --- Measured costs ---


class Doubling(Operation):
    """An operation x * 2 whose kernel is wrong from blocks of 128 on, and does not compile from 1024 on."""

    name = "doubling"

    def inputs(self, case: Any) -> Any:
        del case
        return jnp.ones(8)

    def function(self, case: Any, **how: Any) -> Any:
        del case
        config = how.get("config")

        def double(x: jax.Array) -> jax.Array:
            if config is not None and config.block >= 1024:
                raise RuntimeError("out of\n  shared memory")
            return x * (3 if config is not None and config.block >= 128 else 2)

        return double

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        del case, inputs
        return Verdict(0.0 if bool((result == reference).all()) else 99.0, 0.0, "off")


EIGHT = SimpleNamespace(shapes=lambda: jax.ShapeDtypeStruct((8,), jnp.float32))


def kernel(block: int) -> Contender:
    return Contender("triton", Config(block))


def outcomes(cost_model: MeasuredCost, *blocks: int) -> list[float | str]:
    """Returns times, or why configs were rejected."""
    found = cost_model.samples([kernel(block) for block in blocks], thorough=False)
    assert list(found) == [kernel(block) for block in blocks]
    return [one.median if isinstance(one, Samples) else str(one) for one in found.values()]


WRONG, BROKEN = "wrong: off", "RuntimeError: out of shared memory"


def test_wrong_and_broken_configs_are_rejected_not_timed():
    cost_model = MeasuredCost(Doubling(), EIGHT)
    assert cost_model.origin == "measured"
    first, *rejected, last = outcomes(cost_model, 64, 128, 1024, 32)
    assert rejected == [WRONG, BROKEN]
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert first > 0
    assert outcomes(cost_model, 128) == [WRONG]


def test_what_is_tried_together_is_compiled_on_all_cores_and_once(monkeypatch: pytest.MonkeyPatch):
    together: list[list[int]] = []

    def noted(jobs: Sequence[Any]) -> Any:
        if jobs and "config" in jobs[0].keywords:
            together.append([job.keywords["config"].block for job in jobs])
        return side_by_side(jobs)

    monkeypatch.setattr(costs, "side_by_side", noted)
    cost_model = MeasuredCost(Doubling(), EIGHT)
    outcomes(cost_model, 64, 32)
    outcomes(cost_model, 1024, 64)
    assert together == [[64, 32], [1024]]


def profiled(times: dict[str, float]) -> Callable[..., dict[str, KernelTimes]]:
    """Returns a profiler that shows these times by name, and fails for blocks of 16."""

    def kernel_seconds(runners: Sequence[Any], repetitions: int) -> dict[str, KernelTimes]:
        if any("block=16 " in runner.name for runner in runners):
            raise RuntimeError("launch refused")
        return {one.name: KernelTimes((times[one.name],) * repetitions, 8, ()) for one in runners if one.name in times}

    return kernel_seconds


def test_the_devices_time_decides_where_the_profiler_shows_it(monkeypatch: pytest.MonkeyPatch):
    assert costs.best_clock() == MeasuredCost(Doubling(), EIGHT).clock == "wall"
    times = {"probe": 1.0, "xla": 3.0, "triton block=64 warps=4": 2.0, "triton block=32 warps=4": 1.0}
    monkeypatch.setattr(costs, "kernel_seconds", profiled(times))
    monkeypatch.setattr(costs, "best_clock", costs.best_clock.__wrapped__)  # not the one that is kept
    cost_model = MeasuredCost(Doubling(), EIGHT)
    assert cost_model.clock == "device"
    unseen = "the profiler shows no kernel of it"
    assert outcomes(cost_model, 64, 8, 128) == [2.0, unseen, WRONG]
    compared = cost_model.samples([kernel(64), Contender("xla", None)], thorough=True)
    assert [samples.median for samples in accepted(compared).values()] == [2.0, 3.0]
    # One that fails when it is timed costs itself alone.
    assert outcomes(cost_model, 64, 16, 32) == [2.0, "RuntimeError: launch refused", 1.0]


def test_a_lost_device_names_the_contenders(monkeypatch: pytest.MonkeyPatch):
    cost_model = MeasuredCost(Doubling(), EIGHT)

    def lost(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(costs, "measure", lost)
        with pytest.raises(ContendersLostError) as caught:
            outcomes(cost_model, 64, 128, 32)
    assert caught.value.contenders == (kernel(64), kernel(32))
    monkeypatch.setattr(costs, "warm_runner", lost)
    with pytest.raises(ContendersLostError) as caught:
        outcomes(cost_model, 64, 32)
    assert caught.value.contenders == (kernel(64),)


# --- Tuning a case ---


def test_tuning_a_case_keeps_a_log_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    operation = OPERATIONS["decode_attention"]
    rows = [row for row in operation.table if row.name in ("triton", "xla")]
    start = triton.heuristic(case.problem())
    best = next(one for one in triton.space(case.problem()).spread() if one.num_warps != start.num_warps)
    fields = ("num_warps", "num_stages", "splits")
    log = tmp_path / "trials.jsonl"

    def cost(config: Any) -> float:
        if config is None:
            return 1.5  # XLA's form
        return 1.0 + sum(abs(getattr(config, name) - getattr(best, name)) for name in fields)

    def tuned(cost_model: Costs, trials: int) -> list[Entry]:
        return tune.tune_case(operation, case, rows, cost_model, log=log, seconds=60, trials=trials)

    first = Costs(cost)
    assert [one.implementation for one in tuned(first, 2)] == ["xla", "triton"]
    assert len(log.read_text().splitlines()) == 2
    with log.open("a") as file:
        file.write('{"cut o')
    second = Costs(cost)
    fastest, reference = tuned(second, 60)
    assert not set(first.asked) & set(second.asked)
    assert (fastest.implementation, reference.implementation) == ("triton", "xla")
    assert fastest.config is not None
    assert [fastest.config[name] for name in fields] == [getattr(best, name) for name in fields]
    assert (fastest.seconds, reference.seconds, reference.config) == (1.0, 1.5, None)
    assert (fastest.origin, fastest.clock, fastest.device) == ("measured", "wall", "cpu")
    assert fastest.comparable(reference)
    assert not fastest.heuristic
    # Trials of another version of the kernel's source do not count.
    monkeypatch.setattr(tune, "_versions", lambda _: {"source": "other"})
    third = Costs(cost)
    assert [one.heuristic for one in tuned(third, 1)] == [False, True]
    assert third.asked == [start]


def test_a_kernel_that_is_wrong_has_no_entry():
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    operation = OPERATIONS["decode_attention"]
    wrong = Costs(lambda config: None if config is not None else 1.0)
    rows = tune.contenders(operation, case, interpret=True)
    entries = tune.tune_case(operation, case, rows, wrong, log=None, seconds=60, trials=3)
    assert [one.implementation for one in entries] == ["xla"]


def test_interpreted_times_overrule_nothing():
    cost_model = MeasuredCost(Doubling(), EIGHT, interpret=True)
    assert cost_model.origin == "interpreted"
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    timed = Costs(lambda _: 1.0)
    timed.origin = "interpreted"
    operation = OPERATIONS["decode_attention"]
    rows = tune.contenders(operation, case, interpret=True)
    first, second, *_ = tune.tune_case(operation, case, rows, timed, log=None, seconds=9, trials=1)
    assert first.origin == "interpreted"
    assert not first.comparable(second)


def test_contenders_are_the_implementations_of_the_platform():
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    operation = OPERATIONS["decode_attention"]
    assert [one.name for one in tune.contenders(operation, case)] == ["xla"]
    with tpu_compiler.tracing_for("v6e"):
        assert [one.name for one in tune.contenders(operation, case)] == ["mosaic_tpu", "xla"]
    assert {"mosaic_tpu", "triton", "xla"} <= {one.name for one in tune.contenders(operation, case, interpret=True)}
    # Where a kernel's row runs XLA's product, it does not contend with it.
    dense = OPERATIONS["matmul"]
    named = dense.named_cases()["llama-3-8b-qkv"]
    for rows, contending in ((1, {"triton", "xla"}), (64, {"xla"})):
        with on_h200():
            found = tune.contenders(dense, dataclasses.replace(named, rows=rows))
        assert {one.name for one in found} == contending


# --- Tuning for a TPU that is not present ---


@pytest.mark.parametrize("name", ["llama-3-8b-gate-up-1-int8", "smollm2-head-16"])
def test_a_candidate_is_read_by_another_process(tmp_path: Path, name: str):
    operation = OPERATIONS["quantized_matmul"]
    case = operation.named_cases()[name]
    (row,) = (row for row in operation.table if row.platform == "tpu")
    assert costs.decode_case(operation, json.loads(json.dumps(costs.encode_case(case)))) == case
    with tpu_compiler.tracing_for("v6e"):
        assert target_device_kind() == tpu_chips()["v6e"].device_kind
        config = row.heuristic(case.problem())  # type: ignore[misc]
        path = tmp_path / "candidate.json"
        given = {"operation": operation.name, "case": costs.encode_case(case), "config": dataclasses.asdict(config)}
        path.write_text(json.dumps(given))
        function, arguments, needed = costs.candidate_workload(path)
        (shape,) = (jax.eval_shape(function, *arguments),)
    problem = case.problem()
    assert shape.shape == (case.rows, problem.result_features)
    assert needed == problem.bytes_moved()


# --- The command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "operation: got 'nothing'; accepted: decode_attention, quantized_matmul, matmul, append_kv"),
        (["decode_attention"], "PALLADION_CACHE: got not set; accepted: a folder for what is found, or --package"),
        (["decode_attention", "--package"], "device: got cpu; accepted: a GPU or TPU, or --chip"),
        (["decode_attention", "--package", "--chip=v9"], "--chip: got v9; accepted: v4, v5e"),
        (["decode_attention", "--trials=0"], "--trials: got 0; accepted: at least 1"),
        (["model", "--model=gpt"], "--model: got gpt; accepted: smollm2-135m"),
    ],
)
def test_wrong_commands_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(tuning.CACHE, raising=False)
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_measured_entries_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def entry(rows: int, origin: str) -> Entry:
        sizes = {"rows": rows, "in": 64, "out": 64}
        how = {"origin": origin, "clock": "device", "device": "NVIDIA H200", "date": "2026-11-27"}
        return Entry(implementation="xla", kind="int8", sizes=sizes, config=None, seconds=1e-5, **how)

    packaged = tmp_path / "kernels/matmul/tuned/nvidia_h200.json"
    monkeypatch.setattr(
        tuning, "package_file", lambda operation, _: tmp_path / f"kernels/{operation}/tuned/nvidia_h200.json"
    )
    tuning.save(packaged, [entry(1, "measured")])
    tuning.save(tmp_path / "results/matmul/nvidia_h200.json", [entry(2, "measured"), entry(4, "interpreted")])
    assert main(["tune", "matmul", f"--ship={tmp_path / 'results'}"]) == 0
    assert [one.sizes["rows"] for one in tuning.load(packaged)] == [1, 2]
    assert main(["tune", "append_kv", f"--ship={tmp_path / 'results'}"]) == 2
