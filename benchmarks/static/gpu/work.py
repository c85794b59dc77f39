"""The work of a GPU kernel: what decides its time, as far as its compiled code says it."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from palladion.benchmarks.static.gpu.compiler import TritonKernel
from palladion.benchmarks.static.gpu.loops import Loop
from palladion.benchmarks.static.gpu.sass import Instruction, bytes_awaited
from palladion.benchmarks.static.gpu.strips import Reads

Trips = Mapping[Loop, tuple[int, int]]
"""Trips of each loop of the machine code, in all programs together and in the one that has most."""

SECTOR: Final = 32
"""Bytes that the caches ask the memory for at least."""

Parts = Sequence[tuple[Loop | None, Sequence[Instruction]]]
"""The instructions of each loop without inner loops, and those outside of loops (None)."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a kernel; counts, no times.

    Attributes:
      multiprocessors: multiprocessors of the GPU.
      programs: programs of the grid.
      resident: programs that a multiprocessor has room for.
      memory_bytes: bytes that are read from memory; what programs read again comes from the caches.
      strip_bytes: contiguous bytes that a program reads of a row, of the array that is read most.
      strips: strips that the busiest multiprocessor reads from memory.
      cycles: cycles of the busiest unit of the busiest multiprocessor.
      tensor_cycles: cycles of the tensor cores of the busiest multiprocessor.
      waits: times that the longest program waits for loads, one after the other.
      instructions: instructions of a warp of the longest program.
    """

    multiprocessors: int
    programs: int
    resident: int
    memory_bytes: int
    strip_bytes: int
    strips: int
    cycles: int
    tensor_cycles: int
    waits: float
    instructions: int

    @property
    def turns(self) -> float:
        """Programs that run one after the other in a place of the busiest multiprocessor."""
        programs = math.ceil(self.programs / self.multiprocessors)
        return programs / min(self.resident, programs)

    @property
    def most_bytes(self) -> float:
        """Bytes that the multiprocessor with most programs reads from memory, if programs are alike."""
        return self.memory_bytes * math.ceil(self.programs / self.multiprocessors) / self.programs


def work_of(
    kernel: TritonKernel,
    *,
    multiprocessors: int,
    resident: int,
    reads: Reads,
    parts: Parts,
    trips: Trips | None,
    cycles: Mapping[str, float],
) -> Work | None:
    """Returns the work of a kernel; None if it is not known what it reads, or how often its loops run.

    Args:
      kernel: the kernel.
      multiprocessors: multiprocessors of the GPU.
      resident: programs that a multiprocessor has room for.
      reads: what programs read in a trip.
      parts: its instructions.
      trips: how often its loops run; None if not known.
      cycles: cycles of each unit on the busiest multiprocessor.
    """
    if trips is None or not reads.arrays or not resident:
        return None
    memory_bytes, strips = 0.0, 0.0
    for array in reads.arrays:
        total, size = array.bytes * reads.total, _operand_bytes(kernel, array.argument)
        memory_bytes += min(total, size)
        if total < 4 * size:  # programs do not read the same bytes
            sectors = min(array.strip_bytes / SECTOR, 1.0)  # narrower strips of several trips share one
            strips += array.strips * reads.total * min(size / total, 1.0) * sectors
    programs = math.prod(kernel.grid)
    longest = strips * reads.most / max(reads.total, 1)
    alike = reads.total == programs * reads.most
    share = math.ceil(programs / multiprocessors) / programs if alike else 1 / multiprocessors
    most = {loop: 1 if loop is None else trips[loop][1] for loop, _ in parts}
    return Work(
        multiprocessors=multiprocessors,
        programs=programs,
        resident=resident,
        memory_bytes=round(memory_bytes),
        strip_bytes=reads.arrays[0].strip_bytes,
        strips=round(max(strips * share, longest)),
        cycles=round(max(cycles.values(), default=0.0)),
        tensor_cycles=round(cycles.get("tensor", 0.0)),
        waits=round(sum(most[loop] * _waits(instructions, kernel.num_stages) for loop, instructions in parts), 2),
        instructions=sum(most[loop] * len(instructions) for loop, instructions in parts),
    )


def _waits(instructions: Sequence[Instruction], num_stages: int) -> float:
    """Returns how often a program waits for memory in a trip; pipelined loops wait once for several trips."""
    loaded: collections.Counter[bool] = collections.Counter()
    for one in instructions:
        loaded[one.asynchronous] += one.thread_bytes or 0
    if loaded[True]:
        return 1 / max(num_stages - 1, 1)
    return loaded[False] / max(bytes_awaited(instructions), 1)


def _operand_bytes(kernel: TritonKernel, argument: int) -> int:
    """Returns the bytes of an argument of the kernel."""
    count, element = kernel.operands[argument]
    bits = re.search(r"\d+", element)
    return count * int(bits[0]) // 8 if bits is not None else count
