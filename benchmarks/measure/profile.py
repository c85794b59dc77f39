"""Where the device's time goes, by the names of its kernels: from JAX's own profiler, without another package."""

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
"""How the lines of a trace begin that hold what a device ran, by how the device's name begins."""


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """What the calls of a kernel took.

    Attributes:
      name: as the profiler has it, numbers of instances left out.
      calls: how often it ran.
      seconds: of all calls.
    """

    name: str
    calls: int
    seconds: float


def device_times(function: Callable[[], Any], folder: Path | None = None) -> list[KernelTime]:
    """Runs a function under the profiler and adds up what the device did, the longest first.

    Args:
      function: dispatches work, and waits for it.
      folder: where the trace is kept, for other tools; None keeps none.

    Returns:
      Times by kernel; nothing where the profiler shows no device.
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
    """What the device ran: in the streams of a GPU, or the operations of a TPU; of a CPU the trace shows too little."""
    for plane in data.planes:
        # Other lines say the same again, by program or by step.
        wanted = next((lines for device, lines in LINES.items() if plane.name.startswith(device)), None)
        for line in plane.lines if wanted else ():
            if line.name.startswith(wanted):
                for event in line.events:
                    yield re.sub(r"(\.\d+)+$", "", event.name), event.duration_ns / 1e9
