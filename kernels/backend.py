"""Backends: which exist, which one a call takes, and why not the others.

Every operation has a table of `Implementation`s. `choose` picks a row while a call is traced, by the platform that the
call is compiled for, by the problems that each backend supports, and by what was measured (`tuning.py`); nothing is
decided at run time.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
from jax.export import is_symbolic_dim

from palladion.kernels.compat import hide_constants
from palladion.kernels.derivatives import without_derivatives
from palladion.kernels.implementation import Implementation, Problem, Unsupported, find_implementation
from palladion.kernels.lowering import guard_kernel, guard_partitioning, guard_platform
from palladion.kernels.sharding import run_sharded, unpartitionable
from palladion.kernels.tuning import compare, resolve
from palladion.kernels.types import Interpret
from palladion.kernels.unchecked import call_unchecked
from palladion.reference.derivatives import with_derivatives_of
from palladion.reference.modes import usual_modes
from palladion.reference.platforms import target_platform

BACKENDS: Final = ("auto", "xla", "pallas", "mosaic_tpu", "triton", "mosaic_gpu")
"""Values of `backend=`: the fastest on the platform, the reference, the fastest kernel, or a kernel by name."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that runs a call, and why.

    Attributes:
      operation: name of the operation.
      problem: shapes and options of the call.
      backend: name of the implementation that runs it.
      interpret: whether its kernel is interpreted instead of compiled.
      reasons: why implementations were passed over, by name: they come earlier in the table and cannot run the call, or
        they were measured and are slower.
      backend_source: origin of the choice among implementations, one of `tuning.SOURCES`: "explicit" where the caller
        has named one or its block sizes, "heuristic" for the order of the table.
      config: the kernel's block sizes; None for the reference.
      config_source: origin of the block sizes, one of `tuning.SOURCES`; empty for the reference.
    """

    operation: str
    problem: Problem
    backend: str
    interpret: bool
    reasons: dict[str, str]
    backend_source: str
    config: Any = None
    config_source: str = ""


# A user context is part of jit's cache key: a function traced under one default is traced again under another.
_default_backend = jax.make_user_context("auto")
_recorders: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar("recorders", default=())


def using_backend(backend: str) -> contextlib.AbstractContextManager[None]:
    """Sets the backend that `backend=None` stands for in calls traced inside a `with` block, also in jitted functions.

    Args:
      backend: one of `BACKENDS`.

    Raises:
      ValueError: the backend is not one of them.
    """
    return _default_backend(_known(backend))


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Records the `Choice` of every operation traced inside a `with` block; a call that jit has cached is not traced.

    Example:
      with record_choices() as choices:
          jax.jit(step).lower(*arguments)
      for choice in choices:
          print(choice.operation, choice.backend, choice.reasons)
    """
    choices: list[Choice] = []
    token = _recorders.set((*_recorders.get(), choices))
    try:
        yield choices
    finally:
        _recorders.reset(token)


def dispatch(
    operation: str,
    table: Sequence[Implementation],
    problem: Problem,
    inputs: Any,
    *,
    backend: str | None,
    config: Any,
    interpret: Interpret,
    differentiable: bool = False,
) -> Any:
    """Chooses the implementation of a call and its block sizes, and runs it; raises what `choose` raises.

    Profiles show the operation with the origin of its block sizes: "decode_attention.triton.tuned".

    Args:
      operation: name of the operation.
      table: its implementations.
      problem: shapes and options of the call.
      inputs: arrays of the call.
      backend: the caller's argument.
      config: the caller's argument.
      interpret: the caller's argument.
      differentiable: whether kernels have the derivatives of the reference; differentiating them is an error otherwise.
    """
    # XLA may trace a device's share of the call while it compiles, when the default may be another.
    known = backend if backend is not None else _default_backend.value

    def run(problem: Problem, inputs: Any) -> Any:
        row, choice, interpreted = choose(operation, table, problem, known, interpret, config)
        if interpret is None and known in ("auto", "pallas"):
            inputs = _guarded(inputs, table, row, choice)
        called = f"{operation}({problem}): {row.name}"
        if row.has_kernel and row.platform is not None and not interpreted:
            if row.platform == "tpu" and jax.sharding.get_abstract_mesh().empty:
                inputs = guard_partitioning(inputs, name=called)
            if row.platform != target_platform():
                inputs = guard_kernel(inputs, name=called, platform=row.platform)
        call = _implementation(row, choice, interpreted)
        if row.has_kernel and differentiable:
            reference = find_implementation(table, "xla")
            call = with_derivatives_of(
                _implementation(reference, dataclasses.replace(choice, config=None), False), call
            )
        elif row.has_kernel:
            call = without_derivatives(called, call)
        name = ".".join(part for part in (operation, row.name, choice.config_source) if part)
        with jax.named_scope(name):
            return call(inputs)

    return run_sharded(
        problem.sharding_rule,
        inputs,
        functools.partial(run, problem),
        functools.partial(problem.run_share, run),
    )


def _implementation(row: Implementation, choice: Choice, interpret: Any) -> Callable[[Any], Any]:
    """Returns the function of a call's inputs that an implementation runs."""

    def implementation(inputs: Any) -> Any:
        inputs = hide_constants(inputs) if interpret else inputs
        with usual_modes():
            return row.run(choice.problem, inputs, config=choice.config, interpret=interpret)

    is_kernel = row.config_class is not None and isinstance(choice.config, row.config_class)
    return functools.partial(call_unchecked, implementation) if is_kernel else implementation


