"""Time that a device spends in each kernel, from JAX's own profiler."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import jax

LINES: Final = {"/device:GPU": "Stream", "/device:TPU": "XLA Ops"}
"""Prefix of the trace lines that list what a device ran, by prefix of the device's name."""


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """Time of all calls of a kernel.

    Attributes:
      name: its name in the profile, without the numbers that tell instances apart.
      calls: number of calls.
      seconds: time of all calls together.
    """

    name: str
    calls: int
    seconds: float


def device_times(function: Callable[[], Any], folder: Path | None = None) -> list[KernelTime]:
    """Runs a function under the profiler and adds up the device's time by kernel.

    Args:
      function: dispatches work and waits for it.
      folder: keeps the trace there, for other tools; None keeps none.

    Returns:
      Times by kernel, the longest first; empty if the profiler shows no device.
    """
    with tempfile.TemporaryDirectory(prefix="palladion_profile_") as temporary:
        place = folder or Path(temporary)
        with jax.profiler.trace(str(place)):
            function()
        found: dict[str, list[float]] = defaultdict(list)
        for path in sorted(place.rglob("*.xplane.pb")):
            data = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
            for name, seconds in _events(data):
                found[name].append(seconds)
    times = [KernelTime(name, len(seconds), sum(seconds)) for name, seconds in found.items()]
    return sorted(times, key=lambda one: -one.seconds)


def _events(data: Any) -> Iterator[tuple[str, float]]:
    """Yields name and seconds of everything that a GPU ran in its streams, or a TPU in its operations."""
    for plane in data.planes:
        # Other lines list the same time again, by program or by step.
        wanted = next((lines for device, lines in LINES.items() if plane.name.startswith(device)), None)
        for line in plane.lines if wanted else ():
            if line.name.startswith(wanted):
                for event in line.events:
                    yield re.sub(r"(\.\d+)+$", "", event.name), event.duration_ns / 1e9
