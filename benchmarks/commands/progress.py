"""Progress messages and deadlines, as the commands that take long share them."""

from __future__ import annotations

import sys
import time


def report_progress(message: str) -> None:
    """Prints a message to standard error, beside the results on standard output."""
    print(message, file=sys.stderr, flush=True)


def seconds_left(deadline: float) -> float:
    """Returns the seconds until a deadline of `time.perf_counter()`; negative once it has passed."""
    return deadline - time.perf_counter()
