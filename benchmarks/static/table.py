"""What is known of kernels, for people and for programs: a table, JSON, a picture; the same for TPUs and for GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from palladion.benchmarks.static.examiner import Examination


@dataclasses.dataclass(frozen=True)
class Roof:
    """What no kernel exceeds on a chip.

    Attributes:
      title: of the chip, and how its figures are known.
      bytes_per_second: bandwidth of its memory.
      clock_hertz: cycles per second.
    """

    title: str
    bytes_per_second: float
    clock_hertz: float


@dataclasses.dataclass(frozen=True)
class Table:
    """How the reports of an instrument are shown.

    Attributes:
      headings: columns, and how wide they are; the kernel's name and grid follow.
      legend: what the columns mean.
      cells: of a report, one for each column.
      notes: what else there is to say of a report.
      fields: all that is known, as JSON has it.
      figures_of: what is worth keeping and comparing.
      about_row: what JSON has of a row besides its reports.
      roof: of a chip.
      bytes_per_cycle: of a report, bytes that move for each cycle of computing.
    """

    headings: tuple[tuple[str, int], ...]
    legend: str
    cells: Callable[[Any], Sequence[str]]
    notes: Callable[[Any, Examination], Iterable[str]]
    fields: Callable[[Any], dict[str, Any]]
    figures_of: Callable[[Any], dict[str, Any]]
    about_row: Callable[[Examination], dict[str, Any]]
    roof: Callable[[str], Roof]
    bytes_per_cycle: Callable[[Any], float]

    def heading(self) -> str:
        """Names of the columns."""
        return "".join(f"{name:>{width}s}" for name, width in self.headings) + "  kernel"

    def lines(self, row: Examination) -> list[str]:
        """The rows of the table for a workload on a chip, and what there is to say of them."""
        width = self.headings[0][1]
        margin = " " * (width + 2)
        if row.failure is not None:
            first, *rest = row.failure.splitlines()
            return [f"{row.chip:>{width}s}  {first}", *[f"{margin}{line}" for line in rest]]
        found = []
        for report in row.reports:
            cells = zip(self.cells(report), self.headings, strict=True)
            written = "".join(f"{cell:>{width}s}" for cell, (_, width) in cells)
            found.append(f"{written}  {report.name} [{grid(report.grid)}]")
            named = f"{report.name}: " if len(row.reports) > 1 else ""
            found += [f"{margin}{named}{note}" for note in self.notes(report, row)]
        return found

    def record(self, row: Examination) -> dict[str, Any]:
        """A row as JSON has it."""
        return {
            "workload": str(row.workload),
            "chip": row.chip,
            "failure": row.failure,
            "kernels": [self.fields(report) | {"estimated": True} for report in row.reports],
        } | self.about_row(row)

    def figures(self, rows: Sequence[Examination]) -> list[dict[str, Any]]:
        """What is worth keeping and comparing, in short: one entry for each kernel, or failure."""
        found = []
        for row in rows:
            place = {"workload": str(row.workload), "chip": row.chip}
            if row.failure is not None:
                found.append(place | {"failure": row.failure.splitlines()[0]})
            found += [place | {"kernel": report.name} | self.figures_of(report) for report in row.reports]
        return found

    def plot(self, rows: Sequence[Examination], path: Path) -> list[Path]:
        """Draws a roofline for each chip, with all kernels whose times are known.

        Across: bytes that move for each cycle of computing. Up: bytes that must move a second. A kernel can be no
        higher than the chip's bandwidth, and no higher than its bytes for a cycle times the clock.

        Args:
          rows: what to draw.
          path: of the picture, "roofline.png"; with several chips, "roofline-v6e.png" and so on.

        Returns:
          The files.

        Raises:
          ImportError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        chips = list(dict.fromkeys(row.chip for row in rows))
        written = []
        for name in chips:
            roof = self.roof(name)
            points = [
                (f"{row.workload}" + (f" {one.name}" if len(row.reports) > 1 else ""), one)
                for row in rows
                for one in row.reports
                if row.chip == name and one.roofline is not None
            ]
            figure = Figure(figsize=(12, 7), layout="constrained")
            axes = figure.subplots()
            bandwidth, clock = roof.bytes_per_second, roof.clock_hertz
            ridge = bandwidth / clock
            intensities = [self.bytes_per_cycle(one) for _, one in points]
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
                title=roof.title,
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


def require_matplotlib() -> None:
    """Raises ImportError, with what to do, where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'palladion[bench]', or pip install matplotlib")


def number(value: float | None) -> str:
    """Three digits, or all before the point; "-" for what is not known."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - max(math.floor(math.log10(value)), 0)}f}" if value else "0"


def microseconds(seconds: float | None) -> str:
    """A time in µs."""
    return number(None if seconds is None else seconds * 1e6)


def percent(share: float | None) -> str:
    """A share of one."""
    return "-" if share is None else f"{share:.0%}"


def rounded(value: float | None, digits: int) -> float | None:
    """A number with so many digits behind the point."""
    return None if value is None else round(value, digits)


def grid(bounds: Sequence[int]) -> str:
    """A grid; "?" for a bound that is decided at run time."""
    return " x ".join(str(bound) if bound else "?" for bound in bounds) or "1"


def about_times(times: int | None) -> list[str]:
    """What to say of a kernel that is called several times."""
    return [] if times in (1, None) else [f"is called {times} times; figures are those of one call"]
