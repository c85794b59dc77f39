"""Occupancy: how many programs of a kernel a multiprocessor holds at a time, and what limits it.

The arithmetic is NVIDIA's (CUDA C++ Best Practices Guide, "Calculating Occupancy"): registers are allocated to warps in
units of 256, for four warps at a time, and shared memory to programs in units of 128 bytes, with 1 KiB for the system.
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
    """Occupancy of a multiprocessor.

    Attributes:
      programs: programs at a time; 0 if not even one fits.
      limit: what limits them: "registers", "shared memory", "warps" or "programs".
      warps: warps of all these programs.
    """

    programs: int
    limit: str
    warps: int


def occupancy(gpu: Gpu, *, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """Calculates the occupancy of a multiprocessor.

    Args:
      gpu: the GPU.
      registers: registers of a thread.
      shared_bytes: shared memory that a program asks for.
      num_warps: warps of a program.
    """
    warp_registers = _round_up(max(registers, 1) * 32, REGISTER_UNIT)
    program_bytes = _round_up(shared_bytes + SYSTEM_SHARED_BYTES, SHARED_UNIT)
    fits = shared_bytes <= gpu.program_shared_bytes
    limits = {
        "registers": gpu.registers // warp_registers // WARP_UNIT * WARP_UNIT // num_warps,
        "shared memory": gpu.shared_bytes // program_bytes if fits else 0,
        "warps": gpu.warps // num_warps,
        "programs": gpu.programs,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit, limits[limit] * num_warps)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
