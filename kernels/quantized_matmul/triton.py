"""quantized_matmul on a GPU: a few rows of activations times a wide weight of 8- or 4-bit codes.

    y = sum_g (x_g @ (code_g - zero_g)) * scale_g + sum(x_g) * minimum_g        result = finish(y + bias)

A program takes a block of rows, a block of output channels and one of several equal shares of `in` (split-K). It goes
along its share in tiles, and widens codes in registers on their way from memory to the tensor cores: [tile, block_out]
of 8-bit codes, or [tile / 2, block_out] bytes, whose low and high nibbles each meet their own columns of x. Codes of a
group lie below each other, so that a tile reads a scale once for each of its groups and channels.

Grid: (row blocks * out blocks, splits). One decode step has too few channels for all multiprocessors: the splits fill
them, and XLA adds their float32 sums, bias, activation and gate. A single share does all of it itself. A gated call has
two sums, gate and up, over two blocks of channels.

Resident in registers: the sums; x and codes pass through shared memory, `num_stages` tiles in flight. Rows are padded
to the 16 that tensor cores take, by masks, and so are channels and `in`. The layer of a stacked weight is an offset,
but where Pallas miscounts it (`offsets_wrap`): there the layer is copied first.

Bound by memory for few rows: each code is read once for 2 * rows FLOPs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.quantized_matmul.problem import Inputs, Problem
from palladion.reference.quantization import PACK_BLOCK

MIN_BLOCK: Final = 16
"""The smallest side of a matrix that tensor cores multiply."""

MAX_BLOCK_ROWS: Final = 64

MULTIPROCESSORS: Final = 132
"""Of an H100 or H200; other GPUs have about as many."""

MIN_TILES: Final = 4
"""Of a share of `in`: a shorter loop costs more to start and add up than it saves."""


def offsets_wrap(codes: int) -> bool:
    """Whether Pallas reaches some of that many one-byte codes by a wrong address.

    It counts in 32 bits up to 4 GiB, and Triton takes those as signed: from 2 GiB on they point before the array.
    """
    return 2**31 < codes <= 2**32


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_rows: rows of x in a program, a power of two of at least 16.
      block_out: output channels of a program, a power of two of at least 16.
      tile: weights along `in` of a trip, a power of two of at least 32.
      splits: shares that `in` is cut into.
      num_warps: warps of a program.
      num_stages: tiles that are loaded ahead.
    """

    block_rows: int
    block_out: int
    tile: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name, least in (("block_rows", MIN_BLOCK), ("block_out", MIN_BLOCK), ("tile", PACK_BLOCK)):
            value = getattr(self, name)
            power = value >= least and value & (value - 1) == 0
            check(power, f"config.{name}", value, f"a power of two of at least {least}")
        for name in ("splits", "num_stages"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")
        check(self.num_warps in (1, 2, 4, 8, 16), "config.num_warps", self.num_warps, "1, 2, 4, 8 or 16")


def heuristic(problem: Problem) -> Config:
    """Blocks that fit into registers, and splits that give every multiprocessor two programs."""
    p = problem
    block_rows = min(max(pl.next_power_of_2(p.rows), MIN_BLOCK), MAX_BLOCK_ROWS)
    # float32 is not multiplied by tensor cores: operands are held in registers, and large blocks would be spilled.
    block_out = (64 if p.dot_dtype != "float32" else 32) // p.parts
    tile = 64 if p.dot_dtype != "float32" or block_rows == MIN_BLOCK else 32
    programs = pl.cdiv(p.rows, block_rows) * pl.cdiv(p.result_features, block_out)
    splits = min(pl.cdiv(2 * MULTIPROCESSORS, programs), pl.cdiv(p.in_features, MIN_TILES * tile))
    return Config(block_rows, block_out, tile, splits)


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    p = problem
    if p.scheme.format not in ("int8", "int4"):
        return f"weights must be int8 or int4, got {p.scheme.format}"
    if p.quantize_x is not None:
        return f"activations are multiplied as they are, got quantize_x={p.quantize_x!r}"
    group = p.scheme.group_size
    if group is not None and (group % PACK_BLOCK or group & (group - 1)):
        return f"group_size must be a power of two of at least {PACK_BLOCK}, got {group}"
    if p.scale_dtype not in ("float32", "bfloat16", "float16"):
        return f"scales must be float32, bfloat16 or float16, got {p.scale_dtype}"
    if p.rows == 0:
        return "x must have rows, got none"
    codes = p.in_features * p.out_features // (2 if p.scheme.packed else 1)
    if offsets_wrap(codes):
        return f"codes of a matrix must take up to 2 GiB, or more than 4, got {codes} bytes"
    return None


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    p, splits = problem, config.splits
    w, layer = inputs.w, inputs.layer
    if layer is not None and offsets_wrap(w.values.size):
        index = layer
        w, layer = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, index, 0, keepdims=False), w), None
    stacked = [part if layer is not None else part[None] for part in jax.tree.leaves(w)]
    arrays = [jnp.zeros(1, jnp.int32) if layer is None else layer[None], inputs.x, *stacked]
    if inputs.bias is not None and splits == 1:
        arrays.append(inputs.bias)
    row_blocks, out_blocks = pl.cdiv(p.rows, config.block_rows), pl.cdiv(p.result_features, config.block_out)
    whole = jax.ShapeDtypeStruct((p.rows, p.result_features), p.out_dtype)
    sums = jax.ShapeDtypeStruct((splits, p.parts, p.rows, p.result_features), jnp.float32)
    out = pl.pallas_call(
        fresh_kernel(_kernel, problem=p, config=config, out_blocks=out_blocks),
        grid=(row_blocks * out_blocks, splits),
        out_shape=whole if splits == 1 else sums,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"quantized_matmul_{p.scheme}_r{config.block_rows}_o{config.block_out}_t{config.tile}_s{splits}".replace(
            "-", "_"
        ),
    )(*arrays)
    if splits == 1:
        return out
    products = [jnp.sum(out[:, part], axis=0) for part in range(p.parts)]
    if inputs.bias is not None:
        biases = jnp.split(inputs.bias.astype(jnp.float32)[None], p.parts, axis=1)
        products = [product + bias for product, bias in zip(products, biases, strict=True)]
    return p.finish(products).astype(p.out_dtype)


