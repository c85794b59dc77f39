"""Listings of the kernel `ring` in tests/golden, parsed."""

from __future__ import annotations

import functools

from static_kernels import GOLDEN

from palladion.benchmarks.static.tpu.schedule import Schedule, parse_schedule
from palladion.kernels.devices import tpu_chips


@functools.cache
def golden(chip: str) -> Schedule:
    """The compiler's listing of the kernel `ring`."""
    texts = [(GOLDEN / f"ring_{chip}_{name}.txt").read_text() for name in ("bundles", "utilization")]
    return parse_schedule(*texts, tpu_chips()[chip].branch_delay_slots)
