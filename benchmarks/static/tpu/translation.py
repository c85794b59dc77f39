"""Translates the scalar instructions of a schedule to Python: a function for each block of bundles without a branch.

The functions share global variables, one for each scalar. Listed names are unique ("%s31_s20" becomes `s31`), so that
no write comes too early, whatever the latency of its instruction. Where paths meet, `sphi` takes what was last written
to the register ("R_s20"). Scalars that are only used for vectors, addresses and assertions are left out.

A block returns the number of the next one. Instructions with effects call functions that `scalar_core.py` provides:
`load`, `store`, `copy`, `start`, `wait`, `add`, `reset` and `operand`.
"""

from __future__ import annotations

import re
from typing import Final

from palladion.benchmarks.static.opaque import Undecided
from palladion.benchmarks.static.tpu.schedule import Bundle, Instruction, Schedule, is_transfer, transfer_size

MASK: Final = 2**32 - 1

HBM: Final = 2**60
HBM_STRIDE: Final = 2**40
"""Operand n begins at HBM + n * HBM_STRIDE, so that an address tells its operand even when it is shifted."""

ALLOCATION_STRIDE: Final = 2**20
"""Distance between allocations: number n begins at (n + 1) times this."""

# Expressions over operands {0}, {1}, {2}; scalars are unsigned 32-bit numbers, predicates are 0 or 1.
_ARITHMETIC: Final = {
    "smov": "{0}",
    "smov.u32": "{0}",
    "pmov": "{0}",
    "sadd.s32": "({0} + {1}) & 0xFFFFFFFF",
    "ssub.s32": "({0} - {1}) & 0xFFFFFFFF",
    "smul.u32": "({0} * {1}) & 0xFFFFFFFF",
    "smul.s32": "({0} * {1}) & 0xFFFFFFFF",
    "smulhi.u32": "({0} * {1}) >> 32",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "sshll.u32": "shift_left({0}, {1})",
    "sshrl.u32": "shift_right({0}, {1})",
    "sshra.s32": "shift_right_signed({0}, {1})",
    "smin.u32": "select({0} < {1}, {0}, {1})",
    "smax.u32": "select({0} < {1}, {1}, {0})",
    "smin.s32": "select(({0} ^ 0x80000000) < ({1} ^ 0x80000000), {0}, {1})",
    "smax.s32": "select(({0} ^ 0x80000000) < ({1} ^ 0x80000000), {1}, {0})",
    "sc.u32": "({0} + {1}) > 0xFFFFFFFF",
    "pneg": "1 - {0}",
    "pand": "{0} & {1}",
    "por": "either({0}, {1})",
    "pxor": "{0} ^ {1}",
    "pnand": "1 - ({0} & {1})",
    "pnor": "1 - either({0}, {1})",
    "scalar_select": "select({0}, {1}, {2})",
}
_COMPARE: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_NAME: Final = re.compile(r"%([sp]\d+)_[sp]\d+")


