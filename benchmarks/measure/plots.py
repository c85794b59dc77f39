"""Pictures of results: how close to the bandwidth each contender comes, rooflines, steps of growing batches."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.measure.records import Limits, Row

COLORS: Final = {"kernel": "#c0392b", "reference": "#2c3e50", "peer": "#7f8c8d"}
DOTS_PER_INCH: Final = 100


def require_matplotlib() -> None:
    """Raises ImportError, with what to do, where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib: pip install 'palladion[bench]', or pip install matplotlib")


def bars(rows: Sequence[Row], limits: Limits, device: str, path: Path) -> None:
    """Draws, for each workload, the share of the measured bandwidth that each contender reaches; thin lines: p20, p80.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    del limits
    timed = [row for row in rows if row.samples is not None and row.bandwidth]
    labels = [f"{row.workload}  {row.contender}" for row in timed]
    figure = Figure(figsize=(9, 1.2 + 0.24 * max(len(timed), 1)), layout="constrained")
    axes = figure.subplots()
    shares, errors = [], ([], [])  # type: tuple[list[float], tuple[list[float], list[float]]]
    for row in timed:
        samples, best = row.samples, row.bytes / (row.bandwidth or 1.0)
        assert samples is not None
        shares.append(100 * best / samples.median)
        errors[0].append(100 * best * (1 / samples.median - 1 / samples.p80))
        errors[1].append(100 * best * (1 / samples.p20 - 1 / samples.median))
    axes.barh(
        range(len(timed)), shares, xerr=errors, color=[COLORS[row.kind] for row in timed], height=0.7, ecolor="#555555"
    )
    axes.set_yticks(range(len(timed)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("bytes that must move over the time, % of the bandwidth measured in between")
    axes.set_title(device, fontsize=9)
    _save(figure, path)


def roofline(rows: Sequence[Row], limits: Limits, device: str, path: Path) -> None:
    """Draws FLOP/s over FLOPs a byte, below what this machine's memory and arithmetic allow.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.samples is not None and row.flops]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ridge = limits.matrix_rate / limits.bandwidth
    intensities = [row.flops / row.bytes for row in timed] or [ridge]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot([left, ridge, right], [left * limits.bandwidth, limits.matrix_rate, limits.matrix_rate], color="black")
    contenders = list(dict.fromkeys(row.contender for row in timed))
    for number, contender in enumerate(contenders):
        mine = [row for row in timed if row.contender == contender]
        heights = [row.flops / row.samples.median for row in mine if row.samples is not None]
        axes.scatter([row.flops / row.bytes for row in mine], heights, s=18, color=f"C{number}", label=contender)
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
    """Draws what a decode step takes, and how many tokens a second come out, over the batch.

    Args:
      points: by batch, "step", "limit" (the bytes that must be read over the bandwidth) and "tokens" a second.
      device: where that was measured.
      title: what was measured.
      path: of the picture.

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
    """Draws the median tokens a second of each decoder; thin lines: its worst and its best turn.

    Args:
      rates: by decoder, of every turn; ours is the first.
      device: where that was measured.
      title: what was decoded.
      path: of the picture.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rates)), layout="constrained")
    axes = figure.subplots()
    medians = [statistics.median(of) for of in rates.values()]
    errors = (
        [median - min(of) for median, of in zip(medians, rates.values(), strict=True)],
        [max(of) - median for median, of in zip(medians, rates.values(), strict=True)],
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
    # No date inside: the same figures are the same file.
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
