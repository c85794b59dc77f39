"""Estimates of contenders in contests, and the best of them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from palladion.benchmarks.static.examiner import Examination, Report
from palladion.benchmarks.static.peers.by_name import workload_name
from palladion.benchmarks.static.peers.contests import OURS, Contender, Contest
from palladion.benchmarks.static.workloads import WorkloadName
from palladion.kernels.devices import tpu_chips

LONGEST: Final = 150
"""Maximum length of a compiler's message."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimates for a contender in a contest on a chip; times are None if not known.

    Attributes:
      contest: name of the contest.
      chip: a name in `tpu_chips()`.
      contender: name of the contender.
      package: distribution that it comes from.
      setting: how it was called.
      kernels: number of its Pallas kernels; times are those of all of them together.
      bytes_needed: bytes that must move between HBM and the chip.
      bytes_moved: bytes that do move.
      compute_seconds: time of the bundles, without any wait.
      seconds: time of the kernels, waits included.
      unknown: why times are not known; None if they are.
      failure: why there is no kernel; None if there is one.
    """

    contest: str
    chip: str
    contender: str
    package: str
    setting: str
    kernels: int
    bytes_needed: int
    bytes_moved: int | None
    compute_seconds: float | None
    seconds: float | None
    unknown: str | None
    failure: str | None

    @property
    def needed_seconds(self) -> float:
        """Memory bound: bytes that must move, at the chip's bandwidth."""
        return self.bytes_needed / tpu_chips()[self.chip].hbm_bytes_per_second

    @property
    def memory_seconds(self) -> float | None:
        """Time of the bytes that do move, at the chip's bandwidth."""
        if self.bytes_moved is None:
            return None
        return self.bytes_moved / tpu_chips()[self.chip].hbm_bytes_per_second

    @property
    def roofline(self) -> float | None:
        """Memory bound in parts of the estimated time."""
        return None if self.seconds is None else self.needed_seconds / self.seconds

    @property
    def is_ours(self) -> bool:
        """Whether the contender is Palladion."""
        return self.contender == OURS

    def record(self) -> dict[str, Any]:
        """Returns all figures, as JSON has them."""
        derived = ("needed_seconds", "memory_seconds", "roofline")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived} | {"estimated": True}


FIELDS: Final = tuple(field.name for field in dataclasses.fields(Estimate))


def from_record(record: dict[str, Any]) -> Estimate:
    """Returns the estimate that `Estimate.record` has made a record of."""
    return Estimate(**{name: record[name] for name in FIELDS})


def estimate_of(found: Examination, contest: Contest, contender: Contender, setting: str) -> Estimate:
    """Adds up the reports on a contender's kernels."""
    reports = found.reports
    unknown = next((one.unknown for one in reports if one.unknown is not None), None)
    # A kernel whose call was not found has no grid; others' kernels are not called in loops.
    if unknown is None and any(one.times is None and one.grid for one in reports):
        unknown = "how often a kernel is called is decided at run time"
    known = found.failure is None and unknown is None
    return Estimate(
        contest=contest.name,
        chip=found.chip,
        contender=contender.name,
        package=contender.package,
        setting=setting,
        kernels=len(reports),
        bytes_needed=contest.bytes_needed,
        bytes_moved=_total(reports, "bytes_moved") if known else None,
        compute_seconds=_total(reports, "compute_seconds") if known else None,
        seconds=_total(reports, "seconds") if known else None,
        unknown=unknown,
        failure=None if found.failure is None else short_message(found.failure),
    )


def _total(reports: Sequence[Report], name: str) -> Any:
    values = [getattr(one, name) for one in reports]
    if any(value is None for value in values):
        return None
    return sum(value * (1 if one.times is None else one.times) for one, value in zip(reports, values, strict=True))


def short_message(message: str) -> str:
    """Shortens a compiler's or a package's message to one line."""
    line = " ".join(message.split())
    line = re.sub(r"Mosaic failed to compile TPU kernel with MLIR module name `\S*`( HLO name `\S*`)?: ", "", line)
    line = re.sub(r"^(\w*Error): (INTERNAL: )?", "", line)
    line = re.split(r" (?:See https?://|at location:|The MLIR operation involved)", line)[0]
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 2]} …"


class WorkloadExaminer(Protocol):
    """The interface of an `Examiner`."""

    def examine(self, workload: WorkloadName, chip: str) -> Examination:
        """Examines a workload for a chip."""


def hold_contests(
    contests: Sequence[Contest],
    chips: Sequence[str],
    examiner: WorkloadExaminer,
    *,
    takes_part: Callable[[Contender], bool] = lambda _: True,
    known: Sequence[Estimate] = (),
) -> Iterator[tuple[Contest, str, list[Estimate]]]:
    """Examines all contenders of contests, chip by chip.

    Args:
      contests: the contests.
      chips: names in `tpu_chips()`.
      examiner: examines the workloads.
      takes_part: whether a contender takes part.
      known: earlier estimates, which are not made again.

    Yields:
      A contest, a chip, and the estimates so far, after every estimate, so that an interruption loses no more than one.
    """
    earlier = {(one.contest, one.chip, one.contender, one.setting): one for one in known}
    for contest in contests:
        contenders = [contender for contender in contest.contenders if takes_part(contender)]
        settings = [(contender, one) for contender in contenders for one in contender.settings(contest.case)]
        for chip in chips:
            results: list[Estimate] = []
            for contender, setting in settings:
                found = earlier.get((contest.name, chip, contender.name, setting))
                if found is None:
                    examination = examiner.examine(workload_name(contest, contender, setting), chip)
                    found = estimate_of(examination, contest, contender, setting)
                results.append(found)
                yield contest, chip, results


def best_of_each(results: Sequence[Estimate]) -> list[Estimate]:
    """Returns each contender's fastest setting; if no times are known, one that says why."""
    found: dict[str, Estimate] = {}
    for one in results:
        if one.contender not in found or _rank(one) < _rank(found[one.contender]):
            found[one.contender] = one
    return list(found.values())


def _rank(one: Estimate) -> tuple[bool, bool, float]:
    """Returns a sort key: known times first, then kernels without a failure, then short times."""
    return one.seconds is None, one.failure is not None, math.inf if one.seconds is None else one.seconds


def best_peer(results: Sequence[Estimate]) -> Estimate | None:
    """Returns the fastest of the others, or None if no times are known."""
    others = [one for one in results if not one.is_ours and one.seconds is not None]
    return min(others, key=_rank, default=None)


def ours(results: Sequence[Estimate]) -> Estimate | None:
    """Returns our fastest setting, or None."""
    mine = [one for one in results if one.is_ours]
    return min(mine, key=_rank, default=None)


def ratio(theirs: Estimate | None, mine: Estimate | None) -> float | None:
    """Returns how many times as long theirs takes as ours; None if one is not known."""
    if theirs is None or mine is None or theirs.seconds is None or mine.seconds is None:
        return None
    return theirs.seconds / mine.seconds
