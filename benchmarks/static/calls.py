"""The Pallas kernels that a function calls, and what is known of their arguments before anything is compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import numpy as np

from palladion.benchmarks import tpu_compiler

LARGEST_KNOWN: Final = 2**20
"""Elements of an array whose values are followed: tables and lengths are, weights and caches are not."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A `pallas_call`, as it is traced for a chip.

    Attributes:
      name: of the kernel.
      operands: shapes and dtypes of its arguments; scalars that are prefetched come first.
      results: shapes and dtypes of what it returns.
      values: of each argument, where they are known.
      times: how often the function calls it; None where that is decided at run time.
      parameters: of the call, as JAX keeps them: "grid_mapping", "jaxpr", "compiler_params", …
    """

    name: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    values: tuple[np.ndarray | None, ...]
    times: int | None
    parameters: dict[str, Any]

    @property
    def grid(self) -> tuple[int, ...]:
        """Its grid; 0 for a bound that is decided at run time."""
        return tuple(bound if isinstance(bound, int) else 0 for bound in self.parameters["grid_mapping"].grid)

    @property
    def bytes(self) -> int:
        """Bytes of all arguments and results, each once."""
        return sum(size_in_bytes(array) for array in (*self.operands, *self.results))

    @property
    def semantics(self) -> tuple[str, ...]:
        """Of each dimension of the grid, whether it is "parallel" or "arbitrary"."""
        given = getattr(self.parameters["compiler_params"], "dimension_semantics", None) or ()
        names = tuple(str(getattr(one, "value", one)).lower() for one in given)
        return names or ("arbitrary",) * len(self.grid)


def size_in_bytes(array: Any) -> int:
    """Bytes of an array, those of narrow numbers packed."""
    return math.prod(array.shape) * item_bits(array.dtype) // 8


def item_bits(dtype: Any) -> int:
    """Bits of a number."""
    name = jax.numpy.dtype(dtype).name
    return {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4}.get(
        name, 8 * jax.numpy.dtype(dtype).itemsize
    )


def kernel_calls(function: Callable[..., Any], arguments: Sequence[Any], chip: str) -> list[KernelCall]:
    """Finds the Pallas kernels that a function calls when it is traced for a chip, in order.

    Args:
      function: of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree; the values of integer arrays are followed.
      chip: a name in `tpu_chips()`.
    """
    described = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tuple(arguments))
    with tpu_compiler.tracing_for(chip):
        closed = jax.make_jaxpr(lambda *arrays: function(*arrays))(*described)
    found: list[KernelCall] = []
    _follow(closed.jaxpr, [_known(x) for x in closed.consts], [_known(x) for x in jax.tree.leaves(arguments)], 1, found)
    return found


def _known(value: Any) -> np.ndarray | None:
    """The values of an array of integers that is there and not too large."""
    if isinstance(value, (jax.ShapeDtypeStruct, jax.core.Tracer)):
        return None
    followed = _is_integer(jax.numpy.result_type(value)) and np.size(value) <= LARGEST_KNOWN
    return np.asarray(value) if followed else None


def _is_integer(dtype: Any) -> bool:
    return bool(jax.numpy.issubdtype(dtype, np.integer) or jax.numpy.issubdtype(dtype, np.bool_))


def _follow(
    jaxpr: Any,
    constants: Sequence[np.ndarray | None],
    arguments: Sequence[np.ndarray | None],
    times: int | None,
    found: list[KernelCall],
) -> list[np.ndarray | None]:
    """Walks through a program, evaluates the integers that follow from known ones, and collects kernels."""
    known: dict[Any, np.ndarray | None] = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom: Any) -> np.ndarray | None:
        return _known(atom.val) if hasattr(atom, "val") else known.get(atom)

    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        values = [value(atom) for atom in equation.invars]
        results: Sequence[np.ndarray | None] = [None] * len(equation.outvars)
        if name == "pallas_call":
            found.append(_kernel_call(equation, values, times))
        elif name == "scan":
            constant = values[: scan_parts(equation)[0]]
            inside = constant + [None] * (len(values) - len(constant))
            repeated = None if times is None else times * parameters["length"]
            _follow(parameters["jaxpr"].jaxpr, _constants(parameters["jaxpr"]), inside, repeated, found)
        elif name == "while":
            body = parameters["body_jaxpr"]
            constant = values[parameters["cond_nconsts"] :][: parameters["body_nconsts"]]
            inside = constant + [None] * (len(body.jaxpr.invars) - len(constant))
            _follow(body.jaxpr, _constants(body), inside, None, found)
        elif name == "cond":
            branches = parameters["branches"]
            taken = branches if values[0] is None else [branches[int(values[0])]]
            for branch in taken:
                inside_times = times if len(taken) == 1 else None
                results = _follow(branch.jaxpr, _constants(branch), values[1:], inside_times, found)
            results = results if len(taken) == 1 else [None] * len(equation.outvars)
        elif (inner := _inner(parameters)) is not None and len(_jaxpr(inner).invars) == len(values):
            results = _follow(_jaxpr(inner), _constants(inner), values, times, found)
        else:
            results = _evaluate(equation, values)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def scan_parts(equation: Any) -> tuple[int, int]:
    """How many of a scan's arguments are constants, and how many are carried; the rest it goes through.

    JAX's own numbers of them are kept in other ways from version to version. What is gone through, and what is stacked
    up, has a dimension more outside than inside.
    """
    body = equation.params["jaxpr"].jaxpr

    def same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))

    carried = same(equation.outvars, body.outvars)
    return same(equation.invars, body.invars) - carried, carried


def _inner(parameters: dict[str, Any]) -> Any:
    """The program that a call, a custom derivative or a shard_map runs."""
    return next((parameters[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in parameters), None)


def _jaxpr(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _constants(program: Any) -> list[np.ndarray | None]:
    return [_known(x) for x in getattr(program, "consts", ())]


def _evaluate(equation: Any, values: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """The results of an operation on known integers."""
    unknown: list[np.ndarray | None] = [None] * len(equation.outvars)
    if any(value is None for value in values) or equation.effects:
        return unknown
    for variable in equation.outvars:
        dtype = getattr(variable.aval, "dtype", None)
        if dtype is None or not _is_integer(dtype) or math.prod(variable.aval.shape) > LARGEST_KNOWN:
            return unknown
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        result = equation.primitive.bind(*map(jax.numpy.asarray, values), **equation.params)
    return [np.asarray(one) for one in (result if equation.primitive.multiple_results else [result])]


def _kernel_call(equation: Any, values: Sequence[np.ndarray | None], times: int | None) -> KernelCall:
    parameters = dict(equation.params)

    def described(variables: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype) for one in variables)

    name = parameters.get("name") or getattr(parameters.get("name_and_src_info"), "name", None) or "kernel"
    return KernelCall(
        name=name,
        operands=described(equation.invars),
        results=described(equation.outvars),
        values=tuple(values),
        times=times,
        parameters=parameters,
    )
