"""The Pallas kernels that a function calls, and what is known of their arguments before anything is compiled."""

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
"""Elements of an array whose values are followed: tables and lengths are, weights and caches are not."""

_Known = Callable[[], np.ndarray] | None
"""Computes an array of the program from the arguments that were given; None where that cannot be done."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A `pallas_call`, as it is traced for a chip.

    Attributes:
      name: of the kernel.
      operands: shapes and dtypes of its arguments; scalars that are prefetched come first.
      results: shapes and dtypes of what it returns.
      values: of each argument that is integers, where they are known.
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


def limiting_resource(memory_seconds: float | None, compute_seconds: float | None) -> str:
    """Whether "memory" or "compute" takes a kernel longer; "UNKNOWN" where that is not known."""
    if memory_seconds is None or compute_seconds is None:
        return "UNKNOWN"
    return "memory" if memory_seconds >= compute_seconds else "compute"


def size_in_bytes(array: Any) -> int:
    """Bytes of an array, those of narrow numbers packed."""
    return math.prod(array.shape) * item_bits(array.dtype) // 8


def item_bits(dtype: Any) -> int:
    """Bits of a number."""
    name = jax.numpy.dtype(dtype).name
    return {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4}.get(
        name, 8 * jax.numpy.dtype(dtype).itemsize
    )


def kernel_calls(
    function: Callable[..., Any], arguments: Sequence[Any], tracing: contextlib.AbstractContextManager[None]
) -> list[KernelCall]:
    """Finds the Pallas kernels that a function calls when it is traced for a chip, in order.

    Args:
      function: of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree; the values of small arrays are followed.
      tracing: for which chip, `tpu_compiler.tracing_for` or that of `gpu_compiler`.
    """
    avals = jax.tree.map(tpu_compiler.described, tuple(arguments))
    with tracing:
        closed = jax.make_jaxpr(lambda *arrays: function(*arrays))(*avals)
    found: list[KernelCall] = []
    _follow(closed.jaxpr, [_known(x) for x in closed.consts], [_known(x) for x in jax.tree.leaves(arguments)], 1, found)
    return found


def _known(value: Any) -> _Known:
    """An array that is there and not too large."""
    if isinstance(value, (jax.ShapeDtypeStruct, jax.core.Tracer)) or np.size(value) > LARGEST_KNOWN:
        return None
    return lambda: np.asarray(value)


def _follow(
    jaxpr: Any, constants: Sequence[_Known], arguments: Sequence[_Known], times: int | None, found: list[KernelCall]
) -> list[_Known]:
    """Walks through a program, keeps track of what can be computed from what is known, and collects kernels."""
    known: dict[Any, _Known] = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom: Any) -> _Known:
        return _known(atom.val) if hasattr(atom, "val") else known.get(atom)

    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        values = [value(atom) for atom in equation.invars]
        results: Sequence[_Known] = [None] * len(equation.outvars)
        if name == "pallas_call":
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
    """How many of a scan's arguments are constants, and how many are carried; the rest it goes through.

    JAX's own numbers of them are kept in other ways from version to version. What is gone through, and what is stacked
    up, has a dimension more outside than inside.
    """
    body = equation.params["jaxpr"].jaxpr

    def same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))

    carried = same(equation.outvars, body.outvars)
    return same(equation.invars, body.invars) - carried, carried


def inner_jaxprs(parameters: dict[str, Any]) -> list[Any]:
    """The programs that an equation runs: bodies of loops, branches, functions that it calls."""
    found = []
    for parameter in parameters.values():
        for one in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            program = _jaxpr(one)
            found += [program] if hasattr(program, "eqns") else []
    return found


def _has_kernels(parameters: dict[str, Any]) -> bool:
    return any(
        equation.primitive.name == "pallas_call" or _has_kernels(equation.params)
        for program in inner_jaxprs(parameters)
        for equation in program.eqns
    )


def _inner(parameters: dict[str, Any]) -> Any:
    """The program that a call, a custom derivative or a shard_map runs."""
    return next((parameters[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in parameters), None)


def _jaxpr(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _constants(program: Any) -> list[_Known]:
    return [_known(x) for x in getattr(program, "consts", ())]


def _computed(equation: Any, values: Sequence[_Known]) -> list[_Known]:
    """The results of an operation on known arrays; computed when they are asked for."""
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
