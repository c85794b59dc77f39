"""Counts how often the loops of a GPU kernel run, from its PTX.

The instructions that decide about loops are evaluated for every program of the grid, with its grid indices and the
values of arrays where they are known. A loop that depends on anything else is `Undecided`. The first thread of each
program is followed: Triton's loops are those of the whole program.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from palladion.benchmarks.static.gpu import ptx as ptx_language
from palladion.benchmarks.static.gpu.loops import Loop, natural_loops, with_depths
from palladion.benchmarks.static.gpu.ptx import BRANCHES, UNKNOWN_REGISTER, Statement
from palladion.benchmarks.static.opaque import Opaque, Undecided

MOST_OPERATIONS: Final = 20_000_000
"""Instructions after which evaluating a kernel is given up."""

LONGEST_WAIT: Final = 4
"""Statements, at most, of a loop that only waits for a barrier."""

ARGUMENT_STRIDE: Final = 2**44
"""Distance between the addresses that pointer arguments are given: more than any array has bytes."""


@dataclasses.dataclass(frozen=True)
class TripCounts:
    """Trip counts of a kernel's loops.

    Attributes:
      loops: the loops of the PTX, in the order of their first statements, outer ones first.
      total: for each loop, its trips in all programs together.
      most: for each loop, the trips of the program that has most.
      longest: grid indices of the program with most trips through all loops together, or of the first of several.
      loads: for each loop, reads of global memory in a trip, without inner loops.
      products: for each loop, matrix products of tensor cores in a trip, without inner loops.
    """

    loops: tuple[Loop, ...]
    total: tuple[int, ...]
    most: tuple[int, ...]
    longest: tuple[int, ...]
    loads: tuple[int, ...]
    products: tuple[int, ...]


def count_trips(ptx: str, grid: Sequence[int], values: Sequence[np.ndarray | None], num_warps: int) -> TripCounts:
    """Counts how often each loop of a kernel runs.

    Args:
      ptx: PTX of one kernel.
      grid: programs along each axis.
      values: value of each argument in order; None where it is not known.
      num_warps: warps of a program.

    Raises:
      Undecided: a loop depends on something that is not known.
    """
    return Kernel(ptx, values, num_warps).trips(grid)


class Kernel:
    """A kernel whose loop-deciding statements can be evaluated.

    Attributes:
      statements: its statements.
      loops: its loops, without those that only wait.
      num_warps: warps of a program.
    """

    def __init__(
        self, ptx: str, values: Sequence[np.ndarray | None], num_warps: int, *, followed: bool = False
    ) -> None:
        """Parses the kernel.

        Args:
          ptx: PTX of one kernel.
          values: value of each argument in order; None where it is not known.
          num_warps: warps of a program.
          followed: whether addresses of loads are evaluated, too.
        """
        self._values = values
        self.num_warps = num_warps
        self._followed = followed
        self.statements, self._labels = ptx_language.parse(ptx)
        self._parameters = ptx_language.parameters(ptx)
        loops = natural_loops([self._successors(number) for number in range(len(self.statements))])
        self._waits = {loop.first for loop in loops if self._only_waits(loop)}
        self.loops = with_depths([loop for loop in loops if loop.first not in self._waits])
        self._relevant = self._slice()
        # For each statement, the next one at or after it that must be visited.
        visited = [*self._relevant, True, True]
        for loop in self.loops:
            visited[loop.first] = True
        self._next = [0] * len(visited)
        for number in reversed(range(len(visited))):
            self._next[number] = number if visited[number] else self._next[number + 1]

    def trips(self, grid: Sequence[int]) -> TripCounts:
        """Evaluates one program for each distinct set of grid indices that matters, and adds them up."""
        read = {
            name
            for statement, relevant in zip(self.statements, self._relevant, strict=True)
            if relevant
            for name in statement.read
        }
        axes = [bound if f"%ctaid.{axis}" in read else 1 for axis, bound in zip("xyz", grid, strict=True)]
        alike = math.prod(grid) // math.prod(axes)
        total, most, budget = [0] * len(self.loops), [0] * len(self.loops), MOST_OPERATIONS
        longest, its_trips = (0,) * len(axes), 0
        for index in itertools.product(*map(range, axes)):
            counts, used = self._run(index, grid, budget)
            budget -= used
            if sum(counts) > its_trips:
                longest, its_trips = index, sum(counts)
            for number, count in enumerate(counts):
                total[number] += alike * count
                most[number] = max(most[number], count)
        return TripCounts(
            self.loops,
            tuple(total),
            tuple(most),
            longest,
            tuple(self._count(loop, lambda one: one.loads) for loop in self.loops),
            tuple(self._count(loop, lambda one: one.multiplies) for loop in self.loops),
        )

    # Which statements matter.

    def _target(self, here: int) -> int:
        """Returns where a branch or an end goes to; inline assembly repeats labels, and the last one before counts."""
        statement, end = self.statements[here], len(self.statements)
        if statement.opcode != "bra":
            return end
        places = self._labels.get(statement.operands[0], [])
        return max((place for place in places if place <= here), default=places[0] if places else end)

    def _successors(self, here: int) -> list[int]:
        statement, end = self.statements[here], len(self.statements)
        found = [self._target(here)] if statement.opcode in BRANCHES else []
        if statement.opcode not in BRANCHES or statement.guard is not None:
            found.append(here + 1)
        return [number for number in found if number < end]

    def _only_waits(self, loop: Loop) -> bool:
        """Whether a loop does nothing but poll a barrier."""
        polls = any(self.statements[number].opcode == "mbarrier" for number in loop.body)
        return polls and len(loop.body) <= LONGEST_WAIT

    def _slice(self) -> list[bool]:
        """Returns which statements decide how often loops run: branches of loops, and what these depend on.

        If loads are followed, they and what their addresses depend on belong to them.
        """
        relevant = [self._followed and statement.loads for statement in self.statements]
        needed: set[str] = set()
        for statement, here in zip(self.statements, relevant, strict=True):
            if here:
                needed.update(statement.read if statement.guard is None else (*statement.read, statement.guard))
        grown = True
        while grown:
            grown = False
            for number, statement in enumerate(self.statements):
                if relevant[number]:
                    continue
                if statement.opcode in BRANCHES:
                    target = self._target(number)
                    relevant[number] = self._decides(number, target, needed) or self._skips(number, target, relevant)
                else:
                    relevant[number] = bool(needed.intersection(statement.written))
                if relevant[number]:
                    grown = True
                    needed.update(statement.read if statement.guard is None else (*statement.read, statement.guard))
        return relevant

    def _decides(self, here: int, target: int, needed: set[str]) -> bool:
        """Whether a branch closes a loop, or skips one, or skips the computation of registers that are needed."""
        if target <= here:
            return target not in self._waits
        for loop in self.loops:
            if (here in loop.body) != (target in loop.body) or any(here < number < target for number in loop.body):
                return True
        return any(needed.intersection(one.written) for one in self.statements[here + 1 : target])

    def _skips(self, here: int, target: int, relevant: Sequence[bool]) -> bool:
        """Whether a branch passes over one that matters, which may lead around a loop."""
        return any(
            relevant[number] and self.statements[number].opcode in BRANCHES for number in range(here + 1, target)
        )

    def _count(self, loop: Loop, kind: Callable[[Statement], bool]) -> int:
        """Counts the statements of a kind in a loop, without inner loops."""
        return sum(kind(self.statements[number]) for number in self._inside(loop))

    def _inside(self, loop: Loop | None) -> set[int]:
        """Returns the statements of a loop without its inner loops; None means those outside of all loops."""
        inside = set(range(len(self.statements))) if loop is None else set(loop.body)
        return inside.difference(*(other.body for other in self.loops if loop is None or loop.contains(other)))

    # Evaluation.

    def _run(self, index: Sequence[int], grid: Sequence[int], budget: int, thread: int = 0) -> tuple[list[int], int]:
        """Returns how often a thread reaches the first statement of each loop, and how many statements that took."""
        registers: dict[str, Any] = {"%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%laneid": thread % 32}
        registers["%ntid.x"] = 32 * self.num_warps
        registers |= {f"%ctaid.{axis}": number for axis, number in zip("xyz", index, strict=True)}
        registers |= {f"%nctaid.{axis}": number for axis, number in zip("xyz", grid, strict=True)}
        counts = [0] * len(self.loops)
        heads = {loop.first: number for number, loop in enumerate(self.loops)}
        end = len(self.statements)
        here, used = self._next[0], 0
        while here < end:
            if here in heads:
                counts[heads[here]] += 1
                if self._ends(here, counts[heads[here]]):
                    break
            used += 1
            if used > budget:
                raise Undecided(f"it has not ended after {MOST_OPERATIONS:,} operations")
            statement = self.statements[here]
            following = self._next[here + 1]
            if self._relevant[here]:
                guard = self._guard(statement, registers)
                if self._followed and statement.loads:
                    self._visit(here, guard, registers)
                if statement.opcode in BRANCHES:
                    following = self._next[self._branch(guard, here, registers)]
                elif type(guard) is Opaque:
                    registers.update(dict.fromkeys(statement.written, guard))
                elif guard:
                    registers.update(zip(statement.written, self._results(statement, registers), strict=True))
            here = following
        return counts, used

    def _ends(self, head: int, times: int) -> bool:
        """Whether a thread need not be followed further when it reaches a loop's first statement once more."""
        del head, times
        return False

    def _visit(self, here: int, guard: Any, registers: dict[str, Any]) -> None:
        """Is called for each load that is followed, before it is executed."""

    def _guard(self, statement: Statement, registers: dict[str, Any]) -> Any:
        """Returns whether a statement is executed; opaque where that is not known."""
        if statement.guard is None:
            return True
        guard = registers.get(statement.guard, UNKNOWN_REGISTER)
        return guard if type(guard) is Opaque else guard != statement.negated

    def _branch(self, guard: Any, here: int, registers: dict[str, Any]) -> int:
        """Returns the statement after a branch."""
        target = self._target(here)
        if type(guard) is not Opaque:
            return target if guard else here + 1
        if target <= here or any(here < loop.first < target for loop in self.loops):
            raise Undecided(guard.reason)
        # What the branch may skip may have been computed or not, and is not known after it.
        for number in range(here + 1, target):
            if self.statements[number].opcode in BRANCHES and self._target(number) > target:
                raise Undecided(guard.reason)  # the other half of a condition
            registers.update(dict.fromkeys(self.statements[number].written, guard))
        return target

    def _results(self, statement: Statement, registers: dict[str, Any]) -> Sequence[Any]:
        if statement.opcode == "ld":
            return self._load(statement, registers)
        return ptx_language.evaluate(statement, registers)

    def _load(self, statement: Statement, registers: dict[str, Any]) -> Sequence[Any]:
        """Loads pointer arguments, and elements of arrays that are known."""
        count = len(statement.written)
        found = ptx_language.ADDRESS.fullmatch(statement.operands[1])
        if found is None:
            return [Opaque("it depends on an address that is not understood")] * count
        if "param" in statement.modifiers:
            parameter = self._parameters.get(found["base"])
            if parameter is None:
                return [Opaque(f"it depends on {found['base']}")]
            return [(parameter + 1) * ARGUMENT_STRIDE]
        if "global" not in statement.modifiers:
            return [Opaque("it depends on what is in shared memory")] * count
        base = registers.get(found["base"], UNKNOWN_REGISTER)
        if type(base) is Opaque:
            return [base] * count
        argument, offset = divmod(base + int(found["offset"] or "0", 0), ARGUMENT_STRIDE)
        argument -= 1
        array = self._values[argument] if 0 <= argument < len(self._values) else None
        if array is None or array.dtype.itemsize * 8 != statement.bits:
            reason = f"it depends on the values of argument {argument} of the kernel, which were not given"
            return [Opaque(reason)] * count
        elements = array.reshape(-1)
        first = offset // array.dtype.itemsize
        return [
            int(elements[place]) & ptx_language.mask(statement.bits)
            if place < elements.size
            else Opaque(f"it reads argument {argument} beyond its end")
            for place in range(first, first + count)
        ]
