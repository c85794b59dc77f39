"""A file of key figures: versions on the first line, then a line for each kernel on each workload and chip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palladion.kernels.devices import tpu_chips

Place = tuple[str, str]
"""A workload and a chip."""


def read(path: Path) -> tuple[dict[str, str], dict[Place, list[dict[str, Any]]]]:
    """Returns the versions with which figures were taken, and the figures of each workload and chip."""
    versions, *entries = map(json.loads, path.read_text().splitlines())
    found: dict[Place, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault((entry["workload"], entry["chip"]), []).append(entry)
    return versions, found


def write(path: Path, versions: dict[str, str], entries: Sequence[dict[str, Any]]) -> None:
    """Writes figures, as `Table.figures` returns them.

    Figures of other workloads and chips in an existing file are kept if its versions are the same.
    """
    found: dict[Place, list[dict[str, Any]]] = {}
    if path.exists():
        before, kept = read(path)
        found = kept if before == versions else {}
    now = {(entry["workload"], entry["chip"]) for entry in entries}
    found = {place: kept for place, kept in found.items() if place not in now}
    for entry in entries:
        found.setdefault((entry["workload"], entry["chip"]), []).append(entry)
    ordered = [entry for place in sorted(found) for entry in found[place]]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (versions, *ordered)))


def names(path: Path, operation: str) -> list[str]:
    """Returns the names of an operation's cases in a file."""
    _, found = read(path)
    kept = dict.fromkeys(workload for workload, _ in found)
    return [workload.removeprefix(f"{operation}/") for workload in kept if workload.startswith(f"{operation}/")]


def markdown(path: Path, operation: str, cases: Sequence[str]) -> str:
    """Formats a Markdown table of an operation's cases: estimated time and share of the bandwidth on each chip."""
    _, found = read(path)
    wanted = [f"{operation}/{name}" for name in cases]
    places = [place for place in found if place[0] in wanted]
    chips = [chip for chip in tpu_chips() if chip in {chip for _, chip in places}]
    lines = [f"| µs, roofline | {' | '.join(chips)} |", f"|---|{'---|' * len(chips)}"]
    for workload in wanted:
        cells = [_cell(found.get((workload, chip), [])) for chip in chips]
        lines.append(f"| `{workload.removeprefix(f'{operation}/')}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(entries: Sequence[dict[str, Any]]) -> str:
    """Formats the figures of all kernels of a workload together."""
    if not entries or any("failure" in entry for entry in entries):
        return "-"
    if any(entry["microseconds"] is None for entry in entries):
        return "UNKNOWN"
    microseconds = sum(entry["microseconds"] for entry in entries)
    time = f"{microseconds:.3g}" if microseconds < 1000 else f"{microseconds:,.0f}"
    return time if len(entries) > 1 else f"{time}, {entries[0]['roofline']:.0%}"
