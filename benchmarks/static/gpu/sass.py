"""Reads the machine code of a GPU kernel as nvdisasm lists it: its instructions, its loops, and the units they use.

A multiprocessor has four schedulers, each of which issues one instruction of a warp in a cycle. The pipes behind them
take one cycle or several for the 32 threads of an instruction, so that instructions differ in cost: a conversion of an
integer takes as long as eight additions.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Final

from palladion.benchmarks.static.gpu.loops import Loop, natural_loops, with_depths

WARP: Final = 32
"""Threads of a warp, which execute an instruction together."""

ISSUE: Final = "issue"
"""Name of the schedulers, which every instruction needs, among the units."""

LOAD_STORE: Final = "load/store"
"""Name of the pipe to shared memory, and through L1 to global memory."""

_INSTRUCTION: Final = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_LABEL: Final = re.compile(r"(?P<label>\.L\w*):")
_TARGET: Final = re.compile(r"`\((?P<label>\.L\w*)\)")

_WIDTHS: Final = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes per thread by the opcode's modifier; four without one."""

_TMA: Final = {
    "UTMALDG": "load",
    "UTMAPF": "prefetch",
    "UBLKPF": "prefetch",
    "UTMASTG": "store",
    "UTMAREDG": "store",
    "UBLKRED": "store",
}
"""Work that instructions make TMA do; UBLKCP names its direction in a modifier."""

