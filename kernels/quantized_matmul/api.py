"""Defines quantized_matmul: its signature and contract, and the table of its implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
from jax.typing import DTypeLike

from palladion.kernels.implementation import Implementation
from palladion.kernels.linear import Inputs, inputs_of
from palladion.kernels.products import multiply
from palladion.kernels.quantized_matmul.mosaic_gpu import block_sizes as hopper_blocks
from palladion.kernels.quantized_matmul.mosaic_gpu import call as mosaic_gpu
from palladion.kernels.quantized_matmul.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import call as triton
from palladion.kernels.types import Interpret
from palladion.reference import quantized_matmul as reference
from palladion.reference.quantization import QuantizedArray, register_product
from palladion.reference.quantized_matmul import NORM_EPS


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
        quantize_x=problem.quantize_x,
        layer=inputs.layer,
        out_dtype=problem.out_dtype,
        batch_invariant=problem.batch_invariant,
    )


IMPLEMENTATIONS: Final = (
    Implementation(
        "mosaic_tpu",
        "tpu",
        mosaic_tpu.unsupported,
        mosaic_tpu.quantized_matmul,
        mosaic_tpu.Config,
        mosaic_tpu.heuristic,
        mosaic_tpu.space,
    ),
    Implementation(
        "triton",
        "gpu",
        triton.unsupported,
        triton.quantized_matmul,
        triton.Config,
        triton.heuristic,
        triton.space,
    ),
    Implementation(
        "mosaic_gpu",
        "gpu",
        mosaic_gpu.unsupported,
        mosaic_gpu.quantized_matmul,
        hopper_blocks.Config,
        hopper_blocks.heuristic,
        hopper_blocks.space,
        mosaic_gpu.preferred,
    ),
    Implementation("xla", None, lambda _: None, _reference),
)
"""The implementations: each takes a `Problem` and its `Inputs`, and returns `[rows, result_features]`.

Triton comes before Mosaic GPU: without measurements "auto" takes that one for a few rows once gpus.json says that it
was right on such a GPU."""


def quantized_matmul(
    x: jax.Array,
    w: QuantizedArray,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    gated: bool = False,
    norm: jax.Array | None = None,
    norm_eps: float = NORM_EPS,
    residual: jax.Array | None = None,
    quantize_x: str | None = None,
    layer: jax.Array | int | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
    config: Any = None,
    interpret: Interpret = None,
) -> jax.Array:
    """Returns x @ w for a quantized w, with norm, bias, activation, gate and residual fused.

    Weights are read in their stored bits and scaled inside the kernel. Products are accumulated in float32, or exactly
    in int32 between int8 activations and integer weights. Codes may be multiplied before they are scaled, so the sum of
    |x| times the largest code (127; 448 for float8_e4m3fn, 57,344 for float8_e5m2) must stay below 3.4e38: activations
    below 1e27 are safe.

    Derivatives are those of x @ dequantize(w), by every backend: codes are constants, and the rounding of `quantize_x`
    passes derivatives straight through.

    Sharded arrays: rows of x and `out` need no communication, `in` one all-reduce, and a norm another one. In a gated
    product gates and ups of a result are on two devices where `out` is sharded: the products, not the weights, are
    exchanged in two permutations. Gates and ups in two weights, multiplied by two calls, need none.

    Args:
      x: activations `[..., in]`; float32, bfloat16 or float16.
      w: the weights, a `QuantizedArray` `[in, out]`.
      bias: float `[out]`, added before the activation.
      activation: any elementwise JAX function of a float32 array, for example `jax.nn.silu`.
      gated: the first out / 2 channels are gates and the others ups: returns activation(gate) * up, `[..., out / 2]`
        (SwiGLU with `jax.nn.silu`, GeGLU with `jax.nn.gelu`).
      norm: float `[in]`: x is normalized first, x / sqrt(mean(x ** 2) + norm_eps) * norm over its last axis (RMS norm).
      norm_eps: number added to the mean square.
      residual: `[..., out]`, or `[..., out / 2]` where gated; float32, bfloat16 or float16; added to the result.
      quantize_x: "int8" (with int8 and int4 weights) or "float8_e4m3fn" (with float8 weights) quantizes x on the fly,
        one scale per token; None multiplies x unchanged.
      layer: index of the matrix where w has a leading `[num_layers]`, an int32 scalar: a loop over layers then copies
        none of them where the implementation can avoid it.
      out_dtype: dtype of the result, float32, bfloat16 or float16; None means that of x.
      batch_invariant: gives a row the same bits whatever the number, order and values of the other rows. Block sizes
        and splits then do not depend on the number of rows, and may be slower than the best for this number; the
        reference multiplies row by row. A `config` must not depend on the number of rows either.
      backend: one of `palladion.BACKENDS`; None means the backend that `using_backend` set, or "auto".
      config: block sizes of the kernel that `backend` names, a `Config` of its folder; None chooses.
      interpret: whether a kernel is interpreted; None interprets where backend="pallas" runs on a CPU.

    Returns:
      `[..., out]`, or `[..., out / 2]` where gated, in `out_dtype`.

    Raises:
      ValueError: shapes, dtypes or options do not agree; the message names the argument.
      Unsupported: the chosen backend does not cover this call; the message says why.

    Source: LLM.int8() (arXiv 2208.07339) for int8 activations; GLU Variants Improve Transformer (arXiv 2002.05202);
      Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    inputs, leading = inputs_of(x, w, bias=bias, layer=layer, norm=norm, residual=residual)
    problem = Problem.of(
        inputs,
        activation=activation,
        gated=gated,
        quantize_x=quantize_x,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        norm_eps=norm_eps,
    )
    return multiply(
        "quantized_matmul",
        IMPLEMENTATIONS,
        problem,
        inputs,
        leading,
        backend=backend,
        config=config,
        interpret=interpret,
    )


register_product(quantized_matmul)
