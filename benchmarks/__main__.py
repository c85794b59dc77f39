"""`python -m palladion.benchmarks`: see `commands`."""

from __future__ import annotations

import sys

from palladion.benchmarks.commands import main
from palladion.benchmarks.measure import machine

if __name__ == "__main__":
    machine.end_as_interrupted()
    sys.exit(main())
