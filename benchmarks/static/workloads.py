"""Workloads to examine: the operations' named cases, and functions in a user's file."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import jax
import numpy as np

import palladion.kernels
from palladion.kernels.checks import check
from palladion.kernels.implementation import Implementation, Unsupported


@dataclasses.dataclass(frozen=True)
class WorkloadName:
    """Names a workload, so that another process can load it.

    Attributes:
      operation: a folder of kernels/, or "" for a user's file.
      name: name of a case, or of a function in the file.
      path: path of the file, or "".
    """

    operation: str
    name: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.operation or Path(self.path).name}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A function and its arguments.

    Attributes:
      function: a function of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      bytes_needed: bytes that must move between device memory and the chip; None if every argument and result moves
        once.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes_needed: int | None


BACKENDS: Final = {"tpu": ("mosaic_tpu",), "gpu": ("triton", "mosaic_gpu")}
"""Backends whose kernels are examined, by platform, the default first."""


def operations(platform: str | None = None) -> list[str]:
    """Returns the operations that have cases, and a kernel for a platform ("tpu" or "gpu"; None for any)."""
    packages = [module.name for module in pkgutil.iter_modules(palladion.kernels.__path__) if module.ispkg]

    def has(name: str, file: str) -> bool:
        return importlib.util.find_spec(f"palladion.kernels.{name}.{file}") is not None

    known = [name for name in packages if has(name, "cases")]
    return [name for name in known if platform is None or any(row(name, one) is not None for one in BACKENDS[platform])]


def row(operation: str, backend: str) -> Implementation | None:
    """Returns the row of an operation with the kernel of a backend, or None."""
    table: Sequence[Implementation] = _module(operation, "api").IMPLEMENTATIONS
    return next((one for one in table if one.name == backend and one.has_kernel), None)


def models(operation: str) -> Sequence[Any]:
    """Returns an operation's cases of real models."""
    cases: Sequence[Any] = _module(operation, "cases").MODELS
    return cases


def named_cases(operation: str) -> dict[str, Any]:
    """Returns an operation's cases by name: those of real models, a grid of shapes if there is one, small ones."""
    module = _module(operation, "cases")
    return {case.name: case for case in (*module.MODELS, *getattr(module, "SHAPES", ()), *module.TESTS)}


def select(names: Sequence[str] | None, operation: str | None, platform: str | None = None) -> list[WorkloadName]:
    """Returns the chosen cases.

    Args:
      names: names of cases, or patterns such as "llama*"; None takes those of real models.
      operation: the operation; None takes all.
      platform: takes only operations with a kernel for "tpu" or "gpu"; None takes all.

    Raises:
      ValueError: there is no such operation, or no such case.
    """
    known = operations(platform)
    check(operation is None or operation in known, "--operation", operation, ", ".join(known))
    chosen = known if operation is None else [operation]
    if names is None:
        return [WorkloadName(one, case.name) for one in chosen for case in models(one)]
    found = []
    for pattern in names:
        matching = [
            WorkloadName(one, name) for one in chosen for name in named_cases(one) if fnmatch.fnmatchcase(name, pattern)
        ]
        listed = "\n".join(f"  {one}: {', '.join(named_cases(one))}" for one in chosen)
        check(bool(matching), "--cases", pattern, f"patterns, or names of\n{listed}")
        found += matching
    return list(dict.fromkeys(found))


def load(workload: WorkloadName, backend: str = "mosaic_tpu") -> Workload:
    """Loads a workload.

    Args:
      workload: its name.
      backend: the backend whose kernel a case calls.

    Raises:
      ValueError: the file or the function does not exist, or the function does not return a workload.
      Unsupported: the operation has no kernel of the backend.
    """
    return _from_file(workload) if workload.path else _from_case(workload, backend)


def from_argument(text: str) -> WorkloadName:
    """Returns the workload that `path/to/file.py:function` names, after loading it once.

    Raises:
      ValueError: it does not exist.
    """
    path, colon, name = text.rpartition(":")
    check(bool(colon), "--file", text, "path/to/file.py:function")
    workload = WorkloadName("", name, str(Path(path).resolve()))
    load(workload)
    return workload


def _from_case(workload: WorkloadName, backend: str) -> Workload:
    case = named_cases(workload.operation)[workload.name]
    problem = case.problem()
    kernel = row(workload.operation, backend)
    if kernel is None:
        raise Unsupported(f"{backend}: {workload.operation} has no kernel of it yet")

    def function(inputs: Any) -> Any:
        # While it is traced, because what is supported may depend on the chip.
        reason = kernel.unsupported(problem)
        if reason is not None:
            raise Unsupported(f"{kernel.name}: {reason}")
        return kernel.run(problem, inputs, config=None, interpret=False)

    lengths = getattr(case, "filled", None)
    counted = inspect.signature(problem.bytes_moved).parameters
    needed = problem.bytes_moved(lengths) if "lengths" in counted and lengths is not None else problem.bytes_moved()
    return Workload(function, (with_scalars(case.shapes(), case),), needed)


def with_scalars(shapes: Any, case: Any) -> Any:
    """Returns the arrays of a case, with values for those that decide what a kernel does."""

    def value(path: tuple[Any, ...], array: Any) -> Any:
        name = getattr(path[-1], "name", "") if path else ""
        if array.dtype != np.int32:
            return array
        given = getattr(case, "filled" if name == "lengths" else name, None)
        if given is not None:
            return np.asarray(given, np.int32)
        if name == "layer":
            return np.int32((case.num_layers or 1) - 1)
        if name == "page_table":
            return np.arange(array.size, dtype=np.int32).reshape(array.shape)
        return array

    return jax.tree_util.tree_map_with_path(value, shapes)


def _from_file(workload: WorkloadName) -> Workload:
    path = Path(workload.path)
    check(path.is_file(), "--file", workload.path, "a Python file that exists")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    check(spec is not None and spec.loader is not None, "--file", workload.path, "a Python file")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = [name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == path.stem]
    function = getattr(module, workload.name, None)
    check(callable(function), "--file", f"{path}:{workload.name}", f"one of its functions: {', '.join(own) or 'none'}")
    assert callable(function)
    made = function()
    form = "(function, arguments) or (function, arguments, bytes_needed)"
    check(
        isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]), f"{path}:{workload.name}()", made, form
    )
    called, arguments, *needed = made
    # A named tuple is a single argument.
    several = isinstance(arguments, (tuple, list)) and not hasattr(arguments, "_fields")
    return Workload(called, tuple(arguments) if several else (arguments,), needed[0] if needed else None)


def _module(operation: str, name: str) -> ModuleType:
    return importlib.import_module(f"palladion.kernels.{operation}.{name}")
