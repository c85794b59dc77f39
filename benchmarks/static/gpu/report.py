"""The report on a GPU kernel: facts of its compiled code, and an estimate of its time."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from palladion.benchmarks.static.gpu.occupancy import Occupancy
from palladion.benchmarks.static.gpu.prediction import TIMINGS, limits, not_estimated, seconds
from palladion.benchmarks.static.gpu.sass import WARP
from palladion.benchmarks.static.gpu.work import Work
from palladion.kernels.devices import Gpu

SCHEDULERS: Final = 4
"""Schedulers of a multiprocessor; each issues an instruction of a warp in a cycle."""


@dataclasses.dataclass(frozen=True)
class LoopTrip:
    """A trip of one program through the loop that issues most instructions; the whole kernel if it has no loop.

    Attributes:
      instructions: instructions of a warp.
      bytes_loaded: maximum bytes that all warps load from global memory; None if the listing does not say.
      copies: whether loads are asynchronous copies to shared memory.
      awaited: maximum bytes that a thread waits for at a time, in loads to registers.
      use: cycles of each of a multiprocessor's units that the program takes.
      total: trips of all programs together; None if not known.
      most: trips of the program that has most; None if not known.
    """

    instructions: int
    bytes_loaded: int | None
    copies: bool
    awaited: int
    use: dict[str, float]
    total: int | None
    most: int | None

    @property
    def busiest(self) -> str:
        """The unit that takes longest."""
        return max(self.use, key=lambda unit: self.use[unit])

    def instructions_per_byte(self, num_warps: int) -> float | None:
        """Returns a thread's instructions per loaded byte; None if nothing is loaded, or it is not known how much."""
        return self.instructions * num_warps * WARP / self.bytes_loaded if self.bytes_loaded else None


