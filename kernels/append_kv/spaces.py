"""The block sizes of append_kv's kernels that may be tried for a problem, around those of the heuristic."""

from __future__ import annotations

from palladion.kernels.append_kv import mosaic_tpu as tpu_kernel
from palladion.kernels.append_kv import triton as gpu_kernel
from palladion.kernels.append_kv.problem import Problem
from palladion.kernels.tuning import Space


def mosaic_tpu(problem: Problem) -> Space:
    """Sequences and heads of a grid step."""
    p, start = problem, tpu_kernel.heuristic(problem)
    sequences = [1 << n for n in range(9) if 1 << n <= p.batch]
    heads = [n for n in range(1, p.kv_heads + 1) if p.kv_heads % n == 0]
    return Space(start, {"sequences": sequences, "heads": heads}, lambda config: tpu_kernel.fits(p, config))


def triton(problem: Problem) -> Space:
    """Rows of a program, and its warps."""
    p, start = problem, gpu_kernel.heuristic(problem)
    rows = [1 << n for n in range(10) if 1 << n < 2 * p.q_len * p.kv_heads]
    return Space(start, {"block_rows": rows, "num_warps": (1, 2, 4, 8)})
