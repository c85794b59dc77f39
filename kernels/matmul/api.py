"""matmul: its signature and contract, and the table of what can run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax

from palladion.kernels.backend import Implementation
from palladion.kernels.checks import as_array
from palladion.kernels.linear import Inputs, inputs_of, multiply
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.matmul.triton import call as triton
from palladion.reference import matmul as reference
from palladion.reference.quantized_matmul import NORM_EPS


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Any) -> jax.Array:
    del config, interpret
    return reference(
        inputs.x,
        inputs.w,
        bias=inputs.bias,
        activation=problem.activation,
        gated=problem.gated,
        norm=inputs.norm,
        norm_eps=problem.norm_eps or 0.0,
        residual=inputs.residual,
        layer=inputs.layer,
        out_dtype=problem.out_dtype,
    )


IMPLEMENTATIONS: Final = (
    Implementation(
        "triton",
        "gpu",
        triton.unsupported,
        triton.matmul,
        triton.Config,
        triton.heuristic,
        triton.space,
    ),
    Implementation("xla", None, lambda _: None, _reference),
)
"""Every implementation takes a `Problem` and its `Inputs`, and returns `[rows, result_features]`."""


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    gated: bool = False,
    norm: jax.Array | None = None,
    norm_eps: float = NORM_EPS,
    residual: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    out_dtype: Any = None,
    backend: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> jax.Array:
    """x @ w for a dense w, with all that `quantized_matmul` fuses.

    XLA's own products of dense matrices are hard to beat, but for a row or a few on a GPU: there each norm, sum of
    splits and residual is a launch of its own, which takes as long as many bytes. Only there is a kernel.

    Args:
      x: activations `[..., in]`; float32, bfloat16 or float16.
      w: weights `[in, out]`, of these dtypes too.
      bias: float `[out]`, added before the activation.
      activation: any elementwise JAX function of a float32 array, for example `jax.nn.silu`.
      gated: the first out / 2 channels are gates and the others ups: returns activation(gate) * up, `[..., out / 2]`.
      norm: float `[in]`: x is normalized first, x / sqrt(mean(x ** 2) + norm_eps) * norm over its last axis (RMS norm).
      norm_eps: what is added to the mean square.
      residual: `[..., out]`, or `[..., out / 2]` where gated; float32, bfloat16 or float16; added to the result.
      layer: where w has a leading `[num_layers]`, which of its matrices to multiply with, an int32 scalar.
      out_dtype: dtype of the result, float32, bfloat16 or float16; None means that of x.
      backend: one of `palladion.BACKENDS`; None means what `using_backend` set, or "auto".
      config: block sizes for the kernel that is named by `backend`, its `Config`; None chooses.
      interpret: whether a kernel is interpreted; None does so where backend="pallas" meets a CPU.

    Returns:
      `[..., out]`, or `[..., out / 2]` where gated, in `out_dtype`.

    Raises:
      ValueError: shapes, dtypes or options do not go together; the message says which.
      Unsupported: the chosen backend does not cover this call.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202); RMS norm (arXiv 1910.07467).
    """
    inputs, leading = inputs_of(x, as_array("w", w), bias=bias, layer=layer, norm=norm, residual=residual)
    problem = Problem.of(inputs, activation=activation, gated=gated, out_dtype=out_dtype, norm_eps=norm_eps)
    return multiply(
        "matmul", IMPLEMENTATIONS, problem, inputs, leading, backend=backend, config=config, interpret=interpret
    )
