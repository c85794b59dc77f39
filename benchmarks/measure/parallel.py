"""Work on all cores: XLA traces in Python, one at a time, and compiles outside of its lock, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(jobs: Sequence[Callable[[], T]], workers: int | None = None) -> Iterator[T | Exception]:
    """Does jobs in threads, and yields what each returned or raised, in their order.

    Who stops listening, by an error or an interruption, keeps those from beginning that have not begun.

    Args:
      jobs: functions that do not wait for each other.
      workers: threads, at most; None means as many as there are cores. With 1 each job is done when it is asked for.
    """
    workers = workers or cores()
    if workers == 1:
        yield from map(_outcome, jobs)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="palladion")
    try:
        yield from pool.map(_outcome, jobs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(job: Callable[[], T]) -> T | Exception:
    try:
        return job()
    except Exception as error:  # whoever asked for the job knows what it means
        return error
