"""Measurements decide which implementation runs a call: the fastest, where the same clock has measured both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from block_sizes import Config, Problem, on_h200, space

from palladion.kernels import tuning
from palladion.kernels.backend import Choice, choose, record_choices, using_backend
from palladion.kernels.implementation import Implementation
from palladion.kernels.tuning import Entry


def row(name: str, unsupported: Callable[[Any], str | None] = lambda _: None) -> Implementation:
    return Implementation(name, "gpu", unsupported, lambda *_: None, Config, lambda _: Config(64), space)


MOSAIC = row("mosaic_gpu", lambda problem: "batch must be 1" if problem.batch > 1 else None)
TRITON = row("triton")
XLA = Implementation("xla", None, lambda _: None, lambda *_: None)
TABLE = (MOSAIC, TRITON, XLA)


def timed(name: str, microseconds: float, length: int = 4096, *, batch: int = 1, **fields: Any) -> Entry:
    """Returns an entry; kernels were tuned to blocks of 256."""
    return Entry(
        implementation=name,
        kind="bfloat16",
        sizes={"length": length, "batch": batch},
        config=None if name == "xla" else {"block": 256, "warps": 8},
        seconds=microseconds / 1e6,
        **{"origin": "measured", "clock": "device", "device": "NVIDIA H200", "date": "2026-11-27"} | fields,
    )


@pytest.fixture(autouse=True)
def traced_for_h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces for an H200, with a folder of the user's own entries."""
    monkeypatch.setenv(tuning.CACHE, str(tmp_path))
    with on_h200():
        yield


def tuned(*entries: Entry) -> None:
    path = tuning.user_file("operation", "NVIDIA H200")
    assert path is not None
    tuning.save(path, entries)


def chosen(length: int = 4096, *, batch: int = 1, backend: str | None = "auto", config: Any = None) -> Choice:
    with record_choices() as choices:
        choose("operation", TABLE, Problem(length, batch), backend, None, config)
    return choices[0]


def test_without_measurements_a_preferred_one_comes_first():
    table = (TRITON, dataclasses.replace(MOSAIC, preferred=lambda problem: problem.length == 4096), XLA)
    tuned(timed("triton", 10, 2**20), timed("mosaic_gpu", 20, 2**20))

    def backend_for(length: int) -> str:
        return choose("operation", table, Problem(length, 1), "auto", None)[1].backend

    assert backend_for(4096) == "mosaic_gpu"
    assert backend_for(8192) == "triton"
    tuned(timed("triton", 10), timed("mosaic_gpu", 20))
    assert backend_for(4096) == "triton"


def test_without_measurements_the_order_of_the_table_decides():
    assert (chosen().backend, chosen().backend_source, chosen().reasons) == ("mosaic_gpu", "heuristic", {})
    choice = chosen(batch=2)
    assert (choice.backend, choice.backend_source) == ("triton", "heuristic")
    assert choice.reasons == {"mosaic_gpu": "batch must be 1"}


def test_xlas_form_is_taken_where_it_was_measured_to_be_faster():
    tuned(timed("triton", 20.1, batch=2), timed("xla", 14.9, batch=2))
    choice = chosen(batch=2)
    assert (choice.backend, choice.backend_source, choice.config) == ("xla", "tuned", None)
    assert choice.reasons == {
        "mosaic_gpu": "batch must be 1",
        "triton": "measured 20.1 us where xla takes 14.9 us (NVIDIA H200)",
    }


def test_a_kernel_that_was_measured_to_be_faster_stays_with_its_block_sizes():
    tuned(timed("mosaic_gpu", 10), timed("xla", 2170))
    choice = chosen()
    assert (choice.backend, choice.backend_source) == ("mosaic_gpu", "tuned")
    assert (choice.config, choice.config_source) == (Config(256, 8), "tuned")
    assert choice.reasons == {"xla": "measured 2,170.0 us where mosaic_gpu takes 10.0 us (NVIDIA H200)"}


