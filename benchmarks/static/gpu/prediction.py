"""Estimates the time of a GPU kernel from its work, with a few constants of a GPU on which kernels were measured.

Five things limit a kernel:

    memory   bytes from memory / bandwidth
    fill     bytes of the busiest multiprocessor / what it takes from the L2 cache: few multiprocessors cannot read as
             fast as the memory
    strips   strips that the busiest multiprocessor reads x time of a strip: narrow strips take as long as wide ones
    issue    cycles of the busiest unit of the busiest multiprocessor / clock rate
    waits    programs of a place, one after the other: each waits for its loads, and executes its instructions

Limits overlap, but not entirely. Lengths a and b together take (a^P + b^P)^(1/P): with P = 1 they would add up, with
P = infinity overlap entirely. The larger of memory and fill, and strips, limits of the same traffic, have P = 3; this
traffic, issue and waits P = 1.4. A launch comes on top.

Constants were fitted to a part of the kernels in `results/h200_kernels.jsonl`; docs/gpu_model.md compares all. Kernels
of a kind that was not measured, or not met, are not estimated (`not_estimated`), nor is any other GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

from palladion.benchmarks.static.gpu.work import Work

TRAFFIC_OVERLAP: Final = 3.0
"""The exponent P of memory and strips."""

OVERLAP: Final = 1.4
"""The exponent P of traffic, issue and waits."""

BYTES_PER_CYCLE: Final = 64
"""Bytes that a multiprocessor takes from the L2 cache in a cycle (NVIDIA's whitepapers, from Volta on)."""

LEAST_BYTES: Final = 4_000_000
"""A kernel that reads less takes hardly longer than a launch, and finds its data in the caches."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Constants of a GPU.

    Attributes:
      launch_seconds: time of a kernel that does hardly anything.
      bytes_per_second: bandwidth at which memory is read.
      clock_hertz: clock rate.
      strip_seconds: time of a multiprocessor for a strip.
      latency_seconds: time that a program waits for a load.
      cycles_per_instruction: cycles from an instruction of a warp to its next one.
    """

    launch_seconds: float
    bytes_per_second: float
    clock_hertz: float
    strip_seconds: float
    latency_seconds: float
    cycles_per_instruction: float


TIMINGS: Final = {
    "h200": Timing(
        launch_seconds=1.5e-6,
        bytes_per_second=4.3e12,
        clock_hertz=1.98e9,
        strip_seconds=2.70e-9,
        latency_seconds=0.285e-6,
        cycles_per_instruction=1.57,
    )
}
"""Constants by the name of the GPU; the first three were measured, the others fitted."""


def limits(work: Work, timing: Timing) -> dict[str, float]:
    """Returns the seconds that each of the limits takes by itself."""
    program = work.waits * timing.latency_seconds
    program += work.instructions * timing.cycles_per_instruction / timing.clock_hertz
    return {
        "memory": work.memory_bytes / timing.bytes_per_second,
        "fill": work.most_bytes / (BYTES_PER_CYCLE * timing.clock_hertz),
        "strips": work.strips * timing.strip_seconds,
        "issue": work.cycles / timing.clock_hertz,
        "waits": work.turns * program,
    }


def seconds(work: Work, timing: Timing) -> float:
    """Returns the estimated time of a kernel, whatever its kind."""
    apart = limits(work, timing)
    traffic = _together((max(apart["memory"], apart["fill"]), apart["strips"]), TRAFFIC_OVERLAP)
    return timing.launch_seconds + _together((traffic, apart["issue"], apart["waits"]), OVERLAP)


def _together(apart: Sequence[float], overlap: float) -> float:
    """Returns how long limits take together that take so long apart."""
    return math.pow(sum(math.pow(one, overlap) for one in apart), 1 / overlap)


def not_estimated(work: Work, timing: Timing) -> str | None:
    """Returns why a kernel's time is not estimated; None if it is of a kind that was measured."""
    if work.memory_bytes < LEAST_BYTES:
        return f"it reads less than {LEAST_BYTES / 1e6:g} MB, and the launch is most of its time"
    if work.tensor_cycles / timing.clock_hertz > work.memory_bytes / timing.bytes_per_second:
        return "the tensor cores take longer than the memory"
    return None
