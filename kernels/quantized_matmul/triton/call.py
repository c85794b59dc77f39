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
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.checks import check, check_num_warps
from palladion.kernels.compat import fresh_kernel, offsets_wrap
from palladion.kernels.devices import Gpu, gpu_to_plan_for
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import matrix as gpu_matrix
from palladion.kernels.quantized_matmul.triton import vector as gpu_vector
from palladion.kernels.quantized_matmul.triton.refs import Refs
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret
from palladion.reference.quantization import quantize_rows

MIN_BLOCK: Final = 16
"""The smallest side of a matrix that tensor cores multiply."""

MIN_TILE: Final = 32

SKINNY_ROWS: Final = 64
"""Rows up to which memory is what a multiplication waits for; their products are scaled, not the weights."""

TILED_TILE: Final = 64
"""Weights along `in` of a trip where rows are many: with twice as many of x there would be room for one program."""

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

PROGRAMS: Final = {"vector": 4, "tensor_core": 2}
"""Programs of a multiprocessor that together keep enough bytes on their way: 64 KiB or more (README.md)."""

MAX_STAGES: Final = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """The form of the kernel, and its block sizes.

    Attributes:
      form: "vector" for up to `vector.MAX_ROWS` rows, or "tensor_core".
      block_rows: rows of x in a program: all of them in the vector form, otherwise a power of two of at least 16.
      block_out: output channels of a program, a power of two of at least 16.
      tile: weights along `in` of a trip, a power of two of at least 32; the vector form has tiles of its own.
      splits: shares that `in` is cut into.
      num_warps: warps of a program.
      num_stages: tiles that are loaded ahead.
      scales_weights: whether weights are scaled, and not products; for the tensor-core form and results of 16 bits.
    """

    form: Literal["vector", "tensor_core"]
    block_rows: int
    block_out: int
    tile: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3
    scales_weights: bool = False

    def __post_init__(self) -> None:
        check(self.form in ("vector", "tensor_core"), "config.form", self.form, "'vector' or 'tensor_core'")
        least = {"block_rows": 1 if self.form == "vector" else MIN_BLOCK, "block_out": MIN_BLOCK, "tile": MIN_TILE}
        for name, value in ((name, getattr(self, name)) for name in least):
            power = value >= least[name] and (value & (value - 1) == 0 or (self.form, name) == ("vector", "block_rows"))
            check(power, f"config.{name}", value, f"a power of two of at least {least[name]}")
        for name in ("splits", "num_stages"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")
        check_num_warps("config.num_warps", self.num_warps)


def heuristic(problem: Problem) -> Config:
    """The form that suits the rows, blocks that keep the memory busy, splits that keep all multiprocessors busy."""
    p, gpu = problem, gpu_to_plan_for()
    vector = _vector(p, gpu) if p.quantize_x != "int8" else None
    if vector is not None:
        return vector
    if p.rows <= SKINNY_ROWS or p.dot_dtype == "float32":
        # float32 rows are three numbers to hold and to multiply by each.
        narrow = p.x_dtype == "float32" and p.quantize_x is None
        block_rows = min(max(pl.next_power_of_2(p.rows), MIN_BLOCK), SKINNY_ROWS // 2 if narrow else SKINNY_ROWS)
        block_out = 64 if narrow or (p.gated and block_rows > 32) else 128
        config = Config("tensor_core", block_rows, block_out, 64 if narrow else 128, splits=1)
    else:
        block_rows = 128 if p.rows > 128 or not p.gated else 64
        scales_weights = gpu_matrix.can_scale_weights(p, TILED_TILE)
        config = Config(
            "tensor_core",
            block_rows,
            128 // p.parts,
            TILED_TILE,
            1,
            num_warps=8 // p.parts,
            scales_weights=scales_weights,
        )
    config = dataclasses.replace(config, num_stages=_stages(p, config, gpu))
    return dataclasses.replace(config, splits=_splits(p, config, gpu))


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


def _stages(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Tiles in flight: as many as `MAX_STAGES`, and as leave shared memory for a second program."""
    room = min(gpu.shared_bytes // 2, gpu.program_shared_bytes) * 3 // 4
    return min(max(room // tile_bytes(problem, config), 2), MAX_STAGES)


def tile_bytes(problem: Problem, config: Config) -> int:
    """Shared memory that a tile of the tensor-core form takes on its way: codes, and the rows of x that they meet."""
    p = problem
    x = config.block_rows * jnp.dtype(gpu_matrix.operand(p) if p.x_dtype != "float32" else "float32").itemsize
    codes = config.block_out * p.parts // (2 if p.scheme.packed else 1)
    return config.tile * (x + codes)


def loaded_bytes(problem: Problem, config: Config) -> int:
    """Shared memory that what is loaded ahead takes, at least: a tile for each stage but the one at work."""
    return (config.num_stages - 1) * tile_bytes(problem, config)


def _splits(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Shares of `in`: the fewest that give every multiprocessor its programs, none of them empty.

    Every split writes and reads a float32 for each result; that is little beside the codes of its share.
    """
    p = problem
    if config.form == "vector":
        trips, row_blocks = gpu_vector.trips(p, config.block_out, config.num_warps), 1
    else:
        trips, row_blocks = pl.cdiv(p.in_features, config.tile), pl.cdiv(p.rows, config.block_rows)
    programs = row_blocks * pl.cdiv(p.result_features, config.block_out)
    wanted = PROGRAMS[config.form] * gpu.multiprocessors
    splits = min(max(wanted // programs, 1), trips)
    return pl.cdiv(trips, pl.cdiv(trips, splits))


def space(problem: Problem) -> Space:
    """Channels of a block and splits along `in`; its depth, how much is loaded ahead, and how a program is run."""
    start, most = heuristic(problem), gpu_to_plan_for().program_shared_bytes
    tiles = -(-problem.in_features // start.tile)
    axes: dict[str, Sequence[int]] = {
        "splits": [1 << n for n in range(7) if 1 << n <= tiles],
        "block_out": (16, 32, 64, 128, 256),
        "num_warps": (2, 4, 8, 16),
    }
    if start.form == "vector":  # which has tiles of its own, in registers
        return Space(start, axes)
    axes |= {"tile": (32, 64, 128, 256), "num_stages": (1, 2, 3, 4, 5)}
    return Space(start, axes, lambda config: loaded_bytes(problem, config) <= most)


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    p = problem
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
        x = x if p.quantize_x == "int8" else x.astype(jnp.float16)  # which has every float8
    stack = [None if array is None else _as_stack(array, layer) for array in (w.values, w.scales, w.zeros, w.minimums)]
    layer_index = jnp.zeros(1, jnp.int32) if layer is None else layer[None]
    fused = (x_scale, inputs.bias, inputs.norm, inputs.residual) if splits == 1 else ()
    refs = Refs(layer_index, x, *stack, *fused)
    out_blocks = pl.cdiv(p.result_features, config.block_out)
    options: dict[str, Any] = {"problem": p, "block_out": config.block_out, "splits": splits}
    options["num_warps"] = config.num_warps
    kernel: Callable[..., None] = gpu_vector.kernel
    row_blocks = 1
    if config.form == "tensor_core":
        kernel, row_blocks = gpu_matrix.kernel, pl.cdiv(p.rows, config.block_rows)
        options |= {name: getattr(config, name) for name in ("block_rows", "tile", "scales_weights")}
        options["out_blocks"] = out_blocks
    else:
        nvidia = gpu_rows.for_nvidia(interpret)
        options["nvidia"] = nvidia
        options["bytewise"] = (nvidia or bool(interpret)) and gpu_vector.in_bytes(p, config.num_warps)
    whole = jax.ShapeDtypeStruct((p.rows, p.result_features), p.out_dtype)
    sums = jax.ShapeDtypeStruct((splits, p.parts, p.rows, p.result_features), jnp.float32)
    out = pl.pallas_call(
        fresh_kernel(kernel, **options),
        grid=(row_blocks * out_blocks, splits),
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
    right = not config.scales_weights or gpu_matrix.can_scale_weights(p, config.tile)
    check(right, "config.scales_weights", True, f"False for {p}")


def _name(problem: Problem, config: Config) -> str:
    blocks = f"r{config.block_rows}_o{config.block_out}_t{config.tile}_s{config.splits}"
    return f"quantized_matmul_{config.form}_{problem.scheme}_{blocks}".replace("-", "_")
