"""Finds which bytes of an array a program reads together, from the PTX of a kernel.

The addresses of loads are evaluated for every thread of one program, in its first trip through the loop that reads
most. Bytes without a gap between them are a strip: of a row-major matrix a program reads one strip of each row. How
wide a strip is decides how fast it is read: a strip of 32 bytes takes a multiprocessor as long as one of 128.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from palladion.benchmarks.static.gpu.loops import Loop
from palladion.benchmarks.static.gpu.ptx import ADDRESS, REGISTER, UNKNOWN_REGISTER, Statement
from palladion.benchmarks.static.gpu.trip_counts import ARGUMENT_STRIDE, MOST_OPERATIONS, Kernel, TripCounts
from palladion.benchmarks.static.opaque import Opaque, Undecided


@dataclasses.dataclass(frozen=True)
class Read:
    """The bytes of an array that a program reads in a trip, each counted once.

    Attributes:
      argument: number of the array among the kernel's arguments.
      strips: contiguous pieces.
      strip_bytes: bytes of a strip; of the most frequent size, if they differ.
      bytes: bytes of all strips.
    """

    argument: int
    strips: int
    strip_bytes: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Reads:
    """The arrays that programs read in a trip, and their trips.

    Attributes:
      arrays: the arrays that are read in a trip, the one with most bytes first; none if addresses are not known.
      total: trips of all programs together.
      most: trips of the longest program.
    """

    arrays: tuple[Read, ...] = ()
    total: int = 0
    most: int = 0


def reads_of(
    ptx: str, grid: Sequence[int], values: Sequence[np.ndarray | None], num_warps: int, counted: TripCounts
) -> Reads:
    """Returns what programs read in a trip through the loop that reads most, or outside of loops if that is more.

    Args:
      ptx: PTX of one kernel.
      grid: programs along each axis.
      values: value of each argument in order; None where it is not known.
      num_warps: warps of a program.
      counted: how often its loops run.
    """
    kernel = _Reader(ptx, values, num_warps, counted)
    programs = math.prod(grid)
    try:
        kernel.follow(counted.longest, grid)
    except Undecided:
        return Reads()
    numbers: dict[Loop | None, tuple[int, int]] = {None: (programs, 1)}
    numbers |= dict(zip(counted.loops, zip(counted.total, counted.most, strict=True), strict=True))
    found = [Reads(kernel.arrays(loop), *trips) for loop, trips in numbers.items()]
    return max(found, key=lambda one: one.most * sum(array.bytes for array in one.arrays))


class _Reader(Kernel):
    """A kernel whose loads are followed."""

    def __init__(self, ptx: str, values: Sequence[np.ndarray | None], num_warps: int, counted: TripCounts) -> None:
        super().__init__(ptx, values, num_warps, followed=True)
        weights = {
            loop: times * sum(_size(self.statements[number]) for number in self._inside(loop))
            for loop, times in zip(self.loops, counted.most, strict=True)
        }
        self._last = max(weights, key=lambda loop: weights[loop], default=None)
        self._pieces: dict[int, collections.Counter[tuple[int, int]]] = collections.defaultdict(collections.Counter)
        self._supposed = False

    def follow(self, index: Sequence[int], grid: Sequence[int]) -> None:
        """Follows all threads of a program to the end of the first trip through the loop that reads most."""
        budget = MOST_OPERATIONS
        for thread in range(32 * self.num_warps):
            budget -= self._run(index, grid, budget, thread)[1]

    def arrays(self, loop: Loop | None) -> tuple[Read, ...]:
        """Returns what was read in a loop, or outside of loops, without inner loops."""
        pieces: collections.Counter[tuple[int, int]] = collections.Counter()
        for number in self._inside(loop) & self._pieces.keys():
            pieces.update(self._pieces[number])
        arrays: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        loaded: collections.Counter[int] = collections.Counter()
        for (address, size), times in sorted(pieces.items()):
            argument, offset = divmod(address, ARGUMENT_STRIDE)
            arrays[argument - 1].append((offset, size))
            loaded[argument - 1] += times * size
        found = sorted(itertools.starmap(_read, arrays.items()), key=lambda one: -loaded[one.argument])
        if found and self._supposed and loaded[found[0].argument] > found[0].bytes:
            return ()  # what lies in different pages seems to lie at the same place
        return tuple(sorted(found, key=lambda one: -one.bytes))

    def _ends(self, head: int, times: int) -> bool:
        return self._last is not None and head == self._last.first and times > 1

    def _visit(self, here: int, guard: Any, registers: dict[str, Any]) -> None:
        statement = self.statements[here]
        found = ADDRESS.fullmatch(statement.operands[1]) if len(statement.operands) > 1 else None
        if found is None or guard is not True:
            return
        base: Any = registers.get(found["base"], UNKNOWN_REGISTER)
        copied = [registers.get(name, UNKNOWN_REGISTER) for name in REGISTER.findall(" ".join(statement.operands[3:]))]
        if type(base) is not Opaque and 0 not in copied:
            self._pieces[here][base + int(found["offset"] or "0", 0), _size(statement)] += 1

    def _load(self, statement: Statement, registers: dict[str, Any]) -> Sequence[Any]:
        """Supposes that unknown numbers in memory, those of layers and pages, are 0: they move strips, all alike."""
        loaded = super()._load(statement, registers)
        if "param" in statement.modifiers:
            return loaded
        self._supposed |= "shared" in statement.modifiers
        return [0 if type(one) is Opaque else one for one in loaded]


def _size(statement: Statement) -> int:
    """Returns the bytes that a thread reads with a statement."""
    if not statement.loads:
        return 0
    if statement.opcode == "cp":
        return int(statement.operands[2], 0)
    return max(len(statement.written), 1) * statement.bits // 8


def _read(argument: int, pieces: Sequence[tuple[int, int]]) -> Read:
    """Joins pieces of memory, sorted by their addresses, to strips."""
    strips: list[list[int]] = []
    for first, size in pieces:
        if strips and first <= strips[-1][1]:
            strips[-1][1] = max(strips[-1][1], first + size)
        else:
            strips.append([first, first + size])
    sizes = collections.Counter(end - first for first, end in strips)
    return Read(argument, len(strips), sizes.most_common(1)[0][0], sum(size * count for size, count in sizes.items()))
