"""How often the loops of a kernel run, from its PTX: the integers that decide are computed, program by program.

PTX is what Triton hands to NVIDIA's assembler, and is documented (PTX ISA). Of its instructions only those are executed
that decide about loops, with the program's place in the grid, and with the values of arrays where they are known. A
loop that depends on anything else is `Undecided`. Of all threads of a program the first is followed: Triton's loops are
those of the whole program.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from palladion.benchmarks.static.gpu.loops import Loop, natural_loops, with_depths
from palladion.benchmarks.static.opaque import Opaque, Undecided

MOST_OPERATIONS: Final = 20_000_000
"""Instructions that are executed before a kernel is given up."""

LONGEST_WAIT: Final = 4
"""Statements of a loop that waits for a barrier."""

_PLACE: Final = 2**44
"""Distance between the addresses that arguments are given: more than any array has bytes."""

_STATEMENT: Final = re.compile(r"(?:@(?P<not>!?)(?P<guard>%?\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.S)
_LABEL: Final = re.compile(r"(\$?\w+):\s*")
_OPERAND: Final = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s]+")
_REGISTER: Final = re.compile(r"%[A-Za-z_]\w*(?:\.[xyz])?")
_ADDRESS: Final = re.compile(r"\[\s*(?P<base>[%\w$.]+)\s*(?:\+\s*(?P<offset>-?\w+)\s*)?\]")
_TYPE: Final = re.compile(r"[subf](?:8|16|32|64)$")

_UNKNOWN: Final = Opaque("it depends on a register that is not followed")

_BRANCHES: Final = ("bra", "ret", "exit")

_STORES: Final = ("st", "bra", "ret", "exit", "bar", "barrier", "membar", "fence", "cp", "red", "prefetch", "trap")
"""Instructions without a result in registers."""


@dataclasses.dataclass(frozen=True)
class TripCounts:
    """How often the loops of a kernel run.

    Attributes:
      loops: of the PTX, in the order of their beginnings, outer ones first.
      total: of each, its trips in all programs together.
      most: of each, the trips of the program that has most.
      loads: of each, reads of global memory in a trip, those of inner loops left out.
      products: the same for products of tensor cores.
    """

    loops: tuple[Loop, ...]
    total: tuple[int, ...]
    most: tuple[int, ...]
    loads: tuple[int, ...]
    products: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Statement:
    """An instruction of the PTX.

    Attributes:
      guard: the register of its predicate, or None.
      negated: whether it is executed where that is false.
      opcode: its first part, "setp".
      parts: the others, ("lt", "u32").
      operands: as they are written, destination first.
      written: registers that it writes.
      read: registers that it reads.
      inputs: what it computes with: names of registers, or None and a number.
      type: of the numbers that it works on, "u32"; "b32" are taken as unsigned.
    """

    guard: str | None
    negated: bool
    opcode: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    written: tuple[str, ...]
    read: tuple[str, ...]
    inputs: tuple[tuple[str | None, Any], ...]
    type: str


def count_trips(ptx: str, grid: Sequence[int], values: Sequence[np.ndarray | None], num_warps: int) -> TripCounts:
    """Counts how often each loop of a kernel runs.

    Args:
      ptx: of one kernel.
      grid: programs along each axis.
      values: of each argument, in order, where they are known.
      num_warps: of a program.

    Raises:
      Undecided: it depends on something that is not known.
    """
    return _Kernel(ptx, values, num_warps).trips(grid)


class _Kernel:
    def __init__(self, ptx: str, values: Sequence[np.ndarray | None], num_warps: int):
        self._values = values
        self._threads = 32 * num_warps
        self._statements, self._labels = _parse(ptx)
        loops = natural_loops([self._following(number) for number in range(len(self._statements))])
        self._waits = {loop.first for loop in loops if self._only_waits(loop)}
        self.loops = with_depths([loop for loop in loops if loop.first not in self._waits])
        self._parameters = {
            name: number for number, name in enumerate(re.findall(r"\.param \.\w+ [^,)]*?(\w+)[,\n)]", ptx))
        }
        self._relevant = self._slice()
        # From each statement, the next one that matters.
        matters = [*self._relevant, True, True]
        for loop in self.loops:
            matters[loop.first] = True
        self._next = [0] * len(matters)
        for number in reversed(range(len(matters))):
            self._next[number] = number if matters[number] else self._next[number + 1]

    def _target(self, here: int) -> int:
        """Where a branch or an end goes to; labels inside assembler of its own are those before it."""
        one, end = self._statements[here], len(self._statements)
        if one.opcode != "bra":
            return end
        places = self._labels.get(one.operands[0], [])
        return max((place for place in places if place <= here), default=places[0] if places else end)

    def _following(self, here: int) -> list[int]:
        one, end = self._statements[here], len(self._statements)
        found = [self._target(here)] if one.opcode in _BRANCHES else []
        if one.opcode not in _BRANCHES or one.guard is not None:
            found.append(here + 1)
        return [number for number in found if number < end]

    def _only_waits(self, loop: Loop) -> bool:
        """Whether a loop does nothing but try a barrier again and again."""
        tries = any(self._statements[number].opcode == "mbarrier" for number in loop.body)
        return tries and len(loop.body) <= LONGEST_WAIT

    def _slice(self) -> list[bool]:
        """Which statements decide how often loops run: branches back or around loops, and what these depend on."""
        needed: set[str] = set()
        relevant = [False] * len(self._statements)
        grown = True
        while grown:
            grown = False
            for number, one in enumerate(self._statements):
                if relevant[number]:
                    continue
                if one.opcode in _BRANCHES:
                    relevant[number] = self._decides(number, self._target(number), needed)
                else:
                    relevant[number] = bool(needed.intersection(one.written))
                if relevant[number]:
                    grown = True
                    needed.update(one.read if one.guard is None else (*one.read, one.guard))
        return relevant

    def _decides(self, here: int, target: int, needed: set[str]) -> bool:
        """Whether a branch makes a loop, or goes around one, or around the computation of registers that are needed."""
        if target <= here:
            return target not in self._waits
        for loop in self.loops:
            if (here in loop.body) != (target in loop.body) or any(here < number < target for number in loop.body):
                return True
        return any(needed.intersection(one.written) for one in self._statements[here + 1 : target])

    def trips(self, grid: Sequence[int]) -> TripCounts:
        """Runs the programs; of those that decide alike, one."""
        read = {
            name
            for one, relevant in zip(self._statements, self._relevant, strict=True)
            if relevant
            for name in one.read
        }
        axes = [bound if f"%ctaid.{axis}" in read else 1 for axis, bound in zip("xyz", grid, strict=True)]
        alike = math.prod(grid) // math.prod(axes)
        total, most, left = [0] * len(self.loops), [0] * len(self.loops), MOST_OPERATIONS
        for place in itertools.product(*map(range, axes)):
            counts, used = self._run(place, grid, left)
            left -= used
            for number, count in enumerate(counts):
                total[number] += alike * count
                most[number] = max(most[number], count)
        return TripCounts(
            self.loops,
            tuple(total),
            tuple(most),
            tuple(self._number_of(loop, _loads) for loop in self.loops),
            tuple(self._number_of(loop, _multiplies) for loop in self.loops),
        )

    def _number_of(self, loop: Loop, kind: Callable[[_Statement], bool]) -> int:
        numbers = loop.body.difference(*(other.body for other in self.loops if loop.contains(other)))
        return sum(kind(self._statements[number]) for number in numbers)

    def _run(self, place: Sequence[int], grid: Sequence[int], most: int) -> tuple[list[int], int]:
        """How often the first statement of each loop is reached in a program, and how many statements that took."""
        registers: dict[str, Any] = {"%tid.x": 0, "%tid.y": 0, "%tid.z": 0, "%laneid": 0, "%ntid.x": self._threads}
        registers |= {f"%ctaid.{axis}": number for axis, number in zip("xyz", place, strict=True)}
        registers |= {f"%nctaid.{axis}": number for axis, number in zip("xyz", grid, strict=True)}
        counts = [0] * len(self.loops)
        heads = {loop.first: number for number, loop in enumerate(self.loops)}
        end = len(self._statements)
        at, used = self._next[0], 0
        while at < end:
            if at in heads:
                counts[heads[at]] += 1
            used += 1
            if used > most:
                raise Undecided(f"it has not ended after {MOST_OPERATIONS:,} operations")
            here, one = at, self._statements[at]
            at = self._next[at + 1]
            if not self._relevant[here]:
                continue
            guard: Any = True
            if one.guard is not None:
                guard = registers.get(one.guard, _UNKNOWN)
                guard = guard if type(guard) is Opaque else guard != one.negated
            if one.opcode in _BRANCHES:
                at = self._next[self._branch(guard, here, registers)]
            elif type(guard) is Opaque:
                registers.update(dict.fromkeys(one.written, guard))
            elif guard:
                registers.update(zip(one.written, self._results(one, registers), strict=True))
        return counts, used

    def _branch(self, guard: Any, here: int, registers: dict[str, Any]) -> int:
        """Where it goes on after a branch."""
        target = self._target(here)
        if type(guard) is not Opaque:
            return target if guard else here + 1
        if target <= here or any(here < loop.first < target for loop in self.loops):
            raise Undecided(guard.reason)
        # What it jumps over may have been computed or not, and is not known behind it.
        for number in range(here + 1, target):
            if self._statements[number].opcode in _BRANCHES and self._target(number) > target:
                raise Undecided(guard.reason)  # the other half of a condition
            registers.update(dict.fromkeys(self._statements[number].written, guard))
        return target

    def _results(self, one: _Statement, registers: dict[str, Any]) -> Sequence[Any]:
        if one.opcode == "ld":
            return self._load(one, registers)
        inputs = [value if name is None else registers.get(name, _UNKNOWN) for name, value in one.inputs]
        opaque = next((value for value in inputs if type(value) is Opaque), None)
        operation = _OPERATIONS.get(one.opcode)
        if opaque is not None or operation is None or one.type[0] == "f":
            if opaque is None:
                opaque = Opaque(f"it depends on the result of {'.'.join((one.opcode, *one.parts))}")
            return [opaque] * len(one.written)
        if one.opcode == "mov" and len(one.written) + len(inputs) > 2:
            return _packed(one, inputs)
        result = operation(one, *(_typed(value, one, number) for number, value in enumerate(inputs)))
        if isinstance(result, int) and not isinstance(result, bool):
            result &= _mask(_result_bits(one))
        return [result] * len(one.written)

    def _load(self, one: _Statement, registers: dict[str, Any]) -> Sequence[Any]:
        """Pointers that are arguments, and numbers in arrays that are known."""
        found = _ADDRESS.fullmatch(one.operands[1])
        if found is None:
            return [Opaque("it depends on an address that is not understood")] * len(one.written)
        if "param" in one.parts:
            number = self._parameters.get(found["base"])
            return [Opaque(f"it depends on {found['base']}") if number is None else (number + 1) * _PLACE]
        if "global" not in one.parts:
            return [Opaque("it depends on what is in shared memory")] * len(one.written)
        base = registers.get(found["base"], _UNKNOWN)
        if type(base) is Opaque:
            return [base] * len(one.written)
        number, offset = divmod(base + int(found["offset"] or "0", 0), _PLACE)
        number -= 1
        value = self._values[number] if 0 <= number < len(self._values) else None
        bits = int(one.type[1:])
        if value is None or value.dtype.itemsize * 8 != bits:
            return [Opaque(f"it depends on the values of argument {number} of the kernel, which were not given")] * len(
                one.written
            )
        numbers = value.reshape(-1)
        first = offset // value.dtype.itemsize
        return [
            int(numbers[at]) & _mask(bits)
            if at < numbers.size
            else Opaque(f"it reads argument {number} beyond its end")
            for at in range(first, first + len(one.written))
        ]


def _parse(ptx: str) -> tuple[list[_Statement], dict[str, list[int]]]:
    """The statements of a kernel, and before which of them each label stands."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"(?m)^\s*\.(?!reg|pragma)\w+[^;{}\n]*$", "", body)  # directives that end with the line
    statements: list[_Statement] = []
    labels: dict[str, list[int]] = {}
    for text in re.split(r";", body):
        left = text.strip()
        while True:
            left = re.sub(r"^[{}\s]+", "", left) if not re.match(r"\{\s*%", left) else left
            label = _LABEL.match(left)
            if label is None:
                break
            labels.setdefault(label[1], []).append(len(statements))
            left = left[label.end() :]
        found = _STATEMENT.fullmatch(left)
        if found is None or left.startswith("."):
            continue
        statements.append(_statement(found))
    return statements, labels


