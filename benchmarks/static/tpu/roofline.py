"""What a kernel would take on a chip, put together from what the compiler says of it: estimates, no measurements.

The compiled schedule is executed as far as scalars decide (`scalar_core.py`), each core of a device for itself. That
gives the bundles which run, one a cycle; the transfers, with their real sizes; and, with a model of the memory
(`transfers.py`), how long a core waits for them. The transfers are held against those that the kernel asks for as it is
written (`traffic.py`). From these:

    memory    bytes moved / bandwidth of the HBM
    compute   bundles executed / clock, of the core that has most to do
    estimated   until the last core is done, waits included
    roofline    bytes that must move / bandwidth / estimated

Cores of a device share its bandwidth where both work; where a kernel leaves one idle, the other is given all of it.
What the vector units do inside a bundle always takes one cycle here: where they stall, the estimate is too low.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from palladion.benchmarks.static.kernel_calls import KernelCall, kernel_calls, limiting_resource
from palladion.benchmarks.static.opaque import Undecided
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu.scalar_core import Execution, Operand, ScalarCore
from palladion.benchmarks.static.tpu.schedule import Schedule, ScheduleLoop, parse_schedule, parse_vmem_report
from palladion.benchmarks.static.tpu.traffic import count_traffic
from palladion.benchmarks.static.tpu.transfers import Rate, Traffic
from palladion.kernels.devices import Chip, tpu_chips


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """A loop of the schedule, as it was executed on the busiest core.

    Attributes:
      loop: where it is.
      trips: how often its body was executed, over all times that it was entered; None where that is not known.
      cycles: of one trip on average, inner loops and what is skipped taken as they were executed; where trips are not
        known, the bundles that it is long.
      use: of each unit, the share of its slots that those cycles use.
    """

    loop: ScheduleLoop
    trips: int | None
    cycles: float
    use: dict[str, float]

    @property
    def busiest(self) -> str:
        """The unit of whose slots it uses the largest share."""
        return max(self.use, key=lambda unit: self.use[unit])


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What is known of a kernel on a chip before it runs. Times are estimates; None where they are not known.

    Attributes:
      name: of the kernel.
      instruction: its name in the compiled program.
      chip: for which it was compiled.
      grid: steps along each axis; 0 where that is decided at run time, empty where the call was not found.
      times: how often the function calls it, where that is known.
      cores: of the device that work on it.
      bytes_needed: that must move between HBM and the chip.
      moved: transfers of the compiled kernel by direction ("hbm_to_vmem", …), all cores together; those that the kernel
        asks for as it is written, where those of the compiled kernel are not known.
      asked: transfers that the kernel asks for as it is written; None where they are not known.
      busy_cycles: bundles that the busiest core executes.
      cycles: until the last core is done, waits included.
      stalls: by direction, cycles in which the busiest core waits for transfers.
      use: of each unit of the busiest core, the share of its slots in the bundles that it executes.
      loops: of the schedule, outer ones first.
      bundles: that the kernel is long.
      vmem_bytes: that it takes of a core's VMEM.
      spills: vector stores and loads in its listing for want of registers.
      unknown: why the times are not known; None where they are.
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
        """Bytes that move between HBM and the chip, all cores together."""
        if self.moved is None:
            return None
        return sum(one.bytes for direction, one in self.moved.items() if "hbm" in direction)

    @property
    def agrees(self) -> bool | None:
        """Whether the compiled kernel does the transfers that the kernel asks for; None where one is not known."""
        if self.moved is None or self.asked is None or self.cycles is None:
            return None
        return agree(self.moved, self.asked)

    @property
    def memory_seconds(self) -> float | None:
        """What moving the bytes takes at the full bandwidth of the device."""
        return None if self.bytes_moved is None else self.bytes_moved / self.chip.hbm_bytes_per_second

    @property
    def compute_seconds(self) -> float | None:
        """What the busiest core's bundles take without any wait."""
        return None if self.busy_cycles is None else self.busy_cycles / self.chip.clock_hertz

    @property
    def seconds(self) -> float | None:
        """What the kernel takes, estimated."""
        return None if self.cycles is None else self.cycles / self.chip.clock_hertz

    @property
    def bound(self) -> str:
        """See `limiting_resource`."""
        return limiting_resource(self.memory_seconds, self.compute_seconds)

    @property
    def roofline(self) -> float | None:
        """The share of the HBM's bandwidth at which the bytes that must move do so, estimated; 1 is the limit."""
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
    """Whether these are the transfers that a kernel asks for.

    The compiler may split a transfer, and pads arrays to whole tiles. What it moves to SMEM before a kernel begins is
    not asked for.
    """

    def same(direction: str) -> bool:
        one, other = moved.get(direction, Traffic()), asked.get(direction, Traffic())
        return one.bytes == other.bytes or (one.transfers == other.transfers and one.bytes > other.bytes)

    return all(same(direction) for direction in {*moved, *asked} if "smem" not in direction)


