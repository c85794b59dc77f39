"""quantized_matmul on a TPU: a few rows of activations times a wide weight of 8- or 4-bit codes.

    y = sum_g (x_g @ (code_g - zero_g)) * scale_g + sum(x_g) * minimum_g        result = finish(y + bias)

Grid: (cores, row blocks, out blocks of a core, in blocks). A step takes a block of output channels with all of `in`, as
long as that is no more than a transfer of a few MB; where it is more, several steps share the channels and add up.
Inside, chunks of `in` are widened one after the other and multiplied at once: wide weights exist in registers and in
VMEM only.

Codes are not put in order, nor converted where the matrix unit takes their bits (`widening.py`). Instead the columns
of x are put in the order of the codes before the kernel, float32 is split into bfloat16 pieces, and sums of x meet what
was added to all codes of a group. How products are scaled is in `kernel.py`.

Resident in VMEM: x of the row block; three blocks each of codes, scales, zeros, minimums, of which one is worked on
while the others are on their way (`stream.py`). A gated call has all but x twice, gate and up, from the same
arrays. Of stacked weights the blocks of one layer are taken: no layer is copied.

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
from palladion.kernels.devices import Chip, target_chip
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.mosaic_tpu.kernel import bits_dtype, kernel
from palladion.kernels.quantized_matmul.mosaic_tpu.plan import Plan
from palladion.kernels.quantized_matmul.mosaic_tpu.widening import NEWER, best, is_narrow, widenings
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.tpu_layout import LANES, SUBLANES, minor_axes, round_up, tile_rows
from palladion.kernels.tuning import Space
from palladion.reference.quantization import PACK_BLOCK, quantize_rows

CODE_ROWS: Final = 32
"""Rows of a tile of 8-bit numbers: where a chunk of codes may begin."""

MAX_BLOCK_ROWS: Final = 256

MAX_BLOCK_OUT: Final = 4096

STARTS_IN_A_BLOCK: Final = 2.5
"""A block of the weight takes as long to arrive as so many starts: what a step costs however small it is."""

CYCLES_TO_START: Final = 400
"""Of a grid step, besides the latency of a transfer: its scalar code, and the way through the matrix unit."""

LEAST_BLOCKS: Final = 6
"""Of a core: nothing is computed while the first one arrives, and nothing arrives while the last one is computed."""

BLOCK_BYTES: Final = 2 * 2**20
"""A block of the weight for a chip that is not known."""

LANES_AT_A_TIME: Final = 512
"""Output channels that are multiplied at a time: their products stay in registers."""

BUFFERS: Final = 3
"""Blocks of the weight in VMEM: one that is worked on, the others on their way."""

MANY_STACKED_ROWS: Final = 128
"""Rows of x, copies for groups that share the matrix unit among them, from which on weights are scaled in less time."""

LEAST_VMEM: Final = 16 * 2**20
"""Of a core of the smallest TPU: what an interpreted kernel keeps to."""

CHUNK: Final = 512
"""Weights along `in` that are multiplied at a time where no group says otherwise."""

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
      scales_weights: whether scales are applied to weights, and not to products; where groups have scales of their own.
    """

    block_rows: int
    block_out: int
    block_in: int
    chunk: int
    widening: str
    scales_weights: bool = False

    def __post_init__(self) -> None:
        for name, multiple in (("block_rows", SUBLANES), ("block_out", LANES)):
            value = getattr(self, name)
            check(value >= 1 and value % multiple == 0, f"config.{name}", value, f"a multiple of {multiple}")
        check(self.chunk >= 1, "config.chunk", self.chunk, "at least 1")
        whole = self.block_in >= 1 and self.block_in % self.chunk == 0
        check(whole, "config.block_in", self.block_in, f"a multiple of chunk, {self.chunk}")