def _statement(found: re.Match[str]) -> _Statement:
    opcode, *parts = found["opcode"].split(".")
    operands = tuple(part.strip() for part in _OPERAND.findall(found["operands"]))
    has_result = opcode not in _STORES and bool(operands)
    # Of `setp.lt.u32 %p1|%p2, …` both are results.
    written = tuple(_REGISTER.findall(operands[0])) if has_result else ()
    sources = operands[has_result:]
    read = tuple(name for operand in sources for name in _REGISTER.findall(operand))
    inputs = tuple(_input(name.strip()) for operand in sources for name in operand.strip("{} ").split(","))
    kind = next((part.replace("b", "u") for part in reversed(parts) if _TYPE.match(part)), "u32")
    return _Statement(found["guard"], found["not"] == "!", opcode, tuple(parts), operands, written, read, inputs, kind)


def _loads(one: _Statement) -> bool:
    return (one.opcode == "ld" and "global" in one.parts) or (
        one.opcode == "cp" and one.parts[:1] == ("async",) and "global" in one.parts
    )


def _multiplies(one: _Statement) -> bool:
    return one.opcode == "mma" or (one.opcode == "wgmma" and "mma_async" in one.parts)


def _input(text: str) -> tuple[str | None, Any]:
    if text.startswith("%"):
        return text, None
    try:
        return None, int(text, 0)
    except ValueError:
        return None, Opaque(f"it depends on {text}")  # a number with a point, or an address of shared memory