def examine(
    function: Callable[..., Any],
    *arguments: Any,
    chip: str = "v6e",
    bytes_needed: int | None = None,
) -> list[KernelReport]:
    """Compiles a function for a TPU that need not be there, and reports on each of its Pallas kernels.

    Args:
      function: of arrays; jitted or not.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree. The values of integer arrays count: lengths and page
        tables decide what a kernel does.
      chip: a name in `tpu_chips()`.
      bytes_needed: that must move between HBM and the chip; by default each argument and result of the kernel once.
        Only for functions with one kernel.

    Returns:
      A report for each kernel in the compiled program; none where it has no Pallas kernels.

    Raises:
      ValueError: there is no such chip, or bytes_needed is given for several kernels.
      RuntimeError: `tpu_compiler.keep_listings` was not called in time.
      Exception: whatever the compiler raises where it refuses the function.
    """
    tpu_compiler.keep_listings()
    calls = kernel_calls(function, arguments, tpu_compiler.tracing_for(chip))
    compiled, listings = tpu_compiler.list_kernels(function, *arguments, chip=chip)
    if bytes_needed is not None and len(listings) > 1:
        names = ", ".join(listing.name for listing in listings)
        raise ValueError(f"bytes_needed: got {bytes_needed} for a function with {len(listings)} kernels: {names}")
    program = compiled.as_text() or ""
    left = list(calls)
    reports = []
    for listing in listings:
        call = _matching(listing.name, program, left)
        if call is not None:
            left.remove(call)
        reports.append(_report(listing, call, program, tpu_chips()[chip], bytes_needed))
    return reports


def _report(
    listing: tpu_compiler.Listing, call: KernelCall | None, program: str, chip: Chip, bytes_needed: int | None
) -> KernelReport:
    schedule = parse_schedule(listing.bundles, listing.utilization, chip.branch_delay_slots)
    executions, unknown = _execute(schedule, _operands(listing.name, call, program), chip)
    cores = len(executions)
    busiest = max(executions, key=lambda one: one.busy, default=None)
    asked = _asked(call, chip)
    vmem = parse_vmem_report(listing.vmem_report).get(listing.name) if listing.vmem_report else None
    return KernelReport(
        name=listing.name if call is None else call.name,
        instruction=listing.name,
        chip=chip,
        grid=() if call is None else call.grid,
        times=None if call is None else call.times,
        cores=cores,
        bytes_needed=bytes_needed if bytes_needed is not None else None if call is None else call.bytes,
        moved=_sum(executions) if executions else asked,
        asked=asked,
        busy_cycles=None if busiest is None else busiest.busy,
        cycles=max((one.cycles for one in executions), default=None),
        stalls={} if busiest is None else dict(busiest.stalls),
        use={} if busiest is None else _use(schedule, busiest.counts, 0, len(schedule.bundles)),
        loops=tuple(_loop_report(schedule, loop, busiest) for loop in schedule.loops()),
        bundles=len(schedule.bundles),
        vmem_bytes=vmem,
        spills=schedule.spills(),
        unknown=unknown,
    )


def _execute(schedule: Schedule, operands: dict[int, Operand], chip: Chip) -> tuple[list[Execution], str | None]:
    """What each core does, and why that is not known where it is not."""
    try:
        program = ScalarCore(schedule)
        cores = chip.cores if program.reads_core_number else 1
        executions = [program.run(operands, rate=_rate(chip, cores), core=core) for core in range(cores)]
        working = [core for core, one in enumerate(executions) if any("to_hbm" in name for name in one.moved)]
        if 0 < len(working) < cores:
            executions = [program.run(operands, rate=_rate(chip, len(working)), core=core) for core in working]
        return executions, None
    except Undecided as reason:
        return [], str(reason)


def _rate(chip: Chip, sharing: int) -> Rate:
    """How fast the transfers of a core are where so many share the memory."""
    return Rate(
        bytes_per_cycle=chip.hbm_bytes_per_second / chip.clock_hertz / sharing,
        latency_cycles=chip.dma_latency_seconds * chip.clock_hertz,
        granule_bytes=chip.dma_granule_bytes,
    )


def _asked(call: KernelCall | None, chip: Chip) -> dict[str, Traffic] | None:
    """The transfers that a kernel asks for as it is written."""
    if call is None:
        return None
    try:
        return count_traffic(call, cores=chip.cores)
    except Undecided:
        return None


def _sum(executions: Sequence[Execution]) -> dict[str, Traffic]:
    moved: dict[str, Traffic] = {}
    for execution in executions:
        for direction, one in execution.moved.items():
            moved[direction] = moved.get(direction, Traffic()) + one
    return moved


