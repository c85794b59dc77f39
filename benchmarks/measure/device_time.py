"""Device time of kernels, from JAX's profiler: what a device spends in each kernel, without the host's share.

    times = kernel_seconds(runners, repetitions=5)   # several contenders in one trace, in turns
    times["triton"].median                           # device seconds of a call, all its kernels together

`runners` are those of `timing.py`, compiled and warmed up: `JaxRunner`, torch's, or a `CallRunner`. The device time of
a call is the sum over its kernels of their median duration, times the launches of a call: a sum of splits counts, the
time between two kernels does not. On a GPU it is stable to a few percent, where wall clock of a short kernel is not.
Where the profiler shows no GPU, `kernel_seconds` returns an empty dictionary, and wall clock is all there is.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import jax

from palladion.benchmarks.measure.samples import Samples
from palladion.benchmarks.measure.timing import Runner
from palladion.benchmarks.text import duration
from palladion.reference.platforms import target_platform

LINES: Final = {"/device:GPU": "Stream", "/device:TPU": "XLA Ops"}
"""Prefix of the trace lines that list what a device ran, by prefix of the device's name."""

HOST_COPIES: Final = ("MemcpyH2D", "MemcpyD2H")
"""Copies between host and device: they belong to a dispatch, not to a call. Copies and fills on the device do count."""

CALLS_IN_A_TURN: Final = 8
"""Calls that a contender makes at least in each of its turns: enough for a median."""

PAUSE_SECONDS: Final = 0.004
"""Pause after each contender's turn, by which the trace is cut into turns."""

GAP_SECONDS: Final = 0.002
"""Idle time of the device from which on a trace is cut: longer than the host takes to launch the next kernel."""

LONG_GAP_SECONDS: Final = 10e-6
"""Idle time between two kernels from which on the device waits for the host, and not for the launch of a kernel."""


@dataclasses.dataclass(frozen=True, order=True)
class Event:
    """A kernel or a copy that a device ran.

    Attributes:
      start: when it began, in seconds after the first event of the trace.
      seconds: how long it took.
      name: its name in the trace.
    """

    start: float
    seconds: float
    name: str


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """Time of a kernel.

    Attributes:
      name: its name in the trace, without the numbers that tell instances apart.
      calls: number of launches; per call of a contender in `KernelTimes`, of all in `total_by_kernel`.
      seconds: time of these launches together.
    """

    name: str
    calls: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class KernelTimes:
    """Device time of a contender's calls.

    Attributes:
      seconds: device seconds of a call, one entry for each repetition.
      calls: calls in a repetition.
      kernels: kernels of a call, the longest first.
    """

    seconds: tuple[float, ...]
    calls: int
    kernels: tuple[KernelTime, ...]

    @property
    def samples(self) -> Samples:
        """The repetitions as samples."""
        return Samples(self.seconds, self.calls)

    @property
    def median(self) -> float:
        """Median device seconds of a call."""
        return self.samples.median

    @property
    def text(self) -> str:
        """The kernels of a call: "partial 12.1 µs, sum 1.4 µs"; "2 x" before what is launched twice."""
        return ", ".join(
            f"{'' if one.calls == 1 else f'{one.calls:.3g} x '}{one.name[:60]} {duration(one.seconds)}"
            for one in self.kernels
        )


def kernel_seconds(runners: Sequence[Runner], repetitions: int = 5) -> dict[str, KernelTimes]:
    """Measures the device time of contenders' calls, in one trace, in which they take turns.

    Args:
      runners: contenders with different names, compiled and warmed up. What one of them raises is raised.
      repetitions: turns of each contender.

    Returns:
      Times by contender's name, without those that launch no kernel; empty where the profiler shows no GPU.
    """
    if target_platform() != "gpu" or not runners:
        return {}
    # Forwards and backwards, as for wall clock. The first turn warms the profiler up and is not counted.
    rounds = [list(runners) if number % 2 == 0 else list(reversed(runners)) for number in range(repetitions)]
    turns = [runners[0], *itertools.chain.from_iterable(rounds)]
    calls: list[int] = []

    def take_turns() -> None:
        for runner in turns:
            calls.append(runner.run(CALLS_IN_A_TURN))
            time.sleep(PAUSE_SECONDS)

    events = [event for event in trace(take_turns) if event.name not in HOST_COPIES]
    groups = cut(events)
    if len(groups) == len(turns):
        found: dict[str, list[tuple[list[Event], int]]] = defaultdict(list)
        for runner, group, number in list(zip(turns, groups, calls, strict=True))[1:]:
            found[runner.name].append((group, number))
        return {name: _times(repeated) for name, repeated in found.items()}
    if len(runners) > 1:
        # A contender launches nothing, or pauses within a turn: a trace of its own says which.
        return {name: times for runner in runners for name, times in kernel_seconds([runner], repetitions).items()}
    return {runners[0].name: _times([(events, sum(calls))])} if events else {}


