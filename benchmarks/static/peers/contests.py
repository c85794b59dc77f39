"""A contest: a shape, and the kernels that are compared on it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax

from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.devices import Chip, target_chip

OURS: Final = "palladion"
"""Name of our contender."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A kernel that takes part in contests.

    Attributes:
      name: its name in the table.
      package: the distribution that it comes from, as pip knows it.
      settings: returns the ways to call the kernel for a case that are worth a try; none if it does not cover the case.
      workload: returns the function and its arguments for a case and a setting.
    """

    name: str
    package: str
    settings: Callable[[Any], tuple[str, ...]]
    workload: Callable[[Any, str], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Contest:
    """A shape, and the contenders on it.

    Attributes:
      operation: a folder of kernels/.
      case: a `Case` of the operation.
      contenders: ours, then the others.
    """

    operation: str
    case: Any
    contenders: tuple[Contender, ...]

    @property
    def name(self) -> str:
        """Name of the operation and the case."""
        return f"{self.operation}/{self.case.name}"

    @property
    def bytes_needed(self) -> int:
        """Bytes that must move between HBM and the chip, by our operation's definition."""
        moved: int = self.case.problem().bytes_moved()
        return moved


def traced_chip() -> Chip:
    """Returns the TPU that functions are traced for."""
    chip = target_chip()
    assert chip is not None, "peers are traced for a TPU"
    return chip


def with_target_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, traced with `jax.devices()` as the TPU that is compiled for.

    Peers look up their tuned block sizes by it, and take untuned ones on a CPU.
    """

    def traced(*arguments: Any) -> Any:
        with _devices(tpu_compiler.device(traced_chip().name)):
            return function(*arguments)

    return traced


@contextlib.contextmanager
def _devices(device: Any) -> Iterator[None]:
    real = jax.devices
    jax.devices = lambda *_: [device]
    try:
        yield
    finally:
        jax.devices = real
