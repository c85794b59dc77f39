"""Block sizes: where they come from, and that the tuner never picks what loses."""

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

from palladion import decode_attention, record_choices
from palladion.benchmarks.commands import main, tune
from palladion.benchmarks.measure import search as tuner
from palladion.benchmarks.measure.bench import DeviceLostError
from palladion.benchmarks.measure.operations import OPERATIONS, Operation, Verdict
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.search import Measured, RejectedError, Trial, certain_gain, search, winner
from palladion.benchmarks.measure.timing import Samples
from palladion.kernels import tuning
from palladion.kernels.backend import Implementation
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention import triton
from palladion.kernels.devices import target_device_kind, tpu_chips
from palladion.kernels.tuning import Entry, Space, TuningKey


@dataclasses.dataclass(frozen=True)
class Config:
    block: int
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    length: int
    batch: int = 1

    def planned(self) -> Problem:
        return self

    def tuning_key(self) -> TuningKey:
        return TuningKey("bfloat16", {"length": self.length, "batch": self.batch})


def space(problem: Problem) -> Space:
    blocks = [1 << n for n in range(4, 12)]
    return Space(Config(64), {"block": blocks, "warps": (2, 4, 8)}, lambda config: problem.length % config.block == 0)


ROW = Implementation("triton", "gpu", lambda _: None, lambda *_: None, Config, lambda _: Config(64), space)


def entry(length: int, size: int, *, kind: str = "bfloat16", batch: int = 1, **changes: Any) -> Entry:
    given: dict[str, Any] = {"block": size, "warps": 8} | changes
    sizes = {"length": length, "batch": batch}
    return Entry(
        implementation="triton",
        kind=kind,
        sizes=sizes,
        config=given,
        seconds=1e-6,
        heuristic_seconds=2e-6,
        origin="measured",
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user's own entries for this device."""
    monkeypatch.setenv(tuning.CACHE, str(tmp_path))
    path = tuning.user_file("operation", target_device_kind())
    assert path is not None
    return path


def resolved(length: int, *, config: Any = None, batch: int = 1) -> tuple[Any, str]:
    return tuning.resolve("operation", ROW, Problem(length, batch), config)


# --- Where block sizes come from ---


def test_without_data_the_heuristic_decides():
    assert resolved(4096) == (Config(64), "heuristic")


def test_the_reference_has_nothing_to_choose():
    row = Implementation("xla", None, lambda _: None, lambda *_: None)
    assert tuning.resolve("operation", row, Problem(4096), None) == (None, "")


def test_explicit_comes_before_tuned_and_tuned_before_the_heuristic(cache: Path):
    tuning.save(cache, "cpu", [entry(4096, 256)])
    assert resolved(4096, config=Config(16)) == (Config(16), "explicit")
    assert resolved(4096) == (Config(256, 8), "tuned")


def test_the_nearest_entry_serves_similar_problems(cache: Path):
    tuning.save(cache, "cpu", [entry(4096, 256), entry(16384, 1024)])
    assert resolved(2048) == (Config(256, 8), "nearest")
    assert resolved(12288) == (Config(1024, 8), "nearest")
    assert resolved(2048, batch=2) == (Config(256, 8), "nearest")


def test_what_lies_far_off_or_is_of_another_kind_is_left_to_the_heuristic(cache: Path):
    tuning.save(cache, "cpu", [entry(4096, 256), entry(64, 16, kind="int8")])
    assert resolved(512)[1] == "heuristic"
    assert resolved(4096, batch=8)[1] == "heuristic"
    assert resolved(64)[1] == "heuristic"


def test_an_entry_that_the_problem_does_not_take_gives_way_to_the_next(cache: Path):
    tuning.save(cache, "cpu", [entry(4096, 1024), entry(2048, 128)])
    assert resolved(3 * 1024 + 128) == (Config(128, 8), "nearest")  # 1024 does not divide it


@pytest.mark.parametrize("changes", [{"gone": 1}, {"block": 48}, {"warps": 3}])
def test_an_entry_of_another_version_of_the_kernel_is_passed_over(cache: Path, changes: dict[str, int]):
    tuning.save(cache, "cpu", [entry(4096, 256, **changes)])
    assert resolved(4096) == (Config(64), "heuristic")


def test_the_users_entries_come_before_those_of_the_package(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packaged = tmp_path / "packaged.json"
    monkeypatch.setattr(tuning, "package_file", lambda *_: packaged)
    tuning.save(packaged, "cpu", [entry(4096, 256)])
    assert resolved(4096)[0] == Config(256, 8)
    tuning.save(cache, "cpu", [entry(4096, 512)])
    assert resolved(4096)[0] == Config(512, 8)


def test_saving_replaces_an_entry_and_keeps_the_others(cache: Path):
    tuning.save(cache, "cpu", [entry(4096, 256), entry(8192, 256)])
    tuning.save(cache, "cpu", [entry(4096, 512)])
    found = {one.sizes["length"]: one.config["block"] for one in tuning.load(cache)}
    assert found == {4096: 512, 8192: 256}
    assert json.loads(cache.read_text())["device_kind"] == "cpu"


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"kind": 1}]}'])
def test_a_damaged_file_is_named(cache: Path, text: str):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.raises(ValueError, match=f"{cache.name}: not tuned block sizes; tune again, or remove it"):
        resolved(4096)


