"""Block sizes come from the caller, from tuned data, or from the heuristic."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import pytest
from block_sizes import ROW, Config, Problem, on_h200

from palladion import decode_attention, record_choices
from palladion.benchmarks.measure.operations import OPERATIONS
from palladion.kernels import tuning
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention.triton import call as triton
from palladion.kernels.devices import target_device_kind
from palladion.kernels.implementation import Implementation
from palladion.kernels.search_space import Space
from palladion.kernels.tuning import Entry


def entry(length: int, size: int, *, kind: str = "bfloat16", batch: int = 1, **changes: Any) -> Entry:
    given: dict[str, Any] = {"block": size, "warps": 8} | changes
    sizes = {"length": length, "batch": batch}
    return Entry(
        implementation="triton",
        kind=kind,
        sizes=sizes,
        config=given,
        seconds=1e-6,
        origin="measured",
        clock="device",
        device="NVIDIA H200",
        date="2026-11-27",
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the file of the user's own entries for this device."""
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


def test_a_kernel_without_a_space_is_timed_and_not_tuned(cache: Path):
    tuning.save(cache, [dataclasses.replace(entry(4096, 256), config=None)])
    row = dataclasses.replace(ROW, space=None)
    assert tuning.resolve("operation", row, Problem(4096), None) == (Config(64), "heuristic")
    assert resolved(4096) == (Config(64), "heuristic")


def test_explicit_comes_before_tuned_and_tuned_before_the_heuristic(cache: Path):
    tuning.save(cache, [entry(4096, 256)])
    assert resolved(4096, config=Config(16)) == (Config(16), "explicit")
    assert resolved(4096) == (Config(256, 8), "tuned")


def test_the_nearest_entry_serves_similar_problems(cache: Path):
    tuning.save(cache, [entry(4096, 256), entry(16384, 1024)])
    assert resolved(2048) == (Config(256, 8), "nearest")
    assert resolved(12288) == (Config(1024, 8), "nearest")
    assert resolved(2048, batch=2) == (Config(256, 8), "nearest")


def test_distant_entries_and_other_kinds_are_left_to_the_heuristic(cache: Path):
    tuning.save(cache, [entry(4096, 256), entry(64, 16, kind="int8")])
    assert resolved(512)[1] == "heuristic"
    assert resolved(4096, batch=8)[1] == "heuristic"
    assert resolved(64)[1] == "heuristic"


def test_where_the_heuristic_is_the_best_it_decides(cache: Path):
    tuning.save(cache, [dataclasses.replace(entry(4096, 256), heuristic=True), entry(512, 128)])
    assert resolved(4096) == resolved(8192) == (Config(64), "heuristic")
    assert resolved(2048) == (Config(64), "heuristic"), "also where a distant entry has other block sizes"
    assert resolved(1024) == (Config(128, 8), "nearest")


def test_an_entry_that_does_not_fit_the_problem_gives_way_to_the_next(cache: Path):
    tuning.save(cache, [entry(4096, 1024), entry(2048, 128)])
    assert resolved(3 * 1024 + 128) == (Config(128, 8), "nearest")  # 1024 does not divide it


@pytest.mark.parametrize("changes", [{"gone": 1}, {"block": 48}, {"warps": 3}])
def test_an_entry_of_another_version_of_the_kernel_is_passed_over(cache: Path, changes: dict[str, int]):
    tuning.save(cache, [entry(4096, 256, **changes)])
    assert resolved(4096) == (Config(64), "heuristic")


def test_the_users_entries_come_before_those_of_the_package(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packaged = tmp_path / "packaged.json"
    monkeypatch.setattr(tuning, "package_file", lambda *_: packaged)
    tuning.save(packaged, [entry(4096, 256)])
    assert resolved(4096)[0] == Config(256, 8)
    tuning.save(cache, [entry(4096, 512)])
    assert resolved(4096)[0] == Config(512, 8)


def test_saving_replaces_an_entry_and_keeps_the_others(cache: Path):
    tuning.save(cache, [entry(4096, 256), entry(8192, 256)])
    tuning.save(cache, [entry(4096, 512)])
    found = {one.sizes["length"]: one.config["block"] for one in tuning.load(cache)}
    assert found == {4096: 512, 8192: 256}
    assert len(cache.read_text().splitlines()) == 2 + 2, "one line for each entry"


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"kind": 1}]}'])
def test_a_damaged_file_is_named(cache: Path, text: str):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.raises(ValueError, match=f"{cache.name}: not tuned block sizes; tune again, or remove it"):
        resolved(4096)


def test_a_call_takes_tuned_block_sizes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(tuning.CACHE, str(tmp_path))
    case = next(one for one in attention_cases.TESTS if one.name == "gqa")
    problem = case.problem()
    with on_h200():
        start = triton.heuristic(problem)
        better = next(one for one in triton.space(problem).spread() if one != start)
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
        tuning.save(path, [found])
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
                    assert all(config in found for config in itertools.islice(found.spread(), 9))


def test_values_that_a_config_rejects_are_passed_over():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        first: int
        second: int

        def __post_init__(self) -> None:
            if self.first * self.second > 8:
                raise ValueError("too many")

    found = Space(Pair(2, 4), {"first": (1, 2, 4), "second": (2, 4, 8)})
    assert set(found.spread()) == {Pair(1, 2), Pair(1, 4), Pair(1, 8), Pair(2, 2), Pair(2, 4), Pair(4, 2)}
    rings = [set(ring) for ring in found.rings(Pair(2, 4))]
    assert rings == [{Pair(1, 4), Pair(2, 2)}, {Pair(1, 2), Pair(1, 8), Pair(4, 2)}, set()]