class Translation:
    """A schedule, translated to Python.

    Args:
      schedule: the kernel's schedule.

    Attributes:
      blocks: for each block of bundles its first bundle, and the one after its last.

    Raises:
      Undecided: a branch is not understood.
    """

    def __init__(self, schedule: Schedule):
        self.blocks = _blocks(schedule)
        self._schedule = schedule
        self._defined = {
            one.destination: one for bundle in schedule.bundles for one in bundle.instructions if one.destination
        }
        # Scalars that are spilled to SMEM.
        self._stored = {
            one.operands[0]: one.operands[1]
            for bundle in schedule.bundles
            for one in bundle.instructions
            if one.opcode == "sst" and "_spill" in one.operands[0]
        }

    def source(self) -> str:
        """Returns the functions of all blocks, `block_0` and so on, as source code."""
        by_first = {first: number for number, (first, _) in enumerate(self.blocks)}
        needed = self._needed()
        merged = {
            operand
            for one in self._defined.values()
            if one.opcode == "sphi" and one.destination in needed
            for operand in one.operands
        }
        lines = [f"{_python(name)} = Opaque('the value of {name} is not a scalar')" for name in sorted(needed)]
        lines += [f"{register} = Opaque('undefined')" for register in sorted({_register(name) for name in merged})]
        for number, (first, end) in enumerate(self.blocks):
            body: list[str] = []
            branch: Instruction | None = None
            for place in range(first, end):
                for one in _in_order(self._schedule.bundles[place]):
                    if one.target is not None:
                        branch = one
                        body.append(f"taken = {_condition(one)}")
                    elif not one.destination or one.destination in needed or _has_effect(one):
                        body += self._statements(one, place - first, merged)
            after = by_first.get(end, -1)
            target = after if branch is None else by_first[branch.target or 0]
            if not body and target == after:
                lines.append(f"def block_{number}():\n    global clock\n    clock += {end - first}\n    return {after}")
                continue
            names = sorted({word for line in body for word in re.findall(r"\b([sp]\d+|R_\w+)\b", line)})
            lines.append(f"def block_{number}():")
            lines.append(f"    global {', '.join(['clock', *names])}")
            lines.append("    now = clock")
            lines += [f"    {line}" for statement in body for line in statement.splitlines()]
            lines.append(f"    clock = now + {end - first}")
            lines.append(f"    return {target} if taken else {after}" if branch else f"    return {after}")
        return "\n".join(lines)

    def _needed(self) -> set[str]:
        """Returns the scalars on which branches, transfers, waits and SMEM depend."""
        needed: set[str] = set()
        todo = [
            name
            for bundle in self._schedule.bundles
            for one in bundle.instructions
            if _has_effect(one)
            for name in (*self._relevant(one), *([one.destination] if one.opcode == "spop.drf" else []))
        ]
        while todo:
            name = todo.pop()
            if name in needed:
                continue
            needed.add(name)
            if name in self._defined:
                todo += self._relevant(self._defined[name])
        return needed

    def _relevant(self, one: Instruction) -> list[str]:
        operands = " ".join(one.operands)
        if is_transfer(one) and not one.opcode.endswith("_to_smem"):
            operands = f"{transfer_size(one)} {_semaphore(one)}"
        names = [match[0] for match in _NAME.finditer(operands)]
        if one.predicate:
            names.append(one.predicate.name)
            names += [one.predicate.otherwise] if one.predicate.otherwise else []
        return names

    def _statements(self, one: Instruction, offset: int, merged: set[str]) -> list[str]:
        """Translates an instruction that is `offset` bundles after the beginning of its block."""
        effect = self._effect(one, offset)
        if effect is not None:
            condition = _condition(one)
            always = condition == "1" or one.opcode == "sst"
            return [effect if always else f"if {condition}:\n    {effect}"]
        name, value = _python(one.destination), self._value(one)
        result = f"{_register(one.destination)} = {name}" if one.destination in merged else name
        if one.predicate is None:
            return [f"{result} = {value}"]
        condition = _condition(one)
        otherwise = one.predicate.otherwise
        lines = [f"if type({_python(one.predicate.name)}) is Opaque:", f"    {result} = {_python(one.predicate.name)}"]
        lines += [f"elif {condition}:", f"    {result} = {value}"]
        if otherwise is not None:
            lines += ["else:", f"    {result} = {_python(otherwise)}"]
        return ["\n".join(lines)]

    def _effect(self, one: Instruction, offset: int) -> str | None:
        """Translates an instruction with an effect; returns None for one that only computes a scalar."""
        now, operands = f"now + {offset}" if offset else "now", one.operands
        if one.opcode == "sst":
            return f"store({_condition(one)}, {_address(operands[0])}, {_operand(operands[1])})"
        if one.opcode.startswith(("dma.done", "vwait")):
            return f"now = wait({now}, {_address(operands[0])}, {_operand(operands[1])}) - {offset}"
        if one.opcode == "vsyncadd":
            return f"add({now}, {_address(operands[0])}, {_operand(operands[1])})"
        if one.opcode == "vsyncpa":
            return f"reset({_address(operands[0])})"
        if is_transfer(one):
            size = _operand(transfer_size(one))
            start = f"start({now}, {self._direction(one)!r}, {size}, {_address(_semaphore(one))})"
            if one.opcode.endswith("_to_smem"):
                return f"{start}; copy({_operand(operands[0])}, {_address(operands[2])}, {size})"
            return start
        if one.opcode == "sdivrem.u32":
            parts = "both" if "kDivAndRem" in one.comment else "rem" if "kRem" in one.comment else "div"
            return f"queue.extend(divide({_operand(operands[0])}, {_operand(operands[1])}, {parts!r}))"
        return None

    def _value(self, one: Instruction) -> str:
        """Returns a Python expression for the result of an instruction."""
        if one.opcode.startswith("inlined_call_operand"):
            return _argument(one)
        operands = [_operand(operand) for operand in one.operands]
        if one.opcode in _ARITHMETIC:
            return _ARITHMETIC[one.opcode].format(*operands)
        kind, _, rest = one.opcode.partition(".")
        if kind == "scmp":
            comparison, _, order = rest.partition(".")
            if order == "u32.totalorder":
                return f"{operands[0]} {_COMPARE[comparison]} {operands[1]}"
            if order == "s32.totalorder":
                equality = comparison in ("eq", "ne")
                a, b = operands if equality else [f"({operand} ^ 0x80000000)" for operand in operands]
                return f"{a} {_COMPARE[comparison]} {b}"
        if kind == "scalar_lea":
            address = f"{_address(one.operands[0])} + {_operand(one.operands[1].split(' ')[0])}"
            return address if rest == "hbm" else f"({address}) & {MASK}"
        if kind == "int_to_ptr":
            return _operand(one.operands[0].rpartition(" ")[2])
        if kind == "sld":
            return "core" if "core id" in one.comment else f"load({_address(one.operands[0])})"
        if kind == "sphi":
            same = {_register(name) for name in one.operands} == {_register(one.destination)}
            return _register(one.destination) if same else _opaque(one)
        if one.opcode == "spop.drf":
            return "queue.pop(0)"
        return _opaque(one)

    def _direction(self, one: Instruction) -> str:
        if one.opcode != "dma.general":
            return one.opcode.removeprefix("dma.")
        return f"{self._space(one.operands[0])}_to_{self._space(one.operands[2])}"

    def _space(self, name: str) -> str:
        """Returns the memory that the address in a register refers to."""
        found = self._defined.get(name)
        if found is None or not found.operands:
            return "unknown"
        if found.opcode.startswith("inlined_call_operand"):
            return "hbm"
        space = found.opcode.partition(".")[2]
        if space in ("hbm", "vmem", "smem"):
            return space
        if found.opcode == "sld":
            return self._space(self._stored.get(found.operands[0], ""))
        return self._space(found.operands[0])