def test_a_call_takes_tuned_block_sizes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(tuning.CACHE, str(tmp_path))
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    problem, operation = case.problem(), OPERATIONS["decode_attention"]
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        start = triton.heuristic(problem)
        better = next(
            iter(next(row for row in operation.table if row.name == "triton").space(problem).neighbours(start))
        )
        path = tuning.user_file("decode_attention", "NVIDIA H200")
        assert path is not None

        def taken() -> Any:
            with record_choices() as choices:
                jax.eval_shape(lambda inputs: decode_attention(**inputs._asdict(), backend="triton"), case.shapes())
            return choices[0]

        assert (taken().config, taken().config_source) == (start, "heuristic")
        key = problem.tuning_key()
        found = entry(1, 1)
        found = dataclasses.replace(found, kind=key.kind, sizes=dict(key.sizes), config=dataclasses.asdict(better))
        tuning.save(path, "NVIDIA H200", [found])
        assert (taken().config, taken().config_source) == (better, "tuned")


@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU v4", "NVIDIA H200"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kernels_heuristic_is_in_its_space(name: str, kind: str):
    platform = "gpu" if kind.startswith("NVIDIA") else "tpu"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    operation = OPERATIONS[name]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        for row in operation.table:
            for case in operation.cases.MODELS[:6] if row.platform == platform and row.space is not None else ():
                problem = case.problem()
                if row.unsupported(problem) is None:
                    found = row.space(problem)
                    assert found.start in found
                    assert all(config in found for config in found.neighbours(found.start))


def test_values_that_do_not_go_together_are_passed_over():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        first: int
        second: int

        def __post_init__(self) -> None:
            if self.first * self.second > 8:
                raise ValueError("too many")

    found = Space(Pair(2, 4), {"first": (1, 2, 4), "second": (2, 4, 8)})
    assert set(found.neighbours(Pair(2, 4))) == {Pair(1, 4), Pair(2, 2)}


# --- The search ---


class Costs:
    """A judge that knows what everything costs."""

    origin = "measured"

    def __init__(self, cost: Any, gains: dict[Config, float] | None = None) -> None:
        self.cost, self.gains = cost, gains or {}
        self.asked: list[Config] = []
        self.expected: list[list[Config]] = []

    def expect(self, configs: Sequence[Config]) -> None:
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
    """Best at 512 and 8 warps, with a bump at 256 that a walk has to step over."""
    bump = 3.0 if config.block == 256 else 0.0
    return 1.0 + abs(config.block.bit_length() - 10) + 0.1 * abs(config.warps - 8) + bump


def test_the_search_finds_the_best_behind_a_bump():
    judge = Costs(valley)
    best, trials = search(space(Problem(4096)), judge)
    assert best == Trial(Config(512, 8), 1.0)
    assert min(trial.seconds for trial in trials if trial.seconds is not None) == best.seconds
    assert len(judge.asked) == len(set(judge.asked)) == len(trials)


def test_what_does_not_compile_or_fit_is_never_the_best():
    judge = Costs(lambda config: None if config.block >= 256 else valley(config))
    best, trials = search(space(Problem(4096)), judge)
    assert best is not None
    assert best.config == Config(128, 8)
    assert {trial.reason for trial in trials if trial.seconds is None} == {"does not compile"}
    judge = Costs(valley)
    search(space(Problem(128 * 3)), judge)
    assert all(128 * 3 % config.block == 0 for config in judge.asked)


def test_where_nothing_is_accepted_there_is_no_best():
    assert search(space(Problem(4096)), Costs(lambda _: None))[0] is None


def test_a_heuristic_that_is_rejected_gives_way_to_its_neighbours():
    judge = Costs(lambda config: None if config == Config(64) else valley(config))
    best, _ = search(space(Problem(4096)), judge)
    assert best is not None
    assert best.config == Config(512, 8)


