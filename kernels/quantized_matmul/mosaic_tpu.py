"""quantized_matmul on a TPU: a few rows of activations times a wide weight of 8- or 4-bit codes.

    y = sum_g (x_g @ (code_g - zero_g)) * scale_g + sum(x_g) * minimum_g        result = finish(y + bias)

Grid: (row blocks, out blocks, in blocks). A step takes a block of output channels with all of `in`, as long as that is
no more than a transfer of a few MB; where it is more, several steps share the channels and add up. Inside, chunks of
`in` are widened one after the other and multiplied at once: wide weights exist in registers and in VMEM only.

Codes are not put in order, nor converted where the matrix unit takes their bits (`tpu_weights.py`). Instead the columns
of x are put in the order of the codes before the kernel, float32 is split into bfloat16 pieces, and sums of x meet what
was added to all codes of a group. How products are scaled is in `tpu_kernel.py`.

Resident in VMEM: x of the row block; two blocks each of codes, scales, zeros, minimums, of which the pipeline fills one
while the other is worked on. A gated call has all but x twice, gate and up, from the same arrays. The layer of stacked
weights is read before the grid starts, and the index maps take its blocks: no layer is copied.

Bound by memory up to about a hundred rows: each code is read once for 2 * rows FLOPs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel
from palladion.kernels.devices import target_chip
from palladion.kernels.quantized_matmul.problem import Inputs, Problem
from palladion.kernels.quantized_matmul.tpu_kernel import Plan, bits_dtype, kernel
from palladion.kernels.quantized_matmul.tpu_weights import SCALED, best, widenings
from palladion.kernels.tpu_layout import LANES, SUBLANES, minor_axes, round_up, tile_rows
from palladion.reference.quantization import PACK_BLOCK, quantize_rows

CODE_ROWS: Final = 32
"""Rows of a tile of 8-bit numbers: where a chunk of codes may begin."""

MAX_BLOCK_ROWS: Final = 256

MAX_BLOCK_OUT: Final = 4096

BLOCK_BYTES: Final = 2 * 2**20
"""Codes that a grid step reads: enough that the time to start a transfer (up to 1 µs) does not count."""

LANES_AT_A_TIME: Final = 512
"""Output channels that are multiplied at a time: their products stay in registers."""

LEAST_VMEM: Final = 16 * 2**20
"""Of a core of the smallest TPU: what an interpreted kernel keeps to."""

CHUNK: Final = 512
"""Weights along `in` that are multiplied at a time where no group says otherwise."""

SCALED_WEIGHTS: Final = 256 * 2**10
"""Weights that are scaled at a time: 1 MB of float32."""

LONGEST_FLOAT32_SUM: Final = 128
"""Products that are added up in one go where float32 is asked for: the rounding of longer sums would show."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, and the way to widen.

    Attributes:
      block_rows: rows of x in a grid step, a multiple of 8.
      block_out: output channels of a grid step, a multiple of 128; all of them where there are fewer.
      block_in: weights along `in` of a grid step; divides `in`.
      chunk: weights along `in` that are multiplied at a time; divides block_in.
      widening: name of the way to widen codes, one of `tpu_weights.widenings(scheme)`.
    """

    block_rows: int
    block_out: int
    block_in: int
    chunk: int
    widening: str

    def __post_init__(self) -> None:
        for name, multiple in (("block_rows", SUBLANES), ("block_out", LANES)):
            value = getattr(self, name)
            check(value >= 1 and value % multiple == 0, f"config.{name}", value, f"a multiple of {multiple}")
        check(self.chunk >= 1, "config.chunk", self.chunk, "at least 1")
        whole = self.block_in >= 1 and self.block_in % self.chunk == 0
        check(whole, "config.block_in", self.block_in, f"a multiple of chunk, {self.chunk}")


def heuristic(problem: Problem) -> Config:
    """Transfers that are large enough for the memory, in chunks that suit the matrix unit of the chip traced for."""
    p = problem
    chip = target_chip()
    widening = SCALED if _scale_weights(p) else best(p, chip)
    depth = 256 if chip is None or chip.name in ("v6e", "v7x") else 128
    block_rows = min(round_up(p.rows, SUBLANES), MAX_BLOCK_ROWS)
    chunk = _chunk(p, widening, depth)
    block_in = _block_in(p, chunk)
    stored = block_in // _codes_per_byte(p) * p.parts  # bytes of a channel
    channels = p.result_features
    most = min(max(LANES, BLOCK_BYTES // stored // LANES * LANES), MAX_BLOCK_OUT)
    block_out = round_up(pl.cdiv(channels, pl.cdiv(channels, most)), LANES)
    if p.gated:
        # The up's blocks begin where the gate's end.
        block_out = next((size for size in range(block_out, 0, -LANES) if channels % size == 0), LANES)
    config = Config(block_rows, block_out, block_in, chunk, widening)
    while config.block_rows > SUBLANES and _vmem_bytes(_plan(p, config)) > _vmem_limit():
        config = dataclasses.replace(config, block_rows=round_up(config.block_rows // 2, SUBLANES))
    return config


def _scale_weights(problem: Problem) -> bool:
    """Whether scaling the weights costs the vector unit less than scaling the products of many rows."""
    group = problem.scheme.group_size
    return group is not None and group % PACK_BLOCK == 0 and problem.rows > group


def _codes_per_byte(problem: Problem) -> int:
    return 2 if problem.scheme.packed else 1


def _chunks(problem: Problem) -> list[int]:
    """Sizes along `in` that divide it, its groups and its tiles of codes."""
    n, group = problem.in_features, problem.scheme.group_size or 1
    step = CODE_ROWS * _codes_per_byte(problem)
    return [*(size for size in range(step, n, step) if n % size == 0 and size % group == 0), n]


def _chunk(problem: Problem, widening: str, depth: int) -> int:
    """What is multiplied at a time: all that a group has, or several groups where the matrix unit is deeper."""
    p = problem
    if widening == SCALED or p.scheme.group_size is None:
        longest = LONGEST_FLOAT32_SUM if p.out_dtype == "float32" and p.x_dtype == "float32" else CHUNK
    else:
        longest = max(depth, p.scheme.group_size)
    return max((size for size in _chunks(p) if size <= longest), default=min(_chunks(p)))


def _block_in(problem: Problem, chunk: int) -> int:
    """All of `in`, or the largest share of it of which a few hundred channels are no more than two transfers."""
    p = problem
    group = p.scheme.group_size

    def possible(size: int) -> bool:
        rows = size // _codes_per_byte(p)
        groups = 0 if group is None else size // group
        return rows % CODE_ROWS == 0 and groups % tile_rows(bits_dtype(p.scale_dtype)) == 0

    shares = (n for n in range(1, p.in_features // chunk + 1) if p.in_features // chunk % n == 0)
    sizes = [p.in_features // n for n in shares if n == 1 or possible(p.in_features // n)]
    least_channels = min(4 * LANES, round_up(p.result_features, LANES)) * p.parts
    small = (size for size in sizes if size // _codes_per_byte(p) * least_channels <= 2 * BLOCK_BYTES)
    return max(small, default=min(sizes))


def _vmem_limit() -> int:
    """What the blocks of a step may take: three quarters of what a core has."""
    chip = target_chip()
    return (LEAST_VMEM if chip is None else chip.vmem_bytes) * 3 // 4


def _vmem_bytes(plan: Plan) -> int:
    """What the blocks of a grid step and what is made of them take in VMEM."""
    p = plan.problem
    factors = round_up(plan.groups, SUBLANES) * 4 * (1 if p.scheme.offset == "none" else 2)
    weights = 2 * p.parts * plan.block_out * (plan.block_in // _codes_per_byte(p) + factors)
    x = 2 * p.in_features * plan.stacked_rows * jnp.dtype(plan.x_operand).itemsize
    if plan.needs_sums:
        columns = plan.groups // plan.together
        x += 2 * plan.sum_blocks * plan.together * plan.block_rows * round_up(columns, LANES) * 4
    products = plan.masked * plan.stacked_rows * plan.block_out * 4
    totals = (2 * p.parts + 2) * plan.block_rows * plan.block_out * 4
    operands = 2 * plan.chunk * plan.block_out * jnp.dtype(plan.widen.operand).itemsize
    return weights + x + products + totals + operands


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    p = problem
    if p.rows == 0:
        return "x must have rows, got none"
    needed, limit = _vmem_bytes(_plan(p, heuristic(p))), _vmem_limit()
    if needed > limit:
        return f"blocks must fit into {limit >> 20} MiB, with in = {p.in_features} they take {needed >> 20}"
    return None


def _plan(problem: Problem, config: Config) -> Plan:
    return Plan(
        problem=problem,
        widening=config.widening,
        block_rows=config.block_rows,
        block_out=min(config.block_out, problem.result_features),
        block_in=config.block_in,
        chunk=config.chunk,
        lanes=LANES_AT_A_TIME,
    )


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    p = problem
    if p.gated and p.result_features % LANES:
        # The up begins within a tile: the product as a whole, and the gate after it.
        product = dataclasses.replace(p, gated=False, activation=None, out_dtype="float32")
        y = quantized_matmul(product, inputs, config=config, interpret=interpret)
        return p.finish(jnp.split(y, 2, axis=1)).astype(p.out_dtype)
    config = config or heuristic(p)
    _check(p, config)
    plan = _plan(p, config)
    row_blocks = pl.cdiv(p.rows, plan.block_rows)
    out_blocks = pl.cdiv(p.result_features, plan.block_out)
    x = jnp.pad(inputs.x, ((0, row_blocks * plan.block_rows - p.rows), (0, 0)))
    arrays, specs = [], []

    def take(array: jax.Array, block: tuple[int, ...], index: Any) -> None:
        arrays.append(array)
        specs.append(pl.BlockSpec(block, index))

    for array in _by_rows(plan, x.reshape(row_blocks, plan.block_rows, p.in_features)):
        take(array, (1, *array.shape[1:]), lambda i, *_, n=array.ndim: (i, *[0] * (n - 1)))
    if plan.together > 1:
        masks = jnp.asarray(plan.masks())
        arrays.insert(1, masks)
        specs.insert(1, pl.BlockSpec(masks.shape, lambda *_: (0, 0, 0)))
    by_channels = _by_channels(p, inputs)
    for part in range(p.parts):
        for array, stacked in by_channels:
            along_in = array.shape[1] > 1 and plan.in_blocks > 1

            def index(
                _: Any,
                j: Any,
                k: Any,
                layer: Any,
                *,
                part: int = part,
                stacked: bool = stacked,
                along_in: bool = along_in,
            ) -> Any:
                return layer[0] if stacked else 0, k if along_in else 0, j + part * out_blocks

            take(array, (1, array.shape[1] // (plan.in_blocks if along_in else 1), plan.block_out), index)
    totals = p.parts if plan.in_blocks > 1 else 0
    out = pl.pallas_call(
        fresh_kernel(kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(row_blocks, out_blocks, plan.in_blocks),
            in_specs=specs,
            out_specs=pl.BlockSpec((plan.block_rows, plan.block_out), lambda i, j, *_: (i, j)),
            scratch_shapes=[pltpu.VMEM((plan.block_rows, plan.block_out), plan.total_dtype)] * totals,
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], p.result_features), _storable(p.out_dtype)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_vmem_limit() // 6 * 7
        ),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"quantized_matmul_{p.scheme}_{plan.widening}".replace("-", "_"),
    )(jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None], *arrays)
    return out[: p.rows].astype(p.out_dtype)


def _storable(dtype: str) -> str:
    """In what the kernel writes a result of a dtype: Mosaic has no float16."""
    return "float32" if dtype == "float16" else dtype


def _check(problem: Problem, config: Config) -> None:
    """Raises ValueError where a config does not go with a problem."""
    p = problem
    known = tuple(widenings(p.scheme))
    check(config.widening in known, "config.widening", config.widening, f"one of {', '.join(known)}")
    check(config.chunk in _chunks(p), "config.chunk", config.chunk, f"one of {_chunks(p)}")
    check(p.in_features % config.block_in == 0, "config.block_in", config.block_in, f"a divisor of {p.in_features}")
    whole = not p.gated or p.result_features % config.block_out == 0
    check(whole, "config.block_out", config.block_out, f"a divisor of the gate's {p.result_features} channels")


def _by_rows(plan: Plan, x: jax.Array) -> list[jax.Array]:
    """What the kernel takes of x `[row_blocks, block_rows, in]`: operands, sums, scales, as far as there are any."""
    p = plan.problem
    row_blocks, block_rows, _ = x.shape
    scales = []
    if p.quantize_x is not None:
        x, scale = quantize_rows(x, p.quantize_x)
        scales = [scale[:, :, None]]
    wide = x.astype(jnp.float32)
    sums = []
    if plan.needs_sums:
        size = p.in_features // (plan.sum_blocks * plan.groups)
        by_group = jnp.sum(wide.reshape(*x.shape[:2], -1, size), axis=3)  # [row_blocks, block_rows, groups]
        apart = by_group.reshape(*x.shape[:2], plan.sum_blocks, -1, plan.together)
        by_block = apart.transpose(0, 2, 4, 1, 3)  # [row_blocks, in_blocks, together, block_rows, chunks]
        sums = [by_block.reshape(row_blocks, plan.sum_blocks, plan.together * block_rows, -1)]
    pieces = _split(wide, plan.pieces) if plan.pieces > 1 else [x]
    operands = jnp.stack([piece.astype(plan.x_operand) for piece in pieces] * plan.slots, axis=1)
    stacked = plan.widen.arrange(operands, plan.chunk).reshape(row_blocks, -1, plan.in_blocks, plan.block_in)
    stacked = jnp.pad(stacked, ((0, 0), (0, plan.stacked_rows - stacked.shape[1]), (0, 0), (0, 0)))
    return [stacked.transpose(0, 2, 1, 3), *sums, *scales]


def _split(x: jax.Array, pieces: int) -> list[jax.Array]:
    """float32 as a sum of numbers that bfloat16 has, 8 bits in each."""
    found = []
    for _ in range(pieces):
        # By its bits: XLA may take a conversion to bfloat16 and back for no change at all.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(2**16)
        found.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        x = x - found[-1]
    return found


def _by_channels(problem: Problem, inputs: Inputs) -> list[tuple[jax.Array, bool]]:
    """What the kernel takes of the weight, and the bias, `[layers, rows, out]`; and whether a layer is to be taken."""
    w, layer = inputs.w, inputs.layer
    arrays = []
    for part in (w.values, w.scales, w.zeros, w.minimums):
        if part is None:
            continue
        dtype = bits_dtype(part.dtype.name)
        bits = part if part.dtype == dtype else jax.lax.bitcast_convert_type(part, jnp.dtype(dtype))
        if layer is None:
            arrays.append((bits[None], False))
        elif minor_axes(bits.shape, bits.dtype)[0] == 0:
            # XLA keeps layers below each other, where no block is that of a layer.
            arrays.append((jax.lax.dynamic_index_in_dim(bits, layer, 0), False))
        else:
            arrays.append((bits, True))
    if problem.has_bias and inputs.bias is not None:
        arrays.append((inputs.bias.astype(jnp.float32)[None, None], False))
    return arrays
