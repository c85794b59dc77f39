"""What is known of kernels, for people and for programs: a table, JSON, a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.static.roofline import KernelReport, agree
from palladion.benchmarks.static.runner import Row
from palladion.benchmarks.static.simulator import Simulation
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
"""Columns, and how wide they are; the kernel's name and grid follow."""

WAITS: Final = {"hbm_to_vmem": "reads", "vmem_to_hbm": "writes", "hbm_to_smem": "scalars"}
"""What a core waits for, by the direction of transfers."""

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


def heading() -> str:
    """Names of the columns."""
    return "".join(f"{name:>{width}s}" for name, width in HEADINGS) + "  kernel"


def lines(row: Row) -> list[str]:
    """The rows of the table for a workload on a chip, and what there is to say of them."""
    if row.failure is not None:
        first, *rest = row.failure.splitlines()
        return [f"{row.chip:>5s}  {first}", *[f"       {line}" for line in rest]]
    found = []
    for report in row.reports:
        cells = "".join(f"{cell:>{width}s}" for cell, (_, width) in zip(_cells(report), HEADINGS, strict=True))
        found.append(f"{cells}  {report.name} [{_grid(report.grid)}]")
        named = f"{report.name}: " if len(row.reports) > 1 else ""
        said = [*notes(report), *_simulated(report, row.simulations)]
        found += [f"       {named}{note}" for note in said]
    return found


def notes(report: KernelReport) -> list[str]:
    """What else there is to say of a kernel."""
    said = []
    if report.unknown is not None:
        said.append(f"times are UNKNOWN: {report.unknown}")
    if report.chip.cores > 1 and report.cores == 1:
        said.append(f"works on one of the device's {report.chip.cores} cores")
    if report.agrees is False:
        said.append(f"asks for {_moved(report.asked)}, but is compiled to {_moved(report.moved)}")
    if report.times != 1 and report.times is not None:
        said.append(f"is called {report.times} times; figures are those of one call")
    return said


def believed(report: KernelReport, simulation: Simulation) -> bool | None:
    """Whether libtpu's simulator moves what the kernel asks for; None where that cannot be told."""
    if simulation.moved is None or report.asked is None:
        return None
    cores = report.cores
    return agree({name: one * cores for name, one in simulation.moved.items()}, report.asked)


def _simulated(report: KernelReport, simulations: tuple[Simulation, ...] | str | None) -> list[str]:
    if simulations is None or isinstance(simulations, str):
        return [simulations] if simulations else []
    of = next((one for one in simulations if one.name == report.instruction), None)
    if of is None:
        return ["libtpu's simulator: no result"]
    answer, time = believed(report, of), _microseconds(of.cycles / report.chip.clock_hertz)
    if answer is None:
        return [f"libtpu's simulator says {time} µs, but not what it moves: not believed"]
    if not answer:
        return [f"libtpu's simulator is not believed: it moves {_moved(of.moved)} where {_moved(report.asked)} are due"]
    ratio = "" if report.cycles is None else f", the estimate is {report.cycles / of.cycles:.2f} times that"
    return [f"libtpu's simulator, which knows no contention: {time} µs{ratio}"]


def record(row: Row) -> dict[str, Any]:
    """A row as JSON has it."""
    return {
        "workload": str(row.workload),
        "chip": row.chip,
        "failure": row.failure,
        "kernels": [_record(report) for report in row.reports],
        "simulations": _simulations(row),
    }


def figures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is worth keeping and comparing, in short: one entry for each kernel, or failure."""
    found = []
    for row in rows:
        place = {"workload": str(row.workload), "chip": row.chip}
        if row.failure is not None:
            found.append(place | {"failure": row.failure.splitlines()[0]})
        found += [
            place
            | {
                "kernel": report.name,
                "bytes_needed": report.bytes_needed,
                "bytes_moved": report.bytes_moved,
                "microseconds": None if report.seconds is None else round(report.seconds * 1e6, 3),
                "roofline": None if report.roofline is None else round(report.roofline, 4),
                "vmem_bytes": report.vmem_bytes,
                "spills": list(report.spills),
            }
            for report in row.reports
        ]
    return found


def _simulations(row: Row) -> Any:
    if not isinstance(row.simulations, tuple):
        return row.simulations
    by_name = {report.instruction: report for report in row.reports}
    return [dataclasses.asdict(one) | {"believed": believed(by_name[one.name], one)} for one in row.simulations]


def require_matplotlib() -> None:
    """Raises ImportError, with what to do, where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'palladion[bench]', or pip install matplotlib")


