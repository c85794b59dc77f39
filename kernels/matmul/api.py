"""Signature and contract of matmul, and the table of its implementations.

XLA's own product of dense matrices is hard to beat: an H200 took 14.9 and 30.0 us for one row of Llama 3 8B's qkv and
down, a prototype of this kernel 14.0 and 30.3. So "auto" takes XLA's product on a GPU, unless measurements say that the
kernel is faster: its row comes after XLA's. The rows of "mosaic_tpu", and of "triton" for more than `MAX_ROWS` rows of
x, run XLA's product too; `record_choices` shows it, as `Choice.config` is then an `XlaProduct`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import jax
from jax.typing import DTypeLike

from palladion.kernels.checks import as_array, check
from palladion.kernels.gpu_rows import MAX_ROWS
from palladion.kernels.implementation import Implementation
from palladion.kernels.linear import Inputs, inputs_of
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.matmul.triton import call as triton
from palladion.kernels.products import multiply
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference import matmul as reference
from palladion.reference.quantization import Order
from palladion.reference.quantized_matmul import NORM_EPS


@dataclasses.dataclass(frozen=True)
class XlaProduct:
    """The config of a call that runs XLA's own product: it has no block sizes to choose."""


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Interpret) -> jax.Array:
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
        order=problem.order,
    )


def _mosaic_tpu(problem: Problem, inputs: Inputs, *, config: Any, interpret: Interpret) -> jax.Array:
    """Runs XLA's product: on a TPU it fuses what stands around it, and no kernel is faster."""
    check(config is None or isinstance(config, XlaProduct), "config", config, "None: XLA's product has no block sizes")
    return _reference(problem, inputs, config=config, interpret=interpret)


def _triton(problem: Problem, inputs: Inputs, *, config: Any, interpret: Interpret) -> jax.Array:
    """Runs the kernel for the few rows that it covers, XLA's product for more: tensor cores then take less time."""
    if problem.rows <= MAX_ROWS:
        return triton.matmul(problem, inputs, config=config, interpret=interpret)
    accepted = f"None: with more than {MAX_ROWS} rows XLA's product runs, which has no block sizes"
    check(config is None or isinstance(config, XlaProduct), "config", config, accepted)
    return _reference(problem, inputs, config=config, interpret=interpret)


def _triton_heuristic(problem: Problem) -> triton.Config | XlaProduct:
    return triton.heuristic(problem) if problem.rows <= MAX_ROWS else XlaProduct()


def _triton_space(problem: Problem) -> Space:
    return triton.space(problem) if problem.rows <= MAX_ROWS else Space(XlaProduct(), {})


def _triton_unsupported(problem: Problem) -> str | None:
    return problem.order_unsupported("out_in")


IMPLEMENTATIONS: Final = (
    Implementation("mosaic_tpu", "tpu", lambda _: None, _mosaic_tpu, heuristic=lambda _: XlaProduct()),
    Implementation("xla", None, lambda _: None, _reference),
    Implementation("triton", "gpu", _triton_unsupported, _triton, triton.Config, _triton_heuristic, _triton_space),
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
    out_dtype: DTypeLike | None = None,
    order: Order = "in_out",
    backend: str | None = None,
    config: Any = None,
    interpret: Interpret = None,
) -> jax.Array:
    """Multiplies x by a dense weight, with everything that `quantized_matmul` fuses.

    There is a kernel for up to four rows of x on a GPU. "auto" runs it where it was measured to be faster than XLA's
    own product, which runs otherwise. Where a platform's backend has no kernel, `record_choices` shows `XlaProduct()`.

    Sharded arrays: rows of x and `out` need no communication, `in` one all-reduce, and a norm another one. In a gated
    product gates and ups of a result are on two devices where `out` is sharded: the products, not the weights, are
    exchanged in two permutations. Gates and ups in two weights, multiplied by two calls, need none.

    Args:
      x: activations `[..., in]`; float32, bfloat16 or float16.
      w: weights `[in, out]`, or `[out, in]` with order="out_in"; float32, bfloat16 or float16.
      bias: float `[out]`, added before the activation.
      activation: any elementwise JAX function of a float32 array, for example `jax.nn.silu`.
      gated: the first out / 2 channels are gates and the others ups: returns activation(gate) * up, `[..., out / 2]`.
      norm: float `[in]`: x is normalized first, x / sqrt(mean(x ** 2) + norm_eps) * norm over its last axis (RMS norm).
      norm_eps: constant added to the mean square.
      residual: `[..., out]`, or `[..., out / 2]` where gated; float32, bfloat16 or float16; added to the result.
      layer: index of the matrix to multiply with, an int32 scalar, where w has a leading `[num_layers]`.
      out_dtype: dtype of the result, float32, bfloat16 or float16; None means that of x.
      order: storage order of w. "out_in" is that of checkpoints, and of the GPU kernel.
      backend: one of `palladion.BACKENDS`; None means what `using_backend` set, or "auto".
      config: block sizes for the kernel that is named by `backend`, its `Config`; None chooses.
      interpret: whether a kernel is interpreted; None interprets where backend="pallas" runs on a CPU.

    Returns:
      `[..., out]`, or `[..., out / 2]` where gated, in `out_dtype`.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other; the message says which.
      Unsupported: the chosen backend does not run on this platform.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202); RMS norm (arXiv 1910.07467).
    """
    inputs, leading = inputs_of(x, as_array("w", w), bias=bias, layer=layer, norm=norm, residual=residual)
    problem = Problem.of(
        inputs, activation=activation, gated=gated, out_dtype=out_dtype, norm_eps=norm_eps, order=order
    )
    return multiply(
        "matmul", IMPLEMENTATIONS, problem, inputs, leading, backend=backend, config=config, interpret=interpret
    )
