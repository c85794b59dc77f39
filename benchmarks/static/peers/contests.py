"""What is compared: shapes, and whose kernels are made for each of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax

from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.devices import Chip, target_chip

OURS: Final = "palladion"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A kernel that somebody offers for an operation.

    Attributes:
      name: what it is called in the table.
      package: the distribution that it comes from, as pip knows it.
      settings: of a case, the ways to call the kernel that are worth a try; none where it does not cover the case.
      workload: of a case and a setting, the function and its arguments.
    """

    name: str
    package: str
    settings: Callable[[Any], tuple[str, ...]]
    workload: Callable[[Any, str], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Contest:
    """A shape, and who competes in it.

    Attributes:
      operation: a folder of kernels/.
      case: one of the operation's `Case`s.
      contenders: ours, and then the others.
    """

    operation: str
    case: Any
    contenders: tuple[Contender, ...]

    @property
    def name(self) -> str:
        """Of the operation and the case."""
        return f"{self.operation}/{self.case.name}"

    @property
    def bytes_needed(self) -> int:
        """Bytes that must move between HBM and the chip, as our operation defines them."""
        moved: int = self.case.problem().bytes_moved()
        return moved


def traced_chip() -> Chip:
    """The TPU that is being traced for."""
    chip = target_chip()
    assert chip is not None, "peers are traced for a TPU"
    return chip


def with_target_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced where `jax.devices()` is the TPU that is compiled for.

    Peers look there for their tuned block sizes, and take untuned ones on a CPU.
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
