"""Pictures of measurements: shares of the bandwidth, rooflines, decode steps by batch size, decoders."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.measure.records import Limits, Measurement
from palladion.benchmarks.plotting import require_matplotlib

COLORS: Final = {"kernel": "#c0392b", "reference": "#2c3e50", "peer": "#7f8c8d"}
DOTS_PER_INCH: Final = 100


def bandwidth(measurements: Sequence[Measurement], device: str, path: Path) -> None:
    """Draws the share of the measured bandwidth that each contender reaches; thin lines are p20 and p80.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    timed = [one for one in measurements if one.best_samples is not None and one.bandwidth]
    labels = [f"{one.workload}  {one.contender}" for one in timed]
    figure = Figure(figsize=(9, 1.2 + 0.24 * max(len(timed), 1)), layout="constrained")
    axes = figure.subplots()
    shares, errors = [], ([], [])  # type: tuple[list[float], tuple[list[float], list[float]]]
    for one in timed:
        samples, best = one.best_samples, one.bytes / (one.bandwidth or 1.0)
        assert samples is not None
        shares.append(100 * best / samples.median)
        errors[0].append(100 * best * (1 / samples.median - 1 / samples.p80))
        errors[1].append(100 * best * (1 / samples.p20 - 1 / samples.median))
    axes.barh(
        range(len(timed)), shares, xerr=errors, color=[COLORS[one.kind] for one in timed], height=0.7, ecolor="#555555"
    )
    axes.set_yticks(range(len(timed)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("bytes that must move over the time, % of the bandwidth measured in between")
    axes.set_title(device, fontsize=9)
    _save(figure, path)


def roofline(measurements: Sequence[Measurement], limits: Limits, device: str, path: Path) -> None:
    """Draws FLOP/s over FLOPs per byte, below the roof of the machine's memory and arithmetic.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    timed = [one for one in measurements if one.best_samples is not None and one.flops]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ridge = limits.matrix_rate / limits.bandwidth
    intensities = [one.flops / one.bytes for one in timed] or [ridge]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot([left, ridge, right], [left * limits.bandwidth, limits.matrix_rate, limits.matrix_rate], color="black")
    contenders = list(dict.fromkeys(one.contender for one in timed))
    for number, contender in enumerate(contenders):
        own = [one for one in timed if one.contender == contender]
        heights = [one.flops / one.best_samples.median for one in own if one.best_samples is not None]
        axes.scatter([one.flops / one.bytes for one in own], heights, s=18, color=f"C{number}", label=contender)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs for each byte that must move",
        ylabel="FLOP/s",
        title=f"{device}: {limits.bandwidth / 1e9:.1f} GB/s, {limits.matrix_rate / 1e12:.3g} TFLOP/s, measured",
    )
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    first, second = figure.subplots(1, 2)
    batches = sorted(points)
    first.plot(batches, [1e3 * points[b]["step"] for b in batches], marker="o", label="measured")
    first.plot(batches, [1e3 * points[b]["limit"] for b in batches], linestyle="--", color="black", label="limit")
    first.set(xlabel="sequences", ylabel="ms a step", title=f"{title}, {device}", ylim=(0, None))
    first.title.set_fontsize(8)
    first.legend(fontsize=8, frameon=False)
    second.plot(batches, [points[b]["tokens"] for b in batches], marker="o")
    second.set(xlabel="sequences", ylabel="tokens/s, all sequences", ylim=(0, None))
    for axes in (first, second):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
    _save(figure, path)


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rates)), layout="constrained")
    axes = figure.subplots()
    medians = [statistics.median(turns) for turns in rates.values()]
    errors = (
        [median - min(turns) for median, turns in zip(medians, rates.values(), strict=True)],
        [max(turns) - median for median, turns in zip(medians, rates.values(), strict=True)],
    )
    colors = [COLORS["reference"], *[COLORS["peer"]] * (len(rates) - 1)]
    axes.barh(range(len(rates)), medians, xerr=errors, color=colors, height=0.6, ecolor="#555555")
    axes.set_yticks(range(len(rates)), list(rates), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    axes.set_title(f"{title}, {device}", fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the same figures give the same file.
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
