"""Exit statuses of the command lines."""

from __future__ import annotations

from typing import Final

USER_ERROR: Final = 2
"""Exit status for a mistake that the user can correct."""

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C or SIGTERM."""
