"""Backends: which exist, which one a call takes, and why not the others.

Every operation keeps a table of `Implementation`s. `choose` picks a row while a call is traced, by the platform that it
is compiled for and by what each kernel says it does not cover; nothing is decided at run time.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import jax

from palladion.kernels.compat import unfolded
from palladion.kernels.tuning import Space, TuningKey, resolve
from palladion.reference.platforms import target_platform

BACKENDS: Final = ("auto", "xla", "pallas", "mosaic_tpu", "triton", "mosaic_gpu")
"""What `backend=` takes: the best for the platform, the reference, the platform's kernel, or a kernel by name."""


class Unsupported(NotImplementedError):  # noqa: N818  # no failure: another backend covers the call
    """A correct call that the chosen backend does not cover; the message says what is not covered and what does."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of an operation's table.

    Attributes:
      name: the backend's name.
      platform: where it runs, "tpu" or "gpu"; None for everywhere.
      unsupported: what of a problem it does not cover, in words that follow "mosaic_tpu: ", or None.
      run: called with the problem, the operation's arrays, `config` and `interpret`.
      config_class: of its block sizes; None where there is nothing to choose.
      heuristic: block sizes for a problem.
      space: the block sizes that may be tried for a problem.
    """

    name: str
    platform: str | None
    unsupported: Callable[[Any], str | None]
    run: Callable[..., Any]
    config_class: type | None = None
    heuristic: Callable[[Any], Any] | None = None
    space: Callable[[Any], Space] | None = None


def find_implementation(table: Sequence[Implementation], name: str) -> Implementation:
    """Returns the row of an operation's table with this backend name.

    Raises:
      KeyError: the table has no such row.
    """
    return {row.name: row for row in table}[name]


class Problem(Protocol):
    """What an operation was asked for, validated and free of arrays."""

    def planned(self) -> Any:
        """The problem by which block sizes are chosen: this one, or one that is the same for every batch."""

    def tuning_key(self) -> TuningKey:
        """What block sizes depend on."""

    def __str__(self) -> str:
        """Shapes and options on one line."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation a call took.

    Attributes:
      operation: the operation's name.
      problem: what was asked.
      backend: the name of the implementation that was taken.
      interpret: whether its kernel is interpreted instead of compiled.
      reasons: why implementations that come before it in the table were not taken, by name.
      config: the kernel's block sizes; None for the reference.
      config_source: one of `tuning.SOURCES`; empty for the reference.
    """

    operation: str
    problem: Problem
    backend: str
    interpret: bool
    reasons: dict[str, str]
    config: Any = None
    config_source: str = ""


# A user context is part of what jit caches by: a function traced under another default is traced anew.
_default_backend = jax.make_user_context("auto")
_recorders: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar("recorders", default=())


def using_backend(backend: str) -> contextlib.AbstractContextManager[None]:
    """Sets what `backend=None` means for calls that are traced inside a `with` block, jitted functions included.

    Args:
      backend: one of `BACKENDS`.

    Raises:
      ValueError: there is no such backend.
    """
    return _default_backend(_known(backend))


def default_backend() -> str:
    """What `backend=None` means here."""
    return _default_backend.value


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects the `Choice` of every operation traced inside a `with` block; a call that jit has cached traces nothing.

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
    interpret: Any,
) -> Any:
    """Picks the implementation of a call and its block sizes, and runs it; arguments and errors are those of `choose`.

    Where block sizes come from is a part of the operation's name in profiles: "decode_attention.triton.tuned".
    """
    row, choice, interpret = choose(operation, table, problem, backend, interpret, config)
    name = ".".join(part for part in (operation, row.name, choice.config_source) if part)
    with jax.named_scope(name):
        return row.run(problem, unfolded(inputs) if interpret else inputs, config=choice.config, interpret=interpret)


def choose(
    operation: str,
    table: Sequence[Implementation],
    problem: Problem,
    backend: str | None,
    interpret: Any,
    config: Any = None,
) -> tuple[Implementation, Choice, Any]:
    """Picks the implementation of a call, and its block sizes.

    Args:
      operation: its name, for messages.
      table: its implementations, kernels first, the best first for each platform, the reference last.
      problem: what was asked.
      backend: one of `BACKENDS`; None takes what `using_backend` set, "auto" at first.
      interpret: True interprets the kernel on any platform, False never does; None interprets where backend="pallas"
        finds a CPU. Kernels also take what `pallas_call` takes, `pltpu.InterpretParams` for example.
      config: block sizes that the caller insists on; None takes tuned ones, or those of the heuristic.

    Returns:
      The implementation, what is recorded of it, and what to pass on as its `interpret`.

    Raises:
      ValueError: there is no such backend.
      Unsupported: no implementation that `backend` allows covers this problem on this platform.
    """
    backend = _known(backend) if backend is not None else _default_backend.value
    platform = target_platform()
    reasons: dict[str, str] = {}
    for row in table:
        is_kernel = row.platform is not None
        if backend not in ("auto", row.name) and not (backend == "pallas" and is_kernel):
            continue
        interpreted = (backend == "pallas" and platform == "cpu") if interpret is None else interpret
        interpreted = interpreted if is_kernel else False
        # Who names a kernel and says interpret=False is lowering for a platform that is not here.
        trusted = interpret is False and backend == row.name
        if row.platform not in (None, platform) and not interpreted and not trusted:
            reason: str | None = f"runs on {row.platform}, not on {platform} (interpret=True runs it anywhere)"
        else:
            reason = row.unsupported(problem)
        if reason is None:
            taken, source = resolve(operation, row, problem, config)
            choice = Choice(operation, problem, row.name, bool(interpreted), reasons, taken, source)
            for choices in _recorders.get():
                choices.append(choice)
            return row, choice, interpreted
        reasons[row.name] = reason
    given = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or f"{backend}: has no kernel for it yet"
    raise Unsupported(f"{operation}({problem}): {given}. backend='xla' covers it")


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; accepted: None, {', '.join(map(repr, BACKENDS))}")
    return backend
