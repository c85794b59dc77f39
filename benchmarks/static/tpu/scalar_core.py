"""Executes the scalar instructions of a schedule: which bundles run how often, what is moved, and what waits for what.

A tensor core has one instruction stream. Its scalar unit decides on everything that takes time: branches, and with them
loops and conditionals; transfers, their sizes and the waits for them. Vector values never matter, unless a kernel moves
one to the scalar unit. So a kernel is executed here without its data: scalars are real, whatever comes from a vector is
opaque. Where a branch or a transfer depends on something opaque, or on a scalar argument that was not given, the
execution ends as `Undecided`, which is better than a guess.

The instructions are translated to Python (`translation.py`); a million blocks of them run in a second or so.
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
"""Blocks that are executed before a kernel is given up."""

SIGN: Final = 2**31


@dataclasses.dataclass(frozen=True)
class Operand:
    """An argument of a kernel.

    Attributes:
      words: its 32-bit words as they lie in memory; None where they are not known.
      description: what to call it where it should have been known.
    """

    words: tuple[int, ...] | None
    description: str


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a core did.

    Attributes:
      cycles: from the first bundle to the last one, waits included.
      counts: for each bundle, how often it was executed.
      moved: by direction, the transfers.
      stalls: by direction, cycles in which the core waited for transfers.
    """

    cycles: float
    counts: tuple[int, ...]
    moved: Mapping[str, Traffic]
    stalls: Mapping[str, float]

    @property
    def busy(self) -> int:
        """Bundles executed: the cycles that it would take if nothing were ever waited for."""
        return sum(self.counts)


class ScalarCore:
    """A schedule, ready to be executed.

    Args:
      schedule: of the kernel.

    Raises:
      Undecided: it branches in a way that is not known here.
    """

    def __init__(self, schedule: Schedule):
        self._schedule = schedule
        translation = Translation(schedule)
        self._blocks = translation.blocks
        self._code = compile(translation.source(), "<schedule>", "exec")

    @property
    def reads_core_number(self) -> bool:
        """Whether cores do different work."""
        return any("core id" in one.comment for bundle in self._schedule.bundles for one in bundle.instructions)

    def run(self, operands: Mapping[int, Operand], *, rate: Rate, core: int = 0) -> Execution:
        """Executes the kernel.

        Args:
          operands: arguments of the kernel, by number.
          rate: how fast transfers are.
          core: which one of the device it is.

        Raises:
          Undecided: what is executed depends on something that is not known.
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
    """The memory of scalars, and the arguments that may be copied to it."""

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
        # Checks store what went wrong where something did, which is not known here.
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
        """Copies from HBM."""
        number, offset = -1, 0
        if type(source) is int and source >= HBM:
            # Some generations count larger units, and shift addresses to granules before they use them.
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
