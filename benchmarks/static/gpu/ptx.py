"""Reads PTX and evaluates its integer instructions.

PTX is what Triton hands to NVIDIA's assembler; NVIDIA documents it (PTX ISA). Only the instructions that decide how
often loops run have to be evaluated (`trip_counts.py`); the result of any other instruction is opaque.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from palladion.benchmarks.static.opaque import Opaque

BRANCHES: Final = ("bra", "ret", "exit")
"""Opcodes after which another statement than the next one may follow."""

ADDRESS: Final = re.compile(r"\[\s*(?P<base>[%\w$.]+)\s*(?:\+\s*(?P<offset>-?\w+)\s*)?\]")
"""An operand in memory: a register or a name, and an offset."""

UNKNOWN_REGISTER: Final = Opaque("it depends on a register that is not followed")

_STATEMENT: Final = re.compile(r"(?:@(?P<not>!?)(?P<guard>%?\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.S)
_LABEL: Final = re.compile(r"(\$?\w+):\s*")
_OPERAND: Final = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s]+")
REGISTER: Final = re.compile(r"%[A-Za-z_]\w*(?:\.[xyz])?")
_TYPE: Final = re.compile(r"[subf](?:8|16|32|64)$")

_NO_RESULT: Final = ("st", "bra", "ret", "exit", "bar", "barrier", "membar", "fence", "cp", "red", "prefetch", "trap")
"""Opcodes of instructions without a result in registers."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """An instruction of the PTX.

    Attributes:
      guard: register of its predicate, or None.
      negated: whether it is executed where the predicate is false.
      opcode: the first part of its opcode, "setp".
      modifiers: the other parts, ("lt", "u32").
      operands: its operands as written, the destination first.
      written: registers that it writes.
      read: registers that it reads.
      inputs: for each source operand the name of a register and None, or None and a number.
      type: type of its numbers, "u32"; untyped bits count as unsigned.
    """

    guard: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    written: tuple[str, ...]
    read: tuple[str, ...]
    inputs: tuple[tuple[str | None, Any], ...]
    type: str

    @property
    def loads(self) -> bool:
        """Whether it reads global memory."""
        return (self.opcode == "ld" and "global" in self.modifiers) or (
            self.opcode == "cp" and self.modifiers[:1] == ("async",) and "global" in self.modifiers
        )

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product of tensor cores."""
        return self.opcode == "mma" or (self.opcode == "wgmma" and "mma_async" in self.modifiers)

    @property
    def bits(self) -> int:
        """Width of its numbers."""
        return int(self.type[1:])


def parse(ptx: str) -> tuple[list[Statement], dict[str, list[int]]]:
    """Returns the statements of a kernel, and for each label the numbers of the statements that it stands before."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"(?m)^\s*\.(?!reg|pragma)\w+[^;{}\n]*$", "", body)  # directives that end with the line
    statements: list[Statement] = []
    labels: dict[str, list[int]] = {}
    for text in re.split(r";", body):
        rest = text.strip()
        while True:
            rest = re.sub(r"^[{}\s]+", "", rest) if not re.match(r"\{\s*%", rest) else rest
            label = _LABEL.match(rest)
            if label is None:
                break
            labels.setdefault(label[1], []).append(len(statements))
            rest = rest[label.end() :]
        found = _STATEMENT.fullmatch(rest)
        if found is None or rest.startswith("."):
            continue
        statements.append(_statement(found))
    return statements, labels


def parameters(ptx: str) -> dict[str, int]:
    """Returns the names of a kernel's parameters, and their numbers."""
    return {name: number for number, name in enumerate(re.findall(r"\.param \.\w+ [^,)]*?(\w+)[,\n)]", ptx))}


def _statement(found: re.Match[str]) -> Statement:
    opcode, *modifiers = found["opcode"].split(".")
    operands = tuple(part.strip() for part in _OPERAND.findall(found["operands"]))
    has_result = opcode not in _NO_RESULT and bool(operands)
    # `setp.lt.u32 %p1|%p2, …` has two results.
    written = tuple(REGISTER.findall(operands[0])) if has_result else ()
    sources = operands[has_result:]
    read = tuple(name for operand in sources for name in REGISTER.findall(operand))
    inputs = tuple(_input(name.strip()) for operand in sources for name in operand.strip("{} ").split(","))
    kind = next((part.replace("b", "u") for part in reversed(modifiers) if _TYPE.match(part)), "u32")
    return Statement(
        guard=found["guard"],
        negated=found["not"] == "!",
        opcode=opcode,
        modifiers=tuple(modifiers),
        operands=operands,
        written=written,
        read=read,
        inputs=inputs,
        type=kind,
    )


