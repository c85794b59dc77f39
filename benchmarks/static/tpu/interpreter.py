"""Interprets the scalar operations of a Pallas kernel's jaxpr, to find the transfers that it starts.

Operations run with the real grid indices, prefetched scalars and what the kernel keeps in SMEM. Vectors are opaque.
Where a transfer, or a loop or branch with transfers in it, depends on something opaque, the answer is `Undecided`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import numpy as np

from palladion.benchmarks.static.kernel_calls import inner_jaxprs, item_bits, scan_operand_counts
from palladion.benchmarks.static.opaque import Opaque, Undecided

MOST_OPERATIONS: Final = 20_000_000
"""Operations after which interpreting a kernel is given up."""

_VECTOR: Final = Opaque("it depends on a vector")

_ARITHMETIC: Final[dict[str, Callable[..., Any]]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "max": max,
    "min": min,
    "div": lambda a, b: _divide(a, b),
    "rem": lambda a, b: a - b * _divide(a, b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: not a if isinstance(a, bool) else ~a,
    "shift_left": lambda a, n: a << n,
    "shift_right_arithmetic": lambda a, n: a >> n,
    "shift_right_logical": lambda a, n: (a & 0xFFFFFFFF) >> n,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "select_n": lambda which, *cases: cases[int(which)],
    "clamp": lambda least, a, most: min(max(a, least), most),
    "convert_element_type": lambda a: a,
    "multiple_of": lambda a: a,
    "reshape": lambda a: a,
    "squeeze": lambda a: a,
    "broadcast_in_dim": lambda a: a,
    "copy": lambda a: a,
    "stop_gradient": lambda a: a,
}
"""JAX's operations on scalars, by the name of the primitive."""


@dataclasses.dataclass
class MemoryArray:
    """An array that a kernel refers to.

    Attributes:
      space: the memory that it lies in: "hbm", "vmem", "smem" or "semaphore".
      bits: bits of an element; 0 for semaphores.
      shape: its shape.
      values: its values before the kernel runs; None where they are not known.
      written: elements that the kernel has written, in SMEM.
    """

    space: str
    bits: int
    shape: tuple[int, ...]
    values: np.ndarray | None = None
    written: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, aval: Any) -> MemoryArray:
        """Returns the array of a kernel's argument or scratch operand."""
        return cls(_space(aval), item_bits(aval.dtype) if _is_number(aval) else 0, aval.shape)

    def read(self, index: tuple[Any, ...]) -> Any:
        """Returns an element; opaque where it or its index is not known."""
        if any(type(part) is Opaque for part in index):
            return next(part for part in index if type(part) is Opaque)
        if index in self.written:
            return self.written[index]
        if self.values is None:
            return Opaque("it depends on a scalar that was not given, or never written")
        return self.values[index].item()


