"""Tables of contests, and their summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from palladion.benchmarks.static.peers.contests import Contest
from palladion.benchmarks.static.peers.estimates import Estimate, best_of_each, best_peer, ours, ratio
from palladion.kernels.devices import tpu_chips

HEADINGS: Final = (
    ("chip", 5),
    ("moved MB", 10),
    ("of needed", 11),
    ("memory µs", 11),
    ("compute µs", 12),
    ("estimated µs", 14),
    ("roofline", 10),
    ("of ours", 9),
)
"""Names and widths of the columns; the contender's name follows."""

SUMMARY: Final = (("chip", 5), ("ours µs", 10), ("roofline", 10), ("peer µs", 10), ("of ours", 9))

LEGEND: Final = """\
All times are estimated from the compiled schedule; nothing was measured.
  moved      bytes between HBM and the chip, and their ratio to those that must move, scales of the cache included
  memory     what moves, at the chip's bandwidth; >= where that is not known: what must move
  compute    bundles executed by the busiest core, one a cycle
  estimated  until the last core is done, waits for transfers included; UNKNOWN where data decide it
  roofline   bytes that must move, at the chip's bandwidth, in parts of the estimate
  of ours    the estimate in parts of our best one: above 1 ours is faster
Only Pallas kernels count: what XLA does around them, ours or theirs, does not. Of each contender its best setting is
shown."""


def heading() -> str:
    """Formats the names of the columns."""
    return _row([name for name, _ in HEADINGS], HEADINGS, "kernel")


def lines(results: Sequence[Estimate]) -> list[str]:
    """Formats the contenders in a contest on a chip, each with its best setting."""
    mine = ours(results)
    found = []
    for one in best_of_each(results):
        who = f"{one.contender}, {one.setting}" if one.setting else one.contender
        if one.failure is not None:
            found.append(f"{one.chip:>5s}  {who}: {one.failure}")
            continue
        found.append(_row(_cells(one, mine), HEADINGS, who))
        if one.unknown is not None:
            found.append(f"       times are UNKNOWN: {one.unknown}")
    return found


def _row(cells: Sequence[str], columns: Sequence[tuple[str, int]], who: str) -> str:
    return "".join(f"{cell:>{width}s}" for cell, (_, width) in zip(cells, columns, strict=True)) + f"  {who}"


def _cells(one: Estimate, mine: Estimate | None) -> tuple[str, ...]:
    moved = one.bytes_moved
    memory = f">={one.needed_seconds * 1e6:.1f}" if one.memory_seconds is None else f"{one.memory_seconds * 1e6:.1f}"
    return (
        one.chip,
        "-" if moved is None else f"{moved / 1e6:.1f}",
        "-" if moved is None else f"{moved / one.bytes_needed:.2f} x",
        memory,
        "-" if one.compute_seconds is None else f"{one.compute_seconds * 1e6:.1f}",
        "UNKNOWN" if one.seconds is None else f"{one.seconds * 1e6:.1f}",
        "-" if one.roofline is None else f"{one.roofline:.0%}",
        _times(ratio(one, mine)),
    )


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def summary(contests: Sequence[Contest], results: Sequence[Estimate]) -> list[str]:
    """Formats our estimate and the best of the others, for each contest and chip."""
    found = [_row([name for name, _ in SUMMARY], SUMMARY, "best peer")]
    for contest in contests:
        of_contest = [one for one in results if one.contest == contest.name]
        found += ["", contest.name]
        for chip in dict.fromkeys(one.chip for one in of_contest):
            on_chip = [one for one in of_contest if one.chip == chip]
            mine, theirs = ours(on_chip), best_peer(on_chip)
            cells = (
                chip,
                "-" if mine is None or mine.seconds is None else f"{mine.seconds * 1e6:.1f}",
                "-" if mine is None or mine.roofline is None else f"{mine.roofline:.0%}",
                "-" if theirs is None or theirs.seconds is None else f"{theirs.seconds * 1e6:.1f}",
                _times(ratio(theirs, mine)),
            )
            who = "none that is known" if theirs is None else f"{theirs.contender}, {theirs.setting}"
            found.append(_row(cells, SUMMARY, who))
    return found


def markdown(operation: str, results: Sequence[Estimate]) -> str:
    """Formats a Markdown table of an operation's contests: our time, and the best of the others in parts of it."""
    of_operation = [one for one in results if one.contest.startswith(f"{operation}/")]
    chips = [chip for chip in tpu_chips() if chip in {one.chip for one in of_operation}]
    found = [f"| ours in µs, the best peer's in parts of it | {' | '.join(chips)} |", f"|---|{'---|' * len(chips)}"]
    for contest in dict.fromkeys(one.contest for one in of_operation):
        cells = [
            _contest([one for one in of_operation if (one.contest, one.chip) == (contest, chip)]) for chip in chips
        ]
        found.append(f"| `{contest.removeprefix(f'{operation}/')}` | {' | '.join(cells)} |")
    return "\n".join(found) + "\n"


def _contest(results: Sequence[Estimate]) -> str:
    """Formats our time and the best of the others."""
    mine, theirs = ours(results), best_peer(results)
    if mine is None or mine.seconds is None:
        return "-"
    factor = ratio(theirs, mine)
    other = "no peer" if theirs is None or factor is None else f"{factor:.2f} x ({theirs.package})"
    return f"{mine.seconds * 1e6:.3g}, {other}"