def heuristic(problem: Problem) -> Config:
    """Blocks that are large enough for the memory, in chunks that suit the matrix unit of the chip traced for."""
    p = multiplied(problem)
    chip = target_chip()
    depth = 256 if chip is None or chip.name in NEWER else 128
    scales_weights = _scale_weights(p, depth)
    widening = best(p, chip, scales_weights)
    block_rows = min(round_up(p.rows, SUBLANES), MAX_BLOCK_ROWS)
    chunk = _chunk(p, scales_weights, depth)
    block_bytes = _block_bytes(p, chip)
    block_in = _block_in(p, chunk, block_bytes)
    stored = block_in // _codes_per_byte(p) * p.parts  # bytes of a channel
    most = min(max(LANES, block_bytes // stored // LANES * LANES), MAX_BLOCK_OUT)
    config = Config(block_rows, _block_out(p, most), block_in, chunk, widening, scales_weights)
    while _vmem_bytes(_plan(p, config)) > _vmem_limit():
        if config.block_out > 2 * LANES:
            config = dataclasses.replace(config, block_out=_block_out(p, config.block_out - LANES))
        elif config.block_rows > SUBLANES:
            config = dataclasses.replace(config, block_rows=round_up(config.block_rows // 2, SUBLANES))
        else:
            break
    return config


def multiplied(problem: Problem) -> Problem:
    """Returns the product that the kernel computes for a problem.

    That is the problem itself, but where it is gated and its up begins within a tile: there the product as a whole in
    float32, which XLA gates afterwards.
    """
    if not problem.gated or problem.result_features % LANES == 0:
        return problem
    return dataclasses.replace(problem, gated=False, activation=None, out_dtype="float32")


def _scale_weights(problem: Problem, depth: int) -> bool:
    """Whether scaling the weights takes less time than scaling products, for which rows are copied for every group."""
    group = problem.scheme.group_size
    if group is None or group % PACK_BLOCK:
        return False
    if not is_narrow(problem) or "bfloat16" not in widenings(problem.scheme):
        return problem.rows > group  # weights in float32 are multiplied in six passes
    return problem.rows * max(1, depth // group) >= MANY_STACKED_ROWS


def _block_bytes(problem: Problem, chip: Chip | None) -> int:
    """Codes of a block."""
    if chip is None:
        return BLOCK_BYTES
    start = chip.dma_latency_seconds + CYCLES_TO_START / chip.clock_hertz
    rate = chip.hbm_bytes_per_second / chip.cores
    codes = problem.in_features * problem.out_features // _codes_per_byte(problem)
    smallest, largest = int(start * rate / 2), int(STARTS_IN_A_BLOCK * start * rate)
    return min(max(codes // chip.cores // LEAST_BLOCKS, smallest), largest)


def _block_out(problem: Problem, most: int) -> int:
    """Channels of a block, about as many: all of them, or a multiple of 128."""
    channels = problem.result_features
    if channels % LANES and channels <= 2 * most:
        return round_up(channels, LANES)  # otherwise the last few channels take a call of their own
    if problem.gated:
        # The up's blocks begin where the gate's end.
        sizes = range(most * 4 // 3 // LANES * LANES, 0, -LANES)
        return next((size for size in sizes if channels % size == 0), LANES)
    return round_up(pl.cdiv(channels, pl.cdiv(channels, most)), LANES)


def _codes_per_byte(problem: Problem) -> int:
    return 2 if problem.scheme.packed else 1


def _chunks(problem: Problem) -> list[int]:
    """Sizes along `in` that divide it, its groups and its tiles of codes."""
    n, group = problem.in_features, problem.scheme.group_size or 1
    step = CODE_ROWS * _codes_per_byte(problem)
    return [*(size for size in range(step, n, step) if n % size == 0 and size % group == 0), n]


def _chunk(problem: Problem, scales_weights: bool, depth: int) -> int:
    """What is multiplied at a time: all that a group has, or several groups where the matrix unit is deeper."""
    p = problem
    if scales_weights or p.scheme.group_size is None:
        longest = LONGEST_FLOAT32_SUM if p.out_dtype == "float32" and p.x_dtype == "float32" else CHUNK
    else:
        longest = max(depth, p.scheme.group_size)
    return max((size for size in _chunks(p) if size <= longest), default=min(_chunks(p)))


def _block_in(problem: Problem, chunk: int, block_bytes: int) -> int:
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
    small = (size for size in sizes if size // _codes_per_byte(p) * least_channels <= 2 * block_bytes)
    return max(small, default=min(sizes))


def _vmem_limit() -> int:
    """What the blocks of a step may take: three quarters of what a core has."""
    chip = target_chip()
    return (LEAST_VMEM if chip is None else chip.vmem_bytes) * 3 // 4


def _vmem_bytes(plan: Plan) -> int:
    """What the blocks of a grid step and what is made of them take in VMEM."""
    p = plan.problem
    lanes = min(plan.lanes, plan.block_out)
    factors = round_up(plan.groups, SUBLANES) * 4 * (1 if p.scheme.offset == "none" else 2)
    weights = plan.buffers * p.parts * plan.block_out * (plan.block_in // _codes_per_byte(p) + factors)
    x = p.in_features * plan.stacked_rows * jnp.dtype(plan.x_operand).itemsize
    if plan.needs_sums:
        x += plan.sum_blocks * plan.block_rows * round_up(plan.groups, LANES) * 4
    results = (2 + (p.parts if plan.in_blocks > 1 else 0)) * plan.block_rows * plan.block_out * 4
    products = (plan.masked * plan.stacked_rows + (p.parts + 1) * plan.block_rows) * lanes * 4
    operands = 2 * plan.chunk * lanes * jnp.dtype(plan.widen.operand).itemsize
    return weights + x + results + 2 * (products + operands + factors * lanes)


def space(problem: Problem) -> Space:
    """Channels and depth of a block."""
    p, start = multiplied(problem), heuristic(problem)
    channels = p.result_features
    widths = [LANES * n for n in (1, 2, 4, 6, 8, 12, 16, 24, 32) if LANES * n <= channels]
    depths = [p.in_features // n for n in (1, 2, 4, 8) if p.in_features % (n * start.chunk) == 0]
    return Space(start, {"block_out": widths, "block_in": depths}, lambda config: fits(p, config))


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
    p = multiplied(problem)
    needed, limit = _vmem_bytes(_plan(p, heuristic(p))), _vmem_limit()
    if needed > limit:
        return f"blocks must fit into {limit >> 20} MiB, with in = {p.in_features} they take {needed >> 20}"
    return None


def _plan(problem: Problem, config: Config) -> Plan:
    chip = target_chip()
    return Plan(
        problem=problem,
        widening=config.widening,
        block_rows=config.block_rows,
        block_out=min(config.block_out, problem.result_features),
        block_in=config.block_in,
        chunk=config.chunk,
        lanes=LANES_AT_A_TIME,
        buffers=BUFFERS,
        cores=1 if chip is None else chip.cores,
        scales_weights=config.scales_weights,
    )


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_tpu.Config or None")
    if problem.norm_eps is not None or problem.has_residual:
        plain, plain_inputs = problem.plain(inputs)
        out = quantized_matmul(plain, plain_inputs, config=config, interpret=interpret)
        return problem.add(inputs.residual, out)
    p = multiplied(problem)
    if p is not problem:
        y = quantized_matmul(p, inputs, config=config, interpret=interpret)
        return problem.finish(jnp.split(y, 2, axis=1)).astype(problem.out_dtype)
    config = config or heuristic(p)
    check_config(p, config)
    plan = _plan(p, config)
    whole = p.result_features // LANES * LANES
    if plan.block_out == p.result_features or whole == p.result_features:
        out = _run(plan, inputs, 0, interpret)
    else:
        # No transfer ends within a tile but that of a whole buffer: the last channels have buffers of their own.
        widths = {0: whole, whole: p.result_features - whole}
        plans = {first: _plan(dataclasses.replace(p, out_features=width), config) for first, width in widths.items()}
        out = jnp.concatenate([_run(plan, inputs, first, interpret) for first, plan in plans.items()], axis=1)
    return out[: p.rows].astype(p.out_dtype)


def _run(plan: Plan, inputs: Inputs, first: int, interpret: Any) -> jax.Array:
    """As many channels of the result as the plan's problem has, from `first` on: `[rows of all blocks, channels]`."""
    p, blocks = plan.problem, plan.blocks(first)
    x = jnp.pad(inputs.x, ((0, blocks.row_blocks * plan.block_rows - p.rows), (0, 0)))
    by_rows = _by_rows(plan, x.reshape(blocks.row_blocks, plan.block_rows, p.in_features))
    if plan.together > 1:
        by_rows.insert(1, jnp.asarray(plan.masks())[None])
    by_channels = _by_channels(p, inputs)
    buffers = [
        pltpu.VMEM(
            (plan.buffers, array.shape[1] // (plan.in_blocks if array.shape[1] > 1 else 1), plan.block_out), array.dtype
        )
        for array, _ in by_channels
    ]
    totals = p.parts if plan.in_blocks > 1 else 0
    return pl.pallas_call(
        fresh_kernel(
            kernel, plan=plan, first=first, by_rows=len(by_rows), stacked=tuple(stacked for _, stacked in by_channels)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks.cores, blocks.row_blocks, blocks.of_a_core, plan.in_blocks),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (len(by_rows) + len(by_channels)),
            out_specs=pl.BlockSpec(
                (plan.block_rows, plan.block_out), lambda core, i, j, *_: (i, blocks.of_all(core, j))
            ),
            scratch_shapes=[
                *(pltpu.VMEM(array.shape[1:], array.dtype) for array in by_rows),
                *buffers * p.parts,
                pltpu.SemaphoreType.DMA((len(by_rows),)),
                pltpu.SemaphoreType.DMA((p.parts * len(buffers), plan.buffers)),
                *[pltpu.VMEM((plan.block_rows, plan.block_out), plan.total_dtype)] * totals,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], p.result_features), _storable(p.out_dtype)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_limit() // 6 * 7,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=0),
        interpret=interpret,
        name=f"quantized_matmul_{p.scheme}_{plan.widening}".replace("-", "_"),
    )(
        jnp.zeros(1, jnp.int32) if inputs.layer is None else inputs.layer[None],
        *by_rows,
        *(array for array, _ in by_channels),
    )


def _storable(dtype: str) -> str:
    """In what the kernel writes a result of a dtype: Mosaic has no float16."""
    return "float32" if dtype == "float16" else dtype


def fits(problem: Problem, config: Config) -> bool:
    """Whether a problem can be cut like that, in the VMEM that there is."""
    try:
        check_config(problem, config)
        return _vmem_bytes(_plan(multiplied(problem), config)) <= _vmem_limit()
    except ValueError:
        return False


def check_config(problem: Problem, config: Config) -> None:
    """Raises ValueError where a config does not go with a problem."""
    p = multiplied(problem)
    known = tuple(widenings(p.scheme))
    check(config.widening in known, "config.widening", config.widening, f"one of {', '.join(known)}")
    check(config.chunk in _chunks(p), "config.chunk", config.chunk, f"one of {_chunks(p)}")
    exact = widenings(p.scheme)[config.widening]
    scalable = p.scheme.group_size is not None and exact.unit == 1 and exact.offset == 0
    scalable &= exact.operand == "float32" or (exact.operand == "bfloat16" and is_narrow(p))
    right = not config.scales_weights or scalable
    check(right, "config.scales_weights", True, f"False for {p.scheme} by {config.widening} to {p.out_dtype}")
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
        scales = [scale[:, None, :, None]]
    wide = x.astype(jnp.float32)
    sums = []
    if plan.needs_sums:
        by_group = wide.reshape(row_blocks, block_rows, plan.sum_blocks, plan.groups, -1).sum(axis=4)
        sums = [by_group.transpose(0, 2, 1, 3)]  # [row_blocks, sum_blocks, block_rows, groups]
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