def _blocks(schedule: Schedule) -> list[tuple[int, int]]:
    """Returns the first bundle of each block, and the one after its last."""
    starts, ends_by_branch = {0}, []
    for number, bundle in enumerate(schedule.bundles):
        branch = bundle.branch
        if branch is not None and branch.target is not None:
            end = number + 1 + schedule.delay_slots
            starts |= {branch.target, end}
            ends_by_branch.append((number, end))
    length = len(schedule.bundles)
    ordered = sorted(start for start in starts if start < length)
    for number, end in ends_by_branch:
        if any(number < start < end for start in ordered):
            raise Undecided(f"bundle {number:#x} branches, and another branch leads to the bundles that follow it")
    return list(zip(ordered, [*ordered[1:], length], strict=True))


def _in_order(bundle: Bundle) -> list[Instruction]:
    """Orders the instructions of a bundle such that each comes after those whose results it uses."""
    defined = {one.destination for one in bundle.instructions if one.opcode != "sphi"}
    ordered = [one for one in bundle.instructions if one.opcode == "sphi"]
    pending = [one for one in bundle.instructions if one.opcode != "sphi"]
    while pending:
        waiting = {one.destination for one in pending}
        ready = [one for one in pending if not (_used(one) & defined & waiting - {one.destination})] or pending[:1]
        ordered += ready
        pending = [one for one in pending if one not in ready]
    return ordered


def _used(one: Instruction) -> set[str]:
    names = {match[0] for match in _NAME.finditer(" ".join(one.operands))}
    if one.predicate:
        names |= {one.predicate.name, one.predicate.otherwise or one.predicate.name}
    return names


def _has_effect(one: Instruction) -> bool:
    return (
        one.target is not None
        or one.opcode == "sst"
        or one.opcode.startswith(("dma.", "vsyncadd", "vsyncpa", "vwait", "sdivrem", "spop.drf"))
    )


def _semaphore(one: Instruction) -> str:
    """Returns the operand of a transfer that names its semaphore."""
    return one.operands[3]


def _condition(one: Instruction) -> str:
    if one.predicate is None:
        return "1"
    name = _python(one.predicate.name)
    return f"1 - {name}" if one.predicate.negated else name


def _argument(one: Instruction) -> str:
    """Returns the address of a kernel's argument, or its value if it is passed in a register."""
    found = re.search(r"index: (\d+), kind: (\w+)", one.operands[0])
    if found and found[2] == "input":
        by_value = one.operands[0].startswith("memory space>")  # inlined_call_operand.<no memory space>
        return f"operand({found[1]}, {by_value})"
    return str(2 * HBM - 1)  # a result: nothing is read from it


def _opaque(one: Instruction) -> str:
    return f"Opaque({f'it depends on the result of {one.opcode}'!r})"


def _python(name: str) -> str:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is not the name of a scalar")
    return found[1]


def _register(name: str) -> str:
    return "R_" + name.rpartition("_")[2]


def _operand(text: str) -> str:
    """Translates a number, a register or an address."""
    if text.startswith("["):
        return _address(text)
    if _NAME.match(text):
        return _python(text.split(" ")[0])
    if re.fullmatch(r"-?\d+", text):
        return str(int(text) & MASK)
    return f"Opaque({f'it depends on {text}'!r})"


def _address(text: str) -> str:
    """Translates an address such as `[smem:[#allocation5 + $0x4]]`, `[#allocation8]` or a register."""
    inner = text.replace("smem:", "").replace("[", "").replace("]", "").replace("sflag:", "")
    parts = []
    for part in inner.split(" + "):
        allocation = re.fullmatch(r"#allocation(\d+)(_spill)?", part)
        if allocation:
            parts.append(str((int(allocation[1]) + 1) * ALLOCATION_STRIDE))
        elif part.startswith("$"):
            parts.append(str(int(part[1:], 0)))
        else:
            parts.append(_operand(part))
    return parts[0] if len(parts) == 1 else f"({' + '.join(parts)}) & {MASK}"
