"""Parses the TPU compiler's listings of a kernel's schedule.

A TPU's tensor core executes one bundle of instructions a cycle. `packed-bundles-post-ra` lists the bundles of a kernel
as they are executed, including empty ones; `pre-delay_hlo-static-per-bundle-utilization` has a row for each bundle with
the slots of each unit that it uses; the `vmem_report` has the use of VMEM. Only scalar instructions and transfers are
parsed, because they decide how often each bundle runs; vector instructions appear in the utilization alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Final

_HEADER: Final = re.compile(r"^ *(?:0x[0-9a-f]+|0)\s+(?:(?P<label>[A-Z]{2}))?\s*:[ \t]?(?P<depth>>*) ?\{", re.MULTILINE)
_COMMENT: Final = re.compile(r"/\*.*?\*/", re.DOTALL)
_PREDICATE: Final = re.compile(r"\((?P<not>!)?(?P<name>%p\w+)(?:, (?P<otherwise>%\w+))?\),?")
_TARGET: Final = re.compile(r"target bundleno = (\d+)")
_SCALAR_RESULT: Final = re.compile(r"%[sp]\d+_[sp]\d+$")
_CONSTANT: Final = re.compile(r"\((?P<not>!?)(?P<value>[01])\),\s*")
_EFFECTS: Final = ("sbr", "sst", "dma.", "sdivrem", "vsync", "vwait")
"""Prefixes of opcodes of instructions that matter although they have no scalar result."""


@dataclasses.dataclass(frozen=True)
class Predicate:
    """The condition of an instruction.

    Attributes:
      name: name of the predicate, "%p12_p3".
      negated: whether the instruction is executed if the predicate is false.
      otherwise: value of the destination if the instruction is not executed; None leaves it unchanged.
    """

    name: str
    negated: bool
    otherwise: str | None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the scalar unit, or one that starts a transfer or waits for one.

    Attributes:
      opcode: its opcode, "sadd.s32" or "dma.hbm_to_vmem" for example.
      destination: name of its result, or "".
      operands: names, numbers and addresses as listed.
      predicate: its condition, or None.
      comment: the compiler's remarks.
    """

    opcode: str
    destination: str
    operands: tuple[str, ...]
    predicate: Predicate | None
    comment: str

    @property
    def target(self) -> int | None:
        """Number of the bundle that it branches to, or None."""
        found = _TARGET.search(self.operands[0]) if self.opcode.startswith("sbr") and self.operands else None
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The instructions of one cycle.

    Attributes:
      label: "LB" at the beginning of a loop's body, "PF" after a conditional, …
      depth: number of loops around it.
      instructions: its scalar instructions and transfers.
    """

    label: str
    depth: int
    instructions: tuple[Instruction, ...]

    @property
    def branch(self) -> Instruction | None:
        """Its branch, or None."""
        return next((one for one in self.instructions if one.target is not None), None)


@dataclasses.dataclass(frozen=True)
class ScheduleLoop:
    """A loop of the schedule.

    Attributes:
      first: number of its first bundle.
      last: number of its last bundle.
      depth: nesting depth, 1 for an outermost loop.
      trips: trips of an execution, if the listing has them; the pipeline of a grid takes two more than the grid has
        steps.
    """

    first: int
    last: int
    depth: int
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """An instruction that starts a transfer.

    Attributes:
      bundle: number of its bundle.
      direction: "hbm_to_vmem", "vmem_to_hbm", …
      granules: its size in the chip's granules; None if decided at run time.
    """

    bundle: int
    direction: str
    granules: int | None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of a kernel.

    Attributes:
      bundles: bundles in order.
      units: names of units, "MXU", "VALU", "SALU", …
      capacity: slots of each unit in a bundle.
      use: for each bundle, the slots of each unit that it uses.
      delay_slots: bundles after a branch that are executed whether it is taken or not.
    """

    bundles: tuple[Bundle, ...]
    units: tuple[str, ...]
    capacity: tuple[int, ...]
    use: tuple[tuple[int, ...], ...]
    delay_slots: int

    def loops(self) -> list[ScheduleLoop]:
        """Returns the loops by their first bundles, outer ones first."""
        found = []
        for number, bundle in enumerate(self.bundles):
            branch = bundle.branch
            if branch is None or branch.target is None or branch.target > number:
                continue
            body = self.bundles[branch.target : number + 1]
            last = min(number + self.delay_slots, len(self.bundles) - 1)
            found.append(ScheduleLoop(branch.target, last, body[0].depth, _trips(body)))
        return sorted(found, key=lambda loop: (loop.first, -loop.last))

    def transfers(self) -> list[Transfer]:
        """Returns the transfers in order."""
        return [
            Transfer(number, one.opcode.removeprefix("dma."), _integer(transfer_size(one)))
            for number, bundle in enumerate(self.bundles)
            for one in bundle.instructions
            if is_transfer(one)
        ]

    def spills(self) -> tuple[int, int]:
        """Returns the slots of vector stores and of vector loads for register spills."""
        sums = [sum(column) for column in zip(*self.use, strict=True)] or [0] * len(self.units)
        by_unit = dict(zip(self.units, sums, strict=True))
        return by_unit.get("VSTORE:SPILL", 0), by_unit.get("VLOAD:FILL", 0)


