"""append_qkv in two steps: XLA rotates queries and keys, then a kernel of append_kv writes keys and values."""

from __future__ import annotations

from typing import Any

import jax

from palladion.kernels import append_kv
from palladion.kernels.append_qkv.problem import Inputs, Problem, rotate_in_xla
from palladion.kernels.implementation import Implementation, find_implementation
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference.caches import KVCache


class RotationInXla:
    """Runs append_qkv with XLA's rotation and one of append_kv's kernels."""

    def __init__(self, backend: str) -> None:
        """Takes the kernel from append_kv's table.

        Args:
          backend: the kernel's backend.
        """
        self.append_kv = find_implementation(append_kv.IMPLEMENTATIONS, backend)

    def unsupported(self, problem: Problem) -> str | None:
        """Returns why the kernel cannot write the new tokens, or None."""
        return self.append_kv.unsupported(problem.append)

    def heuristic(self, problem: Problem) -> Any:
        """Returns the kernel's block sizes for a problem."""
        assert self.append_kv.heuristic is not None
        return self.append_kv.heuristic(problem.append)

    def space(self, problem: Problem) -> Space:
        """Returns the kernel's block sizes that the tuner may try."""
        assert self.append_kv.space is not None
        return self.append_kv.space(problem.append)

    def run(self, problem: Problem, inputs: Inputs, *, config: Any, interpret: Interpret) -> tuple[jax.Array, KVCache]:
        """Rotates and writes; see `palladion.append_qkv` for the contract."""
        q, rotated = rotate_in_xla(inputs)
        return q, self.append_kv.run(problem.append, rotated, config=config, interpret=interpret)

    def implementation(self) -> Implementation:
        """Returns this way of running append_qkv as a row of its table."""
        row = self.append_kv
        return Implementation(
            row.name, row.platform, self.unsupported, self.run, row.config_class, self.heuristic, self.space
        )
