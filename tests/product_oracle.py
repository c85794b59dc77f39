"""Helpers for tests of products: the oracle's result of a case, and the storage order of each backend's weights."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from palladion.benchmarks.measure.operations.products import IN_NUMPY, Case
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul import IMPLEMENTATIONS
from palladion.reference import oracle
from palladion.reference.quantization import order_of_platform

ORDER_OF = {row.name: order_of_platform(row.platform or "cpu") for row in IMPLEMENTATIONS}
"""Storage order that a backend's weights have in tests."""


def judge(case: Case, inputs: Inputs) -> np.ndarray[Any, Any]:
    """Returns the product of a case in float64; a dense weight is `[in, out]`."""
    w = inputs.w if inputs.layer is None else jax.tree.map(lambda part: part[int(inputs.layer)], inputs.w)
    return oracle.quantized_matmul(
        inputs.x,
        w,
        bias=inputs.bias,
        norm=inputs.norm,
        residual=inputs.residual,
        activation=IN_NUMPY[case.activation],
        gated=case.gated,
        quantize_x=case.options.get("quantize_x"),
    )
