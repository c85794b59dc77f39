r"""Compares two files of results: what got faster or slower beyond noise.

  python -m palladion.benchmarks compare old.jsonl new.jsonl

A contender counts as slower where its median is, by more than --threshold, and even its fast samples (p20) are slower
than the slow ones (p80) were. On a machine whose memory is not always as fast, --by-memory divides times by what
reading memory took in the same minutes: that suits what is bound by memory. Exit status: 0, or 1 where one of ours is
slower, wrong, or gone from a workload that was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from palladion.benchmarks.measure import records as results
from palladion.benchmarks.measure.records import Row
from palladion.kernels.checks import check

HELP: Final = "says what got faster or slower between two files of results"

Change = Literal["faster", "slower", "same", "wrong now", "gone", "not measured", "new"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What became of a contender on a workload.

    Attributes:
      old: its row before, or None.
      new: its row now, or None.
      change: what to say of it.
      factor: how many times as fast it is, 1 where that cannot be told.
    """

    old: Row | None
    new: Row | None
    change: Change
    factor: float = 1.0

    @property
    def row(self) -> Row:
        """The newer of the rows that there are."""
        row = self.new or self.old
        assert row is not None
        return row

    @property
    def worse(self) -> bool:
        """Whether one of ours has become worse."""
        return self.row.kind != "peer" and self.change in ("slower", "wrong now", "gone")


def compare(
    old: Sequence[Row], new: Sequence[Row], *, threshold: float = 0.05, by_memory: bool = False
) -> list[Difference]:
    """Compares rows of the same operation, workload and contender.

    Args:
      old: rows before.
      new: rows now.
      threshold: changes of the median by less than this share are none.
      by_memory: compares times in parts of what reading memory took meanwhile, where both rows know it.
    """
    before, now = {row.key: row for row in old}, {row.key: row for row in new}
    measured = {key[:2] for key in now}
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        was, is_ = before.get(key), now.get(key)
        if was is not None and was.samples is None and (is_ is None or is_.samples is None):
            continue  # never was measured
        if is_ is None or (was is not None and is_.samples is None):
            wrong = is_ is not None and is_.status in ("wrong", "failed")
            gone: Change = "gone" if key[:2] in measured else "not measured"
            found.append(Difference(was, is_, "wrong now" if wrong else gone))
        elif was is None or was.samples is None:
            if is_.samples is not None:
                found.append(Difference(was, is_, "new"))
        else:
            found.append(_of_times(was, is_, threshold, by_memory))
    return found


def _of_times(old: Row, new: Row, threshold: float, by_memory: bool) -> Difference:
    before, now = old.samples, new.samples
    assert before is not None
    assert now is not None
    # Time in which memory would have moved a byte.
    units = (old.bandwidth, new.bandwidth) if by_memory and old.bandwidth and new.bandwidth else (1.0, 1.0)
    factor = before.median * units[0] / (now.median * units[1])
    if factor < 1 - threshold and now.p20 * units[1] > before.p80 * units[0]:
        return Difference(old, new, "slower", factor)
    if factor > 1 + threshold and now.p80 * units[1] < before.p20 * units[0]:
        return Difference(old, new, "faster", factor)
    return Difference(old, new, "same", factor)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("old", type=Path, help="a file that `run --json` has written")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--threshold", type=float, default=0.05, metavar="SHARE", help="changes below are none (0.05)")
    parser.add_argument("--by-memory", action="store_true", help="times in parts of what reading memory took")
    parser.add_argument("--all", action="store_true", help="also what stayed the same")


def run(arguments: argparse.Namespace) -> int:
    """Prints what changed."""
    check(arguments.threshold >= 0, "--threshold", arguments.threshold, "0 or more")
    (was, _, old), (is_, _, new) = results.read(arguments.old), results.read(arguments.new)
    if was["device"] != is_["device"]:
        print(f"note: measured on {was['device']} before, on {is_['device']} now")
    differences = compare(old, new, threshold=arguments.threshold, by_memory=arguments.by_memory)
    shown = [one for one in differences if arguments.all or one.change != "same"]
    if shown:
        print(results.table(("workload", "contender", "change", "times as fast", "before", "now"), _lines(shown)))
    counts = {change: sum(1 for one in differences if one.change == change) for change in ("faster", "slower", "same")}
    print(", ".join(f"{count} {change}" for change, count in counts.items()) + f" of {len(differences)} compared")
    return 1 if any(one.worse for one in differences) else 0


def _lines(differences: Sequence[Difference]) -> list[tuple[str, ...]]:
    def time(row: Row | None) -> str:
        return results.duration(row.samples.median) if row is not None and row.samples is not None else ""

    return [
        (
            f"{one.row.operation} {one.row.workload}",
            one.row.contender,
            one.change,
            f"{one.factor:.2f}" if one.change in ("faster", "slower", "same") else "",
            time(one.old),
            time(one.new),
        )
        for one in differences
    ]