def _kernel(
    layer_ref: Any,  # [1]
    x_ref: Any,  # [rows, in]
    codes_ref: Any,  # [num_layers, in or in / 2, out]
    scales_ref: Any,  # [num_layers, groups, out]
    *refs: Any,  # zeros, minimums like scales, bias [out], as far as there are any; out [rows, result_features], or
    # [splits, parts, rows, result_features] where there are several splits
    problem: Problem,
    config: Config,
    out_blocks: int,
) -> None:
    p, scheme = problem, problem.scheme
    *factor_refs, out_ref = refs
    left = iter(factor_refs)
    zeros_ref = next(left) if scheme.offset == "zeros" else None
    minimums_ref = next(left) if scheme.offset == "minimums" else None
    bias_ref = next(left, None)
    block, split = pl.program_id(0), pl.program_id(1)
    row_block, out_block = jax.lax.div(block, jnp.int32(out_blocks)), jax.lax.rem(block, jnp.int32(out_blocks))
    layer = layer_ref[0]
    row = row_block * config.block_rows + jnp.arange(config.block_rows, dtype=jnp.int32)
    channel = out_block * config.block_out + jnp.arange(config.block_out, dtype=jnp.int32)
    real_row, real_channel = row < p.rows, channel < p.result_features

    per_byte = 2 if scheme.packed else 1
    stored_rows = config.tile // per_byte  # rows of codes in a tile
    group_rows = p.group_size // per_byte  # rows of codes in a group
    groups = max(1, stored_rows // group_rows) if scheme.group_size is not None else 1  # in a tile
    tiles = pl.cdiv(p.in_features, config.tile)
    share = pl.cdiv(tiles, config.splits)

    def factors(ref: Any, first_row: jax.Array, columns: jax.Array) -> jax.Array:
        """A factor of every code of a tile, float32: `[stored_rows, block_out]`, or `[1, block_out]` of one group."""
        group = jax.lax.div(first_row, jnp.int32(group_rows)) + jnp.arange(groups, dtype=jnp.int32)
        mask = (group < p.groups)[:, None] & real_channel[None, :]
        values = plgpu.load(ref.at[layer, group[:, None], columns[None, :]], mask=mask, other=0).astype(jnp.float32)
        if groups == 1:
            return values
        spread = jnp.broadcast_to(values[:, None], (groups, stored_rows // groups, config.block_out))
        return spread.reshape(stored_rows, config.block_out)

    def multiply(tile: jax.Array, part: int, total: jax.Array) -> jax.Array:
        columns = channel + part * p.result_features
        first_row = tile * stored_rows
        stored = first_row + jnp.arange(stored_rows, dtype=jnp.int32)
        real = stored < p.in_features // per_byte
        mask = real[:, None] & real_channel[None, :]
        codes = plgpu.load(codes_ref.at[layer, stored[:, None], columns[None, :]], mask=mask, other=0).astype(jnp.int32)
        zero = scheme.implied_zero if zeros_ref is None else factors(zeros_ref, first_row, columns)
        scale = None if scheme.group_size is None else factors(scales_ref, first_row, columns)
        minimum = None if minimums_ref is None else factors(minimums_ref, first_row, columns)
        halves = (codes & 0xF, codes >> 4) if scheme.packed else (codes,)
        for half, numbers in enumerate(halves):
            weights = numbers.astype(jnp.float32) - zero
            if scale is not None:
                weights = weights * scale
            elif minimum is not None:
                weights = weights * factors(scales_ref, first_row, columns)
            if minimum is not None:
                weights = weights + minimum
            # Row j of a packing block holds elements j and j + 16 of its 32.
            element = stored
            if scheme.packed:
                below = jax.lax.rem(stored, jnp.int32(PACK_BLOCK // 2))
                element = 2 * (stored - below) + below + half * (PACK_BLOCK // 2)
            x_mask = real_row[:, None] & real[None, :]
            x = plgpu.load(x_ref.at[row[:, None], element[None, :]], mask=x_mask, other=0).astype(p.dot_dtype)
            total = total + _dot(x, weights.astype(x.dtype))
        return total

    def trip(tile: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(multiply(tile, part, total) for part, total in enumerate(totals))

    nothing = jnp.zeros((config.block_rows, config.block_out), jnp.float32)
    begin = split * share
    end = jnp.minimum(begin + share, tiles)
    totals = jax.lax.fori_loop(begin, end, trip, (nothing,) * p.parts)

    products = []
    for part, total in enumerate(totals):
        columns = channel + part * p.result_features
        if scheme.group_size is None and minimums_ref is None:
            total = total * factors(scales_ref, jnp.int32(0), columns)
        if bias_ref is not None:
            bias = plgpu.load(bias_ref.at[columns], mask=real_channel, other=0)
            total = total + bias.astype(jnp.float32)[None, :]
        products.append(total)
    place = (row[:, None], channel[None, :])
    mask = real_row[:, None] & real_channel[None, :]
    if config.splits == 1:
        plgpu.store(out_ref.at[place], p.finish(products).astype(out_ref.dtype), mask=mask)
    else:
        for part, product in enumerate(products):
            plgpu.store(out_ref.at[split, part, *place], product, mask=mask)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
