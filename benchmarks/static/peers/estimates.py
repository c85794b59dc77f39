"""What came out of a contest: the instrument's figures of every contender, and who is best."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from palladion.benchmarks.static.examiner import Examination, Report
from palladion.benchmarks.static.peers.by_name import reference
from palladion.benchmarks.static.peers.contests import OURS, Contender, Contest
from palladion.benchmarks.static.workloads import WorkloadName
from palladion.kernels.devices import tpu_chips

LONGEST: Final = 150
"""Characters of a compiler's message that are kept."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the instrument says of a contender in a contest on a chip; times are estimates, None where not known.

    Attributes:
      contest: its name.
      chip: a name in `tpu_chips()`.
      contender: its name.
      package: where it comes from.
      setting: how it was called.
      kernels: the Pallas kernels that it consists of; the times are those of all together.
      bytes_needed: that must move between HBM and the chip.
      bytes_moved: that do.
      compute_seconds: what the bundles take, without any wait.
      seconds: what the kernels take, waits included.
      unknown: why the times are not known; None where they are.
      failure: why there is no kernel; None where there is.
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
        """The memory bound: what must move, at the chip's bandwidth."""
        return self.bytes_needed / tpu_chips()[self.chip].hbm_bytes_per_second

    @property
    def memory_seconds(self) -> float | None:
        """What moves, at the chip's bandwidth."""
        if self.bytes_moved is None:
            return None
        return self.bytes_moved / tpu_chips()[self.chip].hbm_bytes_per_second

    @property
    def roofline(self) -> float | None:
        """The memory bound in parts of the estimate."""
        return None if self.seconds is None else self.needed_seconds / self.seconds

    @property
    def is_ours(self) -> bool:
        """Whether the contender is Palladion."""
        return self.contender == OURS

    def record(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        derived = ("needed_seconds", "memory_seconds", "roofline")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived} | {"estimated": True}


FIELDS: Final = tuple(field.name for field in dataclasses.fields(Estimate))


def from_record(record: dict[str, Any]) -> Estimate:
    """The inverse of `Estimate.record`."""
    return Estimate(**{name: record[name] for name in FIELDS})


def result_of(row: Examination, contest: Contest, contender: Contender, setting: str) -> Estimate:
    """Adds up what the instrument says of a contender's kernels."""
    reports = row.reports
    unknown = next((one.unknown for one in reports if one.unknown is not None), None)
    # A kernel whose call is not recognized has no grid; the others' are not called in loops.
    if unknown is None and any(one.times is None and one.grid for one in reports):
        unknown = "how often a kernel is called is decided at run time"
    known = row.failure is None and unknown is None
    return Estimate(
        contest=contest.name,
        chip=row.chip,
        contender=contender.name,
        package=contender.package,
        setting=setting,
        kernels=len(reports),
        bytes_needed=contest.bytes_needed,
        bytes_moved=_total(reports, "bytes_moved") if known else None,
        compute_seconds=_total(reports, "compute_seconds") if known else None,
        seconds=_total(reports, "seconds") if known else None,
        unknown=unknown,
        failure=None if row.failure is None else short_message(row.failure),
    )


def _total(reports: Sequence[Report], name: str) -> Any:
    values = [getattr(one, name) for one in reports]
    if any(value is None for value in values):
        return None
    return sum(value * (1 if one.times is None else one.times) for one, value in zip(reports, values, strict=True))


def short_message(message: str) -> str:
    """What a compiler or a package says, in one line."""
    line = " ".join(message.split())
    line = re.sub(r"Mosaic failed to compile TPU kernel with MLIR module name `\S*`( HLO name `\S*`)?: ", "", line)
    line = re.sub(r"^(\w*Error): (INTERNAL: )?", "", line)
    line = re.split(r" (?:See https?://|at location:|The MLIR operation involved)", line)[0]
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 2]} …"


class WorkloadExaminer(Protocol):
    """Whoever examines workloads: an `Examiner`."""

    def examine(self, workload: WorkloadName, chip: str) -> Examination:
        """Examines a workload."""


def hold_contests(
    contests: Sequence[Contest],
    chips: Sequence[str],
    examiner: WorkloadExaminer,
    *,
    takes_part: Callable[[Contender], bool] = lambda _: True,
    known: Sequence[Estimate] = (),
) -> Iterator[tuple[Contest, str, list[Estimate]]]:
    """Holds contests, one chip after the other.

    Args:
      contests: which ones.
      chips: names in `tpu_chips()`.
      examiner: who is asked.
      takes_part: which contenders do.
      known: what came out earlier; only what is not among it is examined.

    Yields:
      A contest, a chip, and the results so far: once more with every result, so that no more than one is ever lost.
    """
    of_earlier = {_key(one.contest, one.chip, one.contender, one.setting): one for one in known}
    for contest in contests:
        contenders = [contender for contender in contest.contenders if takes_part(contender)]
        for chip in chips:
            results: list[Estimate] = []
            for contender in contenders:
                for setting in contender.settings(contest.case):
                    found = of_earlier.get(_key(contest.name, chip, contender.name, setting))
                    if found is None:
                        row = examiner.examine(reference(contest, contender, setting), chip)
                        found = result_of(row, contest, contender, setting)
                    results.append(found)
                    yield contest, chip, results


def _key(*names: str) -> tuple[str, ...]:
    return names


def best_of_each(results: Sequence[Estimate]) -> list[Estimate]:
    """Of each contender the setting that takes least; where no times are known, one that says why."""
    found: dict[str, Estimate] = {}
    for one in results:
        if one.contender not in found or _rank(one) < _rank(found[one.contender]):
            found[one.contender] = one
    return list(found.values())


def _rank(one: Estimate) -> tuple[bool, bool, float]:
    """What is better comes first: known times, then kernels that there are, then short times."""
    return one.seconds is None, one.failure is not None, math.inf if one.seconds is None else one.seconds


def best_peer(results: Sequence[Estimate]) -> Estimate | None:
    """The fastest of the others whose times are known."""
    others = [one for one in results if not one.is_ours and one.seconds is not None]
    return min(others, key=_rank, default=None)


def ours(results: Sequence[Estimate]) -> Estimate | None:
    """Our fastest."""
    mine = [one for one in results if one.is_ours]
    return min(mine, key=_rank, default=None)


def ratio(theirs: Estimate | None, mine: Estimate | None) -> float | None:
    """How many times as long theirs takes; None where one is not known. Below 1 ours loses."""
    if theirs is None or mine is None or theirs.seconds is None or mine.seconds is None:
        return None
    return theirs.seconds / mine.seconds
