"""Kernel times that were measured on a GPU, beside their estimates: `results/h200_kernels.jsonl`.

The file's first line says where the times come from; each other line is a kernel: its measured time, its work as
`work.py` counts it, and whether the constants of `prediction.py` were fitted to it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.static.gpu.prediction import Timing, limits, not_estimated, seconds
from palladion.benchmarks.static.gpu.work import Work

FITTED: Final = ("strip_seconds", "latency_seconds", "cycles_per_instruction")
"""Constants that are fitted; the others were measured."""

STEPS: Final = (1.1, 1.01, 1.001)
"""Factors by which constants are changed while they are fitted."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A kernel that was measured.

    Attributes:
      group: what it computes.
      case: its shape and its block sizes.
      clock: "profiler", or "wall" for a wall-clock time less what is not the kernel.
      seconds: the measured time.
      fitted: whether constants were fitted to it.
      work: its work.
    """

    group: str
    case: str
    clock: str
    seconds: float
    fitted: bool
    work: Work


def read(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Returns where the times come from, and the kernels."""
    provenance, *entries = map(json.loads, path.read_text().splitlines())
    kernels = [
        Measured(
            group=entry["group"],
            case=entry["case"],
            clock=entry["clock"],
            seconds=entry["microseconds"] * 1e-6,
            fitted=entry["fitted"],
            work=Work(**entry["work"]),
        )
        for entry in entries
    ]
    return provenance, kernels


def errors(kernels: Sequence[Measured], timing: Timing) -> list[float]:
    """Returns estimated / measured - 1 of the kernels that are estimated."""
    return [seconds(one.work, timing) / one.seconds - 1 for one in kernels if not_estimated(one.work, timing) is None]


def fit(kernels: Sequence[Measured], timing: Timing) -> Timing:
    """Fits the constants `FITTED` to kernels: the least sum of squared logarithms of estimated / measured.

    Args:
      kernels: the kernels.
      timing: constants to begin with.
    """

    def loss(constants: Timing) -> float:
        return sum(math.log(seconds(one.work, constants) / one.seconds) ** 2 for one in kernels)

    for step in STEPS:
        improved = True
        while improved:
            tried = [
                dataclasses.replace(timing, **{name: getattr(timing, name) * factor})
                for name in FITTED
                for factor in (step, 1 / step)
            ]
            best = min(tried, key=loss)
            improved = loss(best) < loss(timing)
            timing = best if improved else timing
    return timing


def summary(kernels: Sequence[Measured], timing: Timing) -> str:
    """Formats a Markdown table of the errors of each group, fitted kernels apart from others."""
    groups: dict[tuple[str, bool], list[Measured]] = collections.defaultdict(list)
    for one in kernels:
        groups[one.group, one.fitted].append(one)
    lines = ["| kernels | number | median error | largest error |", "|---|---|---|---|"]
    for (group, fitted), members in groups.items():
        found = errors(members, timing)
        name = f"{group} (fitted)" if fitted else group
        lines.append(f"| {name} | {len(members)} | {_sizes(found)} |")
    for name, fitted in (("all fitted kernels", True), ("**all others**", False)):
        members = [one for one in kernels if one.fitted is fitted]
        lines.append(f"| {name} | {len(members)} | {_sizes(errors(members, timing))} |")
    return "\n".join(lines) + "\n"


def table(kernels: Sequence[Measured], timing: Timing) -> str:
    """Formats a Markdown table of all kernels: measured and estimated times."""
    lines = ["| kernel | strip, bytes | measured µs | estimated µs | error | limit |", "|---|---|---|---|---|---|"]
    for one in kernels:
        cells = [f"{one.group}: {one.case}", f"{one.work.strip_bytes:,}", f"{one.seconds * 1e6:.1f}"]
        if not_estimated(one.work, timing) is None:
            estimated, apart = seconds(one.work, timing), limits(one.work, timing)
            cells += [
                f"{estimated * 1e6:.1f}",
                f"{estimated / one.seconds - 1:+.0%}",
                max(apart, key=apart.__getitem__),
            ]
        else:
            cells += ["-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sizes(found: Sequence[float]) -> str:
    if not found:
        return "not estimated | "
    sizes = [abs(one) for one in found]
    return f"{statistics.median(sizes):.0%} | {max(sizes):.0%}"
