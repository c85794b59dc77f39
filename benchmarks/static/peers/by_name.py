"""All contests by name; an `Examiner` loads their workloads from this file as from a user's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from palladion.benchmarks.static.peers import attention, matmul
from palladion.benchmarks.static.peers.contests import Contender, Contest
from palladion.benchmarks.static.workloads import WorkloadName

SEPARATOR: Final = " | "

CONTESTS: Final = {contest.name: contest for contest in (*attention.CONTESTS, *matmul.CONTESTS)}


def workload_name(contest: Contest, contender: Contender, setting: str) -> WorkloadName:
    """Returns the name by which an `Examiner` loads a contender's workload."""
    return WorkloadName("", SEPARATOR.join((contest.name, contender.name, setting)), __file__)


def _workload(contest: Contest, contender: Contender, setting: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return contender.workload(contest.case, setting)


def __getattr__(name: str) -> Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns the function that makes a workload, for each name of `workload_name`."""
    match name.split(SEPARATOR):
        case contest_name, contender_name, setting if contest_name in CONTESTS:
            contest = CONTESTS[contest_name]
            for contender in contest.contenders:
                if contender.name == contender_name:
                    return functools.partial(_workload, contest, contender, setting)
    raise AttributeError(f"no contest {name!r}")
