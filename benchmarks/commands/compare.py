r"""Compares two files of measurements: what got faster or slower, beyond noise.

  python -m palladion.benchmarks compare old.jsonl new.jsonl

Times are device times where both files have them, else wall clock. A contender is slower if its median is slower by
more than --threshold and even its p20 is slower than its p80 was before. On a machine whose memory bandwidth varies,
--by-memory divides times by the time of reading memory in the same minutes, which suits contenders that are bound by
memory. The exit status is 1 if a kernel or the reference is slower, wrong, or missing from a workload that was
measured; otherwise 0.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from palladion.benchmarks import text
from palladion.benchmarks.measure import records
from palladion.benchmarks.measure.records import Measurement
from palladion.kernels.checks import check

HELP: Final = "says what got faster or slower between two files of results"

Change = Literal["faster", "slower", "same", "wrong now", "gone", "not measured", "new"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two measurements of a contender on a workload, compared.

    Attributes:
      old: the measurement before, or None.
      new: the measurement now, or None.
      change: the kind of change.
      factor: speedup; 1 where there is none to tell.
    """

    old: Measurement | None
    new: Measurement | None
    change: Change
    factor: float = 1.0

    @property
    def newest(self) -> Measurement:
        """The newer of the measurements that there are."""
        newest = self.new or self.old
        assert newest is not None
        return newest

    @property
    def worse(self) -> bool:
        """Whether a kernel or the reference has become worse."""
        return self.newest.kind != "peer" and self.change in ("slower", "wrong now", "gone")


def compare(
    old: Sequence[Measurement], new: Sequence[Measurement], *, threshold: float = 0.05, by_memory: bool = False
) -> list[Difference]:
    """Compares measurements of the same operation, workload and contender.

    Args:
      old: measurements before.
      new: measurements now.
      threshold: relative change of the median below which nothing has changed.
      by_memory: divides times by the time of reading memory in the same minutes, where both are known.
    """
    before, now = {one.key: one for one in old}, {one.key: one for one in new}
    measured = {key[:2] for key in now}
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        was, is_ = before.get(key), now.get(key)
        if was is not None and was.samples is None and (is_ is None or is_.samples is None):
            continue  # it was never measured
        if is_ is None or (was is not None and is_.samples is None):
            wrong = is_ is not None and is_.status in ("wrong", "failed")
            gone: Change = "gone" if key[:2] in measured else "not measured"
            found.append(Difference(was, is_, "wrong now" if wrong else gone))
        elif was is None or was.samples is None:
            if is_.samples is not None:
                found.append(Difference(was, is_, "new"))
        else:
            found.append(_compare_times(was, is_, threshold, by_memory))
    return found


def _compare_times(old: Measurement, new: Measurement, threshold: float, by_memory: bool) -> Difference:
    samples = records.by_the_same_clock(old, new)
    assert samples is not None
    before, now = samples
    # Seconds times bytes per second: how many bytes memory would have moved meanwhile.
    units = (old.bandwidth, new.bandwidth) if by_memory and old.bandwidth and new.bandwidth else (1.0, 1.0)
    factor = before.median * units[0] / (now.median * units[1])
    if factor < 1 - threshold and now.p20 * units[1] > before.p80 * units[0]:
        return Difference(old, new, "slower", factor)
    if factor > 1 + threshold and now.p80 * units[1] < before.p20 * units[0]:
        return Difference(old, new, "faster", factor)
    return Difference(old, new, "same", factor)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("old", type=Path, help="a file that `run --json` has written")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument(
        "--threshold", type=float, default=0.05, metavar="SHARE", help="smaller changes do not count (0.05)"
    )
    parser.add_argument("--by-memory", action="store_true", help="divide times by that of reading memory")
    parser.add_argument("--all", action="store_true", help="also list what stayed the same")


def run(arguments: argparse.Namespace) -> int:
    """Prints what changed."""
    check(arguments.threshold >= 0, "--threshold", arguments.threshold, "0 or more")
    (was, _, old), (is_, _, new) = records.read(arguments.old), records.read(arguments.new)
    if was["device"] != is_["device"]:
        print(f"note: measured on {was['device']} before, on {is_['device']} now")
    differences = compare(old, new, threshold=arguments.threshold, by_memory=arguments.by_memory)
    shown = [one for one in differences if arguments.all or one.change != "same"]
    if shown:
        print(text.table(("workload", "contender", "change", "times as fast", "before", "now"), _lines(shown)))
    counts = {change: sum(1 for one in differences if one.change == change) for change in ("faster", "slower", "same")}
    print(", ".join(f"{count} {change}" for change, count in counts.items()) + f" of {len(differences)} compared")
    return 1 if any(one.worse for one in differences) else 0


def _lines(differences: Sequence[Difference]) -> list[tuple[str, ...]]:
    def time(one: Measurement | None) -> str:
        return text.duration(one.best_samples.median) if one is not None and one.best_samples is not None else ""

    return [
        (
            f"{one.newest.operation} {one.newest.workload}",
            one.newest.contender,
            one.change,
            f"{one.factor:.2f}" if one.change in ("faster", "slower", "same") else "",
            time(one.old),
            time(one.new),
        )
        for one in differences
    ]
