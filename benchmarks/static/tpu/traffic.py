"""Bytes that a Pallas kernel moves, counted from the kernel as it is written; the compiler has no part in it.

Two things move memory. The pipeline fetches a block of an input when its index changes from one grid step to the next,
and writes a block of an output before it does: so the index maps are evaluated over the grid. And a kernel may start
transfers itself: so its scalar operations are interpreted, step by step, with the real grid indices, prefetched scalars
and what the kernel keeps in SMEM. Vectors are opaque. Where a transfer, or a loop or branch with transfers in it,
depends on something opaque, the answer is `Undecided`.

Bytes are those of the numbers that are meant. What the chip moves is more where XLA pads arrays to whole tiles; the
number of transfers is the same. That is what `roofline.py` compares with the compiled kernel.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
import numpy as np

from palladion.benchmarks.static.kernel_calls import KernelCall, inner_jaxprs, item_bits, scan_operand_counts
from palladion.benchmarks.static.opaque import Opaque, Undecided
from palladion.benchmarks.static.tpu.transfers import Traffic

MOST_OPERATIONS: Final = 20_000_000
"""Operations that are interpreted before a kernel is given up."""

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
    "div": lambda a, b: _toward_zero(a, b),
    "rem": lambda a, b: a - b * _toward_zero(a, b),
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
"""Operations on scalars."""


@dataclasses.dataclass
class _Array:
    """An array that a kernel refers to.

    Attributes:
      space: in which memory it lies: "hbm", "vmem", "smem", "semaphore".
      bits: of a number.
      shape: of the array.
      values: where they are known from outside.
      written: what the kernel has written, where it lies in SMEM.
    """

    space: str
    bits: int
    shape: tuple[int, ...]
    values: np.ndarray | None = None
    written: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    def read(self, index: tuple[Any, ...]) -> Any:
        """A number of it."""
        if any(type(part) is Opaque for part in index):
            return next(part for part in index if type(part) is Opaque)
        if index in self.written:
            return self.written[index]
        if self.values is None:
            return Opaque("it depends on a scalar that was not given, or never written")
        return self.values[index].item()


def count_traffic(call: KernelCall, *, cores: int = 1) -> dict[str, Traffic]:
    """Counts what a kernel moves, by direction ("hbm_to_vmem", …), all cores together.

    Args:
      call: the kernel.
      cores: among which parallel dimensions of the grid are divided.

    Raises:
      Undecided: it depends on something that is not known.
    """
    grid = [_bound(bound) for bound in _grid(call)]
    counter = _Counter(call, grid)
    for steps in _shares(grid, call.semantics, cores):
        counter.run(steps)
    return dict(counter.moved)


def _shares(grid: Sequence[int], semantics: Sequence[str], cores: int) -> list[list[tuple[int, ...]]]:
    """The steps of a grid that each core takes, as the compiler divides them.

    It divides the first parallel dimension that the cores divide; otherwise all parallel dimensions together, and cores
    then take some steps twice.
    """
    steps = list(itertools.product(*map(range, grid)))
    parallel = [axis for axis, one in enumerate(semantics) if "parallel" in one]
    divided = [axis for axis in parallel if grid[axis] % cores == 0][:1] or parallel
    places = math.prod(grid[axis] for axis in divided)
    if cores == 1 or places < 2:
        return [steps]
    part = -(-places // cores)
    numbers = {place: n for n, place in enumerate(itertools.product(*(range(grid[axis]) for axis in divided)))}

    def share(core: int) -> list[tuple[int, ...]]:
        first = min(core * part, places - part)
        mine = range(first, first + part)
        return [step for step in steps if numbers[tuple(step[axis] for axis in divided)] in mine]

    return [share(core) for core in range(cores)]


def _grid(call: KernelCall) -> list[Any]:
    """Bounds of the grid; those decided at run time are the first arguments."""
    dynamic = iter(call.values)
    return [bound if isinstance(bound, int) else next(dynamic) for bound in call.parameters["grid_mapping"].grid]


def _bound(bound: Any) -> int:
    if bound is None:
        raise Undecided("it depends on a bound of the grid that was not given")
    return int(np.asarray(bound).reshape(()))


class _Counter:
    """Goes through the grid of a kernel and counts."""

    def __init__(self, call: KernelCall, grid: Sequence[int]):
        self.moved: dict[str, Traffic] = collections.defaultdict(Traffic)
        self._grid = grid
        self._index: tuple[int, ...] = ()
        self._operations = 0
        self._programs: dict[int, list[_Equation]] = {}
        self._matters: dict[int, bool] = {}
        mapping = call.parameters["grid_mapping"]
        self._kernel = call.parameters["jaxpr"]
        first = mapping.num_dynamic_grid_bounds
        last = first + mapping.num_index_operands
        avals = [variable.aval for variable in self._kernel.invars]
        values = [*call.values[first:], *[None] * len(call.results)]
        self._arrays = [
            _Array(_space(aval), item_bits(aval.dtype) if _is_number(aval) else 0, aval.shape) for aval in avals
        ]
        for array, value in zip(self._arrays, values, strict=False):
            array.values = value
        self._scalars = self._arrays[: last - first]
        self._blocks = list(zip(mapping.block_mappings, self._arrays[last - first :], strict=False))
        self._whole = [array.values for _, array in self._blocks]
        self._inputs = len(self._blocks) - len(call.results)

    def run(self, steps: Sequence[tuple[int, ...]]) -> None:
        """Goes through these steps of the grid, as one core does."""
        for number, (block, array) in enumerate(self._blocks):
            if array.space != "hbm":
                self._count_blocks(block, array, number, steps)
        if self._matter(self._kernel):
            for step in steps:
                self._index = step
                for number, (block, array) in enumerate(self._blocks):
                    if array.space == "smem":
                        array.values = self._window(block, number, step)
                self._run(self._kernel, self._arrays)

    def _count_blocks(self, block: Any, array: _Array, number: int, steps: Sequence[tuple[int, ...]]) -> None:
        indices = [self._block_index(block, step) for step in steps]
        direction = f"hbm_to_{array.space}" if number < self._inputs else f"{array.space}_to_hbm"
        for before, index in itertools.pairwise([None, *indices]):
            if index != before:
                sizes = self._sizes(block, index or ())
                self._count(direction, math.prod(sizes) * item_bits(block.array_aval.dtype) // 8)

    def _block_index(self, block: Any, step: tuple[int, ...]) -> tuple[int, ...]:
        """What the index map returns."""
        program = block.index_map_jaxpr
        found = self._run(program.jaxpr, [*step, *self._scalars], program.consts)
        for one in found:
            if type(one) is Opaque:
                raise Undecided(one.reason)
        return tuple(found)

    def _sizes(self, block: Any, index: Sequence[int]) -> list[int]:
        """How much of a block lies inside the array, along each dimension."""
        sizes = []
        for one, place, whole in zip(block.block_shape, index, block.array_aval.shape, strict=True):
            size = _block_size(one)
            first = place * size if "Blocked" in type(one).__name__ else place
            sizes.append(min(size, whole - first))
        return sizes

    def _window(self, block: Any, number: int, step: tuple[int, ...]) -> np.ndarray | None:
        """The values of a block."""
        whole = self._whole[number]
        if whole is None:
            return None
        index = self._block_index(block, step)
        parts: list[Any] = []
        for one, place in zip(block.block_shape, index, strict=True):
            size = _block_size(one)
            first = place * size if "Blocked" in type(one).__name__ else place
            parts.append(first if "Squeezed" in type(one).__name__ else slice(first, first + size))
        return np.asarray(whole[tuple(parts)])

    def _count(self, direction: str, size: int) -> None:
        self.moved[direction].transfers += 1
        self.moved[direction].bytes += size

    # The interpreter of scalar operations.

    def _run(self, jaxpr: Any, arguments: Sequence[Any], constants: Sequence[Any] = ()) -> list[Any]:
        steps = self._programs.get(id(jaxpr))
        if steps is None:
            steps = self._programs[id(jaxpr)] = [_Equation(one) for one in jaxpr.eqns if self._is_relevant(one)]
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=False))
        known.update(zip(jaxpr.invars, arguments, strict=True))
        self._operations += len(steps)
        if self._operations > MOST_OPERATIONS:
            raise Undecided(f"it has not ended after {MOST_OPERATIONS:,} operations")
        for step in steps:
            values = [value if variable is None else known.get(variable, _VECTOR) for variable, value in step.inputs]
            results = self._step(step, values)
            known.update(zip(step.equation.outvars, results, strict=False))
        return [_literal(atom) if hasattr(atom, "val") else known.get(atom, _VECTOR) for atom in jaxpr.outvars]

    def _is_relevant(self, equation: Any) -> bool:
        """Whether an equation computes scalars, or runs other programs, or moves memory."""
        if equation.primitive.name in _HANDLERS or list(inner_jaxprs(equation.params)):
            return True
        return any(not getattr(variable.aval, "shape", ()) for variable in equation.outvars)

    def _step(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        handler = _HANDLERS.get(step.name)
        if handler is not None:
            return handler(self, step, values)
        operation = _ARITHMETIC.get(step.name)
        if operation is not None:
            return [_scalar(operation, step, values)]
        programs = inner_jaxprs(step.equation.params)
        if len(programs) == 1 and len(programs[0].invars) == len(values):
            return self._run(programs[0], values, getattr(_program(step.equation.params), "consts", ()))
        if any(map(self._matter, programs)):
            raise Undecided(f"transfers inside {step.name} are not followed")
        return [_VECTOR] * len(step.equation.outvars)

    def _matter(self, jaxpr: Any) -> bool:
        """Whether a program starts transfers or writes scalars."""
        known = self._matters.get(id(jaxpr))
        if known is None:
            known = self._matters[id(jaxpr)] = any(
                one.primitive.name == "dma_start"
                or (one.primitive.name in ("swap", "addupdate") and _space(one.invars[0].aval) == "smem")
                or any(map(self._matter, inner_jaxprs(one.params)))
                for one in jaxpr.eqns
            )
        return known

    def _program_id(self, step: _Equation, _: list[Any]) -> Sequence[Any]:
        return [self._index[step.equation.params["axis"]]]

    def _num_programs(self, step: _Equation, _: list[Any]) -> Sequence[Any]:
        return [self._grid[step.equation.params["axis"]]]

    def _get(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        array = values[0]
        scalar = not getattr(step.equation.outvars[0].aval, "shape", ())
        if not isinstance(array, _Array) or array.space != "smem" or not scalar:
            return [_VECTOR]
        return [array.read(step.place(values[1:]))]

    def _swap(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        array = values[0]
        if not isinstance(array, _Array) or array.space != "smem":
            return [_VECTOR]
        if getattr(step.equation.invars[1].aval, "shape", ()):
            raise Undecided("a vector is written to SMEM")
        place = step.place(values[2:])
        if any(type(part) is Opaque for part in place):
            raise Undecided("where a scalar is written to SMEM is not known")
        before = array.read(place)
        array.written[place] = values[1] if step.name == "swap" else before + values[1]
        return [before]

    def _dma_start(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        source, destination = jax.tree.unflatten(step.equation.params["tree"], values)[:2]
        arrays = [getattr(one, "ref", one) for one in (source, destination)]
        if not all(isinstance(array, _Array) for array in arrays):
            raise Undecided("between which arrays a transfer goes is not known")
        shape = _shape(source)
        if any(type(size) is Opaque for size in shape):
            raise Undecided(next(size.reason for size in shape if type(size) is Opaque))
        self._count(f"{arrays[0].space}_to_{arrays[1].space}", math.prod(shape) * arrays[0].bits // 8)
        if arrays[1].space == "smem":
            arrays[1].values = None  # whatever was there
            arrays[1].written.clear()
        return []

    def _cond(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        branches = step.equation.params["branches"]
        if type(values[0]) is Opaque:
            if any(self._matter(branch.jaxpr) for branch in branches):
                raise Undecided(values[0].reason)
            return [values[0]] * len(step.equation.outvars)
        branch = branches[min(max(int(values[0]), 0), len(branches) - 1)]
        return self._run(branch.jaxpr, values[1:], branch.consts)

    def _while(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        parameters = step.equation.params
        condition, body = parameters["cond_jaxpr"], parameters["body_jaxpr"]
        first, second = parameters["cond_nconsts"], parameters["body_nconsts"]
        of_condition, of_body = values[:first], values[first : first + second]
        carried: Sequence[Any] = values[first + second :]
        while True:
            (goes_on,) = self._run(condition.jaxpr, [*of_condition, *carried], condition.consts)
            if type(goes_on) is Opaque:
                if self._matter(body.jaxpr):
                    raise Undecided(goes_on.reason)
                return [goes_on] * len(carried)
            if not goes_on:
                return carried
            carried = self._run(body.jaxpr, [*of_body, *carried], body.consts)

    def _scan(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        body, length = step.equation.params["jaxpr"], step.equation.params["length"]
        constants, carried_count = scan_operand_counts(step.equation)
        constant, carried = values[:constants], list(values[constants : constants + carried_count])
        through = [_VECTOR] * (len(values) - constants - carried_count)
        for _ in range(length):
            results = self._run(body.jaxpr, [*constant, *carried, *through], body.consts)
            carried = results[:carried_count]
        return [*carried, *[_VECTOR] * (len(step.equation.outvars) - carried_count)]

    def _run_scoped(self, step: _Equation, values: list[Any]) -> Sequence[Any]:
        program = step.equation.params["jaxpr"]
        scratch = [
            _Array(_space(one.aval), item_bits(one.aval.dtype) if _is_number(one.aval) else 0, one.aval.shape)
            for one in program.invars
        ]
        return self._run(program, scratch, values)


class _Equation:
    """An equation, prepared to be run many times."""

    def __init__(self, equation: Any):
        self.equation = equation
        self.name = equation.primitive.name
        self.inputs = [(None, _literal(one)) if hasattr(one, "val") else (one, None) for one in equation.invars]
        self._places: list[Any] | None = None

    def place(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The index of an element, whose parts that are not constant are these values."""
        if self._places is None:
            numbered = [_Leaf(number) for number in range(len(leaves))]
            transforms = jax.tree.unflatten(self.equation.params["tree"], numbered)
            parts = [part for one in transforms for part in getattr(one, "indices", (_Leaf(-1),))]
            if len(transforms) != 1 or not all(isinstance(part, (int, np.integer, _Leaf)) for part in parts):
                raise Undecided("an element of an array in SMEM is not referred to by its index")
            self._places = parts
        return tuple(leaves[part.number] if isinstance(part, _Leaf) else int(part) for part in self._places)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    number: int


