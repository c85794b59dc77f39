"""Text for people: aligned tables, times and amounts with their units."""

from __future__ import annotations

from collections.abc import Sequence


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Formats an aligned table, without columns that are empty in every line.

    The first column is aligned to the left, the others to the right. A line whose second cell is "-" has no figures:
    its third cell is a reason, which may be longer than its column.
    """
    used = [n for n in range(len(headings)) if n == 0 or any(line[n] for line in lines)]
    with_figures = [line for line in lines if line[1] != "-"] or [["-"] * len(headings)]
    widths = {n: max(len(headings[n]), *(len(line[n]) for line in (with_figures if n > 1 else lines))) for n in used}
    return "\n".join(_line(line, used, widths) for line in (headings, *lines))


def _line(line: Sequence[str], used: list[int], widths: dict[int, int]) -> str:
    if line[1] == "-":
        return f"{line[0]:<{widths[0]}s}  {'-':>{widths.get(1, 1)}s}  {line[2]}"
    return "  ".join(f"{line[n]:<{widths[n]}s}" if n == 0 else f"{line[n]:>{widths[n]}s}" for n in used).rstrip()


def duration(seconds: float) -> str:
    """Formats a time with its unit, to three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def amount(count: float) -> str:
    """Formats a number of bytes with its unit, to three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
