"""The block sizes of quantized_matmul's kernels that may be tried for a problem, around those of the heuristics."""

from __future__ import annotations

from collections.abc import Sequence

from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.quantized_matmul import mosaic_tpu as tpu_kernel
from palladion.kernels.quantized_matmul import triton as gpu_kernel
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.tpu_layout import LANES
from palladion.kernels.tuning import Space


def mosaic_tpu(problem: Problem) -> Space:
    """Channels and depth of a block."""
    p, start = tpu_kernel.multiplied(problem), tpu_kernel.heuristic(problem)
    channels = p.result_features
    widths = [LANES * n for n in (1, 2, 4, 6, 8, 12, 16, 24, 32) if LANES * n <= channels]
    depths = [p.in_features // n for n in (1, 2, 4, 8) if p.in_features % (n * start.chunk) == 0]
    return Space(start, {"block_out": widths, "block_in": depths}, lambda config: tpu_kernel.fits(p, config))


def triton(problem: Problem) -> Space:
    """Channels of a block and splits along `in`; its depth, how much is loaded ahead, and how a program is run."""
    start, most = gpu_kernel.heuristic(problem), gpu_to_plan_for().program_shared_bytes
    tiles = -(-problem.in_features // start.tile)
    axes: dict[str, Sequence[int]] = {
        "splits": [1 << n for n in range(7) if 1 << n <= tiles],
        "block_out": (16, 32, 64, 128, 256),
        "num_warps": (2, 4, 8, 16),
    }
    if start.form == "vector":  # which has tiles of its own, in registers
        return Space(start, axes)
    axes |= {"tile": (32, 64, 128, 256), "num_stages": (1, 2, 3, 4, 5)}
    return Space(start, axes, lambda config: gpu_kernel.loaded_bytes(problem, config) <= most)
