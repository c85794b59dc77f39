"""Pictures of measurements: shares of the bandwidth, rooflines, decode steps by batch size, decoders."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from palladion.benchmarks.measure.records import Limits, Measurement
from palladion.benchmarks.plotting import FONTS, label_decades, legend_columns, name_points, require_matplotlib, save
from palladion.benchmarks.text import duration

COLORS: Final = {"kernel": "#c0392b", "reference": "#2c3e50", "peer": "#7f8c8d"}

MARKERS: Final = "osD^vPX*<>"


def bandwidth(measurements: Sequence[Measurement], device: str, path: Path) -> None:
    """Draws the share of the measured bandwidth that each contender reaches; thin lines are p20 and p80.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    timed = [one for one in measurements if one.best_samples is not None and one.bandwidth]
    groups = [list(group) for _, group in itertools.groupby(timed, key=lambda one: (one.operation, one.workload))]
    rows: list[Measurement | str] = []  # a line with the workload, then its contenders
    for group in groups:
        rows += [group[0].workload, *group]
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(10, 1.4 + 0.25 * max(len(rows), 1)), layout="constrained")
        axes = figure.subplots()
        for row, one in enumerate(rows):
            if isinstance(one, str):
                axes.text(0.0, row + 0.1, f" {one}", va="center", fontweight="bold", fontsize=9)
                continue
            samples, best = one.best_samples, 100 * one.bytes / (one.bandwidth or 1.0)
            assert samples is not None
            share = best / samples.median
            errors = [[share - best / samples.p80], [best / samples.p20 - share]]
            axes.barh([row], [share], xerr=errors, color=COLORS[one.kind], height=0.8, ecolor="#555555")
            said = f"  {share:.0f}%, {duration(samples.median)}"
            axes.text(best / samples.p20, row, said, va="center", fontsize=8, color="#333333")
        named = [(row, one.contender) for row, one in enumerate(rows) if isinstance(one, Measurement)]
        axes.set_yticks([row for row, _ in named], [name for _, name in named], fontsize=9)
        axes.set_ylim(max(len(rows), 1) - 0.4, -0.7)
        axes.set_xlim(0, max(110.0, 1.2 * axes.dataLim.x1))
        axes.axvline(100, color="black", linewidth=0.8)
        axes.set_xlabel("bytes that must move over the time, % of the bandwidth measured in between")
        axes.set_title(f"{_operations(timed)} on {device}")
        kinds = [kind for kind in COLORS if any(one.kind == kind for one in timed)]
        axes.legend(handles=[Patch(color=COLORS[kind], label=kind) for kind in kinds], loc="lower right")
        save(figure, path)


def roofline(measurements: Sequence[Measurement], limits: Limits, device: str, path: Path) -> None:
    """Draws FLOP/s over FLOPs per byte, below the roof of the machine's memory and arithmetic.

    Colors and markers stand for contenders, numbers for workloads.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    timed = [one for one in measurements if one.best_samples is not None and one.flops]
    contenders = list(dict.fromkeys(one.contender for one in timed))
    numbers = {name: n + 1 for n, name in enumerate(dict.fromkeys(one.workload for one in timed))}
    points = [
        (one, one.flops / one.bytes, one.flops / one.best_samples.median)
        for one in timed
        if one.best_samples is not None
    ]
    ridge = limits.matrix_rate / limits.bandwidth
    left, right = min([ridge, *(x for _, x, _ in points)]) / 1.6, max([ridge, *(x for _, x, _ in points)]) * 1.6
    lowest = min([limits.matrix_rate / 10, *(y for _, _, y in points)])
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(11, 6), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            [left, ridge, right], [left * limits.bandwidth, limits.matrix_rate, limits.matrix_rate], color="black"
        )
        for one, x, y in points:
            number = contenders.index(one.contender)
            axes.scatter([x], [y], s=22, color=f"C{number % 10}", marker=MARKERS[number % len(MARKERS)])
        axes.set(
            xscale="log",
            yscale="log",
            xlim=(left, right),
            ylim=(lowest / 1.6, limits.matrix_rate * 1.6),
            xlabel="FLOPs for each byte that must move",
            ylabel="FLOP/s",
            title=f"{_operations(timed)} on {device}: {limits.bandwidth / 1e9:,.1f} GB/s, "
            f"{limits.matrix_rate / 1e12:.3g} TFLOP/s, measured",
        )
        label_decades(axes.xaxis)
        label_decades(axes.yaxis, EngFormatter(sep=""))
        handles = [
            Line2D([], [], linestyle="", color=f"C{n % 10}", marker=MARKERS[n % len(MARKERS)], label=name)
            for n, name in enumerate(contenders)
        ]
        handles += [Line2D([], [], linestyle="", label=f"{number}  {name}") for name, number in numbers.items()]
        figure.legend(handles=handles, loc="outside right upper", ncols=legend_columns(len(handles)))
        name_points(axes, [(x, y, str(numbers[one.workload])) for one, x, y in points])
        save(figure, path)


def _operations(measurements: Sequence[Measurement]) -> str:
    return ", ".join(dict.fromkeys(one.operation for one in measurements)) or "nothing timed"


def scaling(points: Mapping[int, Mapping[str, float]], device: str, title: str, path: Path) -> None:
    """Draws the time of a decode step and the tokens per second over the batch size.

    Args:
      points: by batch size: "step" and "limit" (bytes that must be read, at the bandwidth) in seconds, "tokens" a
        second.
      device: where it was measured.
      title: what was measured.
      path: the picture.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        figure.suptitle(f"Decode steps of {title}, on {device}", fontsize=11)
        first, second = figure.subplots(1, 2)
        batches = sorted(points)
        first.plot(batches, [1e3 * points[b]["step"] for b in batches], marker="o", label="measured")
        bytes_alone = [1e3 * points[b]["limit"] for b in batches]
        first.plot(
            batches, bytes_alone, linestyle="--", color="black", label="bytes that must be read, at the bandwidth"
        )
        first.set(xlabel="sequences", ylabel="ms a step", ylim=(0, None))
        first.legend()
        second.plot(batches, [points[b]["tokens"] for b in batches], marker="o")
        second.set(xlabel="sequences", ylabel="tokens/s, all sequences together", ylim=(0, None))
        for axes in (first, second):
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
        save(figure, path)


def decoders(rates: Mapping[str, Sequence[float]], device: str, title: str, path: Path) -> None:
    """Draws the median tokens per second of each decoder; thin lines are its worst and its best turn.

    Args:
      rates: tokens per second in every turn, by decoder; Palladion is the first.
      device: where it was measured.
      title: what was decoded.
      path: the picture.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    medians = [statistics.median(turns) for turns in rates.values()]
    errors = (
        [median - min(turns) for median, turns in zip(medians, rates.values(), strict=True)],
        [max(turns) - median for median, turns in zip(medians, rates.values(), strict=True)],
    )
    colors = [COLORS["reference"], *[COLORS["peer"]] * (len(rates) - 1)]
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9, 1.3 + 0.45 * len(rates)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(rates)), medians, xerr=errors, color=colors, height=0.6, ecolor="#555555")
        for row, (median, turns) in enumerate(zip(medians, rates.values(), strict=True)):
            axes.text(max(turns), row, f"  {median:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(rates)), list(rates))
        axes.set_xlim(0, 1.12 * max(max(turns) for turns in rates.values()))
        axes.invert_yaxis()
        axes.set_xlabel("tokens/s: median, worst and best turn")
        axes.set_title(f"{title}, on {device}")
        save(figure, path)