def test_a_search_ends_when_told_and_goes_on_where_it_was():
    judge = Costs(valley)
    seen: list[Trial] = []
    best, _ = search(space(Problem(4096)), judge, goes_on=lambda: len(seen) < 3, tried=seen.append)
    assert len(judge.asked) == len(seen) == 3
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
        search(space(Problem(4096)), Costs(cost), tried=seen.append)
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
    # A machine that slows down in the middle does so for both.
    pace = [1.0] * 7 + [3.0] * 8
    better, start = (Samples(tuple(p * each * (1 + rng.random() / 50) for p in pace), 1) for each in (1.0, 1.3))
    assert certain_gain(better, start) == pytest.approx(1.3, rel=0.05)


class Doubling(Operation):
    """x * 2 by a kernel that is wrong from blocks of 128 on, and does not compile from 1024 on."""

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
    judge = Measured(Doubling(), EIGHT, ROW)
    assert judge.seconds(Config(64)) > 0
    with pytest.raises(RejectedError, match="wrong: off"):
        judge.seconds(Config(128))
    with pytest.raises(RejectedError, match="RuntimeError: out of shared memory"):
        judge.seconds(Config(1024))


def test_what_is_expected_is_compiled_with_what_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    together: list[list[int]] = []

    def noted(jobs: Sequence[Any]) -> Any:
        together.append([job.keywords["config"].block for job in jobs])
        return side_by_side(jobs)

    monkeypatch.setattr(tuner, "side_by_side", noted)
    monkeypatch.setattr(tuner, "cores", lambda: 3)
    judge = Measured(Doubling(), EIGHT, ROW)
    judge.expect([Config(block) for block in (1024, 32, 16, 128)])
    assert judge.seconds(Config(64)) > 0
    assert judge.seconds(Config(32)) > 0
    with pytest.raises(RejectedError, match="out of shared memory"):
        judge.seconds(Config(1024))
    with pytest.raises(RejectedError, match="wrong: off"):
        judge.seconds(Config(128))
    assert together == [[64, 1024, 32], [128, 16]]


def test_the_search_tells_what_it_will_ask_for():
    judge = Costs(valley)
    seen: list[Trial] = []
    search(space(Problem(4096)), judge, known={Config(32): Trial(Config(32), 9.0)}, tried=seen.append)
    first, second, *_ = judge.expected
    assert first[0] == Config(64)
    assert set(judge.asked) <= set(itertools.chain(*judge.expected))
    assert not {Config(32), *judge.asked[:1]} & set(second)


def test_tuning_a_case_keeps_a_log_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    operation = OPERATIONS["decode_attention"]
    (row,) = (row for row in operation.table if row.name == "triton")
    best = dataclasses.replace(triton.heuristic(case.problem()), num_warps=4)
    log = tmp_path / "trials.jsonl"

    def cost(config: Any) -> float:
        return 1.0 + abs(config.num_warps - 4) + abs(config.num_stages - best.num_stages)

    def tuned(judge: Costs, trials: int) -> Entry | None:
        deadline = time.perf_counter() + 60
        return tune.tune_case(operation, case, row, judge, log=log, deadline=deadline, most_trials=trials)

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
    # Another source of the kernel: nothing that was tried before counts.
    monkeypatch.setattr(tune, "_versions", lambda _: {"source": "other"})
    third = Costs(cost)
    tuned(third, 1)
    assert third.asked == [triton.heuristic(case.problem())]


# --- For a TPU that is not here ---


@pytest.mark.parametrize("name", ["llama-3-8b-gate-up-1-int8", "smollm2-head-16"])
def test_a_candidate_is_what_another_process_examines(tmp_path: Path, name: str):
    operation = OPERATIONS["quantized_matmul"]
    case = operation.named_cases()[name]
    (row,) = (row for row in operation.table if row.platform == "tpu")
    assert tuner.decoded(operation, json.loads(json.dumps(tuner.encoded(case)))) == case
    with tuner.as_if_on("v6e"):
        assert target_device_kind() == tpu_chips()["v6e"].device_kind
        config = row.heuristic(case.problem())  # type: ignore[misc]
        path = tmp_path / "candidate.json"
        given = {"operation": operation.name, "case": tuner.encoded(case), "config": dataclasses.asdict(config)}
        path.write_text(json.dumps(given))
        function, arguments, needed = tuner.candidate_workload(path)
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
def test_what_cannot_be_tuned(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(tuning.CACHE, raising=False)
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