def _guarded(inputs: Any, table: Sequence[Implementation], row: Implementation, choice: Choice) -> Any:
    """Returns inputs that fail to be lowered for a platform with a kernel, if the platform traced for has none."""
    if row.has_kernel and not choice.interpret:
        return inputs
    # "auto" prefers the kernels that come before the reference.
    preferred = table if row.has_kernel else itertools.takewhile(lambda other: other.name != row.name, table)
    kernels = tuple(
        (other.platform, other.name)
        for other in preferred
        if other.platform is not None and other.has_kernel and _reason(other, choice.problem) is None
    )
    name = f"{choice.operation}({choice.problem}): {row.name}{', interpreted,' if choice.interpret else ''}"
    return guard_platform(inputs, name=name, platform=target_platform(), kernels=kernels) if kernels else inputs


def choose(
    operation: str,
    table: Sequence[Implementation],
    problem: Problem,
    backend: str | None,
    interpret: Interpret,
    config: Any = None,
) -> tuple[Implementation, Choice, Any]:
    """Chooses the implementation of a call, and its block sizes.

    "auto" and "pallas" take the one that was measured to be the fastest (`tuning.compare`), otherwise one that is
    preferred, or the first in the table; the caller's own choice is never overruled.

    Args:
      operation: name of the operation, for messages.
      table: implementations, kernels first, the reference last.
      problem: shapes and options of the call.
      backend: one of `BACKENDS`; None takes the backend of `using_backend`, which is "auto" by default.
      interpret: True interprets the kernel on any platform, False never does; None interprets if backend="pallas" and
        the platform is a CPU. Kernels also take values that `pallas_call` takes, such as `pltpu.InterpretParams`.
      config: block sizes that the caller requires; None takes tuned ones, or those of the heuristic.

    Returns:
      The implementation, the recorded choice, and the value to pass to the implementation as `interpret`.

    Raises:
      ValueError: the backend is not one of `BACKENDS`.
      Unsupported: no implementation that `backend` allows supports this problem on this platform.
    """
    backend = _known(backend) if backend is not None else _default_backend.value
    explicit = backend not in ("auto", "pallas") or config is not None
    platform = target_platform()
    reasons: dict[str, str] = {}
    able: list[tuple[Implementation, Any]] = []
    for row in table:
        is_kernel = row.platform is not None
        if backend not in ("auto", row.name) and not (backend == "pallas" and is_kernel):
            continue
        interpreted = (backend == "pallas" and platform == "cpu") if interpret is None else interpret
        interpreted = interpreted if is_kernel else False
        # A kernel by name with interpret=False is lowered for a platform that is not here.
        cross_lowered = interpret is False and backend == row.name
        if row.platform not in (None, platform) and not interpreted and not cross_lowered:
            reason: str | None = f"runs on {row.platform}, not on {platform} (interpret=True runs it anywhere)"
        else:
            compiled = row.has_kernel and not interpreted
            reason = (unpartitionable() if compiled else None) or _reason(row, problem)
        if reason is None:
            able.append((row, interpreted))
            if explicit:
                break
        elif not able:
            reasons[row.name] = reason
    if not able:
        given = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        given = given or f"{backend}: has no kernel for it yet"
        raise Unsupported(f"{operation}({problem}): {given}. backend='xla' covers it")
    if not explicit:
        planned = problem.planned()
        able.sort(key=lambda pair: pair[0].preferred is None or not pair[0].preferred(planned))
    (row, interpreted), source = (able[0], "explicit") if explicit else _fastest(operation, able, problem, reasons)
    block_sizes, config_source = resolve(operation, row, problem, config)
    choice = Choice(operation, problem, row.name, bool(interpreted), reasons, source, block_sizes, config_source)
    for choices in _recorders.get():
        choices.append(choice)
    return row, choice, interpreted


def _reason(row: Implementation, problem: Problem) -> str | None:
    """Returns why an implementation cannot run a problem, or None."""
    if not row.has_kernel:
        return row.unsupported(problem)
    symbolic = [str(size) for size in _leaves(problem) if is_symbolic_dim(size)]
    if symbolic:
        return f"sizes must be known while tracing, got {', '.join(symbolic)}"
    return row.unsupported(problem)


def _leaves(problem: Any) -> Iterator[Any]:
    """Yields the attributes of a problem, and those of a problem in it."""
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield value


def _fastest(
    operation: str, able: Sequence[tuple[Implementation, Any]], problem: Problem, reasons: dict[str, str]
) -> tuple[tuple[Implementation, Any], str]:
    """Returns the implementation that was measured to be the fastest, otherwise the first, and one of `SOURCES`.

    Args:
      operation: name of the operation.
      able: implementations that support the problem, each with its `interpret`; preferred ones first.
      problem: shapes and options of the call.
      reasons: takes in why those that were measured to be slower are passed over.
    """
    best, source = able[0], "heuristic"
    for other in able[1:]:
        comparison = compare(operation, best[0], other[0], problem)
        if comparison is not None:
            source = comparison.source
            reasons[comparison.slower.implementation] = comparison.reason
            if comparison.faster.implementation == other[0].name:
                best = other
    return best, source


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; accepted: None, {', '.join(map(repr, BACKENDS))}")
    return backend
