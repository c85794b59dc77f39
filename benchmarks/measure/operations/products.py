"""quantized_matmul and matmul for benchmarks; a sample of rows and channels is judged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Final

import jax
import numpy as np

from palladion.benchmarks.measure.operations.base import Operation, Verdict, spread, verdict_of
from palladion.kernels import matmul as dense_package
from palladion.kernels import quantized_matmul as quantized_package
from palladion.kernels.matmul import Inputs
from palladion.kernels.matmul import cases as dense_cases
from palladion.kernels.quantized_matmul import cases as quantized_cases
from palladion.reference import oracle
from palladion.reference.compare import compare
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import order_of_platform

Case = dense_cases.Case | quantized_cases.Case

SAMPLED_ROWS: Final = 8
SAMPLED_CHANNELS: Final = 32

IN_NUMPY: Final[dict[Any, Callable[[np.ndarray], np.ndarray] | None]] = {
    None: None,
    jax.nn.relu: lambda y: np.maximum(y, 0),
    jax.nn.silu: lambda y: y / (1 + np.exp(-y)),
    jax.nn.gelu: lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
}
"""Activations for the float64 oracle."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_inputs(cases: Any, case: Case) -> Inputs:
    """Returns the random arrays of a case that the module `cases` makes."""
    made: Inputs = cases.make_inputs(case)
    return made


class _Product(Operation):
    """A matrix product."""

    def inputs(self, case: Case) -> Inputs:
        """Implements `Operation.inputs`; one program compiles sooner for an accelerator than all of its parts."""
        made: Inputs = _make_inputs(self.cases, case) if target_platform() != "cpu" else super().inputs(case)
        return made

    def stored_for(self, case: Case, platform: str) -> Case:
        """Implements `Operation.stored_for`."""
        return case if case.order is not None else dataclasses.replace(case, order=order_of_platform(platform))

    def judge(self, case: Case, inputs: Inputs, result: Any, reference: Any) -> Verdict:
        """Implements `Operation.judge`."""
        layer = None if inputs.layer is None else int(inputs.layer)
        w = inputs.w if layer is None else jax.tree.map(lambda leaf: leaf[layer], inputs.w)
        channels = np.array(spread(case.problem().result_features, SAMPLED_CHANNELS))
        rows = np.array(spread(case.rows, SAMPLED_ROWS))
        columns = np.concatenate([channels, channels + case.out_features // 2]) if case.gated else channels
        out_in = case.problem().order == "out_in"
        w = jax.tree.map(lambda leaf: leaf[columns] if out_in else leaf[:, columns], w)
        sample = np.ix_(rows, channels)
        exact = oracle.quantized_matmul(
            np.asarray(inputs.x)[rows],
            w.T if out_in and isinstance(w, jax.Array) else w,
            bias=None if inputs.bias is None else np.asarray(inputs.bias)[columns],
            activation=IN_NUMPY[case.activation],
            gated=case.gated,
            norm=inputs.norm,
            residual=None if inputs.residual is None else np.asarray(inputs.residual)[sample],
            quantize_x=case.options.get("quantize_x"),
        )
        return verdict_of(compare(np.asarray(result)[sample], np.asarray(reference)[sample], exact))


class QuantizedMatmul(_Product):
    """quantized_matmul."""

    name = "quantized_matmul"
    cases: ClassVar[Any] = quantized_cases
    package: ClassVar[Any] = quantized_package


class Matmul(_Product):
    """matmul, with dense weights."""

    name = "matmul"
    cases: ClassVar[Any] = dense_cases
    package: ClassVar[Any] = dense_package
