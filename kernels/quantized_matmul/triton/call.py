"""quantized_matmul on a GPU: a few rows of activations, or many, times a wide weight of 8- or 4-bit codes.

    y = sum_g (x_g @ (code_g - zero_g)) * scale_g + sum(x_g) * minimum_g        result = finish(y + bias)

Three forms, by the rows of x. One row, or up to three, needs no tensor cores: `vector.py` multiplies and adds it as
it comes. A few are padded to the 16 or 32 of a tensor core's block, in registers, and their products are scaled; many
take larger blocks, and scaled weights: both are `matrix.py`. All of them read codes once for every block of rows,
128 bits at a time, and multiply their bytes (`bytewise.py`), or floats made by masks and shifts (`codes.py`).

Grid: (row blocks * out blocks, splits). One decode step has too few channels for all multiprocessors: shares of `in`
fill them, and XLA adds their float32 sums, bias, activation and gate, together with what follows. A single share does
all of it itself; the vector form also normalizes rows and adds the residual, and takes narrow blocks rather than
shares: a launch more would take as long as many bytes. A gated call has two sums, gate and up, over two blocks of
channels.

In device memory there is nothing but inputs, result and the sums of splits; quantized rows where `quantize_x` asks for
them. The layer of a stacked weight is an offset, but where Pallas miscounts it (`offsets_wrap`): there it is copied.

Bound by memory for few rows: each code is read once for 2 * rows FLOPs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, offsets_wrap
from palladion.kernels.devices import Gpu, gpu_to_plan_for
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import matrix as gpu_matrix
from palladion.kernels.quantized_matmul.triton import matrix_blocks, matrix_call
from palladion.kernels.quantized_matmul.triton import vector as gpu_vector
from palladion.kernels.quantized_matmul.triton.config import MIN_TILE
from palladion.kernels.quantized_matmul.triton.config import Config as Config
from palladion.kernels.quantized_matmul.triton.refs import Refs
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference.quantization import quantize_rows

VECTOR_BLOCKS: Final = (128, 64, 32)
"""Channels of a program of the vector form: rows of a cache line, or of one sector of it, the least that is read."""

VECTOR_REGISTERS: Final = 255
"""Maximum registers per thread."""

MATRIX_INSTRUCTIONS: Final = {(False, False): 5, (True, False): 7, (False, True): 9, (True, True): 16}
"""Approximate instructions of the tensor-core form per byte of codes, by (codes are packed, GPU is newer)."""

TCGEN05_FROM: Final = 100
"""Compute capability whose tensor cores take neither operand out of registers: weights go through shared memory."""

LAUNCH_SECONDS: Final = 2.5e-6
"""Time to add splits up: a launch, and the start and end of its programs."""

CORES: Final = 128
"""Threads of which a multiprocessor issues an instruction in a cycle."""

PROGRAMS: Final = 4
"""Programs of a multiprocessor that together keep enough bytes on their way: 64 KiB or more (README.md)."""


def heuristic(problem: Problem) -> Config:
    """The form that suits the rows, blocks that keep the memory busy, splits that keep all multiprocessors busy."""
    p, gpu = problem, gpu_to_plan_for()
    vector = _vector(p, gpu) if p.quantize_x != "int8" else None
    if vector is not None:
        return vector
    return matrix_blocks.heuristic(p, gpu)


def _vector(problem: Problem, gpu: Gpu) -> Config | None:
    """The vector form without splits: who has all of a row's products adds them up, and leaves no launch for it.

    Blocks are the widest that spread channels evenly; their warps are as many as have something to do and as let all
    programs run at a time. Where adding up is quicker, a single row has splits; more rows are left to tensor cores.
    """
    p = problem
    if p.rows > gpu_vector.most_rows(p):
        return None
    block_out = gpu_rows.even_block(p.result_features, VECTOR_BLOCKS, gpu.multiprocessors, gpu_vector.cost(p).even)
    busiest = gpu_rows.busiest(p.result_features, block_out, gpu.multiprocessors)
    num_warps = gpu_rows.warps_for(
        lambda warps: gpu_vector.trips(p, block_out, warps), busiest // block_out, VECTOR_REGISTERS
    )
    if _quicker_alone(p, busiest, gpu):
        return Config("vector", p.rows, block_out, MIN_TILE, splits=1, num_warps=num_warps)
    if p.rows > 1:
        return None
    config = Config("vector", p.rows, VECTOR_BLOCKS[0], MIN_TILE, splits=1)
    return dataclasses.replace(config, splits=_splits(p, config, gpu))


def _quicker_alone(problem: Problem, busiest: int, gpu: Gpu) -> bool:
    """Whether the instructions of the vector form without splits take less time than a form with splits and launches.

    Args:
      problem: what is computed.
      busiest: channels of the multiprocessor that has the most.
      gpu: the GPU; of one that is not known a single row alone is taken to be quicker.
    """
    p = problem
    if not gpu.clock_hertz or not gpu.hbm_bytes_per_second:
        return p.rows == 1
    instructions = others = gpu_vector.cost(p).instructions(p.rows)
    if p.rows > 1:
        others = MATRIX_INSTRUCTIONS[p.scheme.packed, gpu.compute_capability >= TCGEN05_FROM]
    codes = p.in_features * p.parts / (2 if p.scheme.packed else 1)  # bytes of a channel
    per_second = CORES * gpu.clock_hertz / codes  # channels of a multiprocessor, at an instruction for each byte
    memory = p.bytes_moved() / gpu.hbm_bytes_per_second
    launches = 1 if p.norm_eps is None else 3  # XLA normalizes in two, where splits leave it to XLA
    spread = p.result_features / gpu.multiprocessors
    return busiest * instructions / per_second <= max(memory, spread * others / per_second) + LAUNCH_SECONDS * launches


def _splits(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Shares of `in`: the fewest that give every multiprocessor its programs, none of them empty.

    Every split writes and reads a float32 for each result; that is little beside the codes of its share.
    """
    trips = gpu_vector.trips(problem, config.block_out, config.num_warps)
    return matrix_blocks.splits_for(trips, pl.cdiv(problem.result_features, config.block_out), PROGRAMS, gpu)


