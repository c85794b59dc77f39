"""Finds the Pallas kernels that a function calls, with the values of their arguments as far as they are known."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import numpy as np

from palladion.benchmarks.static.tpu import compiler as tpu_compiler

LARGEST_KNOWN: Final = 2**20
"""Maximum size of arrays whose values are followed: page tables and lengths, but not weights and caches."""

_Known = Callable[[], np.ndarray] | None
"""A function that computes an array of the program from the given arguments; None if that is not possible."""


KERNELS: Final = ("pallas_call", "mpmd_map")
"""Primitives that call a Pallas kernel: `pallas_call`, and Mosaic GPU's `kernel`."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a Pallas kernel, traced for a chip.

    Attributes:
      name: the kernel's name.
      operands: shapes and dtypes of its arguments, prefetched scalars first.
      results: shapes and dtypes of its results.
      values: value of each integer argument; None if it is not known.
      times: how often the function calls it; None if that is decided at run time.
      parameters: JAX's parameters of the call: "grid_mapping", "jaxpr", "compiler_params", …
    """

    name: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    values: tuple[np.ndarray | None, ...]
    times: int | None
    parameters: dict[str, Any]

    @property
    def grid(self) -> tuple[int, ...]:
        """Bounds of its grid; 0 for a bound that is decided at run time."""
        return tuple(bound if isinstance(bound, int) else 0 for bound in self.parameters["grid_mapping"].grid)

    @property
    def bytes(self) -> int:
        """Bytes of all arguments and results together."""
        return sum(size_in_bytes(array) for array in (*self.operands, *self.results))

    @property
    def semantics(self) -> tuple[str, ...]:
        """Semantics of each dimension of the grid, "parallel" or "arbitrary"."""
        given = getattr(self.parameters["compiler_params"], "dimension_semantics", None) or ()
        names = tuple(str(getattr(one, "value", one)).lower() for one in given)
        return names or ("arbitrary",) * len(self.grid)


def limiting_resource(memory_seconds: float | None, compute_seconds: float | None) -> str:
    """Returns "memory" or "compute", whichever takes longer; "UNKNOWN" if a time is not known."""
    if memory_seconds is None or compute_seconds is None:
        return "UNKNOWN"
    return "memory" if memory_seconds >= compute_seconds else "compute"


def size_in_bytes(array: Any) -> int:
    """Returns the bytes of an array, with numbers of less than a byte packed."""
    return math.prod(array.shape) * item_bits(array.dtype) // 8


def item_bits(dtype: Any) -> int:
    """Returns the bits of a number of a dtype."""
    name = jax.numpy.dtype(dtype).name
    return {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4}.get(
        name, 8 * jax.numpy.dtype(dtype).itemsize
    )


def kernel_calls(
    function: Callable[..., Any], arguments: Sequence[Any], tracing: contextlib.AbstractContextManager[None]
) -> list[KernelCall]:
    """Returns the Pallas kernels that a function calls when it is traced for a chip, in order.

    Args:
      function: a function of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree; the values of small arrays are followed.
      tracing: `tracing_for` of `tpu.compiler` or `gpu.compiler`, which says for which chip.
    """
    avals = jax.tree.map(tpu_compiler.described, tuple(arguments))
    with tracing:
        closed = jax.make_jaxpr(lambda *arrays: function(*arrays))(*avals)
    found: list[KernelCall] = []
    _follow(closed.jaxpr, [_known(x) for x in closed.consts], [_known(x) for x in jax.tree.leaves(arguments)], 1, found)
    return found


def _known(value: Any) -> _Known:
    """Returns a function that returns a value, if it is an array and not too large."""
    if isinstance(value, (jax.ShapeDtypeStruct, jax.core.Tracer)) or np.size(value) > LARGEST_KNOWN:
        return None
    return lambda: np.asarray(value)


def _follow(
    jaxpr: Any, constants: Sequence[_Known], arguments: Sequence[_Known], times: int | None, found: list[KernelCall]
) -> list[_Known]:
    """Walks through a jaxpr, follows values that can be computed, and collects kernels; returns its results."""
    known: dict[Any, _Known] = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom: Any) -> _Known:
        return _known(atom.val) if hasattr(atom, "val") else known.get(atom)

    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        values = [value(atom) for atom in equation.invars]
        results: Sequence[_Known] = [None] * len(equation.outvars)
        if name in KERNELS:
            found.append(_kernel_call(equation, values, times))
        elif not _has_kernels(parameters):
            results = _computed(equation, values)
        elif name == "scan":
            constant = values[: scan_operand_counts(equation)[0]]
            inside = constant + [None] * (len(values) - len(constant))
            repeated = None if times is None else times * parameters["length"]
            _follow(parameters["jaxpr"].jaxpr, _constants(parameters["jaxpr"]), inside, repeated, found)
        elif name == "while":
            body = parameters["body_jaxpr"]
            constant = values[parameters["cond_nconsts"] :][: parameters["body_nconsts"]]
            inside = constant + [None] * (len(body.jaxpr.invars) - len(constant))
            _follow(body.jaxpr, _constants(body), inside, None, found)
        elif name == "cond":
            which = values[0]
            branches = parameters["branches"] if which is None else [parameters["branches"][int(which())]]
            for branch in branches:
                inside_times = times if len(branches) == 1 else None
                outputs = _follow(branch.jaxpr, _constants(branch), values[1:], inside_times, found)
                results = outputs if len(branches) == 1 else results
        elif (inner := _inner(parameters)) is not None and len(_jaxpr(inner).invars) == len(values):
            results = _follow(_jaxpr(inner), _constants(inner), values, times, found)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def scan_operand_counts(equation: Any) -> tuple[int, int]:
    """Returns how many of a scan's operands are constants, and how many are carried; the others are scanned over.

    JAX stores these numbers differently from version to version. Operands that are scanned over, and results that are
    stacked, have a dimension more outside than inside.
    """
    body = equation.params["jaxpr"].jaxpr

    def same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))

    carried = same(equation.outvars, body.outvars)
    return same(equation.invars, body.invars) - carried, carried


def inner_jaxprs(parameters: dict[str, Any]) -> list[Any]:
    """Returns the jaxprs that an equation runs: bodies of loops, branches, functions that it calls."""
    found = []
    for parameter in parameters.values():
        for one in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            program = _jaxpr(one)
            found += [program] if hasattr(program, "eqns") else []
    return found


def _has_kernels(parameters: dict[str, Any]) -> bool:
    return any(
        equation.primitive.name in KERNELS or _has_kernels(equation.params)
        for program in inner_jaxprs(parameters)
        for equation in program.eqns
    )


def _inner(parameters: dict[str, Any]) -> Any:
    """Returns the jaxpr that a call, a custom derivative, a custom rule of vmap or a shard_map runs."""
    return next((parameters[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if name in parameters), None)


def _jaxpr(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _constants(program: Any) -> list[_Known]:
    return [_known(x) for x in getattr(program, "consts", ())]


def _computed(equation: Any, values: Sequence[_Known]) -> list[_Known]:
    """Returns the results of an operation on known arrays, which are computed when they are needed."""
    given = [value for value in values if value is not None]
    sizes = [math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars]
    if len(given) < len(values) or equation.effects or max(sizes, default=0) > LARGEST_KNOWN:
        return [None] * len(equation.outvars)

    @functools.cache
    def results() -> list[np.ndarray]:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            result = equation.primitive.bind(*(jax.numpy.asarray(value()) for value in given), **equation.params)
        return [np.asarray(one) for one in (result if equation.primitive.multiple_results else [result])]

    return [functools.partial(lambda number: results()[number], number) for number in range(len(sizes))]


def _kernel_call(equation: Any, values: Sequence[_Known], times: int | None) -> KernelCall:
    parameters = dict(equation.params)

    def described(variables: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype) for one in variables)

    def integers(atom: Any, value: _Known) -> np.ndarray | None:
        if value is None or not jax.numpy.issubdtype(atom.aval.dtype, np.integer):
            return None
        return value().astype(atom.aval.dtype)

    return KernelCall(
        name=parameters.get("name") or "kernel",
        operands=described(equation.invars),
        results=described(equation.outvars),
        values=tuple(map(integers, equation.invars, values)),
        times=times,
        parameters=parameters,
    )
