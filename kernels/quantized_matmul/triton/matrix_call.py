"""Calls the tensor-core form of quantized_matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.compat import fresh_kernel
from palladion.kernels.devices import gpu_to_plan_for, target_gpu
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import matrix
from palladion.kernels.quantized_matmul.triton.config import Config
from palladion.kernels.quantized_matmul.triton.matrix_store import Outputs
from palladion.kernels.quantized_matmul.triton.refs import Refs
from palladion.kernels.types import Interpret


def multiply(problem: Problem, arrays: Refs, config: Config, name: str, *, interpret: Interpret) -> jax.Array:
    """Returns the result, `[rows, result_features]`.

    Args:
      problem: the call, without norm and residual.
      arrays: the inputs; the residual may be among them.
      config: block sizes.
      name: of the kernel.
      interpret: whether the kernel is interpreted.
    """
    p, c = problem, config
    blocks = pl.cdiv(p.rows, c.block_rows) * pl.cdiv(p.result_features, c.block_out)
    result = jax.ShapeDtypeStruct((p.rows, p.result_features), p.out_dtype)
    sums = jax.ShapeDtypeStruct((c.splits, p.parts, p.rows, p.result_features), jnp.float32)
    counters, aliases, inputs = None, {}, arrays
    if c.splits == 1:
        outputs = Outputs(result)
    elif c.merge == "last":
        counters = jnp.zeros(blocks, jnp.int32)
        outputs = Outputs(result, sums, jax.ShapeDtypeStruct(counters.shape, counters.dtype))
        aliases = {len(jax.tree.leaves(arrays)): 2}
    else:
        outputs, inputs = Outputs(sums=sums), arrays._replace(x_scale=None, bias=None, residual=None)
    native = not interpret and target_gpu() is not None
    reordered = matrix.reorders(p, c, gpu_to_plan_for())
    (written,) = pl.pallas_call(
        fresh_kernel(matrix.kernel, problem=p, config=c, native=native, reordered=reordered),
        grid=(blocks, c.splits),
        out_shape=(outputs,),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=c.num_warps, num_stages=c.num_stages),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=name,
    )(inputs, counters)
    return _merged(p, arrays, written.sums) if written.result is None else written.result


def _merged(problem: Problem, arrays: Refs, sums: jax.Array) -> jax.Array:
    """Returns the result of sums `[splits, parts, rows, result_features]`, which XLA adds up."""
    p = problem
    products = [jnp.sum(sums[:, part], axis=0) for part in range(p.parts)]
    if arrays.x_scale is not None:
        products = [product * arrays.x_scale[:, None] for product in products]
    if arrays.bias is not None:
        biases = jnp.split(arrays.bias.astype(jnp.float32)[None], p.parts, axis=1)
        products = [product + bias for product, bias in zip(products, biases, strict=True)]
    return p.add(arrays.residual, p.finish(products))
