"""The table of TPU kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from palladion.benchmarks.static.examiner import Examination
from palladion.benchmarks.static.table import Roof, Table, about_times, microseconds, number, percent, rounded
from palladion.benchmarks.static.tpu.report import KernelReport, agree
from palladion.benchmarks.static.tpu.simulator import Simulation
from palladion.kernels.devices import tpu_chips

HEADINGS: Final = (
    ("chip", 5),
    ("moved MB", 10),
    ("of needed", 11),
    ("memory µs", 11),
    ("compute µs", 12),
    ("estimated µs", 14),
    ("bound", 9),
    ("roofline", 10),
    ("waits for", 13),
    ("step", 16),
    ("busiest", 11),
    ("VMEM MiB", 10),
    ("spills", 13),
)
"""Names and widths of the columns; the kernel's name and grid follow."""

WAITS: Final = {"hbm_to_vmem": "reads", "vmem_to_hbm": "writes", "hbm_to_smem": "scalars"}
"""Names of what a core waits for, by direction of transfers."""

LEGEND: Final = """\
All times are estimated from the compiled schedule; nothing was measured.
  moved      bytes between HBM and the chip, and their ratio to those that must move
  memory     what moves, at the chip's bandwidth
  compute    bundles executed by the busiest core, one a cycle
  estimated  until the last core is done, waits for transfers included
  roofline   bytes that must move, at the chip's bandwidth, in parts of the estimate
  waits for  share of the estimate in which a core waits, and for what most
  step       cycles and trips of the innermost loop that matters, and the unit of whose slots it uses most
  spills     vector stores and loads in the listing for want of registers"""


def _notes(report: KernelReport, found: Examination) -> Iterable[str]:
    """Returns remarks on a kernel."""
    notes = []
    if report.unknown is not None:
        notes.append(f"times are UNKNOWN: {report.unknown}")
    if report.chip.cores > 1 and report.cores == 1:
        notes.append(f"works on one of the device's {report.chip.cores} cores")
    if report.agrees is False:
        notes.append(f"asks for {_moved(report.asked)}, but is compiled to {_moved(report.moved)}")
    return [*notes, *about_times(report.times), *_simulated(report, found.simulations)]


def believed(report: KernelReport, simulation: Simulation) -> bool | None:
    """Whether libtpu's simulator makes the transfers that the kernel's source asks for; None if not known."""
    if simulation.moved is None or report.asked is None:
        return None
    cores = report.cores
    return agree({name: one * cores for name, one in simulation.moved.items()}, report.asked)


def _simulated(report: KernelReport, simulations: tuple[Simulation, ...] | str | None) -> list[str]:
    """Returns a remark on the simulator's result."""
    if simulations is None or isinstance(simulations, str):
        return [simulations] if simulations else []
    simulation = next((one for one in simulations if one.name == report.instruction), None)
    if simulation is None:
        return ["libtpu's simulator: no result"]
    answer, time = believed(report, simulation), microseconds(simulation.cycles / report.chip.clock_hertz)
    if answer is None:
        return [f"libtpu's simulator says {time} µs, but not what it moves: not believed"]
    if not answer:
        return [
            f"libtpu's simulator is not believed: it moves {_moved(simulation.moved)} "
            f"where {_moved(report.asked)} are due"
        ]
    ratio = "" if report.cycles is None else f", the estimate is {report.cycles / simulation.cycles:.2f} times that"
    return [f"libtpu's simulator, which knows no contention: {time} µs{ratio}"]


def _figures(report: KernelReport) -> dict[str, Any]:
    return {
        "bytes_needed": report.bytes_needed,
        "bytes_moved": report.bytes_moved,
        "microseconds": rounded(None if report.seconds is None else report.seconds * 1e6, 3),
        "roofline": rounded(report.roofline, 4),
        "vmem_bytes": report.vmem_bytes,
        "spills": list(report.spills),
    }


def _simulations(found: Examination) -> dict[str, Any]:
    if not isinstance(found.simulations, tuple):
        return {"simulations": found.simulations}
    by_name = {report.instruction: report for report in found.reports if isinstance(report, KernelReport)}
    return {
        "simulations": [
            dataclasses.asdict(one) | {"believed": believed(by_name[one.name], one)} for one in found.simulations
        ]
    }


def _intensity(report: KernelReport) -> float:
    return max(report.bytes_moved or 0, 1) / max(report.busy_cycles or 0, 1)


def _cells(report: KernelReport) -> list[str]:
    step = report.step
    vmem = "-" if report.vmem_bytes is None else f"{report.vmem_bytes / 2**20:.1f}/{report.chip.vmem_bytes >> 20}"
    ratio = None if not report.bytes_needed or report.bytes_moved is None else report.bytes_moved / report.bytes_needed
    return [
        report.chip.name,
        number(None if report.bytes_moved is None else report.bytes_moved / 1e6),
        "-" if ratio is None else f"x {ratio:.2f}",
        microseconds(report.memory_seconds),
        microseconds(report.compute_seconds),
        microseconds(report.seconds),
        report.bound,
        percent(report.roofline),
        _waits(report),
        "-" if step is None else f"{step.cycles:,.0f} x {'?' if step.trips is None else f'{step.trips:,}'}",
        _busiest(report),
        vmem,
        "{}+{}".format(*report.spills),
    ]


def _waits(report: KernelReport) -> str:
    if report.cycles is None:
        return "-"
    most = max(report.stalls, key=lambda direction: report.stalls[direction], default=None)
    share = sum(report.stalls.values()) / report.cycles
    return f"{share:.0%} {WAITS.get(most, most)}" if most is not None else "0%"


def _busiest(report: KernelReport) -> str:
    use = report.step.use if report.step is not None else report.use
    if not use:
        return "-"
    unit = max(use, key=lambda name: use[name])
    return f"{unit} {use[unit]:.0%}"


def _moved(moved: dict[str, Any] | None) -> str:
    parts = (f"{one.transfers:,} transfers {name} of {one.bytes:,} B" for name, one in sorted((moved or {}).items()))
    return ", ".join(parts) or "none"


def _record(report: KernelReport) -> dict[str, Any]:
    fields = dataclasses.asdict(report) | {"chip": report.chip.name}
    derived = ("bytes_moved", "memory_seconds", "compute_seconds", "seconds", "bound", "roofline", "agrees")
    step = None if report.step is None else dataclasses.asdict(report.step) | {"busiest": report.step.busiest}
    return fields | {name: getattr(report, name) for name in derived} | {"step": step}


def _roof(chip: str) -> Roof:
    known = tpu_chips()[chip]
    title = f"TPU {chip}: estimated from the compiled schedule, not measured"
    return Roof(title, known.hbm_bytes_per_second, known.clock_hertz)


TABLE: Final = Table(
    headings=HEADINGS,
    legend=LEGEND,
    cells=_cells,
    notes=_notes,
    fields=_record,
    figures_of=_figures,
    about=_simulations,
    roof=_roof,
    bytes_per_cycle=_intensity,
)
