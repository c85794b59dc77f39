"""One row of an operation's table: what a backend says of itself, and what it is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from palladion.kernels.search_space import Space, TuningKey
from palladion.kernels.sharding import ShardingRule, Share


class Unsupported(NotImplementedError):  # noqa: N818  # not an error of the caller: another backend covers the call
    """Raised for a correct call that the chosen backend does not support; the message says why and what does."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of an operation's table.

    Attributes:
      name: name of the backend.
      platform: platform that it runs on, "tpu" or "gpu"; None for all.
      unsupported: returns why this backend cannot run a problem, or None; messages put it after "mosaic_tpu: ".
      run: runs the operation, given the problem, the arrays, `config` and `interpret`.
      config_class: class of the block sizes; None where there is nothing to choose.
      heuristic: returns block sizes for a problem.
      space: returns the block sizes that the tuner may try for a problem.
      preferred: returns whether it comes before the rows above it where nothing was measured; None means never.
    """

    name: str
    platform: str | None
    unsupported: Callable[[Any], str | None]
    run: Callable[..., Any]
    config_class: type | None = None
    heuristic: Callable[[Any], Any] | None = None
    space: Callable[[Any], Space] | None = None
    preferred: Callable[[Any], bool] | None = None

    @property
    def has_kernel(self) -> bool:
        """Whether it runs a kernel; what runs XLA's own operations has no block sizes."""
        return self.config_class is not None


def find_implementation(table: Sequence[Implementation], name: str) -> Implementation:
    """Returns the row of an operation's table with this backend name.

    Raises:
      KeyError: the table has no such row.
    """
    return {row.name: row for row in table}[name]


class Problem(Protocol):
    """Shapes and options of a call, validated, without its arrays."""

    def planned(self) -> Any:
        """Returns the problem that block sizes are chosen for: this one, or one that is the same for every batch."""

    def tuning_key(self) -> TuningKey:
        """Returns what block sizes depend on."""

    def sharding_rule(self, inputs: Any) -> ShardingRule | None:
        """Returns which dimensions of the inputs and results are sharded together; None leaves that to JAX."""

    def run_share(self, run: Callable[[Any, Any], Any], inputs: Any, share: Share) -> Any:
        """Runs a device's share of the call.

        Args:
          run: runs a problem with its inputs.
          inputs: the device's shares of the inputs.
          share: how the call is sharded.
        """

    def __str__(self) -> str:
        """Formats shapes and options on one line."""