def _mask(bits: int) -> int:
    return (1 << bits) - 1


def _signed(value: int, bits: int) -> int:
    value &= _mask(bits)
    return value - (1 << bits) if value >> (bits - 1) else value


def _typed(value: Any, one: _Statement, number: int) -> Any:
    """A register's bits as an instruction takes them for one of its operands."""
    if isinstance(value, bool) or one.opcode == "cvt":
        return value
    # What a wide product is added to is as wide.
    bits = int(one.type[1:]) * (2 if "wide" in one.parts and number == 2 else 1)
    return _signed(value, bits) if one.type[0] == "s" else value & _mask(bits)


def _result_bits(one: _Statement) -> int:
    if one.opcode == "cvt":
        kinds = [part for part in one.parts if _TYPE.match(part)]
        return int(kinds[0][1:])
    return int(one.type[1:]) * (2 if "wide" in one.parts else 1)


def _packed(one: _Statement, parts: Sequence[int]) -> Sequence[int]:
    """`mov` of a wide register into narrow ones, or of these into a wide one."""
    share = int(one.type[1:]) // max(len(parts), len(one.written))
    if len(parts) > 1:
        return [sum((part & _mask(share)) << share * number for number, part in enumerate(parts))]
    return [parts[0] >> share * number & _mask(share) for number in range(len(one.written))]


