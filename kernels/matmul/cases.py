"""Named workloads of matmul, shared by tests, compile checks, the tuner and benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.kernels.linear import Inputs
from palladion.kernels.matmul.problem import Problem
from palladion.reference.quantization import Order, order_of_platform
from palladion.reference.quantized_matmul import NORM_EPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A workload.

    Attributes:
      name: letters, digits, dashes.
      rows: rows of x.
      in_features: columns of x.
      out_features: columns of w, gate and up together where gated.
      dtype: dtype of x.
      w_dtype: dtype of w; None means that of x.
      out_dtype: dtype of the result; None means that of x.
      bias: whether a bias is added.
      activation: applied to the result, or None.
      gated: whether the first half of the channels gates the second.
      norm: whether x is normalized first.
      residual: whether a residual is added to the result.
      num_layers: matrices stacked in w, of which the last is used; None for a single matrix.
      order: storage order of w; None means that of the platform traced for.
    """

    name: str
    rows: int
    in_features: int
    out_features: int
    dtype: str = "bfloat16"
    w_dtype: str | None = None
    out_dtype: str | None = None
    bias: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    gated: bool = False
    norm: bool = False
    residual: bool = False
    num_layers: int | None = None
    order: Order | None = None

    @property
    def stored_order(self) -> Order:
        """Storage order of w."""
        return order_of_platform() if self.order is None else self.order

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `matmul` other than arrays."""
        given = {name: getattr(self, name) for name in ("activation", "gated", "out_dtype")}
        return given | {"order": self.stored_order}

    def shapes(self) -> Inputs:
        """Returns shapes and dtypes of the inputs: enough to compile."""
        return jax.eval_shape(lambda: _inputs(self, jax.random.key(0)))

    def problem(self) -> Problem:
        """Returns the `Problem` of a call with this case's inputs and options."""
        problems: list[Problem] = []
        jax.eval_shape(
            lambda inputs: problems.append(Problem.of(inputs, **self.options, norm_eps=NORM_EPS)), self.shapes()
        )
        return problems[0]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Returns normal-distributed inputs: columns of w have unit norm, and layers that are not used are NaN."""
    inputs = _inputs(case, jax.random.key(seed))
    if case.num_layers is None:
        return inputs
    return inputs._replace(w=inputs.w.at[: case.num_layers - 1].set(jnp.nan))


def _inputs(case: Case, key: jax.Array) -> Inputs:
    x_key, w_key, bias_key, norm_key, residual_key = jax.random.split(key, 5)
    stacked = () if case.num_layers is None else (case.num_layers,)
    weights = jax.random.normal(w_key, (*stacked, case.in_features, case.out_features)) * case.in_features**-0.5
    weights = weights if case.stored_order == "in_out" else jnp.swapaxes(weights, -1, -2)
    features = case.out_features // 2 if case.gated else case.out_features
    return Inputs(
        x=jax.random.normal(x_key, (case.rows, case.in_features)).astype(case.dtype),
        w=weights.astype(case.w_dtype or case.dtype),
        bias=jax.random.normal(bias_key, (case.out_features,)) if case.bias else None,
        layer=None if case.num_layers is None else jnp.int32(case.num_layers - 1),
        norm=1 + 0.1 * jax.random.normal(norm_key, (case.in_features,)) if case.norm else None,
        residual=jax.random.normal(residual_key, (case.rows, features)).astype(case.dtype) if case.residual else None,
    )


_SILU: Final[dict[str, Any]] = {"gated": True, "activation": jax.nn.silu}

MODELS: Final = (
    Case(name="llama-3-8b-qkv", rows=1, in_features=4096, out_features=6144, norm=True),
    Case(name="llama-3-8b-output", rows=1, in_features=4096, out_features=4096, residual=True),
    Case(name="llama-3-8b-gate-up", rows=1, in_features=4096, out_features=28672, norm=True, **_SILU),
    Case(name="llama-3-8b-down", rows=1, in_features=14336, out_features=4096, residual=True),
    Case(name="llama-3-8b-head", rows=1, in_features=4096, out_features=128256, norm=True, out_dtype="float32"),
    Case(name="llama-3-8b-qkv-4", rows=4, in_features=4096, out_features=6144, norm=True),
    Case(name="smollm2-gate-up-float32", rows=1, in_features=576, out_features=3072, dtype="float32", **_SILU),
)
"""Shapes of real models: compiled, tuned and measured."""

TESTS: Final = (
    Case(name="bfloat16", rows=1, in_features=384, out_features=512),
    Case(name="float32", rows=3, in_features=384, out_features=512, dtype="float32", bias=True),
    Case(name="float16", rows=2, in_features=384, out_features=512, dtype="float16", activation=jax.nn.gelu),
    Case(name="float32-by-bfloat16", rows=4, in_features=256, out_features=512, dtype="float32", w_dtype="bfloat16"),
    Case(name="norm-gated", rows=1, in_features=384, out_features=512, norm=True, bias=True, **_SILU),
    Case(name="norm-residual", rows=2, in_features=384, out_features=256, norm=True, residual=True, num_layers=3),
    Case(name="wider-result", rows=1, in_features=384, out_features=512, norm=True, out_dtype="float32"),
    Case(name="odd-in", rows=1, in_features=200, out_features=256, dtype="float32", norm=True),
    Case(name="odd-both", rows=2, in_features=77, out_features=333, dtype="float32", residual=True),
    Case(name="gated-odd", rows=3, in_features=160, out_features=400, norm=True, residual=True, **_SILU),
    Case(name="few", rows=1, in_features=1, out_features=1, dtype="float32"),
    Case(name="wide-out", rows=1, in_features=64, out_features=70_000, dtype="float32"),
)
"""Small workloads that cover every option, compared with the oracle."""