def is_transfer(instruction: Instruction) -> bool:
    """Whether an instruction starts a transfer."""
    return instruction.opcode.startswith("dma.") and not instruction.opcode.startswith("dma.done")


def transfer_size(instruction: Instruction) -> str:
    """Returns the operand of a transfer that gives its size in granules: a number or a register."""
    number = 4 if instruction.opcode == "dma.smem_to_host_iova" else 1
    return instruction.operands[number]


def parse_schedule(bundles: str, utilization: str, delay_slots: int) -> Schedule:
    """Parses a kernel's listings.

    Args:
      bundles: text of `packed-bundles-post-ra`.
      utilization: text of `pre-delay_hlo-static-per-bundle-utilization`.
      delay_slots: delay slots of the chip's branches.

    Raises:
      ValueError: the listings are not in the known form.
    """
    parsed = parse_bundles(bundles)
    units, capacity, use = parse_utilization(utilization)
    if len(use) != len(parsed):
        raise ValueError(f"the compiler lists {len(parsed)} bundles, but the utilization of {len(use)}")
    return Schedule(parsed, units, capacity, use, delay_slots)


def parse_bundles(text: str) -> tuple[Bundle, ...]:
    """Parses `packed-bundles-post-ra`."""
    headers = list(_HEADER.finditer(text))
    if not headers:
        raise ValueError("the listing has no bundles")
    ends = [header.start() for header in headers[1:]] + [len(text)]
    bundles = []
    for header, end in zip(headers, ends, strict=True):
        content = text[header.end() : end]
        depth = len(header["depth"])
        bundles.append(Bundle(header["label"] or "", depth, tuple(_instructions(content))))
    return tuple(bundles)


def parse_utilization(text: str) -> tuple[tuple[str, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Parses `pre-delay_hlo-static-per-bundle-utilization` to units, their capacity, and a row for each bundle."""
    head, _, body = text.partition("== UTILIZATION:\n")
    lines = head.strip().splitlines()
    if len(lines) != 3 or not body:
        raise ValueError(f"the utilization begins in an unknown way: {text[:80]!r}")
    units = tuple(name.strip() for name in lines[1].split(","))
    rows = tuple(tuple(map(int, line.split())) for line in body.strip().splitlines())
    return units, tuple(map(int, lines[2].split())), rows


def parse_vmem_report(html: str) -> dict[str, int]:
    """Parses a `vmem_report` to the bytes of VMEM that each kernel takes, by name."""
    _, found, data = html.partition("const DATA =")
    if not found:
        raise ValueError("the VMEM report has no data")
    report, _ = json.JSONDecoder().raw_decode(data.lstrip())
    return {name: int(breakdown["total_size"]) for name, breakdown in report["hlo_breakdowns"].items()}


def _instructions(content: str) -> list[Instruction]:
    # Comments may contain braces and semicolons, so they are replaced by numbers while the text is split.
    comments: list[str] = []

    def keep(match: re.Match[str]) -> str:
        comments.append(match[0][2:-2].strip())
        return f"\0{len(comments) - 1}\0"

    content = _COMMENT.sub(keep, content)
    content = content[: content.rindex("}")] if "}" in content else content
    found = []
    for text in content.split(" ;; "):
        numbers = re.findall(r"\0(\d+)\0", text)
        text = re.sub(r"\0\d+\0", "", text).strip()
        # Names of arguments, as in /*hbm=*/, are left out.
        comment = " ".join(comments[int(n)] for n in numbers if not comments[int(n)].endswith("="))
        instruction = _instruction(text, comment)
        if instruction is not None:
            found.append(instruction)
    return found


def _instruction(text: str, comment: str) -> Instruction | None:
    destination, equals, rest = text.partition(" = ")
    if not equals:
        return None
    opcode, _, rest = rest.strip().partition(" ")
    if not _SCALAR_RESULT.match(destination.strip()) and not opcode.startswith(_EFFECTS):
        return None
    predicate = None
    found = _PREDICATE.search(rest)
    if found:
        predicate = Predicate(found["name"], found["not"] is not None, found["otherwise"])
        rest = rest[: found.start()] + rest[found.end() :]
    constant = _CONSTANT.search(rest) if opcode.startswith("dma.") else None
    if constant:
        # The condition is a constant: the transfer always takes place, or never.
        if (constant["value"] == "1") == bool(constant["not"]):
            return None
        rest = rest[: constant.start()] + rest[constant.end() :]
    if opcode.startswith("sbr"):
        operands = [rest.strip()]
    elif opcode == "sst":
        # sst [smem:[address]] value
        address, _, value = rest.strip().rpartition("]")
        operands = [address + "]", value.strip()]
    elif opcode.startswith("inlined_call_operand"):
        # A description: "[shape: s32[8], index: 1, kind: input, shape index: {}]".
        operands = [rest.strip()]
    else:
        operands = [operand.strip() for operand in rest.split(",")] if rest.strip() else []
    name = destination.strip()
    return Instruction(opcode, name, tuple(operands), predicate, comment)


def _trips(body: tuple[Bundle, ...]) -> int | None:
    for bundle in reversed(body):
        for one in bundle.instructions:
            if "loop exit test" in one.comment and one.opcode == "scmp.ge.s32.totalorder":
                return _integer(one.operands[1])
    return None


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d+", text) else None
