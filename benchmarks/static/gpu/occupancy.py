"""How many programs of a kernel a multiprocessor keeps at a time, and what limits it.

The arithmetic is NVIDIA's (CUDA C++ Best Practices Guide, "Calculating Occupancy"): registers are given to warps in
units of 256, to four warps at a time, and shared memory to programs in units of 128 bytes, with 1 KiB for the system.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from palladion.kernels.devices import Gpu

REGISTER_UNIT: Final = 256
WARP_UNIT: Final = 4
SHARED_UNIT: Final = 128
SYSTEM_SHARED_BYTES: Final = 1024


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """What a multiprocessor keeps.

    Attributes:
      programs: at a time; 0 where not even one fits.
      limit: what does not allow more: "registers", "shared memory", "warps" or "programs".
      warps: at a time, of all its programs.
    """

    programs: int
    limit: str
    warps: int


def occupancy(gpu: Gpu, *, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """How many programs a multiprocessor keeps.

    Args:
      gpu: which one.
      registers: of a thread.
      shared_bytes: that a program asks for.
      num_warps: of a program.
    """
    of_warp = _up(max(registers, 1) * 32, REGISTER_UNIT)
    of_program = _up(shared_bytes + SYSTEM_SHARED_BYTES, SHARED_UNIT)
    fits = shared_bytes <= gpu.program_shared_bytes
    limits = {
        "registers": gpu.registers // of_warp // WARP_UNIT * WARP_UNIT // num_warps,
        "shared memory": gpu.shared_bytes // of_program if fits else 0,
        "warps": gpu.warps // num_warps,
        "programs": gpu.programs,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit, limits[limit] * num_warps)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
