"""The operations as benchmarks see them: workloads, how a backend is called, and whether a result is right.

The float64 oracle goes loop by loop, too slowly for the shapes of real models. Of these it judges a sample: whole
heads and channels at both ends and between, each computed from everything that it depends on.
"""

from __future__ import annotations

from typing import Final

from palladion.benchmarks.measure.operations.appends import AppendKV, AppendQKV
from palladion.benchmarks.measure.operations.attention import DecodeAttention
from palladion.benchmarks.measure.operations.base import Operation, Verdict, verdict_of
from palladion.benchmarks.measure.operations.products import Matmul, QuantizedMatmul
from palladion.kernels.checks import check

__all__ = ["OPERATIONS", "Operation", "Verdict", "operation", "verdict_of"]

OPERATIONS: Final[dict[str, Operation]] = {
    one.name: one for one in (DecodeAttention(), QuantizedMatmul(), Matmul(), AppendKV(), AppendQKV())
}


def operation(name: str) -> Operation:
    """An operation by name.

    Raises:
      ValueError: there is none of that name; the message lists them.
    """
    check(name in OPERATIONS, "operation", repr(name), ", ".join(OPERATIONS))
    return OPERATIONS[name]
