"""Examines kernels for a TPU that need not be there: estimates from the compiler's schedule, no measurements.

The schedule is executed as far as scalars decide, for each core of a device (`scalar_core.py`). That gives the bundles
that run, one a cycle; the transfers, with their real sizes; and, with a model of the memory (`transfers.py`), how long
a core waits for them. The transfers are compared with those that the kernel's source asks for (`traffic.py`). From
these:

    memory      bytes moved / bandwidth of the HBM
    compute     bundles executed / clock, on the busiest core
    estimated   time until the last core is done, waits included
    roofline    bytes that must move / bandwidth / estimated

Cores of a device share its bandwidth if both work; if a kernel leaves one idle, the other one gets all of it. Vector
units are assumed to take one cycle for each bundle: where they stall, the estimate is too low.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from palladion.benchmarks.static.kernel_calls import KernelCall, kernel_calls
from palladion.benchmarks.static.opaque import Undecided
from palladion.benchmarks.static.tpu import compiler
from palladion.benchmarks.static.tpu.layouts import words_in_memory
from palladion.benchmarks.static.tpu.report import KernelReport, LoopReport
from palladion.benchmarks.static.tpu.scalar_core import Execution, Operand, ScalarCore
from palladion.benchmarks.static.tpu.schedule import Schedule, ScheduleLoop, parse_schedule, parse_vmem_report
from palladion.benchmarks.static.tpu.traffic import count_traffic
from palladion.benchmarks.static.tpu.transfers import Rate, Traffic
from palladion.kernels.devices import Chip, tpu_chips


def examine(
    function: Callable[..., Any],
    *arguments: Any,
    chip: str = "v6e",
    bytes_needed: int | None = None,
) -> list[KernelReport]:
    """Compiles a function for a TPU that need not be there, and examines each of its Pallas kernels.

    Args:
      function: a function of arrays, jitted or not.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree. Integer arrays should have values: lengths and page
        tables decide what a kernel does.
      chip: a name in `tpu_chips()`.
      bytes_needed: bytes that must move between HBM and the chip, for functions with one kernel. By default every
        argument and result of a kernel moves once.

    Returns:
      A report for each Pallas kernel in the compiled program.

    Raises:
      ValueError: there is no such chip, or bytes_needed is given for several kernels.
      RuntimeError: `compiler.keep_listings` was not called in time.
      Exception: whatever the compiler raises if it refuses the function.
    """
    compiler.keep_listings()
    calls = kernel_calls(function, arguments, compiler.tracing_for(chip))
    compiled, listings = compiler.list_kernels(function, *arguments, chip=chip)
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
    listing: compiler.Listing, call: KernelCall | None, program: str, chip: Chip, bytes_needed: int | None
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
    """Executes a kernel on each core; returns no executions and the reason if something is not known."""
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
    """Returns the speed of a core's transfers if that many cores share the memory."""
    return Rate(
        bytes_per_cycle=chip.hbm_bytes_per_second / chip.clock_hertz / sharing,
        latency_cycles=chip.dma_latency_seconds * chip.clock_hertz,
        granule_bytes=chip.dma_granule_bytes,
    )


def _asked(call: KernelCall | None, chip: Chip) -> dict[str, Traffic] | None:
    """Returns the transfers that a kernel's source asks for; None if they are not known."""
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
    """Returns the share of each unit's slots that a range of bundles uses, weighted by how often each was executed."""
    times = np.asarray(counts[first:end])
    used = times @ np.asarray(schedule.use[first:end]) / max(int(times.sum()), 1)
    return {unit: float(n) / most for unit, n, most in zip(schedule.units, used, schedule.capacity, strict=True)}


def _matching(name: str, program: str, calls: Sequence[KernelCall]) -> KernelCall | None:
    """Returns the call that an instruction of the compiled program comes from: same shapes, and same name if possible.

    The compiler names instructions after kernels, or after the functions around kernels without a name.
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
    """Returns the arguments of a kernel as they lie in memory, with their values if known."""
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
    """Returns the layout of an array of the compiled program: "2,1,0:T(8,128)(4,1)"."""
    found = re.search(rf"{re.escape(name)} = \w+\[[\d,]*\](?:\{{(.*?)\}})? ", program)
    return None if found is None else found[1] or ""