_PIPES: Final[tuple[tuple[str, str], ...]] = (
    (r"HMMA|IMMA|QMMA|OMMA|DMMA|BMMA|[HIQB]GMMA|UTC\w*MMA", "tensor"),
    (r"MUFU|I2F|F2I|F2F|I2I|FRND|POPC|FLO|BREV", "special"),
    (r"FFMA2?|FMUL2?|FADD2?|FFMA32I|HFMA2|HADD2|HMUL2|FSWZADD", "float"),
    (r"IMAD|IDP|IDP4A", "multiply"),
    (r"LDG|LDS|LDSM|LDL|LD|STG|STS|STSM|STL|ST|LDGSTS|ATOM\w*|RED\w*|SHFL|LDGMC", LOAD_STORE),
    (r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BAR|DEPBAR|LDGDEPBAR|WARPSYNC|YIELD|NOP|NANOSLEEP|ERRBAR", ISSUE),
    (r"MEMBAR|CCTL|FENCE|SYNCS|ACQBULK|ARRIVES|S2R|CS2R|LDCU?|R2UR|S2UR|WARPGROUP\w*|ELECT|U[A-Z0-9]+", ISSUE),
)
"""Pipes by the first part of the opcode; all other instructions go to the integer pipe."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the listing.

    Attributes:
      opcode: "LDG.E.128".
      guard: the predicate that it is executed under, "P0", "!UP1"; "" if there is none.
      operands: its operands as written.
      target: the label that a branch goes to, or None.
    """

    opcode: str
    guard: str
    operands: str
    target: str | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def never(self) -> bool:
        """Whether it is never executed: the assembler leaves such instructions as padding."""
        return self.guard == "!PT"

    @property
    def asynchronous(self) -> bool:
        """Whether it copies from global to shared memory without passing through registers."""
        return self.name == "LDGSTS" or self.tma == "load"

    @property
    def tma(self) -> str | None:
        """Work that it makes TMA do: "load", "prefetch" (into the L2 cache) or "store"; None for all others."""
        if self.name == "UBLKCP":
            return "store" if self.opcode.startswith("UBLKCP.G.S") else "load"
        return _TMA.get(self.name)

    @property
    def thread_bytes(self) -> int | None:
        """Maximum bytes that it reads from global memory per thread; None if the listing does not say.

        It reads less if addresses of threads coincide, or its guard excludes some threads.
        """
        if self.tma == "load":
            return None
        if self.never or self.name not in ("LDG", "LDGSTS", "LD"):
            return 0
        return next((_WIDTHS[part] for part in self.opcode.split(".")[1:] if part in _WIDTHS), 4)

    @property
    def load_store_cycles(self) -> int:
        """Cycles of the load/store pipe for a warp: it moves 128 bytes per cycle to or from shared memory and L1."""
        width = next((_WIDTHS[part] for part in self.opcode.split(".")[1:] if part in _WIDTHS), 4)
        if self.name in ("LDSM", "STSM"):  # 1, 2 or 4 matrices of 128 bytes
            width = 4 * {"2": 2, "4": 4}.get(self.opcode.rpartition(".")[2], 1)
        return max(width // 4, 1)

    @property
    def pipe(self) -> str:
        """The pipe that it goes to: "integer", "multiply", "float", "special", "tensor", `LOAD_STORE` or `ISSUE`."""
        return next((pipe for form, pipe in _PIPES if re.fullmatch(form, self.name)), "integer")

    @property
    def tensor_flops(self) -> float:
        """Cost of a warp's share on tensor cores, in bfloat16 operations; 0 if it is not known."""
        narrow = 2.0 if self.name[0] in "IQ" else 0.5 if "TF32" in self.opcode else 1.0
        group = re.match(r"\w+\.64x(?P<n>\d+)x(?P<k>\d+)", self.opcode)
        if group is not None:  # four warps take 16 rows each
            return 2 * 16 * int(group["n"]) * int(group["k"]) / narrow
        shape = re.match(r"[HIQ]MMA\.(?:SP\.)?(?P<m>16)(?P<n>8)(?P<k>\d{1,2})\b", self.opcode)
        return 2 * 16 * 8 * int(shape["k"]) / narrow if shape is not None else 0.0


def bytes_awaited(instructions: Sequence[Instruction]) -> int:
    """Returns the maximum bytes that a thread waits for at a time, in loads to registers before their first use.

    A load right before its use is waited for alone, however many loads there are.
    """
    waiting: dict[int, tuple[range, int]] = {}  # first register: registers of the load, and its bytes
    most = 0
    for one in instructions:
        operands = one.operands.split(",")
        stores = one.name.startswith(("ST", "RED", "ATOM"))
        for register in map(int, re.findall(r"\bR(\d+)", ",".join(operands if stores else operands[1:]))):
            waiting = {first: load for first, load in waiting.items() if register not in load[0]}
        size = one.thread_bytes
        target = re.match(r"\s*R(\d+)", operands[0])
        if size and target is not None and not one.asynchronous:
            first = int(target[1])
            waiting[first] = (range(first, first + max(size // 4, 1)), size)
            most = max(most, sum(size for _, size in waiting.values()))
    return most


@dataclasses.dataclass(frozen=True)
class Code:
    """The machine code of a kernel.

    Attributes:
      instructions: instructions in the order of their addresses.
      loops: loops, outer ones before inner ones.
    """

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def inside(self, loop: Loop | None) -> list[Instruction]:
        """Returns the instructions of a loop without its inner loops; None means those outside of all loops."""
        numbers = set(range(len(self.instructions))) if loop is None else set(loop.body)
        for other in self.loops:
            if loop is None or loop.contains(other):
                numbers -= other.body
        return [self.instructions[number] for number in sorted(numbers)]


def parse(listing: str) -> Code:
    """Parses the output of `nvdisasm -c` for one kernel.

    Raises:
      ValueError: it has no instructions.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = _LABEL.match(line.strip())
        if label is not None:
            labels[label["label"]] = len(instructions)
            continue
        found = _INSTRUCTION.search(line)
        if found is not None:
            target = _TARGET.search(found["operands"])
            instructions.append(
                Instruction(
                    found["opcode"],
                    found["guard"] or "",
                    found["operands"].strip(),
                    target["label"] if target else None,
                )
            )
    if not instructions:
        raise ValueError(f"no instructions in the listing, which begins: {listing[:80]!r}")
    following = [
        _following(number, one, labels.get(one.target or ""), len(instructions))
        for number, one in enumerate(instructions)
    ]
    found_loops = [loop for loop in natural_loops(following) if not _waits([instructions[at] for at in loop.body])]
    return Code(tuple(instructions), with_depths(found_loops))


def _following(number: int, one: Instruction, target: int | None, end: int) -> list[int]:
    """Returns the instructions that may follow an instruction."""
    found = [] if target is None or target >= end else [target]
    ends = one.name in ("EXIT", "RET") or (one.name in ("BRA", "JMP") and one.operands.startswith("`"))
    if not (ends and not one.guard) and number + 1 < end:
        found.append(number + 1)
    return found


def _waits(instructions: Sequence[Instruction]) -> bool:
    """Whether a loop only waits for a barrier in shared memory, or for tensor memory."""
    waits = any("TRYWAIT" in one.opcode or one.name == "NANOSLEEP" for one in instructions)
    return waits and not any(one.pipe in ("tensor", "float") or one.thread_bytes != 0 for one in instructions)


def by_loop(code: Code) -> list[tuple[Loop | None, list[Instruction]]]:
    """Groups all instructions by their innermost loop; None stands for those outside of all loops."""
    return [(loop, code.inside(loop)) for loop in itertools.chain([None], code.loops)]
