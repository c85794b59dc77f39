"""Others' packages: whether they are installed, and their kernels without the dependencies of a whole server."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, Final

MODULES: Final = {"palladion": "palladion", "jax": "jax", "tpu-inference": "tpu_inference", "tokamax": "tokamax"}
"""Top-level module of each distribution."""

COMPILERS: Final = ("jax", "jaxlib", "libtpu")
"""Distributions that decide how a kernel is compiled."""


def installed(package: str) -> bool:
    """Whether a distribution is installed."""
    return importlib.util.find_spec(MODULES[package]) is not None


def how_to_get(package: str) -> str:
    """Returns the command that installs a distribution; its kernels need no dependency but JAX."""
    return f"pip install --no-deps {package}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those distributions that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def kernels_of(package: str, name: str) -> Any:
    """Imports a module of kernels without initializing its package, which would import a whole server.

    Args:
      package: a distribution, "tpu-inference".
      name: name of the module inside the package, "kernels.quantized_matmul.kernel".

    Raises:
      ImportError: the distribution is not installed, or has no such module.
    """
    outer = MODULES[package]
    if outer not in sys.modules:
        spec = importlib.util.find_spec(outer)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{package} is not installed: {how_to_get(package)}")
        module = ModuleType(outer)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[outer] = module
        for inner, make in _STAND_INS.get(outer, {}).items():
            stand_in = make(f"{outer}.{inner}")
            sys.modules[stand_in.__name__] = stand_in
            setattr(module, inner, stand_in)
    return importlib.import_module(f"{outer}.{name}")


class _Switches(ModuleType):
    """A module of feature switches, all of them off."""

    def __getattr__(self, name: str) -> bool:
        if name.startswith("__"):
            raise AttributeError(name)
        return False


class _Logger(logging.Logger):
    """A logger with vllm's methods that log a message once."""

    def warning_once(self, message: str, *values: object) -> None:
        self.warning(message, *values)

    info_once = debug_once = warning_once


def _logging(name: str) -> ModuleType:
    module = ModuleType(name)
    module.init_logger = _Logger  # type: ignore[attr-defined]
    return module


_STAND_INS: Final = {"tpu_inference": {"envs": _Switches, "logger": _logging}}
"""Stand-ins for modules that kernels import and that would import vllm."""