def plot(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws a roofline for each generation, with all kernels whose times are known.

    Across: bytes that move for each cycle that a core computes. Up: bytes that must move a second. A kernel can be no
    higher than the chip's bandwidth, and no higher than its bytes for a cycle times its clock.

    Args:
      rows: what to draw.
      path: of the picture, "roofline.png"; with several generations, "roofline-v6e.png" and so on.

    Returns:
      The files.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    chips = [name for name in tpu_chips() if any(row.chip == name for row in rows)]
    written = []
    for name in chips:
        chip = tpu_chips()[name]
        points = [
            (f"{row.workload}" + (f" {one.name}" if len(row.reports) > 1 else ""), one)
            for row in rows
            for one in row.reports
            if row.chip == name and one.roofline is not None
        ]
        figure = Figure(figsize=(12, 7), layout="constrained")
        axes = figure.subplots()
        bandwidth, clock = chip.hbm_bytes_per_second, chip.clock_hertz
        ridge = bandwidth / clock
        intensities = [_intensity(one) for _, one in points]
        left, right = min([ridge / 8, *intensities]) / 1.5, max([ridge * 8, *intensities]) * 1.5
        axes.plot([left, ridge, right], [left * clock / 1e9, bandwidth / 1e9, bandwidth / 1e9], color="black")
        for number, ((label, one), intensity) in enumerate(zip(points, intensities, strict=True)):
            achieved = (one.roofline or 0.0) * bandwidth / 1e9
            axes.scatter([intensity], [achieved], color=f"C{number % 10}", label=f"{number + 1}  {label}")
            axes.annotate(
                str(number + 1), (intensity, achieved), textcoords="offset points", xytext=(5, -9), fontsize=8
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlim=(left, right),
            xlabel="bytes moved per cycle of computing",
            ylabel="GB/s of bytes that must move, estimated",
            title=f"TPU {name}: estimated from the compiled schedule, not measured",
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        if points:
            figure.legend(loc="outside right upper", fontsize=7, frameon=False)
        file = path if len(chips) == 1 else path.with_name(f"{path.stem}-{name}{path.suffix}")
        figure.savefig(file, dpi=120)
        written.append(file)
    return written


def _intensity(report: KernelReport) -> float:
    return max(report.bytes_moved or 0, 1) / max(report.busy_cycles or 0, 1)


def _cells(report: KernelReport) -> list[str]:
    step = report.step
    vmem = "-" if report.vmem_bytes is None else f"{report.vmem_bytes / 2**20:.1f}/{report.chip.vmem_bytes >> 20}"
    ratio = None if not report.bytes_needed or report.bytes_moved is None else report.bytes_moved / report.bytes_needed
    return [
        report.chip.name,
        "-" if report.bytes_moved is None else _number(report.bytes_moved / 1e6),
        "-" if ratio is None else f"x {ratio:.2f}",
        _microseconds(report.memory_seconds),
        _microseconds(report.compute_seconds),
        _microseconds(report.seconds),
        report.bound,
        _percent(report.roofline),
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


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return (
        f"{value:,.0f}" if value >= 100 else f"{value:.{2 - max(math.floor(math.log10(value)), 0)}f}" if value else "0"
    )


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else _number(seconds * 1e6)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _grid(grid: tuple[int, ...]) -> str:
    return " x ".join(str(bound) if bound else "?" for bound in grid) or "1"


def _moved(moved: dict[str, Any] | None) -> str:
    parts = (f"{one.transfers:,} transfers {name} of {one.bytes:,} B" for name, one in sorted((moved or {}).items()))
    return ", ".join(parts) or "none"


def _record(report: KernelReport) -> dict[str, Any]:
    fields = dataclasses.asdict(report) | {"chip": report.chip.name}
    derived = ("bytes_moved", "memory_seconds", "compute_seconds", "seconds", "bound", "roofline", "agrees")
    step = None if report.step is None else dataclasses.asdict(report.step) | {"busiest": report.step.busiest}
    return fields | {name: getattr(report, name) for name in derived} | {"step": step, "estimated": True}