class Interpreter:
    """Interprets jaxprs of a kernel and of its index maps.

    Args:
      grid: bounds of the kernel's grid.
      on_transfer: called with the direction and the size in bytes of each transfer that is started.

    Attributes:
      index: grid indices of the current step.
    """

    def __init__(self, grid: Sequence[int], on_transfer: Callable[[str, int], None]) -> None:
        self.index: tuple[int, ...] = ()
        self._grid = grid
        self._on_transfer = on_transfer
        self._operations = 0
        self._programs: dict[int, list[_Equation]] = {}
        self._effects: dict[int, bool] = {}

    def run(self, jaxpr: Any, arguments: Sequence[Any], constants: Sequence[Any] = ()) -> list[Any]:
        """Interprets a jaxpr and returns its results.

        Raises:
          Undecided: a transfer depends on something that is not known.
        """
        equations = self._programs.get(id(jaxpr))
        if equations is None:
            equations = [_Equation(one) for one in jaxpr.eqns if _is_relevant(one)]
            self._programs[id(jaxpr)] = equations
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=False))
        known.update(zip(jaxpr.invars, arguments, strict=True))
        self._operations += len(equations)
        if self._operations > MOST_OPERATIONS:
            raise Undecided(f"it has not ended after {MOST_OPERATIONS:,} operations")
        for equation in equations:
            values = [value if name is None else known.get(name, _VECTOR) for name, value in equation.inputs]
            results = self._evaluate(equation, values)
            known.update(zip(equation.jaxpr_equation.outvars, results, strict=False))
        return [_literal(atom) if hasattr(atom, "val") else known.get(atom, _VECTOR) for atom in jaxpr.outvars]

    def has_effects(self, jaxpr: Any) -> bool:
        """Whether a jaxpr starts transfers or writes scalars."""
        known = self._effects.get(id(jaxpr))
        if known is None:
            known = self._effects[id(jaxpr)] = any(
                one.primitive.name == "dma_start"
                or (one.primitive.name in ("swap", "addupdate") and _space(one.invars[0].aval) == "smem")
                or any(map(self.has_effects, inner_jaxprs(one.params)))
                for one in jaxpr.eqns
            )
        return known

    def _evaluate(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        handler = _HANDLERS.get(equation.name)
        if handler is not None:
            return handler(self, equation, values)
        operation = _ARITHMETIC.get(equation.name)
        if operation is not None:
            return [_scalar(operation, equation, values)]
        parameters = equation.jaxpr_equation.params
        jaxprs = inner_jaxprs(parameters)
        if len(jaxprs) == 1 and len(jaxprs[0].invars) == len(values):
            closed = next(
                (parameters[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in parameters), None
            )
            return self.run(jaxprs[0], values, getattr(closed, "consts", ()))
        if any(map(self.has_effects, jaxprs)):
            raise Undecided(f"transfers inside {equation.name} are not followed")
        return [_VECTOR] * len(equation.jaxpr_equation.outvars)

    def _program_id(self, equation: _Equation, _: list[Any]) -> Sequence[Any]:
        return [self.index[equation.jaxpr_equation.params["axis"]]]

    def _num_programs(self, equation: _Equation, _: list[Any]) -> Sequence[Any]:
        return [self._grid[equation.jaxpr_equation.params["axis"]]]

    def _get(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        array = values[0]
        scalar = not getattr(equation.jaxpr_equation.outvars[0].aval, "shape", ())
        if not isinstance(array, MemoryArray) or array.space != "smem" or not scalar:
            return [_VECTOR]
        return [array.read(equation.element(values[1:]))]

    def _swap(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        array = values[0]
        if not isinstance(array, MemoryArray) or array.space != "smem":
            return [_VECTOR]
        if getattr(equation.jaxpr_equation.invars[1].aval, "shape", ()):
            raise Undecided("a vector is written to SMEM")
        index = equation.element(values[2:])
        if any(type(part) is Opaque for part in index):
            raise Undecided("where a scalar is written to SMEM is not known")
        before = array.read(index)
        array.written[index] = values[1] if equation.name == "swap" else before + values[1]
        return [before]

    def _dma_start(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        source, destination = jax.tree.unflatten(equation.jaxpr_equation.params["tree"], values)[:2]
        arrays = [getattr(one, "ref", one) for one in (source, destination)]
        if not all(isinstance(array, MemoryArray) for array in arrays):
            raise Undecided("between which arrays a transfer goes is not known")
        shape = _shape(source)
        if any(type(size) is Opaque for size in shape):
            raise Undecided(next(size.reason for size in shape if type(size) is Opaque))
        self._on_transfer(f"{arrays[0].space}_to_{arrays[1].space}", math.prod(shape) * arrays[0].bits // 8)
        if arrays[1].space == "smem":
            arrays[1].values = None  # overwritten by the transfer
            arrays[1].written.clear()
        return []

    def _cond(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        branches = equation.jaxpr_equation.params["branches"]
        if type(values[0]) is Opaque:
            if any(self.has_effects(branch.jaxpr) for branch in branches):
                raise Undecided(values[0].reason)
            return [values[0]] * len(equation.jaxpr_equation.outvars)
        branch = branches[min(max(int(values[0]), 0), len(branches) - 1)]
        return self.run(branch.jaxpr, values[1:], branch.consts)

    def _while(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        parameters = equation.jaxpr_equation.params
        condition, body = parameters["cond_jaxpr"], parameters["body_jaxpr"]
        first, second = parameters["cond_nconsts"], parameters["body_nconsts"]
        condition_constants, body_constants = values[:first], values[first : first + second]
        carry: Sequence[Any] = values[first + second :]
        while True:
            (goes_on,) = self.run(condition.jaxpr, [*condition_constants, *carry], condition.consts)
            if type(goes_on) is Opaque:
                if self.has_effects(body.jaxpr):
                    raise Undecided(goes_on.reason)
                return [goes_on] * len(carry)
            if not goes_on:
                return carry
            carry = self.run(body.jaxpr, [*body_constants, *carry], body.consts)

    def _scan(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        parameters = equation.jaxpr_equation.params
        body, length = parameters["jaxpr"], parameters["length"]
        constant_count, carry_count = scan_operand_counts(equation.jaxpr_equation)
        constants = values[:constant_count]
        carry = list(values[constant_count : constant_count + carry_count])
        slices = [_VECTOR] * (len(values) - constant_count - carry_count)
        for _ in range(length):
            carry = self.run(body.jaxpr, [*constants, *carry, *slices], body.consts)[:carry_count]
        return [*carry, *[_VECTOR] * (len(equation.jaxpr_equation.outvars) - carry_count)]

    def _run_scoped(self, equation: _Equation, values: list[Any]) -> Sequence[Any]:
        jaxpr = equation.jaxpr_equation.params["jaxpr"]
        return self.run(jaxpr, [MemoryArray.of(one.aval) for one in jaxpr.invars], values)


_HANDLERS: Final[dict[str, Callable[[Interpreter, _Equation, list[Any]], Sequence[Any]]]] = {
    "program_id": Interpreter._program_id,
    "num_programs": Interpreter._num_programs,
    "get": Interpreter._get,
    "swap": Interpreter._swap,
    "addupdate": Interpreter._swap,
    "dma_start": Interpreter._dma_start,
    "dma_wait": lambda *_: [],
    "cond": Interpreter._cond,
    "while": Interpreter._while,
    "scan": Interpreter._scan,
    "run_scoped": Interpreter._run_scoped,
}
"""Handlers of operations that are not arithmetic, by the name of the primitive."""


class _Equation:
    """An equation of a jaxpr, prepared to be evaluated many times.

    Args:
      equation: JAX's own.

    Attributes:
      jaxpr_equation: JAX's own.
      name: name of the primitive.
      inputs: for each input its variable, or None and its value.
    """

    def __init__(self, equation: Any) -> None:
        self.jaxpr_equation = equation
        self.name: str = equation.primitive.name
        self.inputs = [(None, _literal(one)) if hasattr(one, "val") else (one, None) for one in equation.invars]
        self._index: list[Any] | None = None

    def element(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the index of the element that a `get` or `swap` refers to; `leaves` are its dynamic parts."""
        if self._index is None:
            numbered = [_Leaf(number) for number in range(len(leaves))]
            transforms = jax.tree.unflatten(self.jaxpr_equation.params["tree"], numbered)
            parts = [part for one in transforms for part in getattr(one, "indices", (_Leaf(-1),))]
            if len(transforms) != 1 or not all(isinstance(part, (int, np.integer, _Leaf)) for part in parts):
                raise Undecided("an element of an array in SMEM is not referred to by its index")
            self._index = parts
        return tuple(leaves[part.number] if isinstance(part, _Leaf) else int(part) for part in self._index)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A dynamic part of an index, by its number."""

    number: int


def _is_relevant(equation: Any) -> bool:
    """Whether an equation computes scalars, runs other jaxprs, or moves memory."""
    if equation.primitive.name in _HANDLERS or list(inner_jaxprs(equation.params)):
        return True
    return any(not getattr(variable.aval, "shape", ()) for variable in equation.outvars)


def _literal(atom: Any) -> Any:
    value = np.asarray(atom.val)
    return value.item() if value.shape == () and value.dtype.kind in "iufb" else _VECTOR


def _scalar(operation: Callable[..., Any], equation: _Equation, values: list[Any]) -> Any:
    """Returns the result of an operation on scalars, in its dtype."""
    aval = equation.jaxpr_equation.outvars[0].aval
    for value in values:
        if type(value) is Opaque:
            # `False and unknown` is False, `True or unknown` is True.
            decides = {"and": False, "or": True}.get(equation.name)
            if decides is not None and any(other is decides for other in values):
                return decides
            return value
    if getattr(aval, "shape", ()):
        return _VECTOR
    result = operation(*values)
    kind = np.dtype(aval.dtype).kind if _is_number(aval) else "?"
    if kind == "b":
        return bool(result)
    if kind in "iu":
        bits, whole = 8 * aval.dtype.itemsize, int(result)
        if kind == "u":
            return whole & (1 << bits) - 1
        return (whole + (1 << bits - 1) & (1 << bits) - 1) - (1 << bits - 1)
    return result


def _divide(a: Any, b: Any) -> Any:
    """Divides as XLA does: integers toward zero, and 0 for a division by zero."""
    if b == 0:
        return 0
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _shape(reference: Any) -> list[Any]:
    """Returns the shape of what a transfer moves."""
    shape: list[Any] = list(getattr(reference, "ref", reference).shape)
    for transform in getattr(reference, "transforms", ()):
        if not hasattr(transform, "indices"):
            raise Undecided(f"how much a transfer moves is not known behind a {type(transform).__name__}")
        shape = [part.size for part in transform.indices if hasattr(part, "size") and hasattr(part, "stride")]
    return shape


def _is_number(aval: Any) -> bool:
    try:
        np.dtype(aval.dtype)
    except TypeError:
        return False  # a semaphore
    return True


def _space(aval: Any) -> str:
    name = str(getattr(aval, "memory_space", "")).lower()
    for space, names in (("semaphore", ("semaphore",)), ("smem", ("smem",)), ("hbm", ("hbm", "any"))):
        if any(one in name for one in names):
            return space
    return "vmem"