def test_pallas_takes_the_fastest_kernel_and_never_xlas_form():
    tuned(timed("mosaic_gpu", 12), timed("triton", 10), timed("xla", 5))
    assert (chosen(backend="pallas").backend, chosen(backend="pallas").backend_source) == ("triton", "tuned")
    assert chosen(backend="auto").backend == "xla"
    assert set(chosen(backend="auto").reasons) == {"mosaic_gpu", "triton"}


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton", "xla"])
def test_the_callers_choice_is_not_overruled(backend: str):
    times = {"mosaic_gpu": 10.0, "triton": 10.0, "xla": 10.0} | {backend: 99.0}
    tuned(*(timed(name, time) for name, time in times.items()))
    for choice in (chosen(backend=backend), *_by_default(backend)):
        assert (choice.backend, choice.backend_source, choice.reasons) == (backend, "explicit", {})


def _by_default(backend: str) -> Iterator[Choice]:
    with using_backend(backend):
        yield chosen(backend=None)


def test_block_sizes_of_the_caller_are_for_a_kernel():
    tuned(timed("mosaic_gpu", 10), timed("xla", 5))
    choice = chosen(config=Config(16))
    assert (choice.backend, choice.backend_source, choice.config) == ("mosaic_gpu", "explicit", Config(16))


def test_similar_problems_decide_where_this_one_was_not_measured():
    tuned(timed("mosaic_gpu", 20), timed("xla", 15), timed("mosaic_gpu", 20, 16384), timed("xla", 25, 16384))
    choice = chosen(2048)
    assert (choice.backend, choice.backend_source) == ("xla", "nearest")
    said = "measured 20.0 us where xla takes 15.0 us (NVIDIA H200, length=4096, batch=1)"
    assert choice.reasons == {"mosaic_gpu": said}
    assert chosen(16384).backend == "mosaic_gpu"
    assert chosen(256).backend_source == "heuristic", "too far"


class Invariant(Problem):
    """A problem whose results must not depend on the batch: everything is chosen for a batch of one."""

    def planned(self) -> Problem:
        return Problem(self.length)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_batch_invariant_call_takes_the_same_implementation_in_any_batch(batch: int):
    tuned(timed("triton", 20), timed("xla", 15), timed("triton", 20, batch=64), timed("xla", 25, batch=64))
    with record_choices() as choices:
        choose("operation", (TRITON, XLA), Invariant(4096, batch), "auto", None)
    assert choices[0].backend == "xla"


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (timed("mosaic_gpu", 20, clock="wall"), timed("xla", 10)),
        (timed("mosaic_gpu", 20), timed("xla", 10, clock="wall")),
        (timed("mosaic_gpu", 20, origin="estimated", clock=""), timed("xla", 10, origin="estimated", clock="")),
        (timed("mosaic_gpu", 20), timed("xla", 10, 2048)),
        (timed("mosaic_gpu", 20), dataclasses.replace(timed("xla", 10), kind="float32")),
        (timed("mosaic_gpu", 10.2), timed("xla", 10)),
        (dataclasses.replace(timed("mosaic_gpu", 20), config={"gone": 1}), timed("xla", 10)),
        (timed("triton", 20), timed("xla", 10)),
        (timed("mosaic_gpu", 20), timed("mosaic_gpu", 10, 2048)),
    ],
    ids=[
        "wall-device",
        "device-wall",
        "estimates",
        "sizes",
        "kinds",
        "too-little",
        "old-config",
        "not-the-first",
        "alone",
    ],
)
def test_times_that_cannot_be_compared_decide_nothing(mine: Entry, other: Entry):
    tuned(mine, other)
    assert (chosen().backend, chosen().backend_source, chosen().reasons) == ("mosaic_gpu", "heuristic", {})


def test_a_newer_entry_of_a_problem_replaces_the_older():
    tuned(timed("triton", 20, clock="wall", batch=2), timed("xla", 10, clock="wall", batch=2))
    assert chosen(batch=2).backend == "xla"
    tuned(timed("triton", 9, batch=2), timed("xla", 10, batch=2))
    assert chosen(batch=2).backend == "triton"
    path = tuning.user_file("operation", "NVIDIA H200")
    assert path is not None
    assert len(tuning.load(path)) == 2
