"""Executes the scalar instructions of a schedule, to find how often bundles run, what is moved, and what is waited for.

A tensor core has one instruction stream. Its scalar unit decides on everything that takes time: branches, and with them
loops and conditionals; transfers, their sizes, and the waits for them. Vector values do not matter, unless a kernel
moves one to the scalar unit. So a kernel is executed without its data: scalars are real, and whatever comes from a
vector is opaque. If a branch or a transfer depends on something opaque, or on a scalar argument that was not given, the
execution ends as `Undecided`, which is better than a guess.

The instructions are translated to Python (`translation.py`); a million blocks run in about a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from palladion.benchmarks.static.opaque import Opaque, Undecided, either, select
from palladion.benchmarks.static.tpu.schedule import Schedule
from palladion.benchmarks.static.tpu.transfers import Rate, Traffic, Transfers
from palladion.benchmarks.static.tpu.translation import HBM, HBM_STRIDE, MASK, Translation

MOST_BLOCKS: Final = 20_000_000
"""Blocks after which executing a kernel is given up."""

SIGN: Final = 2**31
"""Sign bit of a 32-bit word."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """An argument of a kernel.

    Attributes:
      words: its 32-bit words in memory; None if they are not known.
      description: its name in messages.
    """

    words: tuple[int, ...] | None
    description: str


@dataclasses.dataclass(frozen=True)
class Execution:
    """An execution of a kernel on a core.

    Attributes:
      cycles: cycles from the first bundle to the last one, waits included.
      counts: number of executions of each bundle.
      moved: transfers by direction.
      stalls: cycles in which the core waited for transfers, by direction.
    """

    cycles: float
    counts: tuple[int, ...]
    moved: Mapping[str, Traffic]
    stalls: Mapping[str, float]

    @property
    def busy(self) -> int:
        """Number of bundles executed: the cycles without any wait."""
        return sum(self.counts)


class ScalarCore:
    """A schedule, translated and ready to be executed.

    Args:
      schedule: the kernel's schedule.

    Raises:
      Undecided: a branch is not understood.
    """

    def __init__(self, schedule: Schedule):
        self._schedule = schedule
        translation = Translation(schedule)
        self._blocks = translation.blocks
        self._code = compile(translation.source(), "<schedule>", "exec")

    @property
    def reads_core_number(self) -> bool:
        """Whether the kernel reads the core's number, so that cores do different work."""
        return any("core id" in one.comment for bundle in self._schedule.bundles for one in bundle.instructions)

    def run(self, operands: Mapping[int, Operand], *, rate: Rate, core: int = 0) -> Execution:
        """Executes the kernel.

        Args:
          operands: the kernel's arguments, by number.
          rate: speed of transfers.
          core: number of the core.

        Raises:
          Undecided: the execution depends on something that is not known.
        """
        transfers = Transfers(rate)
        memory = _Scalars(operands, core, rate.granule_bytes)
        namespace: dict[str, Any] = {
            "Opaque": Opaque,
            "select": select,
            "either": either,
            "shift_left": _shift_left,
            "shift_right": _shift_right,
            "shift_right_signed": _shift_right_signed,
            "divide": _divide,
            "load": memory.load,
            "store": memory.store,
            "copy": memory.copy,
            "operand": memory.operand,
            "core": core,
            "start": transfers.start,
            "wait": transfers.wait,
            "add": transfers.add,
            "reset": transfers.reset,
            "queue": [],
            "clock": 0.0,
        }
        exec(self._code, namespace)
        functions: list[Callable[[], int]] = [namespace[f"block_{n}"] for n in range(len(self._blocks))]
        counts = [0] * len(functions)
        number, executed = 0, 0
        try:
            while number >= 0:
                counts[number] += 1
                number = functions[number]()
                executed += 1
                if executed > MOST_BLOCKS:
                    raise Undecided(f"it has not ended after {MOST_BLOCKS:,} blocks")
        except Undecided as reason:
            first = self._blocks[number][0]
            raise Undecided(f"{reason} (in the bundles from {first:#x} on)") from None
        by_bundle = [0] * len(self._schedule.bundles)
        for count, (first, end) in zip(counts, self._blocks, strict=True):
            by_bundle[first:end] = [count] * (end - first)
        return Execution(namespace["clock"], tuple(by_bundle), dict(transfers.moved), dict(transfers.stalls))


class _Scalars:
    """The memory of scalars (SMEM), and the arguments that may be copied to it."""

    def __init__(self, operands: Mapping[int, Operand], core: int, granule_bytes: int):
        self._operands = operands
        self._core = core
        self._words_per_granule = granule_bytes // 4
        self._memory: dict[Any, Any] = {}

    def load(self, address: Any) -> Any:
        if type(address) is Opaque:
            return address
        found = self._memory.get(address)
        return Opaque("a scalar is read that was never written") if found is None else found

    def store(self, condition: Any, address: Any, value: Any) -> None:
        # Assertions store an error code under a condition that is not known here.
        if type(condition) is Opaque:
            self._memory[address] = condition
        elif condition:
            self._memory[address] = value

    def operand(self, number: int, by_value: bool) -> Any:
        if not by_value:
            return HBM + number * HBM_STRIDE
        found = self._operands.get(number)
        if found is None or found.words is None:
            return self._unknown(number)
        return found.words[0]

    def copy(self, source: Any, destination: Any, granules: int) -> None:
        """Copies words from HBM to SMEM."""
        number, offset = -1, 0
        if type(source) is int and source >= HBM:
            # Some generations count in larger units, and shift addresses to granules before they use them.
            shift = source.bit_length() - HBM.bit_length()
            number, offset = divmod((source >> shift) - HBM, HBM_STRIDE)
            offset <<= shift
        found = self._operands.get(number)
        words = None if found is None else found.words
        first = offset * self._words_per_granule
        for n in range(granules * self._words_per_granule):
            if words is None:
                self._memory[destination + n] = self._unknown(number)
            elif first + n < len(words):
                self._memory[destination + n] = words[first + n]

    def _unknown(self, number: int) -> Opaque:
        found = self._operands.get(number)
        description = "what lies in HBM" if found is None else found.description
        return Opaque(f"it depends on the values of {description}, which were not given")


def _shift_left(a: Any, n: Any) -> Any:
    if type(a) is Opaque or type(n) is Opaque:
        return a if type(a) is Opaque else n
    if a >= HBM:
        return a << n
    return (a << n) & MASK if n < 32 else 0


def _shift_right(a: Any, n: Any) -> Any:
    if type(a) is Opaque or type(n) is Opaque:
        return a if type(a) is Opaque else n
    return a >> n


def _shift_right_signed(a: Any, n: Any) -> Any:
    if type(a) is Opaque or type(n) is Opaque:
        return a if type(a) is Opaque else n
    return (((a & MASK) ^ SIGN) - SIGN >> min(n, 31)) & MASK


def _divide(a: Any, b: Any, parts: str) -> list[Any]:
    if type(a) is Opaque or type(b) is Opaque or b == 0:
        unknown = a if type(a) is Opaque else Opaque("a division by zero")
        return [unknown] * (2 if parts == "both" else 1)
    return {"both": [a // b, a % b], "div": [a // b], "rem": [a % b]}[parts]
