"""Processes that a compiler or a kernel may end."""

from __future__ import annotations

import re
import signal
from typing import Final

LONGEST: Final = 240
"""Maximum length of a message."""


def exit_reason(status: int, written: str) -> str:
    """Says in one line why a process ended.

    Args:
      status: its exit status; negative for a signal.
      written: its output.
    """
    found = re.search(r"Check failed: .*", written) or re.search(r"\b\w*Error: .*", written)
    with_ = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{with_}, {found[0].strip()[:LONGEST]}" if found else with_