def space(problem: Problem) -> Space:
    """Returns the block sizes that the tuner may try: those of the form that the heuristic chooses."""
    start = heuristic(problem)
    if start.form == "tensor_core":
        return matrix_blocks.space(problem, start)
    tiles = -(-problem.in_features // start.tile)
    axes: dict[str, Sequence[int]] = {
        "splits": [1 << n for n in range(7) if 1 << n <= tiles],
        "block_out": (16, 32, 64, 128, 256),
        "num_warps": (2, 4, 8, 16),
    }
    return Space(start, axes)


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    p = problem
    if (reason := p.order_unsupported("out_in")) is not None:
        return reason
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
    residual = inputs.residual
    if not fuses(problem, config):
        problem, inputs = problem.plain(inputs)
    p, splits = problem, config.splits
    check_config(p, config)
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
    refs = Refs(layer_index, x, *stack)._replace(x_scale=x_scale, bias=inputs.bias)
    if config.form == "tensor_core":
        refs = refs._replace(residual=residual)
        return matrix_call.multiply(p, refs, config, _name(p, config), interpret=interpret)
    refs = refs._replace(norm=inputs.norm, residual=inputs.residual)
    refs = refs if splits == 1 else refs._replace(x_scale=None, bias=None)
    nvidia = gpu_rows.for_nvidia(interpret)
    options: dict[str, Any] = {"problem": p, "block_out": config.block_out, "splits": splits}
    options |= {"num_warps": config.num_warps, "nvidia": nvidia}
    options["bytewise"] = (nvidia or bool(interpret)) and gpu_vector.in_bytes(p, config.num_warps)
    whole = jax.ShapeDtypeStruct((p.rows, p.result_features), p.out_dtype)
    sums = jax.ShapeDtypeStruct((splits, p.parts, p.rows, p.result_features), jnp.float32)
    out = pl.pallas_call(
        fresh_kernel(gpu_vector.kernel, **options),
        grid=(pl.cdiv(p.result_features, config.block_out), splits),
        out_shape=whole if splits == 1 else sums,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=_name(p, config),
    )(refs)
    if splits == 1:
        return out if p.has_residual else p.add(residual, out)
    products = [jnp.sum(out[:, part], axis=0) for part in range(p.parts)]
    if x_scale is not None:
        products = [product * x_scale[:, None] for product in products]
    if inputs.bias is not None:
        biases = jnp.split(inputs.bias.astype(jnp.float32)[None], p.parts, axis=1)
        products = [product + bias for product, bias in zip(products, biases, strict=True)]
    return p.add(residual, p.finish(products))


def _as_stack(array: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Returns an array of a weight as `[num_layers, rows, out]`, e8m0 scales as their bits."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint8) if array.dtype == jnp.float8_e8m0fnu else array
    return bits[None] if layer is None else bits


def fuses(problem: Problem, config: Config) -> bool:
    """Whether the kernel normalizes x and adds the residual itself: where a program goes through all of a row as it is.

    Otherwise XLA does both, before and after.
    """
    return config.form == "vector" and config.splits == 1 and problem.quantize_x is None


def check_config(problem: Problem, config: Config) -> None:
    """Raises ValueError where a config does not go with a problem."""
    p = problem
    if config.form == "vector":
        most = gpu_vector.MAX_ROWS
        check(p.rows <= most and p.quantize_x != "int8", "config.form", "vector", f"up to {most} rows that are floats")
    right = not config.scales_weights or gpu_matrix.can_scale_weights(p)
    check(right, "config.scales_weights", True, f"False for {p}")


def _name(problem: Problem, config: Config) -> str:
    blocks = f"r{config.block_rows}_o{config.block_out}_t{config.tile}_s{config.splits}"
    return f"quantized_matmul_{config.form}_{problem.scheme}_{blocks}".replace("-", "_")
