"""A file of key figures: versions on the first line, then a line for each kernel on each workload and chip."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.static import workloads
from palladion.kernels.devices import tpu_chips

INTRODUCTION: Final = (
    "Each cell has the estimated microseconds, and the time that the bytes which must move need at the chip's "
    "bandwidth,\nas a share of them. No chip has confirmed them.\n"
)
"""First sentences of a page."""

Place = tuple[str, str]
"""A workload and a chip."""


def read(path: Path) -> tuple[dict[str, str], dict[Place, list[dict[str, Any]]]]:
    """Returns the versions with which figures were taken, and the figures of each workload and chip."""
    versions, *entries = map(json.loads, path.read_text().splitlines())
    found: dict[Place, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault((entry["workload"], entry["chip"]), []).append(entry)
    return versions, found


def write(
    path: Path, versions: dict[str, str], entries: Sequence[dict[str, Any]], *, pages: Path | None = None
) -> None:
    """Writes figures, as `Table.figures` returns them.

    Figures of other workloads, chips and backends in an existing file are kept if its versions are the same.

    Args:
      path: the file.
      versions: versions with which the figures were taken.
      entries: the figures.
      pages: folder of `<operation>_static.md`, whose tables of this file's figures are replaced; None for no pages.
    """
    old = {one: tables(path, one) for one in operations(path)} if path.exists() else {}
    found: dict[Place, list[dict[str, Any]]] = {}
    if path.exists():
        before, figures = read(path)
        found = figures if before == versions else {}
    now = {_source(entry) for entry in entries}
    kept = [entry for group in found.values() for entry in group if _source(entry) not in now]
    ordered = sorted([*kept, *entries], key=_source)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (versions, *ordered)))
    if pages is None:
        return
    for operation in operations(path):
        _update(pages / f"{operation}_static.md", operation, old.get(operation, []), tables(path, operation))


def _source(entry: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the workload, the chip and the backend of an entry."""
    return entry["workload"], entry["chip"], entry.get("backend", "")


def _update(page: Path, operation: str, old: Sequence[str], new: Sequence[str]) -> None:
    """Replaces tables in a page; those that have no place in it yet are added to its end."""
    text = page.read_text() if page.exists() else f"# {operation}: what the TPU compiler says\n\n{INTRODUCTION}"
    for before, after in itertools.zip_longest(old, new):
        if before is not None and before in text:
            text = text.replace(before, after or "")
        elif after is not None and after not in text:
            text += f"\n{after}"
    page.write_text(text)


def operations(path: Path) -> list[str]:
    """Returns the names of the operations with figures in a file."""
    return sorted({workload.partition("/")[0] for workload, _ in read(path)[1]} & set(workloads.operations()))


def tables(path: Path, operation: str) -> list[str]:
    """Returns the tables of an operation's figures in a file: cases of real models, then others."""
    kept = names(path, operation)
    models = [case.name for case in workloads.models(operation)]
    groups = [name for name in models if name in kept], [name for name in kept if name not in models]
    return [markdown(path, operation, cases) for cases in groups if cases]


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
