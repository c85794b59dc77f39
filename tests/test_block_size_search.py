"""The search for block sizes never picks a slower config, and resumes where it was interrupted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from block_sizes import ROW, Config, Problem, space

from palladion.benchmarks.commands import main, tune
from palladion.benchmarks.measure import costs
from palladion.benchmarks.measure.bench import DeviceLostError
from palladion.benchmarks.measure.costs import MeasuredCost, certain_gain
from palladion.benchmarks.measure.operations import OPERATIONS, Operation, Verdict
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.samples import Samples
from palladion.benchmarks.measure.search import RejectedError, Trial, search, winner
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels import tuning
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention.triton import call as triton
from palladion.kernels.devices import target_device_kind, tpu_chips
from palladion.kernels.tuning import Entry


class Costs:
    """A cost model that computes every cost from a function."""

    origin = "measured"

    def __init__(self, cost: Any, gains: dict[Config, float] | None = None) -> None:
        self.cost, self.gains = cost, gains or {}
        self.asked: list[Config] = []
        self.expected: list[list[Config]] = []

    def prepare(self, configs: Sequence[Config]) -> None:
        self.expected.append(list(configs))

    def seconds(self, config: Config) -> float:
        self.asked.append(config)
        cost: float | None = self.cost(config)
        if cost is None:
            raise RejectedError("does not compile")
        return cost

    def gain(self, better: Config, start: Config) -> float:
        return self.gains.get(better, self.cost(start) / self.cost(better))


def valley(config: Config) -> float:
    """Returns a cost that is least at 512 and 8 warps, with a bump at 256 that the search has to cross."""
    bump = 3.0 if config.block == 256 else 0.0
    return 1.0 + abs(config.block.bit_length() - 10) + 0.1 * abs(config.warps - 8) + bump


def test_the_search_finds_the_best_behind_a_bump():
    cost_model = Costs(valley)
    best, trials = search(space(Problem(4096)), cost_model)
    assert best == Trial(Config(512, 8), 1.0)
    assert min(trial.seconds for trial in trials if trial.seconds is not None) == best.seconds
    assert len(cost_model.asked) == len(set(cost_model.asked)) == len(trials)


def test_configs_that_do_not_compile_or_fit_are_never_the_best():
    cost_model = Costs(lambda config: None if config.block >= 256 else valley(config))
    best, trials = search(space(Problem(4096)), cost_model)
    assert best is not None
    assert best.config == Config(128, 8)
    assert {trial.reason for trial in trials if trial.seconds is None} == {"does not compile"}
    cost_model = Costs(valley)
    search(space(Problem(128 * 3)), cost_model)
    assert all(128 * 3 % config.block == 0 for config in cost_model.asked)


def test_where_nothing_is_accepted_there_is_no_best():
    assert search(space(Problem(4096)), Costs(lambda _: None))[0] is None


def test_a_heuristic_that_is_rejected_gives_way_to_its_neighbours():
    cost_model = Costs(lambda config: None if config == Config(64) else valley(config))
    best, _ = search(space(Problem(4096)), cost_model)
    assert best is not None
    assert best.config == Config(512, 8)


def test_a_search_stops_when_told_and_resumes():
    cost_model = Costs(valley)
    seen: list[Trial] = []
    best, _ = search(space(Problem(4096)), cost_model, proceed=lambda: len(seen) < 3, on_trial=seen.append)
    assert len(cost_model.asked) == len(seen) == 3
    assert best == min(seen, key=lambda trial: trial.seconds or 0.0)
    again = Costs(valley)
    best, _ = search(space(Problem(4096)), again, known={trial.config: trial for trial in seen})
    assert best is not None
    assert best.config == Config(512, 8)
    assert not set(again.asked) & {trial.config for trial in seen}


def test_a_config_that_takes_the_device_down_is_remembered():
    def cost(config: Config) -> float:
        if config.block == 128:
            raise DeviceLostError("an illegal memory access was encountered")
        return valley(config)

    seen: list[Trial] = []
    with pytest.raises(DeviceLostError):
        search(space(Problem(4096)), Costs(cost), on_trial=seen.append)
    assert seen[-1] == Trial(Config(128), None, "an illegal memory access was encountered")
    best, _ = search(space(Problem(4096)), Costs(valley), known={trial.config: trial for trial in seen})
    assert best is not None
    assert best.config != Config(128)


def test_a_lucky_sample_does_not_win():
    start, lucky = Config(64), Trial(Config(512, 8), 0.1)
    tuned = space(Problem(4096))
    assert tuned.start == start
    assert winner(tuned, lucky, Costs(valley, {lucky.config: 0.9})) is None
    assert winner(tuned, lucky, Costs(valley, {lucky.config: 1.01})) is None
    assert winner(tuned, lucky, Costs(valley, {lucky.config: 1.2})) == (lucky, 1.2)
    assert winner(tuned, Trial(start, 1.0), Costs(valley)) is None
    assert winner(tuned, None, Costs(valley)) is None


def test_noise_is_no_gain():
    rng = random.Random(0)
    same = [Samples(tuple(1 + rng.random() for _ in range(15)), 1) for _ in range(2)]
    assert certain_gain(*same) <= 1.0
    # Where the machine slows down in the middle, it slows down for both.
    pace = [1.0] * 7 + [3.0] * 8
    better, start = (Samples(tuple(p * each * (1 + rng.random() / 50) for p in pace), 1) for each in (1.0, 1.3))
    assert certain_gain(better, start) == pytest.approx(1.3, rel=0.05)


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


def test_wrong_and_broken_configs_are_rejected_not_timed():
    cost_model = MeasuredCost(Doubling(), EIGHT, ROW)
    assert cost_model.seconds(Config(64)) > 0
    with pytest.raises(RejectedError, match="wrong: off"):
        cost_model.seconds(Config(128))
    with pytest.raises(RejectedError, match="RuntimeError: out of shared memory"):
        cost_model.seconds(Config(1024))


def test_expected_configs_are_compiled_with_the_requested_one(monkeypatch: pytest.MonkeyPatch):
    together: list[list[int]] = []

    def noted(jobs: Sequence[Any]) -> Any:
        together.append([job.keywords["config"].block for job in jobs])
        return side_by_side(jobs)

    monkeypatch.setattr(costs, "side_by_side", noted)
    monkeypatch.setattr(costs, "cores", lambda: 3)
    cost_model = MeasuredCost(Doubling(), EIGHT, ROW)
    cost_model.prepare([Config(block) for block in (1024, 32, 16, 128)])
    assert cost_model.seconds(Config(64)) > 0
    assert cost_model.seconds(Config(32)) > 0
    with pytest.raises(RejectedError, match="out of shared memory"):
        cost_model.seconds(Config(1024))
    with pytest.raises(RejectedError, match="wrong: off"):
        cost_model.seconds(Config(128))
    assert together == [[64, 1024, 32], [128, 16]]


def test_the_search_announces_the_configs_that_it_will_request():
    cost_model = Costs(valley)
    seen: list[Trial] = []
    search(space(Problem(4096)), cost_model, known={Config(32): Trial(Config(32), 9.0)}, on_trial=seen.append)
    first, second, *_ = cost_model.expected
    assert first[0] == Config(64)
    assert set(cost_model.asked) <= set(itertools.chain(*cost_model.expected))
    assert not {Config(32), *cost_model.asked[:1]} & set(second)


def test_tuning_a_case_keeps_a_log_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    operation = OPERATIONS["decode_attention"]
    (row,) = (row for row in operation.table if row.name == "triton")
    best = dataclasses.replace(triton.heuristic(case.problem()), num_warps=4)
    log = tmp_path / "trials.jsonl"

    def cost(config: Any) -> float:
        return 1.0 + abs(config.num_warps - 4) + abs(config.num_stages - best.num_stages)

    def tuned(cost_model: Costs, trials: int) -> Entry | None:
        deadline = time.perf_counter() + 60
        return tune.tune_case(operation, case, row, cost_model, log=log, deadline=deadline, most_trials=trials)

    first = Costs(cost)
    tuned(first, 2)
    assert len(log.read_text().splitlines()) == 2
    with log.open("a") as file:
        file.write('{"cut o')
    second = Costs(cost)
    found = tuned(second, 99)
    assert not set(first.asked) & set(second.asked)
    assert found is not None
    assert found.config == dataclasses.asdict(best)
    assert found.origin == "measured"
    assert found.heuristic_seconds > found.seconds
    # Trials of another version of the kernel's source do not count.
    monkeypatch.setattr(tune, "_versions", lambda _: {"source": "other"})
    third = Costs(cost)
    tuned(third, 1)
    assert third.asked == [triton.heuristic(case.problem())]


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
