"""quantized_matmul on a TPU: a few rows of activations times a wide weight of 8- or 4-bit codes.

    y = sum_g (x_g @ (code_g - zero_g)) * scale_g + sum(x_g) * minimum_g        result = finish(y + bias)

Grid: (row blocks, out blocks). A step takes all of `in` for a block of output channels: nothing is carried from step to
step, and a weight block is one long transfer. Inside, chunks of `in` are widened one after the other, as much as fits
beside the blocks, and multiplied at once: the wide weights exist in VMEM only.

Two codes share a byte: the low nibbles are elements 0 to 15 and the high ones elements 16 to 31 of each 32. Instead of
interleaving weights the kernel takes two halves of x, whose columns were put in that order outside, and adds two
products.

Resident in VMEM: x of the row block; two blocks each of codes, scales, zeros, minimums, of which the pipeline fills one
while the other is worked on; a widened chunk. A gated call has all but x twice, gate and up, from the same arrays. The
layer of stacked weights is read before the grid starts, and the index maps take its blocks: no layer is copied.

Bound by memory up to about a hundred rows: each code is read once for 2 * rows FLOPs; with few rows by the widening,
where codes are narrow and the memory is fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.quantized_matmul.problem import Inputs, Problem
from palladion.reference.quantization import PACK_BLOCK

LANES: Final = 128
CODE_ROWS: Final = 32
"""Rows of a tile of 8-bit numbers: where a chunk of codes may begin."""

ROW_MULTIPLE: Final = 16
"""Rows of a tile of 16-bit numbers, and two tiles of 32-bit ones."""

MAX_BLOCK_ROWS: Final = 256

WEIGHT_BLOCK_BYTES: Final = 2 * 2**20
"""Codes that a grid step reads: enough that the time to start a transfer (up to 1 µs) does not count."""

CHUNK_WEIGHTS: Final = 256 * 2**10
"""Weights that are widened at a time: 1 MB of float32."""

LONGEST_FLOAT32_SUM: Final = 128
"""Products that are added up in one go where float32 is asked for: the rounding of longer sums would show."""

VMEM_BYTES: Final = 12 * 2**20
"""What all blocks of a step may take: three quarters of what the smallest TPU has (v4, 16 MB)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_rows: rows of x in a grid step, a multiple of 16.
      block_out: output channels of a grid step, a multiple of 128; all of them where there are fewer.
      chunk: weights along `in` that are widened at a time; divides `in`.
    """

    block_rows: int
    block_out: int
    chunk: int

    def __post_init__(self) -> None:
        multiple = self.block_rows >= 1 and self.block_rows % ROW_MULTIPLE == 0
        check(multiple, "config.block_rows", self.block_rows, f"a multiple of {ROW_MULTIPLE}")
        lanes = self.block_out >= 1 and self.block_out % LANES == 0
        check(lanes, "config.block_out", self.block_out, f"a multiple of {LANES}")
        check(self.chunk >= 1, "config.chunk", self.chunk, "at least 1")


def heuristic(problem: Problem) -> Config:
    """Weight blocks that are large enough for the memory, in chunks that leave room beside them."""
    p = problem
    stored = p.in_features // (2 if p.scheme.packed else 1)
    most = min(WEIGHT_BLOCK_BYTES // p.parts // stored, CHUNK_WEIGHTS // min(_chunks(p)))
    most = max(LANES, most // LANES * LANES)
    channels = p.result_features
    block_out = min(most, pl.cdiv(channels, LANES) * LANES)
    if p.gated:
        # The up's blocks begin where the gate's end.
        block_out = next(size for size in range(block_out, 0, -LANES) if channels % size == 0)
    longest = LONGEST_FLOAT32_SUM if p.dot_dtype == "float32" else p.in_features
    chunks = [size for size in _chunks(p) if size * block_out <= CHUNK_WEIGHTS and size <= longest]
    chunk = max(chunks, default=min(_chunks(p)))
    block_rows = min(pl.cdiv(p.rows, ROW_MULTIPLE) * ROW_MULTIPLE, MAX_BLOCK_ROWS)
    while block_rows > ROW_MULTIPLE and _block_bytes(p, Config(block_rows, block_out, chunk)) > VMEM_BYTES:
        block_rows = pl.cdiv(block_rows // 2, ROW_MULTIPLE) * ROW_MULTIPLE
    return Config(block_rows, block_out, chunk)


def _chunks(problem: Problem) -> list[int]:
    """Sizes along `in` that divide it, its groups and its tiles of codes."""
    n, group = problem.in_features, problem.scheme.group_size or 1
    step = CODE_ROWS * (2 if problem.scheme.packed else 1)
    sizes = [size for size in range(step, n, step) if n % size == 0 and size % group == 0]
    return [*sizes, n]


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    p = problem
    if p.scheme.format not in ("int8", "int4"):
        return f"weights must be int8 or int4, got {p.scheme.format}"
    if p.quantize_x is not None:
        return f"activations are multiplied as they are, got quantize_x={p.quantize_x!r}"
    for name, dtype in (("x", p.x_dtype), ("the result", p.out_dtype)):
        if dtype not in ("float32", "bfloat16"):
            return f"{name} must be float32 or bfloat16, got {dtype}"
    if p.scale_dtype not in ("float32", "bfloat16"):
        return f"scales must be float32 or bfloat16, got {p.scale_dtype}: w.with_scale_dtype('float32')"
    if p.scheme.group_size is not None and p.scheme.group_size % PACK_BLOCK:
        return f"group_size must be a multiple of {PACK_BLOCK}, got {p.scheme.group_size}"
    if p.rows == 0:
        return "x must have rows, got none"
    if p.gated and p.result_features % LANES:
        return f"gated: half of out must be a multiple of {LANES}, got {p.result_features}"
    needed = _block_bytes(p, heuristic(p))
    if needed > VMEM_BYTES:
        return f"blocks must fit into {VMEM_BYTES >> 20} MiB, with in = {p.in_features} they take {needed >> 20}"
    return None


def _block_bytes(problem: Problem, config: Config) -> int:
    """What the blocks of a grid step and a widened chunk take in VMEM."""
    p = problem
    codes = p.in_features // (2 if p.scheme.packed else 1)
    factors = p.groups * 4 * (2 if p.scheme.offset == "minimums" else 1)
    weights = 2 * p.parts * config.block_out * (codes + factors)
    rows = config.block_rows * (
        2 * p.in_features * jnp.dtype(p.x_dtype).itemsize + (p.parts + 2) * 4 * config.block_out
    )
    return weights + rows + 2 * 4 * config.chunk * config.block_out


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    config = config or heuristic(problem)
    p = problem
    check(config.chunk in _chunks(p), "config.chunk", config.chunk, f"one of {_chunks(p)}")
    whole = not p.gated or p.result_features % config.block_out == 0
    check(whole, "config.block_out", config.block_out, f"a divisor of the gate's {p.result_features} channels")
    block_out = min(config.block_out, p.result_features)
    row_blocks, out_blocks = pl.cdiv(p.rows, config.block_rows), pl.cdiv(p.result_features, block_out)
    rows = row_blocks * config.block_rows

    x = jnp.pad(inputs.x, ((0, rows - p.rows), (0, 0)))
    by_rows = [*_halves(x)] if p.scheme.packed else [x]
    if p.scheme.offset == "minimums":
        by_rows.append(jnp.sum(x.reshape(rows, p.groups, -1).astype(jnp.float32), axis=2))  # [rows, groups]
    w, layer = inputs.w, inputs.layer
    by_channels = [part for part in (w.values, w.scales, w.zeros, w.minimums) if part is not None]
    by_channels = [part[None] if layer is None else part for part in by_channels]
    if inputs.bias is not None:
        by_channels.append(inputs.bias.astype(jnp.float32)[None, None])

    def rows_of(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((config.block_rows, array.shape[1]), lambda i, *_: (i, 0))

    def channels_of(array: jax.Array, part: int) -> pl.BlockSpec:
        # The bias is that of this call, whatever layer the weight is of.
        stacked = array.shape[0] > 1
        return pl.BlockSpec(
            (1, array.shape[1], block_out),
            lambda _, j, layer: (layer[0] if stacked else 0, 0, j + part * out_blocks),
        )

    arrays, specs = [*by_rows], [rows_of(array) for array in by_rows]
    for part in range(p.parts):
        arrays += by_channels
        specs += [channels_of(array, part) for array in by_channels]
    out = pl.pallas_call(
        fresh_kernel(_kernel, problem=p, chunk=config.chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(row_blocks, out_blocks),
            in_specs=specs,
            out_specs=pl.BlockSpec((config.block_rows, block_out), lambda i, j, _: (i, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, p.result_features), p.out_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"quantized_matmul_{p.scheme}_r{config.block_rows}_o{block_out}_c{config.chunk}".replace("-", "_"),
    )(jnp.zeros(1, jnp.int32) if layer is None else layer[None], *arrays)
    return out[: p.rows]


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns of x `[rows, in]` that meet low nibbles, and those that meet high ones: `[rows, in / 2]` each."""
    blocks = x.reshape(x.shape[0], -1, 2, PACK_BLOCK // 2)
    return blocks[:, :, 0].reshape(x.shape[0], -1), blocks[:, :, 1].reshape(x.shape[0], -1)


def _kernel(
    layer_ref: Any,  # [1] in SMEM
    # by rows: x [block_rows, in], or its two halves, and sums [block_rows, groups] where there are minimums;
    # by channels, once for each part: codes [1, in or in / 2, block_out], scales, zeros and minimums
    # [1, groups, block_out] and bias [1, 1, block_out], as far as there are any; out [block_rows, block_out]
    *refs: Any,
    problem: Problem,
    chunk: int,
) -> None:
    del layer_ref  # for the index maps
    p, scheme = problem, problem.scheme
    left = iter(refs)
    xs = [next(left) for _ in range(2 if scheme.packed else 1)]
    sums_ref = next(left) if scheme.offset == "minimums" else None

    def product() -> jax.Array:
        """x times the next part's weights, bias added: `[block_rows, block_out]` float32."""
        codes_ref, scales_ref = next(left), next(left)
        zeros_ref = next(left) if scheme.offset == "zeros" else None
        y = jnp.zeros((xs[0].shape[0], codes_ref.shape[2]), jnp.float32)
        for start in range(0, p.in_features, chunk):
            group = slice(start // p.group_size, pl.cdiv(start + chunk, p.group_size))
            for half, codes in enumerate(_codes(codes_ref, start, chunk, scheme.packed)):
                zero = scheme.implied_zero
                if zeros_ref is not None:
                    zero = zeros_ref[0, group].astype(jnp.int32).astype(jnp.float32)
                scale = None if scheme.group_size is None else scales_ref[0, group].astype(jnp.float32)
                first = start // len(xs)
                x = xs[half][:, first : first + chunk // len(xs)].astype(p.dot_dtype)
                y += _dot(x, _weights(codes, zero, scale).astype(x.dtype))
        if scheme.group_size is None:
            y = y * scales_ref[0].astype(jnp.float32)
        if sums_ref is not None:
            y += _dot(sums_ref[...], next(left)[0].astype(jnp.float32))
        return y + next(left)[0] if p.has_bias else y

    parts = [product() for _ in range(p.parts)]
    out_ref = next(left)
    out_ref[...] = p.finish(parts).astype(out_ref.dtype)


def _codes(codes_ref: Any, start: int, chunk: int, packed: bool) -> Iterator[jax.Array]:
    """Codes `start` to `start + chunk` along `in`: int32 `[chunk, out]`, or low and high nibbles `[chunk / 2, out]`."""
    if not packed:
        yield codes_ref[0, start : start + chunk].astype(jnp.int32)
        return
    stored = codes_ref[0, start // 2 : (start + chunk) // 2].astype(jnp.int32)
    yield stored & 0xF
    yield stored >> 4


def _weights(codes: jax.Array, zero: Any, scale: jax.Array | None) -> jax.Array:
    """scale * (code - zero) in float32; zero is a number or, as scale, `[groups, out]` or `[1, out]`."""
    if isinstance(zero, int):
        weights = (codes - zero if zero else codes).astype(jnp.float32)
    else:
        weights = codes.astype(jnp.float32)
    factors = [factor for factor in (zero, scale) if isinstance(factor, jax.Array)]
    if not factors:
        return weights
    groups = factors[0].shape[0]
    weights = weights.reshape(groups, -1, codes.shape[1])  # [groups, group, out]
    if not isinstance(zero, int):
        weights = weights - zero[:, None]
    if scale is not None:
        weights = weights * scale[:, None]
    return weights.reshape(codes.shape)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
