"""Work on all cores: JAX traces one function at a time, but XLA compiles several at once, outside of Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(jobs: Sequence[Callable[[], T]], workers: int | None = None) -> Iterator[T | Exception]:
    """Runs jobs in threads, and yields in order what each of them returned or raised.

    If the caller stops iterating, because of an error or an interruption, jobs that have not begun are cancelled.

    Args:
      jobs: functions that do not wait for each other.
      workers: maximum number of threads; None means the number of cores. With 1 each job runs when it is asked for.
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
    except Exception as error:  # the caller knows what it means
        return error
