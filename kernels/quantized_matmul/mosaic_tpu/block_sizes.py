"""Chooses and checks the block sizes of quantized_matmul on a TPU: what fits VMEM and keeps the memory busy."""

from __future__ import annotations

import dataclasses
from typing import Final

import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.checks import check
from palladion.kernels.devices import Chip, target_chip, vmem_budget
from palladion.kernels.integers import round_up
from palladion.kernels.quantized_matmul.mosaic_tpu.dequantize import (
    NEWER,
    best_dequantizer,
    dequantizers,
    fits_bfloat16,
)
from palladion.kernels.quantized_matmul.mosaic_tpu.kernel import bits_dtype
from palladion.kernels.quantized_matmul.mosaic_tpu.plan import Plan
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.search_space import Space
from palladion.kernels.tpu_layout import LANES, SUBLANES, tile_rows
from palladion.reference.scheme import PACK_BLOCK

CODE_ROWS: Final = 32
"""Rows of a tile of 8-bit numbers: a chunk of codes begins at a multiple."""

MAX_BLOCK_ROWS: Final = 256

MAX_BLOCK_OUT: Final = 4096

MAX_BLOCK_LATENCIES: Final = 2.5
"""The largest block takes as long to arrive as so many times the fixed cost of a grid step."""

STEP_CYCLES: Final = 400
"""Fixed cost of a grid step beside the latency of a DMA: its scalar code, and the way through the matrix unit."""

MIN_STEPS: Final = 6
"""Steps that a core should have: nothing is multiplied while the first block arrives, nothing arrives during the last
step."""

BLOCK_BYTES: Final = 2 * 2**20
"""Size of a block of codes where the chip is not known."""

LANES_AT_A_TIME: Final = 512
"""Output channels that are multiplied at a time: their products stay in registers."""

BUFFERS: Final = 3
"""Blocks of the weight in VMEM: one in use, the others in flight."""

MIN_ROWS_TO_SCALE_WEIGHTS: Final = 128
"""Rows of x, copies for the groups of a chunk included, from which on scaling weights is faster than products."""

CHUNK: Final = 512
"""Weights along `in` that are multiplied at a time where groups do not limit them."""

MAX_FLOAT32_SUM: Final = 128
"""Products that are added up in the matrix unit for a float32 result, which would show the rounding of longer sums."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, and how codes are dequantized.

    Attributes:
      block_rows: rows of x in a grid step, a multiple of 8.
      block_out: output channels of a grid step, a multiple of 128; all of them where there are fewer.
      block_in: weights along `in` of a grid step; divides `in`.
      chunk: weights along `in` that are multiplied at a time; divides block_in.
      dequantizer: how codes become operands, a key of `dequantize.dequantizers(scheme)`.
      scales_weights: whether scales multiply weights, not products; for schemes with groups.
    """

    block_rows: int
    block_out: int
    block_in: int
    chunk: int
    dequantizer: str
    scales_weights: bool = False

    def __post_init__(self) -> None:
        for name, multiple in (("block_rows", SUBLANES), ("block_out", LANES)):
            value = getattr(self, name)
            check(value >= 1 and value % multiple == 0, f"config.{name}", value, f"a multiple of {multiple}")
        check(self.chunk >= 1, "config.chunk", self.chunk, "at least 1")
        whole = self.block_in >= 1 and self.block_in % self.chunk == 0
        check(whole, "config.block_in", self.block_in, f"a multiple of chunk, {self.chunk}")


