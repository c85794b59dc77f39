"""Processes that the compiler may end."""

from __future__ import annotations

import re
import signal
from typing import Final

LONGEST: Final = 240
"""Characters of a message that are shown."""


def exit_reason(status: int, written: str) -> str:
    """Why a process ended, in one line.

    Args:
      status: with which it ended; negative for a signal.
      written: what it wrote.
    """
    found = re.search(r"Check failed: .*", written) or re.search(r"\b\w*Error: .*", written)
    with_ = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{with_}, {found[0].strip()[:LONGEST]}" if found else with_
