"""What is examined: the operations' named cases, and functions from a user's file."""

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
from palladion.kernels.backend import Unsupported
from palladion.kernels.checks import check


@dataclasses.dataclass(frozen=True)
class WorkloadName:
    """Which workload is meant, in words that another process understands.

    Attributes:
      operation: a folder of kernels/, or "" for a user's file.
      name: of a case, or of a function in the file.
      path: of the file, or "".
    """

    operation: str
    name: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.operation or Path(self.path).name}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A function and what it is called with.

    Attributes:
      function: of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      bytes_needed: that must move between device memory and the chip; None for each argument and result once.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes_needed: int | None


KERNEL_FILES: Final = {"tpu": "mosaic_tpu", "gpu": "triton"}
"""In an operation's folder, by platform."""


def operations(platform: str | None = None) -> list[str]:
    """The operations that have cases, and a kernel of their own for a platform ("tpu" or "gpu"); None for any."""
    packages = [module.name for module in pkgutil.iter_modules(palladion.kernels.__path__) if module.ispkg]

    def has(name: str, file: str) -> bool:
        return importlib.util.find_spec(f"palladion.kernels.{name}.{file}") is not None

    known = [name for name in packages if has(name, "cases")]
    return [name for name in known if platform is None or has(name, KERNEL_FILES[platform])]


def named_cases(operation: str) -> dict[str, Any]:
    """The cases of an operation by name: those of real models, a grid of shapes where there is one, small ones."""
    module = _module(operation, "cases")
    return {case.name: case for case in (*module.MODELS, *getattr(module, "SHAPES", ()), *module.TESTS)}


def select(names: Sequence[str] | None, operation: str | None, platform: str | None = None) -> list[WorkloadName]:
    """The cases that are asked for.

    Args:
      names: of cases, or patterns of names such as "llama*"; None takes those of real models.
      operation: whose they are; None takes all.
      platform: for which there is to be a kernel, "tpu" or "gpu"; None for any.

    Raises:
      ValueError: there is no such operation, or no such case.
    """
    known = operations(platform)
    check(operation is None or operation in known, "--operation", operation, ", ".join(known))
    chosen = known if operation is None else [operation]
    if names is None:
        return [WorkloadName(one, case.name) for one in chosen for case in _module(one, "cases").MODELS]
    found = []
    for pattern in names:
        meant = [
            WorkloadName(one, name) for one in chosen for name in named_cases(one) if fnmatch.fnmatchcase(name, pattern)
        ]
        listed = "\n".join(f"  {one}: {', '.join(named_cases(one))}" for one in chosen)
        check(bool(meant), "--cases", pattern, f"patterns, or names of\n{listed}")
        found += meant
    return list(dict.fromkeys(found))


def load(reference: WorkloadName, platform: str = "tpu") -> Workload:
    """Makes a workload.

    Args:
      reference: which one.
      platform: "tpu" or "gpu": of a case, the kernel for that is meant.

    Raises:
      ValueError: the file or the function does not exist, or the function returns something else than a workload.
      Unsupported: the operation has no kernel for the platform.
    """
    return _from_file(reference) if reference.path else _from_case(reference, platform)


def from_argument(text: str) -> WorkloadName:
    """The workload that `path/to/file.py:function` means; it is made to see whether it exists.

    Raises:
      ValueError: it does not.
    """
    path, colon, name = text.rpartition(":")
    check(bool(colon), "--file", text, "path/to/file.py:function")
    reference = WorkloadName("", name, str(Path(path).resolve()))
    load(reference)
    return reference


def _from_case(reference: WorkloadName, platform: str) -> Workload:
    case = named_cases(reference.operation)[reference.name]
    problem = case.problem()
    rows = [row for row in _module(reference.operation, "api").IMPLEMENTATIONS if row.platform == platform]
    if not rows:
        raise Unsupported(f"{reference.operation} has no kernel for {platform.upper()}s yet")
    accepted = inspect.signature(rows[0].run).parameters

    def function(inputs: Any) -> Any:
        # Asked for while it is traced: what is supported may depend on the chip.
        reason = rows[0].unsupported(problem)
        if reason is not None:
            raise Unsupported(f"{rows[0].name}: {reason}")
        options = {"config": None, "interpret": False}
        return rows[0].run(problem, inputs, **{name: options[name] for name in options if name in accepted})

    lengths = getattr(case, "filled", None)
    counted = inspect.signature(problem.bytes_moved).parameters
    needed = problem.bytes_moved(lengths) if "lengths" in counted and lengths is not None else problem.bytes_moved()
    return Workload(function, (with_scalars(case.shapes(), case),), needed)


def with_scalars(shapes: Any, case: Any) -> Any:
    """The arrays of a case; with values where these decide what a kernel does."""

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


def _from_file(reference: WorkloadName) -> Workload:
    path = Path(reference.path)
    check(path.is_file(), "--file", reference.path, "a Python file that exists")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    check(spec is not None and spec.loader is not None, "--file", reference.path, "a Python file")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = [name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == path.stem]
    function = getattr(module, reference.name, None)
    check(callable(function), "--file", f"{path}:{reference.name}", f"one of its functions: {', '.join(own) or 'none'}")
    assert callable(function)
    made = function()
    form = "(function, arguments) or (function, arguments, bytes_needed)"
    check(
        isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]), f"{path}:{reference.name}()", made, form
    )
    called, arguments, *needed = made
    # A named tuple is one argument.
    several = isinstance(arguments, (tuple, list)) and not hasattr(arguments, "_fields")
    return Workload(called, tuple(arguments) if several else (arguments,), needed[0] if needed else None)


def _module(operation: str, name: str) -> ModuleType:
    return importlib.import_module(f"palladion.kernels.{operation}.{name}")
