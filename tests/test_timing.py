"""Timing: contenders take turns, inputs are not cached, one program makes several calls, jobs use all cores."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion.benchmarks.measure import timing
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.samples import Samples, quantile, ratio
from palladion.benchmarks.measure.timing import CallRunner, JaxRunner, measure

pytestmark = pytest.mark.usefixtures("small_probes")


class Scripted:
    """A runner whose calls take the time that a script says."""

    def __init__(self, name: str, turns: list[str], takes: Callable[[int], float]) -> None:
        self.name, self._turns, self._takes, self._count = name, turns, takes, 0
        self.calls: list[int] = []

    def seconds(self, calls: int) -> float:
        self._turns.append(self.name)
        self.calls.append(calls)
        self._count += 1
        return self._takes(self._count)


def test_contenders_take_turns_there_and_back():
    turns: list[str] = []
    runners = [Scripted(name, turns, lambda _: 0.01) for name in "abc"]
    found = measure(runners, rounds=3, sample_seconds=0.02)
    assert "".join(turns[-9:]) == "abccbaabc"
    assert found["a"].seconds == (0.01,) * 3
    assert found["a"].calls == 2


def test_samples_are_as_long_as_asked_for():
    runner = Scripted("a", [], lambda _: 1e-5)
    found = measure([runner], rounds=2, sample_seconds=0.02)["a"]
    assert found.calls * found.median == pytest.approx(0.02, rel=0.01)


def test_a_contender_that_raises_is_left_out():
    def breaks(count: int) -> float:
        if count > 2:
            raise RuntimeError("device lost")
        return 0.1

    said: list[str] = []
    runners = [Scripted("good", [], lambda _: 0.1), Scripted("bad", [], breaks)]
    found = measure(runners, rounds=4, failed=lambda runner, error: said.append(f"{runner.name}: {error}"))
    assert list(found) == ["good"]
    assert len(found["good"].seconds) == 4
    assert said == ["bad: device lost"]
    with pytest.raises(RuntimeError, match="device lost"):
        measure([Scripted("bad", [], breaks)], rounds=4)


def test_a_deadline_ends_the_rounds_but_not_the_first():
    runner = Scripted("a", [], lambda _: 1.0)
    assert len(measure([runner], rounds=9, deadline=time.perf_counter() - 1)["a"].seconds) == 1


def test_medians_spreads_and_ratios():
    samples = Samples((3.0, 1.0, 2.0, 5.0, 4.0, 6.0), 1)
    assert (samples.median, samples.p20, samples.p80) == (3.5, 2.0, 5.0)
    assert samples.spread == pytest.approx(3 / 3.5)
    assert samples.noisy
    assert quantile([1.0], 0.8) == 1.0
    # The second round was slow for both.
    assert ratio(Samples((2.0, 20.0, 2.0), 1), Samples((1.0, 10.0, 1.0), 1)) == 2.0


def test_the_clock_waits_for_the_result():
    def slow(x: jax.Array) -> jax.Array:
        def wait(x: np.ndarray) -> np.ndarray:
            time.sleep(0.03)
            return x

        return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    runner = JaxRunner.compile("slow", slow, jnp.ones(4), copies=1)
    assert runner.seconds(3) >= 0.03
    runner = JaxRunner.compile("fast", lambda x: x + 1, jnp.ones(4), copies=1)
    assert runner.seconds(50) < 0.03


def test_other_functions_are_waited_for_by_their_own_means():
    log: list[str] = []
    runner = CallRunner("a", log.append, ["x", "y"], synchronize=lambda: log.append("wait"))
    runner.seconds(3)
    assert log == ["wait", "x", "y", "x", "wait"]


def test_inputs_pass_by_in_turns_that_no_cache_holds():
    assert timing.copies_of(2**20, "cpu") * 2**20 > timing.CACHE_BYTES["cpu"]
    assert timing.copies_of(2**40, "cpu") == 1
    runner = JaxRunner.compile("a", lambda x: x + 1, jnp.zeros(2**18), copies=3)
    pointers = {inputs[0].unsafe_buffer_pointer() for inputs in runner._inputs}
    assert len(pointers) == 3


def test_what_is_donated_is_updated_in_place_call_after_call():
    runner = JaxRunner.compile("a", lambda total, x: total + x, jnp.ones(4), donated=jnp.zeros(4), copies=1)
    np.testing.assert_array_equal(runner.result, 1)
    runner.seconds(3)
    np.testing.assert_array_equal(runner._donated[0][0], 4)


def test_on_an_accelerator_several_calls_are_one_program_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "target_platform", lambda: "gpu")
    calls: list[float] = []

    def seen(x: np.ndarray) -> np.ndarray:
        calls.append(time.perf_counter())
        time.sleep(0.01)
        return x

    def slow(x: jax.Array) -> jax.Array:
        return jax.pure_callback(seen, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    runner = JaxRunner.compile("a", slow, jnp.ones(4), copies=4)
    calls.clear()
    took = runner.seconds(6)  # two programs of four
    assert len(calls) == 8
    assert took >= 0.01
    assert np.diff(calls).min() >= 0.009
    # Each donated array is used with its own inputs.
    runner = JaxRunner.compile("b", lambda total, x: total + x, jnp.ones(4), donated=jnp.zeros(4), copies=2)
    runner.seconds(4)
    np.testing.assert_array_equal(np.asarray(runner._donated[0]), 3)


def test_a_program_takes_longer_than_its_dispatch(monkeypatch: pytest.MonkeyPatch):
    assert timing.Layout.choose(2**20) == timing.Layout(1, 1, timing.copies_of(2**20))
    monkeypatch.setattr(timing, "target_platform", lambda: "gpu")
    short, long = timing.Layout.choose(25 * 2**20), timing.Layout.choose(2**30)
    assert short.width == timing.CALLS_IN_A_PROGRAM
    assert short.width * 25 * 2**20 > timing.PROGRAM_BYTES / 2
    assert (long.width, long.groups) == (1, 2)  # reading one group evicts the other from the cache
    assert timing.Layout.choose(25 * 2**20, copies=1) == timing.Layout(1, 1, 1)
    # A call that updates a large cache reads little of it, so many calls use few copies.
    assert timing.Layout.choose(2**10, 2**30) == timing.Layout(timing.CALLS_IN_A_PROGRAM, 2, 1)


def test_calls_take_turns_with_what_is_donated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "target_platform", lambda: "gpu")
    monkeypatch.setattr(timing, "copies_of", lambda _: 2)
    monkeypatch.setattr(timing, "CALLS_IN_A_PROGRAM", 5)
    traced: list[None] = []

    def add(total: jax.Array, x: jax.Array) -> jax.Array:
        traced.append(None)
        return total + x

    runner = JaxRunner.compile("a", add, jnp.ones(4), donated=jnp.zeros(4))
    assert len(traced) == 1
    first, second = runner._donated[0]  # type: ignore[index]
    np.testing.assert_array_equal(first, 3)
    np.testing.assert_array_equal(second, 2)
    np.testing.assert_array_equal(runner.result, 3)


def test_a_program_is_compiled_from_shapes():
    program = timing.CompiledCalls.compile(lambda x: x + 1, jax.ShapeDtypeStruct((4,), jnp.float32), copies=1)
    np.testing.assert_array_equal(JaxRunner("a", program, jnp.ones(4)).result, 2)


def test_jobs_are_done_side_by_side_and_told_of_in_order():
    together = threading.Barrier(3)

    def job(number: int) -> int:
        together.wait(timeout=30)
        if number == 1:
            raise KeyError(number)
        return number

    jobs = [functools.partial(job, number) for number in range(3)]
    zero, error, two = side_by_side(jobs, workers=3)
    assert (zero, repr(error), two) == (0, "KeyError(1)", 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_do_not_begin_when_nobody_listens_any_more(workers: int):
    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        time.sleep(0.01)
        return number

    outcomes = side_by_side([functools.partial(job, number) for number in range(50)], workers)
    assert next(outcomes) == 0
    outcomes.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(begun) < 10


def test_the_memory_probe_reads_what_it_says():
    (array,) = jax.tree.leaves(timing.memory_probe()._inputs)
    assert array.nbytes == timing.probe_bytes()
