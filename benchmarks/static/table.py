"""Shows examinations as a table, as JSON and as a picture, for TPUs and GPUs alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from palladion.benchmarks.plotting import FONTS, label_decades, legend_columns, name_points, require_matplotlib, save
from palladion.benchmarks.static.examiner import Examination


@dataclasses.dataclass(frozen=True)
class Roof:
    """The limits of a chip, which no kernel exceeds.

    Attributes:
      title: the chip's name, and where its figures come from.
      bytes_per_second: memory bandwidth.
      clock_hertz: clock rate.
    """

    title: str
    bytes_per_second: float
    clock_hertz: float


@dataclasses.dataclass(frozen=True)
class Table:
    """The presentation of a platform's reports.

    Attributes:
      headings: names and widths of the columns; the kernel's name and grid follow.
      legend: the meaning of the columns.
      cells: returns the cells of a report.
      notes: returns remarks on a report.
      fields: returns everything that is known of a report, for JSON.
      figures_of: returns the key figures of a report.
      about: returns what JSON has of an examination besides its reports.
      roof: returns the limits of a chip.
      bytes_per_cycle: returns the bytes that a kernel moves per cycle of computing.
    """

    headings: tuple[tuple[str, int], ...]
    legend: str
    cells: Callable[[Any], Sequence[str]]
    notes: Callable[[Any, Examination], Iterable[str]]
    fields: Callable[[Any], dict[str, Any]]
    figures_of: Callable[[Any], dict[str, Any]]
    about: Callable[[Examination], dict[str, Any]]
    roof: Callable[[str], Roof]
    bytes_per_cycle: Callable[[Any], float]

    def heading(self) -> str:
        """Formats the names of the columns."""
        return "".join(f"{name:>{width}s}" for name, width in self.headings) + "  kernel"

    def lines(self, found: Examination) -> list[str]:
        """Formats an examination: a line for each kernel, with remarks below, or the failure."""
        width = self.headings[0][1]
        margin = " " * (width + 2)
        if found.failure is not None:
            first, *rest = found.failure.splitlines()
            named = "" if found.backend is None or first.startswith(found.backend) else f"{found.backend}: "
            return [f"{found.chip:>{width}s}  {named}{first}", *[f"{margin}{line}" for line in rest]]
        lines = []
        for report in found.reports:
            cells = zip(self.cells(report), self.headings, strict=True)
            written = "".join(f"{cell:>{width}s}" for cell, (_, width) in cells)
            lines.append(f"{written}  {report.name} [{grid(report.grid)}]")
            prefix = f"{report.name}: " if len(found.reports) > 1 else ""
            lines += [f"{margin}{prefix}{note}" for note in self.notes(report, found)]
        return lines

    def record(self, found: Examination) -> dict[str, Any]:
        """Returns an examination as JSON has it."""
        return {
            "workload": str(found.workload),
            "chip": found.chip,
            "backend": found.backend,
            "failure": found.failure,
            "kernels": [self.fields(report) | {"estimated": True} for report in found.reports],
        } | self.about(found)

    def figures(self, examinations: Sequence[Examination]) -> list[dict[str, Any]]:
        """Returns the key figures: an entry for each kernel or failure."""
        entries = []
        for one in examinations:
            place = {"workload": str(one.workload), "chip": one.chip}
            place |= {} if one.backend is None else {"backend": one.backend}
            if one.failure is not None:
                entries.append(place | {"failure": one.failure.splitlines()[0]})
            entries += [place | {"kernel": report.name} | self.figures_of(report) for report in one.reports]
        return entries

    def plot(self, examinations: Sequence[Examination], path: Path) -> list[Path]:
        """Draws a roofline for each chip, with all kernels whose times are known.

        The horizontal axis has the bytes that move per cycle of computing, the vertical axis the bytes that must move
        per second. A kernel cannot exceed the chip's bandwidth, nor its bytes per cycle times the clock rate.

        Args:
          examinations: what to draw.
          path: the picture, "roofline.png"; with several chips, "roofline-v6e.png" and so on.

        Returns:
          The files.

        Raises:
          ImportError: matplotlib is not installed.
        """
        require_matplotlib("--plot")
        chips = list(dict.fromkeys(one.chip for one in examinations))
        written = []
        for chip in chips:
            file = path if len(chips) == 1 else path.with_name(f"{path.stem}-{chip}{path.suffix}")
            self._plot_chip(self.roof(chip), [one for one in examinations if one.chip == chip], file)
            written.append(file)
        return written

    def _plot_chip(self, roof: Roof, examinations: Sequence[Examination], file: Path) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        operations = list(dict.fromkeys(str(one.workload).partition("/")[0] for one in examinations))
        points = [
            (
                str(one.workload).removeprefix(f"{operations[0]}/" if len(operations) == 1 else "")
                + (f" {report.name}" if len(one.reports) > 1 else ""),
                report,
            )
            for one in examinations
            for report in one.reports
            if report.roofline is not None
        ]
        bandwidth, clock = roof.bytes_per_second, roof.clock_hertz
        ridge = bandwidth / clock
        achieved = [(report.roofline or 0.0) * bandwidth / 1e9 for _, report in points]
        intensities = [self.bytes_per_cycle(report) for _, report in points]
        left, right = min([ridge / 1.5, *intensities]) / 1.3, max([ridge * 1.5, *intensities]) * 1.3
        lowest = min([left * clock / 1e9, *achieved])
        with matplotlib.rc_context(FONTS):
            figure = Figure(figsize=(12, 7), layout="constrained")
            axes = figure.subplots()
            axes.plot([left, ridge, right], [left * clock / 1e9, bandwidth / 1e9, bandwidth / 1e9], color="black")
            for n, ((label, _), x, y) in enumerate(zip(points, intensities, achieved, strict=True)):
                axes.scatter([x], [y], s=22, color=f"C{n % 10}", label=f"{n + 1}  {label}")
            axes.set(
                xscale="log",
                yscale="log",
                xlim=(left, right),
                ylim=(lowest / 1.2, bandwidth / 1e9 * 1.2),
                xlabel="bytes moved per cycle of computing",
                ylabel="GB/s of bytes that must move, estimated",
                title=f"{', '.join(operations)} on {roof.title}",
            )
            for axis in (axes.xaxis, axes.yaxis):
                label_decades(axis)
            if points:
                figure.legend(loc="outside right upper", fontsize=8, ncols=legend_columns(len(points)))
                numbered = zip(intensities, achieved, strict=True)
                name_points(axes, [(x, y, str(n + 1)) for n, (x, y) in enumerate(numbered)])
            save(figure, file)


def number(value: float | None) -> str:
    """Formats a number to three digits, or to all before the point; "-" if it is not known."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - max(math.floor(math.log10(value)), 0)}f}" if value else "0"


def microseconds(seconds: float | None) -> str:
    """Formats a time in µs."""
    return number(None if seconds is None else seconds * 1e6)


def percent(share: float | None) -> str:
    """Formats a share in percent."""
    return "-" if share is None else f"{share:.0%}"


def rounded(value: float | None, digits: int) -> float | None:
    """Rounds a number to that many digits after the point."""
    return None if value is None else round(value, digits)


def grid(bounds: Sequence[int]) -> str:
    """Formats a grid, with "?" for bounds that are decided at run time."""
    return " x ".join(str(bound) if bound else "?" for bound in bounds) or "1"


def about_times(times: int | None) -> list[str]:
    """Returns a remark on a kernel that is called several times."""
    return [] if times in (1, None) else [f"is called {times} times; figures are those of one call"]
