"""quantized_matmul on a GPU: a few rows of activations, or many, times a wide weight of 8- or 4-bit codes.

    y = sum_g (x_g @ (code_g - zero_g)) * scale_g + sum(x_g) * minimum_g        result = finish(y + bias)

Two forms, by the rows of x. Up to four rows are multiplied as they are, without tensor cores (`few_rows.py`): a
program has all of `in` for its channels, and adds bias and residual, activates and gates. More rows are padded to the
16 and more of a tensor core's block (`matrix.py`), with shares of `in` where channels do not fill the multiprocessors:
XLA adds their float32 sums, bias, activation and gate, together with what follows. Both read weights that are stored
`[out, in]`, each code once for every block of rows. x is normalized in a launch of its own (`gpu_norm.py`); of few rows
also on its way into registers, where the tuner finds that faster.

In device memory there is nothing but inputs, result and the sums of splits; quantized rows where `quantize_x` asks for
them. The layer of a stacked weight is an offset, but where Pallas miscounts it (`offsets_wrap`): there it is copied.

Bound by memory for few rows: each code is read once for 2 * rows FLOPs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_norm, gpu_rows
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, offsets_wrap
from palladion.kernels.devices import gpu_to_plan_for, target_device_kind, target_gpu
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import few_rows, matrix_blocks, matrix_call
from palladion.kernels.quantized_matmul.triton import matrix as gpu_matrix
from palladion.kernels.quantized_matmul.triton.config import FORMS, MULTIPLIES
from palladion.kernels.quantized_matmul.triton.config import Config as Config
from palladion.kernels.quantized_matmul.triton.refs import Refs
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import quantize_rows

ROWS: Final = {"int8": 2}
"""Most rows that the heuristic multiplies without tensor cores, by format, and 1 for others: for more, instructions
take longer than memory (README.md)."""

CHANNELS: Final = {"float": 8, "bytes": 16}
"""Channels whose sums, for one row, leave registers for what else a thread needs; more rows have fewer channels."""

LEAST_CHANNELS: Final = 4
"""Channels among which the conversion of x is divided, however many rows there are."""

MOST_SUMS: Final = 64
"""Most sums of a thread that the tuner tries."""


def heuristic(problem: Problem) -> Config:
    """Returns the form that suits the rows, with blocks that keep the memory busy."""
    p = problem
    if p.rows > ROWS.get(p.scheme.format, 1) or not few_rows.covers(p):
        return matrix_blocks.heuristic(p, gpu_to_plan_for())
    # int8 codes are read in time either way. Four-bit ones take more instructions than the GPU has time for as floats.
    packed = p.scheme.packed and few_rows.can_multiply_bytes(p)
    multiply: Literal["float", "bytes"] = "bytes" if packed else "float"
    channels = max(CHANNELS[multiply] // pl.next_power_of_2(p.rows), LEAST_CHANNELS)
    block_out = gpu_rows.block_for(p, channels // p.parts)
    num_warps = gpu_rows.warps_for(p, few_rows.per_thread(p))
    return Config("few_rows", block_out, num_warps, multiply)


def space(problem: Problem) -> Space:
    """Returns what the tuner may try: for few rows both ways to multiply, and tensor cores."""
    p, start = problem, heuristic(problem)
    if not few_rows.covers(p):
        return matrix_blocks.space(p, start)
    tensor_core = matrix_blocks.space(p, matrix_blocks.heuristic(p, gpu_to_plan_for()))
    axes: dict[str, Sequence[Any]] = dict(tensor_core.axes)
    few = {"block_out": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8, 16)}
    axes |= {name: sorted({*axes[name], *values}) for name, values in few.items()}
    axes |= {
        "ahead": (False, True),
        "form": FORMS,
        "multiply": MULTIPLIES if few_rows.can_multiply_bytes(p) else ("float",),
        "normalizes": (False, True) if p.norm_eps is not None and few_rows.can_normalize(p) else (False,),
    }
    unused = Config("few_rows", block_out=1)

    def fits(config: Config) -> bool:
        """Leaves out what differs from another config only in what its form does not use."""
        if config.form == "tensor_core":
            return _agree(config, unused, ("multiply", "ahead", "normalizes")) and tensor_core.fits(config)
        only = ("block_rows", "tile", "splits", "num_stages", "scales_weights", "merge")
        return _agree(config, unused, only) and config.block_out * p.parts * p.rows <= MOST_SUMS

    return Space(start, axes, fits)


def _agree(config: Config, other: Config, names: Sequence[str]) -> bool:
    """Returns whether two configs have the same values in the named fields."""
    return all(getattr(config, name) == getattr(other, name) for name in names)


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    p = problem
    if (reason := p.order_unsupported("out_in")) is not None:
        return reason
    if target_platform() == "gpu" and target_gpu() is None:
        return f"the GPU must be one of NVIDIA's, for PTX, got {target_device_kind()}"
    if p.scale_dtype not in ("float32", "bfloat16", "float16", "float8_e8m0fnu"):
        return f"scales must be float32, bfloat16 or float16, got {p.scale_dtype}"
    codes = p.in_features * p.out_features // (2 if p.scheme.packed else 1)
    if offsets_wrap(codes):
        return f"codes of a matrix must take up to 2 GiB, or more than 4, got {codes} bytes"
    return None


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    check_config(problem, config)
    residual, norm = inputs.residual, None
    if config.form == "few_rows" and config.normalizes and few_rows.can_normalize(problem):
        p, norm = dataclasses.replace(problem, has_residual=False), inputs.norm
    else:
        p, inputs = problem.plain(inputs, functools.partial(gpu_norm.rms_norm, interpret=interpret))
    w, layer = inputs.w, inputs.layer
    if layer is not None and offsets_wrap(w.values.size):
        index = layer
        w, layer = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, index, 0, keepdims=False), w), None
    x, x_scale = inputs.x, None
    if p.quantize_x is not None:
        x, x_scale = quantize_rows(x, p.quantize_x)
        x = x.astype(gpu_matrix.operand(p))
    stack = [None if array is None else _as_stack(array, layer) for array in (w.values, w.scales, w.zeros, w.minimums)]
    layer_index = jnp.zeros(1, jnp.int32) if layer is None else layer[None]
    refs = Refs(layer_index, x, *stack)._replace(x_scale=x_scale, bias=inputs.bias, residual=residual, norm=norm)
    if config.form == "tensor_core":
        return matrix_call.multiply(p, refs, config, _name(p, config), interpret=interpret)
    out: jax.Array = pl.pallas_call(
        fresh_kernel(few_rows.kernel, problem=p, config=config, native=not interpret),
        grid=(pl.cdiv(p.result_features, config.block_out),),
        out_shape=jax.ShapeDtypeStruct((p.rows, p.result_features), p.out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=_name(p, config),
    )(refs)
    return out


def _as_stack(array: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Returns an array of a weight as `[num_layers, out, …]`, e8m0 scales as their bits."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint8) if array.dtype == jnp.float8_e8m0fnu else array
    return bits[None] if layer is None else bits


def check_config(problem: Problem, config: Config) -> None:
    """Raises ValueError where a config does not go with a problem."""
    p = problem
    if config.form == "few_rows":
        accepted = f"'tensor_core': few_rows takes up to {gpu_rows.MAX_ROWS} rows that are not quantized to int8"
        check(few_rows.covers(p), "config.form", "few_rows", accepted)
        right = config.multiply == "float" or few_rows.can_multiply_bytes(p)
        check(right, "config.multiply", "bytes", f"'float' for {p}")
    right = not config.scales_weights or gpu_matrix.can_scale_weights(p)
    check(right, "config.scales_weights", True, f"False for {p}")


def _name(problem: Problem, config: Config) -> str:
    blocks = f"{config.multiply}_o{config.block_out}_w{config.num_warps}{'_ahead' if config.ahead else ''}"
    if config.form == "tensor_core":
        blocks = f"r{config.block_rows}_o{config.block_out}_t{config.tile}_s{config.splits}"
    return f"quantized_matmul_{config.form}_{problem.scheme}_{blocks}".replace("-", "_")
