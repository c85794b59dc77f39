"""The report on a TPU kernel: its transfers, its loops, and estimates of its time."""

from __future__ import annotations

import dataclasses

from palladion.benchmarks.static.kernel_calls import limiting_resource
from palladion.benchmarks.static.tpu.schedule import ScheduleLoop
from palladion.benchmarks.static.tpu.transfers import Traffic
from palladion.kernels.devices import Chip


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """A loop of the schedule, as the busiest core executes it.

    Attributes:
      loop: the loop.
      trips: trips in all executions of the loop together; None if not known.
      cycles: average cycles of a trip, inner loops included; if trips are not known, the bundles of the loop.
      use: share of each unit's slots that those cycles use.
    """

    loop: ScheduleLoop
    trips: int | None
    cycles: float
    use: dict[str, float]

    @property
    def busiest(self) -> str:
        """The unit of whose slots the loop uses the largest share."""
        return max(self.use, key=lambda unit: self.use[unit])


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """A kernel on a TPU, examined without running it. Times are estimates; None if not known.

    Attributes:
      name: the kernel's name.
      instruction: its name in the compiled program.
      chip: the chip that it was compiled for.
      grid: steps along each axis; 0 if decided at run time, empty if the call was not found.
      times: how often the function calls it; None if not known.
      cores: cores of the device that work on it.
      bytes_needed: bytes that must move between HBM and the chip.
      moved: transfers of the compiled kernel by direction ("hbm_to_vmem", …), on all cores; if they are not known,
        those that the kernel's source asks for.
      asked: transfers that the kernel's source asks for; None if not known.
      busy_cycles: bundles that the busiest core executes.
      cycles: cycles until the last core is done, waits included.
      stalls: cycles in which the busiest core waits for transfers, by direction.
      use: share of each unit's slots in the bundles that the busiest core executes.
      loops: loops of the schedule, outer ones first.
      bundles: length of the kernel in bundles.
      vmem_bytes: bytes of a core's VMEM that it takes.
      spills: vector stores and loads for register spills in its listing.
      unknown: why times are not known; None if they are.
    """

    name: str
    instruction: str
    chip: Chip
    grid: tuple[int, ...]
    times: int | None
    cores: int
    bytes_needed: int | None
    moved: dict[str, Traffic] | None
    asked: dict[str, Traffic] | None
    busy_cycles: int | None
    cycles: float | None
    stalls: dict[str, float]
    use: dict[str, float]
    loops: tuple[LoopReport, ...]
    bundles: int
    vmem_bytes: int | None
    spills: tuple[int, int]
    unknown: str | None

    @property
    def bytes_moved(self) -> int | None:
        """Bytes that move between HBM and the chip, on all cores together."""
        if self.moved is None:
            return None
        return sum(one.bytes for direction, one in self.moved.items() if "hbm" in direction)

    @property
    def agrees(self) -> bool | None:
        """Whether the compiled kernel makes the transfers that its source asks for; None if one is not known."""
        if self.moved is None or self.asked is None or self.cycles is None:
            return None
        return agree(self.moved, self.asked)

    @property
    def memory_seconds(self) -> float | None:
        """Time of moving the bytes at the full bandwidth of the device."""
        return None if self.bytes_moved is None else self.bytes_moved / self.chip.hbm_bytes_per_second

    @property
    def compute_seconds(self) -> float | None:
        """Time of the busiest core's bundles without any wait."""
        return None if self.busy_cycles is None else self.busy_cycles / self.chip.clock_hertz

    @property
    def seconds(self) -> float | None:
        """Estimated time of the kernel."""
        return None if self.cycles is None else self.cycles / self.chip.clock_hertz

    @property
    def bound(self) -> str:
        """The resource that takes longer, "memory" or "compute"; "UNKNOWN" if not known."""
        return limiting_resource(self.memory_seconds, self.compute_seconds)

    @property
    def roofline(self) -> float | None:
        """Estimated share of the HBM's bandwidth at which the bytes that must move are moved; 1 is the limit."""
        if self.seconds is None or self.bytes_needed is None:
            return None
        return self.bytes_needed / self.chip.hbm_bytes_per_second / self.seconds

    @property
    def step(self) -> LoopReport | None:
        """The steady state: the innermost loop that takes at least half of the time of the loop around it."""
        if not self.loops:
            return None
        found = max(self.loops, key=_total)
        while inner := [
            one for one in self.loops if _inside(one.loop, found.loop) and _total(one) >= _total(found) / 2
        ]:
            found = max(inner, key=_total)
        return found


def agree(moved: dict[str, Traffic], asked: dict[str, Traffic]) -> bool:
    """Whether a compiled kernel's transfers are those that its source asks for.

    The compiler may split transfers, pads arrays to whole tiles, and copies scalars to SMEM before a kernel begins.
    """

    def same(direction: str) -> bool:
        one, other = moved.get(direction, Traffic()), asked.get(direction, Traffic())
        return one.bytes == other.bytes or (one.transfers == other.transfers and one.bytes > other.bytes)

    return all(same(direction) for direction in {*moved, *asked} if "smem" not in direction)


def _total(one: LoopReport) -> float:
    return one.cycles * (1 if one.trips is None else one.trips)


def _inside(inner: ScheduleLoop, outer: ScheduleLoop) -> bool:
    return inner != outer and outer.first <= inner.first and inner.last <= outer.last
