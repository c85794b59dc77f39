"""The block sizes of matmul's kernel that may be tried for a problem, around those of the heuristic."""

from __future__ import annotations

from palladion.kernels.matmul import triton as gpu_kernel
from palladion.kernels.matmul.problem import Problem
from palladion.kernels.tuning import Space


def triton(problem: Problem) -> Space:
    """Channels of a program, and its warps."""
    return Space(gpu_kernel.heuristic(problem), {"block_out": (16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8, 16)})