def _multiply(one: _Statement, a: int, b: int, c: int = 0) -> int:
    product = a * b
    if "hi" in one.parts:
        product >>= int(one.type[1:])
    return product + c


def _quotient(_: _Statement, a: int, b: int) -> int:
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _set(one: _Statement, a: Any, b: Any, also: bool | None = None) -> bool:
    holds: bool = {
        "eq": a == b,
        "ne": a != b,
        "lt": a < b,
        "lo": a < b,
        "le": a <= b,
        "ls": a <= b,
        "gt": a > b,
        "hi": a > b,
        "ge": a >= b,
        "hs": a >= b,
    }[one.parts[0]]
    if also is None:
        return holds
    return {"and": holds and also, "or": holds or also, "xor": holds != also}[one.parts[1]]


def _convert(one: _Statement, a: int) -> int:
    _, of = [part for part in one.parts if _TYPE.match(part)][:2]
    bits = int(of[1:])
    return _signed(a, bits) if of[0] == "s" else a & _mask(bits)


def _extract(one: _Statement, a: int, position: int, length: int) -> int:
    field = (a & _mask(int(one.type[1:]))) >> (position & 0xFF) & _mask(length & 0xFF)
    return _signed(field, length) if one.type[0] == "s" and length else field


def _logical(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(one: _Statement, a: Any, b: Any) -> Any:
        return bool(operation(bool(a), bool(b))) if "pred" in one.parts else operation(a, b)

    return apply


_OPERATIONS: Final[dict[str, Callable[..., Any]]] = {
    "mov": lambda one, a: bool(a) if "pred" in one.parts else a,
    "cvta": lambda _, a: a,
    "add": lambda _, a, b: a + b,
    "sub": lambda _, a, b: a - b,
    "neg": lambda _, a: -a,
    "abs": lambda _, a: abs(a),
    "mul": _multiply,
    "mad": _multiply,
    "div": _quotient,
    "rem": lambda one, a, b: a - b * _quotient(one, a, b) if b else a,
    "min": lambda _, a, b: min(a, b),
    "max": lambda _, a, b: max(a, b),
    "and": _logical(lambda a, b: a & b),
    "or": _logical(lambda a, b: a | b),
    "xor": _logical(lambda a, b: a ^ b),
    "not": lambda one, a: not a if "pred" in one.parts else ~a,
    "shl": lambda _, a, n: a << n if n < 64 else 0,
    "shr": lambda _, a, n: a >> n,
    "selp": lambda _, a, b, which: a if which else b,
    "setp": _set,
    "cvt": _convert,
    "bfe": _extract,
    # Of a warp's first thread: what all its threads have.
    "shfl": lambda one, a, lane, *_: a if "idx" in one.parts and lane == 0 else _UNKNOWN,
}
"""Operations on integers and predicates, on values in the type of the instruction."""