def heuristic(problem: Problem) -> Config:
    """Returns blocks large enough for the memory, in chunks that suit the matrix unit of the chip traced for."""
    p = kernel_problem(problem)
    chip = target_chip()
    depth = 256 if chip is None or chip.name in NEWER else 128
    scales_weights = _scaling_weights_is_faster(p, depth)
    dequantizer = best_dequantizer(p, chip, scales_weights)
    block_rows = min(round_up(p.rows, SUBLANES), MAX_BLOCK_ROWS)
    chunk = _chunk(p, scales_weights, depth)
    block_bytes = _block_bytes(p, chip)
    block_in = _block_in(p, chunk, block_bytes)
    channel_bytes = block_in // _codes_per_byte(p) * p.parts
    most = min(max(LANES, block_bytes // channel_bytes // LANES * LANES), MAX_BLOCK_OUT)
    config = Config(block_rows, _block_out(p, most), block_in, chunk, dequantizer, scales_weights)
    while _vmem_bytes(make_plan(p, config)) > vmem_limit():
        smaller = _smaller_block_out(p, config.block_out)
        if config.block_out > 2 * LANES and smaller is not None:
            config = dataclasses.replace(config, block_out=smaller)
        elif config.block_rows > SUBLANES:
            config = dataclasses.replace(config, block_rows=round_up(config.block_rows // 2, SUBLANES))
        else:
            break
    return config


def space(problem: Problem) -> Space:
    """Returns what a tuner may try: channels and depth of a block."""
    p, start = kernel_problem(problem), heuristic(problem)
    channels = p.result_features
    widths = [LANES * n for n in (1, 2, 4, 6, 8, 12, 16, 24, 32) if LANES * n <= channels]
    depths = [p.in_features // n for n in (1, 2, 4, 8) if p.in_features % (n * start.chunk) == 0]
    return Space(start, {"block_out": widths, "block_in": depths}, lambda config: fits(p, config))


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    if (reason := problem.order_unsupported("in_out")) is not None:
        return reason
    p = kernel_problem(problem)
    needed, limit = _vmem_bytes(make_plan(p, heuristic(p))), vmem_limit()
    if needed > limit:
        return f"blocks must fit into {limit >> 20} MiB, with in = {p.in_features} they take {needed >> 20}"
    return None


def kernel_problem(problem: Problem) -> Problem:
    """Returns the product that the kernel computes for a problem.

    It is the problem itself, unless the problem is gated and its up projection begins within a tile: then it is the
    whole product in float32, to which XLA applies activation and gate.
    """
    if not problem.gated or problem.result_features % LANES == 0:
        return problem
    return dataclasses.replace(problem, gated=False, activation=None, out_dtype="float32")


def make_plan(problem: Problem, config: Config) -> Plan:
    """Returns the plan of a call on the chip traced for."""
    chip = target_chip()
    return Plan(
        problem=problem,
        dequantizer_name=config.dequantizer,
        block_rows=config.block_rows,
        block_out=min(config.block_out, problem.result_features),
        block_in=config.block_in,
        chunk=config.chunk,
        lanes=LANES_AT_A_TIME,
        buffers=BUFFERS,
        cores=1 if chip is None else chip.cores,
        scales_weights=config.scales_weights,
    )


def vmem_limit() -> int:
    """Returns the VMEM that the blocks of a grid step may take on the chip that is being traced for."""
    return vmem_budget(target_chip())


def fits(problem: Problem, config: Config) -> bool:
    """Whether a config suits a problem and its blocks fit VMEM."""
    try:
        check_config(problem, config)
        return _vmem_bytes(make_plan(kernel_problem(problem), config)) <= vmem_limit()
    except ValueError:
        return False


def check_config(problem: Problem, config: Config) -> None:
    """Raises ValueError where a config does not suit a problem."""
    p = kernel_problem(problem)
    known = dequantizers(p.scheme)
    check(config.dequantizer in known, "config.dequantizer", config.dequantizer, f"one of {', '.join(known)}")
    check(config.chunk in _chunks(p), "config.chunk", config.chunk, f"one of {_chunks(p)}")
    dequantizer = known[config.dequantizer]
    scalable = p.scheme.group_size is not None and dequantizer.unit == 1 and dequantizer.offset == 0
    scalable &= dequantizer.operand == "float32" or (dequantizer.operand == "bfloat16" and fits_bfloat16(p))
    accepted = f"False for {p.scheme} by {config.dequantizer} to {p.out_dtype}"
    check(not config.scales_weights or scalable, "config.scales_weights", True, accepted)
    check(p.in_features % config.block_in == 0, "config.block_in", config.block_in, f"a divisor of {p.in_features}")
    whole = not p.gated or p.result_features % config.block_out == 0
    check(whole, "config.block_out", config.block_out, f"a divisor of the gate's {p.result_features} channels")


def _scaling_weights_is_faster(problem: Problem, depth: int) -> bool:
    """Whether scaling weights takes less time than scaling products, for which rows are copied for every group."""
    group = problem.scheme.group_size
    if group is None or group % PACK_BLOCK:
        return False
    if not fits_bfloat16(problem) or "bfloat16" not in dequantizers(problem.scheme):
        return problem.rows > group  # weights in float32 are multiplied in six passes
    return problem.rows * max(1, depth // group) >= MIN_ROWS_TO_SCALE_WEIGHTS


def _block_bytes(problem: Problem, chip: Chip | None) -> int:
    """Returns the bytes of codes that a block should have."""
    if chip is None:
        return BLOCK_BYTES
    step_seconds = chip.dma_latency_seconds + STEP_CYCLES / chip.clock_hertz
    rate = chip.hbm_bytes_per_second / chip.cores
    codes = problem.in_features * problem.out_features // _codes_per_byte(problem)
    smallest, largest = int(step_seconds * rate / 2), int(MAX_BLOCK_LATENCIES * step_seconds * rate)
    return min(max(codes // chip.cores // MIN_STEPS, smallest), largest)


def _block_out(problem: Problem, most: int) -> int:
    """Returns the channels of a block, about `most`: all channels, or a multiple of 128."""
    channels = problem.result_features
    if channels % LANES and channels <= 2 * most:
        return round_up(channels, LANES)  # otherwise the last few channels take a call of their own
    if problem.gated:
        # The up projection's blocks begin where the gate's end.
        sizes = range(most * 4 // 3 // LANES * LANES, 0, -LANES)
        return next((size for size in sizes if channels % size == 0), LANES)
    return _even_block_out(channels, most)


def _smaller_block_out(problem: Problem, block_out: int) -> int | None:
    """Returns the channels of the next smaller block, a multiple of 128, or None where there is none."""
    channels, most = problem.result_features, block_out - LANES
    if problem.gated:
        return next((size for size in range(most, 0, -LANES) if channels % size == 0), None)
    return _even_block_out(channels, most) if most > 0 else None


def _even_block_out(channels: int, most: int) -> int:
    """Returns the channels of a block, a multiple of 128 and no more than `most`, that spreads them evenly."""
    return round_up(pl.cdiv(channels, pl.cdiv(channels, most)), LANES)


def _codes_per_byte(problem: Problem) -> int:
    return 2 if problem.scheme.packed else 1


def _chunks(problem: Problem) -> list[int]:
    """Returns the sizes along `in` that divide it, and that its groups and its tiles of codes divide."""
    n, group = problem.in_features, problem.scheme.group_size or 1
    step = CODE_ROWS * _codes_per_byte(problem)
    return [*(size for size in range(step, n, step) if n % size == 0 and size % group == 0), n]


def _chunk(problem: Problem, scales_weights: bool, depth: int) -> int:
    """Returns the weights that are multiplied at a time: a group, or several where the matrix unit is deeper."""
    p = problem
    if scales_weights or p.scheme.group_size is None:
        longest = MAX_FLOAT32_SUM if p.out_dtype == "float32" and p.x_dtype == "float32" else CHUNK
    else:
        longest = max(depth, p.scheme.group_size)
    return max((size for size in _chunks(p) if size <= longest), default=min(_chunks(p)))


def _block_in(problem: Problem, chunk: int, block_bytes: int) -> int:
    """Returns all of `in`, or its largest divisor with which a few hundred channels take no more than two blocks."""
    p = problem
    group = p.scheme.group_size

    def is_aligned(size: int) -> bool:
        rows = size // _codes_per_byte(p)
        groups = 0 if group is None else size // group
        return rows % CODE_ROWS == 0 and groups % tile_rows(bits_dtype(p.scale_dtype)) == 0

    counts = (n for n in range(1, p.in_features // chunk + 1) if p.in_features // chunk % n == 0)
    sizes = [p.in_features // n for n in counts if n == 1 or is_aligned(p.in_features // n)]
    min_channels = min(4 * LANES, round_up(p.result_features, LANES)) * p.parts
    small = (size for size in sizes if size // _codes_per_byte(p) * min_channels <= 2 * block_bytes)
    return max(small, default=min(sizes))


def _vmem_bytes(plan: Plan) -> int:
    """Returns the VMEM that the blocks of a grid step, and what is computed from them, take."""
    p = plan.problem
    lanes = min(plan.lanes, plan.block_out)
    factors = round_up(plan.groups, SUBLANES) * 4 * (1 if p.scheme.offset == "none" else 2)
    weights = plan.buffers * p.parts * plan.block_out * (plan.block_in // _codes_per_byte(p) + factors)
    x = p.in_features * plan.stacked_rows * jnp.dtype(plan.x_operand).itemsize
    if plan.needs_sums:
        x += plan.sum_blocks * plan.block_rows * round_up(plan.groups, LANES) * 4
    results = (2 + (p.parts if plan.in_blocks > 1 else 0)) * plan.block_rows * plan.block_out * 4
    products = (plan.masked_copies * plan.stacked_rows + (p.parts + 1) * plan.block_rows) * lanes * 4
    operands = 2 * plan.chunk * lanes * jnp.dtype(plan.dequantizer.operand).itemsize
    return weights + x + results + 2 * (products + operands + factors * lanes)