def _input(text: str) -> tuple[str | None, Any]:
    if text.startswith("%"):
        return text, None
    try:
        return None, int(text, 0)
    except ValueError:
        return None, Opaque(f"it depends on {text}")  # a floating-point number, or an address of shared memory


def evaluate(statement: Statement, registers: dict[str, Any]) -> Sequence[Any]:
    """Returns the values of the registers that an instruction writes; opaque where they are not known."""
    inputs = [value if name is None else registers.get(name, UNKNOWN_REGISTER) for name, value in statement.inputs]
    opaque = next((value for value in inputs if type(value) is Opaque), None)
    operation = _OPERATIONS.get(statement.opcode)
    if opaque is not None or operation is None or statement.type[0] == "f":
        if opaque is None:
            opcode = ".".join((statement.opcode, *statement.modifiers))
            opaque = Opaque(f"it depends on the result of {opcode}")
        return [opaque] * len(statement.written)
    if statement.opcode == "mov" and len(statement.written) + len(inputs) > 2:
        return _packed(statement, inputs)
    result = operation(statement, *(_typed(value, statement, number) for number, value in enumerate(inputs)))
    if isinstance(result, int) and not isinstance(result, bool):
        result &= mask(_result_bits(statement))
    return [result] * len(statement.written)


def mask(bits: int) -> int:
    """Returns the number with that many bits, all set."""
    return (1 << bits) - 1


def _signed(value: int, bits: int) -> int:
    value &= mask(bits)
    return value - (1 << bits) if value >> (bits - 1) else value


def _typed(value: Any, statement: Statement, number: int) -> Any:
    """Interprets a register's bits as an instruction does for its operand of that number."""
    if isinstance(value, bool) or statement.opcode == "cvt":
        return value
    # A wide product is added to a number of twice the width.
    bits = statement.bits * (2 if "wide" in statement.modifiers and number == 2 else 1)
    return _signed(value, bits) if statement.type[0] == "s" else value & mask(bits)


def _result_bits(statement: Statement) -> int:
    if statement.opcode == "cvt":
        kinds = [part for part in statement.modifiers if _TYPE.match(part)]
        return int(kinds[0][1:])
    return statement.bits * (2 if "wide" in statement.modifiers else 1)


def _packed(statement: Statement, parts: Sequence[int]) -> Sequence[int]:
    """Evaluates a `mov` of a wide register into narrow ones, or of narrow ones into a wide one."""
    width = statement.bits // max(len(parts), len(statement.written))
    if len(parts) > 1:
        return [sum((part & mask(width)) << width * number for number, part in enumerate(parts))]
    return [parts[0] >> width * number & mask(width) for number in range(len(statement.written))]


def _multiply(statement: Statement, a: int, b: int, c: int = 0) -> int:
    product = a * b
    if "hi" in statement.modifiers:
        product >>= statement.bits
    return product + c


def _quotient(_: Statement, a: int, b: int) -> int:
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _set(statement: Statement, a: Any, b: Any, other: bool | None = None) -> bool:
    """Evaluates `setp`: a comparison, combined with another predicate if there is one."""
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
    }[statement.modifiers[0]]
    if other is None:
        return holds
    return {"and": holds and other, "or": holds or other, "xor": holds != other}[statement.modifiers[1]]


def _convert(statement: Statement, a: int) -> int:
    _, source = [part for part in statement.modifiers if _TYPE.match(part)][:2]
    bits = int(source[1:])
    return _signed(a, bits) if source[0] == "s" else a & mask(bits)


def _extract(statement: Statement, a: int, position: int, length: int) -> int:
    field = (a & mask(statement.bits)) >> (position & 0xFF) & mask(length & 0xFF)
    return _signed(field, length) if statement.type[0] == "s" and length else field


def _logical(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(statement: Statement, a: Any, b: Any) -> Any:
        return bool(operation(bool(a), bool(b))) if "pred" in statement.modifiers else operation(a, b)

    return apply


_OPERATIONS: Final[dict[str, Callable[..., Any]]] = {
    "mov": lambda one, a: bool(a) if "pred" in one.modifiers else a,
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
    "not": lambda one, a: not a if "pred" in one.modifiers else ~a,
    "shl": lambda _, a, n: a << n if n < 64 else 0,
    "shr": lambda _, a, n: a >> n,
    "selp": lambda _, a, b, which: a if which else b,
    "setp": _set,
    "cvt": _convert,
    "bfe": _extract,
    # The first thread of a warp is followed: what it broadcasts, all threads have.
    "shfl": lambda one, a, lane, *_: a if "idx" in one.modifiers and lane == 0 else UNKNOWN_REGISTER,
}
"""Operations on integers and predicates, given the statement and its inputs in the statement's type."""
