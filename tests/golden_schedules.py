"""Parsed listings of the kernel `ring`, from tests/golden."""

from __future__ import annotations

import functools

from static_kernels import GOLDEN

from palladion.benchmarks.static.tpu.schedule import Schedule, parse_schedule
from palladion.kernels.devices import tpu_chips


@functools.cache
def golden(chip: str) -> Schedule:
    """Returns the parsed listing that the compiler made of the kernel `ring` for a chip."""
    texts = [(GOLDEN / f"ring_{chip}_{name}.txt").read_text() for name in ("bundles", "utilization")]
    return parse_schedule(*texts, tpu_chips()[chip].branch_delay_slots)
