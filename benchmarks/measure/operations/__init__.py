"""The operations for benchmarks: their cases, how a backend is called, and whether a result is right.

The float64 oracle loops over every element, too slowly for the shapes of real models. There it judges a sample: whole
heads or channels, the first and the last among them, each computed from everything that it depends on.
"""

from __future__ import annotations

from typing import Final

from palladion.benchmarks.measure.operations.appends import AppendKV, AppendQKV
from palladion.benchmarks.measure.operations.attention import DecodeAttention
from palladion.benchmarks.measure.operations.base import CallOptions, Case, Operation, Verdict, verdict_of
from palladion.benchmarks.measure.operations.products import Matmul, QuantizedMatmul
from palladion.kernels.checks import check

__all__ = ["OPERATIONS", "CallOptions", "Case", "Operation", "Verdict", "operation", "verdict_of"]

OPERATIONS: Final[dict[str, Operation]] = {
    one.name: one for one in (DecodeAttention(), QuantizedMatmul(), Matmul(), AppendKV(), AppendQKV())
}


def operation(name: str) -> Operation:
    """Returns the operation of that name.

    Raises:
      ValueError: there is none; the message lists the names.
    """
    check(name in OPERATIONS, "operation", repr(name), ", ".join(OPERATIONS))
    return OPERATIONS[name]