_HANDLERS: Final[dict[str, Callable[[_Counter, _Equation, list[Any]], Sequence[Any]]]] = {
    "program_id": _Counter._program_id,
    "num_programs": _Counter._num_programs,
    "get": _Counter._get,
    "swap": _Counter._swap,
    "addupdate": _Counter._swap,
    "dma_start": _Counter._dma_start,
    "dma_wait": lambda *_: [],
    "cond": _Counter._cond,
    "while": _Counter._while,
    "scan": _Counter._scan,
    "run_scoped": _Counter._run_scoped,
}


def _program(parameters: dict[str, Any]) -> Any:
    return next((parameters[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in parameters), None)


def _literal(atom: Any) -> Any:
    value = np.asarray(atom.val)
    return value.item() if value.shape == () and value.dtype.kind in "iufb" else _VECTOR


def _scalar(operation: Callable[..., Any], step: _Equation, values: list[Any]) -> Any:
    """The result of an operation on scalars, in its dtype."""
    aval = step.equation.outvars[0].aval
    for value in values:
        if type(value) is Opaque:
            # What a condition excludes is excluded, whatever else it depends on.
            decides = {"and": False, "or": True}.get(step.name)
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


def _toward_zero(a: Any, b: Any) -> Any:
    if b == 0:
        return 0
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _shape(reference: Any) -> Iterator[Any] | list[Any]:
    """The shape of what a transfer moves."""
    shape: list[Any] = list(getattr(reference, "ref", reference).shape)
    for transform in getattr(reference, "transforms", ()):
        if not hasattr(transform, "indices"):
            raise Undecided(f"how much a transfer moves is not known behind a {type(transform).__name__}")
        shape = [part.size for part in transform.indices if hasattr(part, "size") and hasattr(part, "stride")]
    return shape


def _block_size(one: Any) -> int:
    """Elements of a block along a dimension."""
    if one is None or "Squeezed" in type(one).__name__:
        return 1
    return int(getattr(one, "block_size", one))


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
