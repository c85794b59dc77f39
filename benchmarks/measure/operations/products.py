"""quantized_matmul and matmul: a sample of rows and channels is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import jax
import numpy as np

from palladion.benchmarks.measure.operations.base import Operation, Verdict, spread, verdict_of
from palladion.kernels import matmul as dense_package
from palladion.kernels import quantized_matmul as quantized_package
from palladion.kernels.matmul import cases as dense_cases
from palladion.kernels.quantized_matmul import cases as quantized_cases
from palladion.reference import oracle
from palladion.reference.compare import compare

SAMPLED_ROWS: Final = 8
SAMPLED_CHANNELS: Final = 32

IN_NUMPY: Final[dict[Any, Callable[[np.ndarray], np.ndarray] | None]] = {
    None: None,
    jax.nn.relu: lambda y: np.maximum(y, 0),
    jax.nn.silu: lambda y: y / (1 + np.exp(-y)),
    jax.nn.gelu: lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
}
"""Activations in float64."""


class _Product(Operation):
    """A product: the function of its package that has its name."""

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""

        def multiply(inputs: Any) -> jax.Array:
            found: jax.Array = getattr(self.package, self.name)(**inputs._asdict(), **(case.options | how))
            return found

        return multiply

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """As `Operation` has it."""
        w = inputs.w if inputs.layer is None else jax.tree.map(lambda part: part[int(inputs.layer)], inputs.w)
        channels = np.array(spread(case.problem().result_features, SAMPLED_CHANNELS))
        rows = np.array(spread(case.rows, SAMPLED_ROWS))
        taken = np.concatenate([channels, channels + case.out_features // 2]) if case.gated else channels
        place = np.ix_(rows, channels)
        exact = oracle.quantized_matmul(
            np.asarray(inputs.x)[rows],
            jax.tree.map(lambda part: part[:, taken], w),
            bias=None if inputs.bias is None else np.asarray(inputs.bias)[taken],
            activation=IN_NUMPY[case.activation],
            gated=case.gated,
            norm=inputs.norm,
            residual=None if inputs.residual is None else np.asarray(inputs.residual)[place],
            quantize_x=case.options.get("quantize_x"),
        )
        return verdict_of(compare(np.asarray(result)[place], np.asarray(reference)[place], exact))


class QuantizedMatmul(_Product):
    """quantized_matmul."""

    name = "quantized_matmul"
    cases: ClassVar[Any] = quantized_cases
    package: ClassVar[Any] = quantized_package


class Matmul(_Product):
    """matmul, of dense weights."""

    name = "matmul"
    cases: ClassVar[Any] = dense_cases
    package: ClassVar[Any] = dense_package
