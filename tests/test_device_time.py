"""Device time: traces are read, cut into turns, and added up by kernel; made-up traces, because there is no GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from palladion.benchmarks.measure import device_time
from palladion.benchmarks.measure.device_time import Event, Idle, KernelTime

MICROSECOND = 1e-6


def xspace(planes: dict[str, dict[str, list[tuple[int, int, str]]]], base: int = 0) -> bytes:
    """Encodes a trace: start and duration in nanoseconds, and name of events, by plane and line."""
    text = []
    for plane, lines in planes.items():
        names = sorted({name for events in lines.values() for _, _, name in events})
        encoded = [
            f'lines {{ name: "{line}" timestamp_ns: {base} '
            + " ".join(
                f"events {{ metadata_id: {names.index(name)} offset_ps: {start * 1000} duration_ps: {length * 1000} }}"
                for start, length, name in events
            )
            + " }"
            for line, events in lines.items()
        ]
        known = [
            f'event_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }}'
            for number, name in enumerate(names)
        ]
        text.append(f'planes {{ name: "{plane}" {" ".join(encoded + known)} }}')
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace("\n".join(text))


def test_a_trace_tells_what_the_device_ran_and_when():
    trace = xspace(
        {
            "/device:GPU:0": {
                "Stream #7(Compute)": [(500, 70, "sum.2.1"), (300, 50, "dot.1")],
                "Stream #9(MemcpyD2D)": [(400, 10, "MemcpyD2D")],
                "XLA Modules": [(300, 999, "jit")],
                "XLA Ops": [(300, 999, "dot")],
            },
            "/host:CPU": {"Stream": [(0, 999, "python")]},
            "/device:TPU:0": {"XLA Ops": [(900, 30, "fusion")]},
        },
        base=1_764_000_000_000_000_000,
    )
    events = device_time.read_events(trace)
    assert [event.name for event in events] == ["dot.1", "MemcpyD2D", "sum.2.1", "fusion"]
    assert [event.seconds for event in events] == pytest.approx([50e-9, 10e-9, 70e-9, 30e-9])
    assert events[0].start == 0
    assert events[2].start == pytest.approx(200e-9, abs=300e-9)  # what float64 leaves of such a date
    totals = device_time.total_by_kernel(events)
    assert [one.name for one in totals] == ["sum", "dot", "fusion", "MemcpyD2D"]


class Launches:
    """A runner whose calls launch kernels in a made-up trace.

    `script` tells the kernels of a call, in microseconds, by the number of the turn.
    """

    def __init__(self, name: str, device: Device, script: Callable[[int], list[tuple[str, float]]]) -> None:
        self.name, self._device, self._script, self._turn = name, device, script, 0
        self.result: Any = None

    def run(self, calls: int) -> int:
        calls += 1  # at least as many
        for _ in range(calls):
            for name, microseconds in self._script(self._turn):
                self._device.launch(name, microseconds)
        self._turn += 1
        return calls

    def seconds(self, calls: int) -> float:
        raise AssertionError(calls)


class Device:
    """A made-up device that takes as long as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._clock = 0.0
        self.traces = 0
        monkeypatch.setattr(device_time, "target_platform", lambda: "gpu")
        monkeypatch.setattr(device_time, "trace", self._trace)
        monkeypatch.setattr(device_time.time, "sleep", self.pause)

    def launch(self, name: str, microseconds: float) -> None:
        self.events.append(Event(self._clock, microseconds * MICROSECOND, name))
        self._clock += microseconds * MICROSECOND + MICROSECOND

    def pause(self, seconds: float) -> None:
        self._clock += seconds

    def _trace(self, function: Callable[[], Any]) -> list[Event]:
        self.traces += 1
        self.events.clear()
        function()
        return sorted(self.events)


def test_a_calls_time_is_that_of_all_its_kernels(monkeypatch: pytest.MonkeyPatch):
    device = Device(monkeypatch)

    def split(turn: int) -> list[tuple[str, float]]:
        # A first turn of a trace is slow, which does not count; copies from the host do not belong to a call.
        product = 500.0 if turn == 0 else 10.0 + turn
        return [("MemcpyH2D", 30), ("product", product), ("partial", 4.0), ("partial", 6.0), ("MemcpyD2D", 2.0)]

    found = device_time.kernel_seconds(
        [Launches("a", device, split), Launches("b", device, lambda _: [("one", 7.0)])], repetitions=3
    )
    assert device.traces == 1
    # `partial` is launched twice in a call: two of its medians.
    assert found["a"].seconds == pytest.approx([(10 + turn + 10 + 2) * MICROSECOND for turn in (1, 2, 3)])
    assert found["a"].median == pytest.approx(24 * MICROSECOND)
    assert found["a"].calls == device_time.CALLS_IN_A_TURN + 1
    assert [(one.name, one.calls) for one in found["a"].kernels] == [("product", 1), ("partial", 2), ("MemcpyD2D", 1)]
    assert found["a"].text == "product 12 µs, 2 x partial 10 µs, MemcpyD2D 2 µs"
    assert found["b"].kernels == (KernelTime("one", 1, pytest.approx(7 * MICROSECOND)),)


def test_contenders_that_cannot_be_told_apart_get_traces_of_their_own(monkeypatch: pytest.MonkeyPatch):
    device = Device(monkeypatch)

    def pauses(_: int) -> list[tuple[str, float]]:
        device.pause(2 * device_time.GAP_SECONDS)
        return [("slow", 5.0)]

    runners = [
        Launches("quick", device, lambda _: [("quick", 3.0)]),
        Launches("idle", device, lambda _: []),
        Launches("pauses", device, pauses),
    ]
    found = device_time.kernel_seconds(runners, repetitions=3)
    assert list(found) == ["quick", "pauses"]
    assert device.traces == 4
    assert found["quick"].seconds == pytest.approx([3 * MICROSECOND] * 3)
    assert found["pauses"].seconds == pytest.approx([5 * MICROSECOND])


def test_without_a_gpu_there_is_no_device_time(monkeypatch: pytest.MonkeyPatch):
    runners = [Launches("a", Device(monkeypatch), lambda _: [])]
    assert device_time.kernel_seconds(runners) == {}  # a GPU whose profiler shows nothing
    monkeypatch.setattr(device_time, "target_platform", lambda: "tpu")
    assert device_time.kernel_seconds(runners) == {}


def test_gaps_are_the_launches_or_the_hosts():
    events = [
        Event(0, 10 * MICROSECOND, "a"),
        Event(5 * MICROSECOND, 1 * MICROSECOND, "within"),
        Event(12 * MICROSECOND, 10 * MICROSECOND, "b"),
        Event(30 * MICROSECOND, 1 * MICROSECOND, "MemcpyD2H"),
        Event(72 * MICROSECOND, 8 * MICROSECOND, "a"),
    ]
    idle = Idle.of(events)
    assert idle.seconds == pytest.approx(80 * MICROSECOND)
    assert idle.short_gaps == pytest.approx(2 * MICROSECOND)
    assert (idle.long_gaps, idle.waits) == (pytest.approx(50 * MICROSECOND), 1)
    assert Idle.of([]) == Idle(0, 0, 0, 0)


def test_a_trace_is_taken_and_kept_only_where_it_is_asked_for(tmp_path: Path):
    def work() -> None:
        jax.block_until_ready(jnp.arange(4) + 1)
        time.sleep(0.001)

    assert device_time.trace(work, tmp_path) == []  # a CPU shows no device
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    assert device_time.trace(work) == []