def _times(repetitions: Sequence[tuple[list[Event], int]]) -> KernelTimes:
    """Adds up the kernels of a call; repetitions are events and number of calls."""
    every = [event for events, _ in repetitions for event in events]
    kernels = _medians(every, sum(calls for _, calls in repetitions))
    seconds = tuple(sum(one.seconds for one in _medians(events, calls)) for events, calls in repetitions)
    return KernelTimes(seconds, repetitions[0][1], tuple(kernels))


def _medians(events: Iterable[Event], calls: int) -> list[KernelTime]:
    """Returns each kernel's median duration times its launches per call, the longest first."""
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        durations[event.name].append(event.seconds)
    times = [
        KernelTime(name, len(seconds) / calls, statistics.median(seconds) * len(seconds) / calls)
        for name, seconds in durations.items()
    ]
    return sorted(times, key=lambda one: -one.seconds)


def cut(events: Sequence[Event]) -> list[list[Event]]:
    """Cuts events, in the order of their beginning, where the device pauses."""
    groups: list[list[Event]] = []
    end = 0.0
    for event in events:
        if not groups or event.start - end > GAP_SECONDS:
            groups.append([])
            end = event.start
        groups[-1].append(event)
        end = max(end, event.start + event.seconds)
    return groups


@dataclasses.dataclass(frozen=True)
class Idle:
    """Time in which a device ran nothing, between its first kernel and its last.

    Attributes:
      seconds: from the first kernel's beginning to the last one's end.
      short_gaps: seconds of all gaps of at most LONG_GAP_SECONDS together: a launch follows a launch.
      long_gaps: seconds of all longer gaps together: the device waits for the host.
      waits: number of the longer gaps.
    """

    seconds: float
    short_gaps: float
    long_gaps: float
    waits: int

    @classmethod
    def of(cls, events: Sequence[Event]) -> Idle:
        """Finds the gaps between events, which are in the order of their beginning; copies to the host fill none."""
        short = long = 0.0
        waits = 0
        kernels = [event for event in events if event.name not in HOST_COPIES]
        end = kernels[0].start if kernels else 0.0
        for event in kernels:
            gap = event.start - end
            if gap > LONG_GAP_SECONDS:
                long += gap
                waits += 1
            elif gap > 0:
                short += gap
            end = max(end, event.start + event.seconds)
        return cls(end - kernels[0].start if kernels else 0.0, short, long, waits)


def total_by_kernel(events: Iterable[Event]) -> list[KernelTime]:
    """Adds up time and launches by kernel, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        found[re.sub(r"(\.\d+)+$", "", event.name)].append(event.seconds)
    times = [KernelTime(name, len(seconds), sum(seconds)) for name, seconds in found.items()]
    return sorted(times, key=lambda one: -one.seconds)


def trace(function: Callable[[], Any], folder: Path | None = None) -> list[Event]:
    """Runs a function under the profiler.

    Args:
      function: dispatches work and waits for it.
      folder: keeps the trace there, for other tools; None keeps none.

    Returns:
      What the device ran, in the order of its beginning; empty if the profiler shows no device.
    """
    options = jax.profiler.ProfileOptions()
    # Recording every Python call would slow the host down, and the device would wait for it.
    options.python_tracer_level = 0
    options.enable_hlo_proto = folder is not None
    with tempfile.TemporaryDirectory(prefix="palladion_profile_") as temporary:
        place = folder or Path(temporary)
        with jax.profiler.trace(str(place), profiler_options=options):
            function()
        # A folder that is kept may hold older traces: every trace has a folder of its own in it, named by its time.
        newest = max(place.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns, default=None)
        return [] if newest is None else read_events(newest.read_bytes())


def read_events(xspace: bytes) -> list[Event]:
    """Reads what a device ran from a serialized trace: a GPU in its streams, a TPU in its operations."""

    def events() -> Iterator[tuple[float, float, str]]:
        for plane in jax.profiler.ProfileData.from_serialized_xspace(xspace).planes:
            # Other lines list the same time again, by program or by step.
            wanted = next((lines for device, lines in LINES.items() if plane.name.startswith(device)), None)
            for line in plane.lines if wanted else ():
                if line.name.startswith(wanted):
                    yield from ((event.start_ns, event.duration_ns, event.name) for event in line.events)

    found = sorted(events())
    # From the first event on, because seconds of the calendar leave no digits for nanoseconds.
    return [Event((start - found[0][0]) / 1e9, duration / 1e9, name) for start, duration, name in found]