@dataclasses.dataclass(frozen=True)
class GpuReport:
    """A kernel on a GPU, examined without running it. Attributes are facts; only times are estimates.

    Attributes:
      name: the kernel's name.
      backend: "triton" or "mosaic_gpu".
      gpu: the GPU that it was compiled for.
      grid: programs along each axis.
      times: how often the function calls it; None if not known.
      num_warps: warps of a program.
      num_stages: stages of pipelined loops; None if not known.
      registers: registers of a thread, in Mosaic GPU kernels when it starts: warpgroups may change theirs.
      spilled: bytes of registers that a thread spills to memory.
      shared_bytes: shared memory of a program.
      occupancy: programs that a multiprocessor holds at a time.
      wide_loads: instructions that load 128 bits or more per thread from global memory to registers.
      wide_copies: instructions that copy 128 bits or more per thread from global to shared memory, asynchronously.
      narrow_loads: all other loads of threads from global memory.
      tma_loads: instructions with which TMA copies from global to shared memory.
      tma_prefetches: instructions with which TMA reads into the L2 cache.
      tma_stores: instructions with which TMA copies from shared to global memory.
      tensor: instructions of tensor cores.
      strip_bytes: contiguous bytes of a row that a program reads together, of the array that is read most; None if not
        known.
      bytes_needed: bytes that must move between device memory and the chip.
      trip: a trip through the loop that issues most instructions.
      cycles: cycles of each unit on the busiest multiprocessor; empty if not known.
      work: what decides its time; None if not known.
      unknown: why it is not known how often loops run; None if it is.
    """

    name: str
    backend: str
    gpu: Gpu
    grid: tuple[int, ...]
    times: int | None
    num_warps: int
    num_stages: int | None
    registers: int
    spilled: int
    shared_bytes: int
    occupancy: Occupancy
    wide_loads: int
    wide_copies: int
    narrow_loads: int
    tma_loads: int
    tma_prefetches: int
    tma_stores: int
    tensor: int
    strip_bytes: int | None
    bytes_needed: int | None
    trip: LoopTrip
    cycles: dict[str, float]
    work: Work | None
    unknown: str | None

    @property
    def programs(self) -> int:
        """Number of programs in the grid."""
        return math.prod(self.grid)

    @property
    def waves(self) -> float | None:
        """Programs of the grid over those that the GPU holds at a time; None if not even one fits."""
        slots = self.occupancy.programs * self.gpu.multiprocessors
        return self.programs / slots if slots else None

    @property
    def idle_in_last_wave(self) -> float | None:
        """Share of the GPU's places for programs that are empty in the last wave."""
        return None if self.waves is None else math.ceil(self.waves) - self.waves

    @property
    def idle_multiprocessors(self) -> int:
        """Number of multiprocessors without any program."""
        return max(self.gpu.multiprocessors - self.programs, 0)

    @property
    def bytes_loaded(self) -> int | None:
        """Maximum bytes that all trips load, from the L2 cache or from memory."""
        if self.trip.total is None or self.trip.bytes_loaded is None:
            return None
        return self.trip.total * self.trip.bytes_loaded

    @property
    def bytes_in_flight(self) -> int | None:
        """Maximum bytes that a multiprocessor's programs wait for at a time; None if not known.

        A pipelined loop has copies in flight for one trip less than it has stages; a load to registers is in flight
        until its first use.
        """
        if self.trip.bytes_loaded is None:
            return None
        at_once = min(self.occupancy.programs, math.ceil(self.programs / self.gpu.multiprocessors))
        if self.trip.copies:
            if self.num_stages is None:
                return None
            return at_once * max(self.num_stages - 1, 1) * self.trip.bytes_loaded
        return at_once * self.trip.awaited * WARP * self.num_warps

    @property
    def instructions_per_byte(self) -> float | None:
        """Instructions of a thread per byte that the loop loads."""
        return self.trip.instructions_per_byte(self.num_warps)

    @property
    def affordable_instructions_per_byte(self) -> float | None:
        """Instructions of a thread that the schedulers can issue per byte at the full memory bandwidth."""
        if self.gpu.clock_hertz is None or self.gpu.hbm_bytes_per_second is None:
            return None
        rate = WARP * SCHEDULERS * self.gpu.multiprocessors * self.gpu.clock_hertz
        return rate / self.gpu.hbm_bytes_per_second

    @property
    def busiest(self) -> str | None:
        """The unit that takes longest on the busiest multiprocessor."""
        return max(self.cycles, key=lambda unit: self.cycles[unit], default=None)

    @property
    def memory_seconds(self) -> float | None:
        """Time of moving the bytes that must move, at the full memory bandwidth."""
        if self.bytes_needed is None or self.gpu.hbm_bytes_per_second is None:
            return None
        return self.bytes_needed / self.gpu.hbm_bytes_per_second

    @property
    def not_estimated(self) -> str | None:
        """Why the time is not estimated; None if it is."""
        if self.unknown is not None:
            return self.unknown
        if self.work is None:
            return "it is not known what programs read"
        if self.gpu.name not in TIMINGS:
            return f"no kernel was measured on the {self.gpu.device_kind}"
        return not_estimated(self.work, TIMINGS[self.gpu.name])

    @property
    def limits(self) -> dict[str, float]:
        """The estimated time of each limit by itself; empty if not known."""
        if self.not_estimated is not None or self.work is None:
            return {}
        return limits(self.work, TIMINGS[self.gpu.name])

    @property
    def seconds(self) -> float | None:
        """Estimated time of the kernel; None if it is not estimated."""
        if self.not_estimated is not None or self.work is None:
            return None
        return seconds(self.work, TIMINGS[self.gpu.name])

    @property
    def bound(self) -> str:
        """The limit that takes longest, one of the names of `prediction.limits`; "UNKNOWN" if not estimated."""
        return max(self.limits, key=lambda name: self.limits[name], default="UNKNOWN")

    @property
    def roofline(self) -> float | None:
        """Estimated share of the memory bandwidth at which the bytes that must move are moved."""
        if self.seconds is None or self.memory_seconds is None:
            return None
        return self.memory_seconds / self.seconds
