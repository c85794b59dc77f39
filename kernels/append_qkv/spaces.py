"""The block sizes of append_qkv's kernels that may be tried for a problem, around those of the heuristic."""

from __future__ import annotations

from palladion.kernels.append_qkv import triton as gpu_kernel
from palladion.kernels.append_qkv.problem import Problem
from palladion.kernels.tuning import Space


def triton(problem: Problem) -> Space:
    """Rows of a program, and its warps."""
    rows = [1 << n for n in range(10) if 1 << n < 2 * problem.append.q_len * problem.heads]
    return Space(gpu_kernel.heuristic(problem), {"block_rows": rows, "num_warps": (1, 2, 4, 8)})