def _loop_report(schedule: Schedule, loop: ScheduleLoop, execution: Execution | None) -> LoopReport:
    first, end = loop.first, loop.last + 1
    if execution is None or execution.counts[first] == 0:
        counts = [1] * len(schedule.bundles)
        trips, cycles = (None if execution is None else 0), float(end - first)
    else:
        counts = list(execution.counts)
        trips = counts[first]
        cycles = sum(counts[first:end]) / trips
    return LoopReport(loop, trips, cycles, _use(schedule, counts, first, end))


def _use(schedule: Schedule, counts: Sequence[int], first: int, end: int) -> dict[str, float]:
    """Of each unit, the share of its slots that these bundles use, as often as each was executed."""
    times = np.asarray(counts[first:end])
    used = times @ np.asarray(schedule.use[first:end]) / max(int(times.sum()), 1)
    return {unit: float(n) / most for unit, n, most in zip(schedule.units, used, schedule.capacity, strict=True)}


def _total(one: LoopReport) -> float:
    return one.cycles * (1 if one.trips is None else one.trips)


def _inside(inner: ScheduleLoop, outer: ScheduleLoop) -> bool:
    return inner != outer and outer.first <= inner.first and inner.last <= outer.last


def _matching(name: str, program: str, calls: Sequence[KernelCall]) -> KernelCall | None:
    """The call from which an instruction of the compiled program comes: of its shapes, and of its name if there is one.

    The compiler names instructions after kernels, or after the functions around them where those have no name.
    """
    found = re.search(r"operand_layout_constraints=\{(.*?)\}, [a-z_]+=", _line(name, program))
    shapes = re.findall(r"\w+\[([\d,]*)\]", found[1]) if found else []
    alike = [call for call in calls if [",".join(map(str, array.shape)) for array in call.operands] == shapes]
    form = re.compile(r"(.*?)(\.\d+)*")
    named = [call for call in alike if form.fullmatch(name)[1] == re.sub(r"[^\w.]", "_", call.name)]  # type: ignore[index]
    return next(iter(named or alike), None)


def _line(name: str, program: str) -> str:
    found = re.search(rf"%{re.escape(name)} = .*", program)
    return "" if found is None else found[0]


def _operands(name: str, call: KernelCall | None, program: str) -> dict[int, Operand]:
    """The arguments of a kernel as they lie in memory, where their values are known."""
    if call is None:
        return {}
    inside = re.search(r"custom-call\((.*?)\), custom_call_target", _line(name, program))
    names = re.findall(r"%[\w.\-]+", inside[1]) if inside else []
    operands = {}
    for number, (array, value) in enumerate(zip(call.operands, call.values, strict=True)):
        description = f"argument {number} of the kernel, {array.dtype.name}{list(array.shape)}"
        layout = _layout(names[number], program) if number < len(names) else None
        words = None if value is None or layout is None else words_in_memory(value, layout)
        operands[number] = Operand(words, description)
    return operands


def _layout(name: str, program: str) -> str | None:
    """How an array of the compiled program lies in memory: "2,1,0:T(8,128)(4,1)"."""
    found = re.search(rf"{re.escape(name)} = \w+\[[\d,]*\](?:\{{(.*?)\}})? ", program)
    return None if found is None else found[1] or ""


def words_in_memory(value: np.ndarray, layout: str) -> tuple[int, ...] | None:
    """The 32-bit words of an array of integers as it lies in HBM; None where its layout is another than is known here.

    Args:
      value: the array.
      layout: as XLA writes it: dimensions from the last to the first, tiles, and tiles in these tiles for narrow
        numbers, "2,1,0:T(8,128)(4,1)". An array without a tile is laid out row by row.
    """
    order, _, tiles = layout.partition(":")
    found = re.fullmatch(r"(?:T\((?:(\d+),)?(\d+)\)(?:\((\d+),1\))?)?(?:S\(\d+\))?", tiles)
    row_major = order in ("", ",".join(str(axis) for axis in reversed(range(value.ndim))))
    if found is None or not row_major or value.dtype.itemsize not in (1, 2, 4):
        return None
    rows, columns, packed = (int(size or 1) for size in found.groups())
    array = value.reshape((1,) * (2 - value.ndim) + value.shape) if value.ndim < 2 else value
    padding = [(0, 0)] * (array.ndim - 2) + [(0, -array.shape[-2] % rows), (0, -array.shape[-1] % columns)]
    array = np.pad(array, padding)
    height, width = array.shape[-2:]
    array = array.reshape(-1, height // rows, rows // packed, packed, width // columns, columns)
    # By tile, in it by groups of rows that share words, by column, by row of the group.
    data = array.transpose(0, 1, 4, 2, 5, 3).tobytes()
    return tuple(np.frombuffer(data + bytes(-len(data) % 4), np.uint32).tolist())
