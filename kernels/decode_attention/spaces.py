"""The block sizes of decode_attention's kernels that may be tried for a problem, around those of the heuristics."""

from __future__ import annotations

from typing import Final

from palladion.kernels.decode_attention import mosaic_tpu as tpu_kernel
from palladion.kernels.decode_attention import triton as gpu_kernel
from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.tpu_layout import LANES
from palladion.kernels.tuning import Space

MORE_IN_VMEM: Final = 2
"""Times what the heuristic puts into VMEM: what is more is refused by the compiler anyway."""


def mosaic_tpu(problem: Problem) -> Space:
    """Blocks of tokens, how many of them, and how many sequences share a step."""
    p, start = problem, tpu_kernel.heuristic(problem)
    grain = LANES if p.page_size is None else p.page_size
    rows = p.max_len
    # Whole tiles of a dense cache that consists of such; whole pages.
    sizes = [grain << n for n in range(8) if rows % (grain << n) == 0 and rows % grain == 0]
    cores = start.cores if p.kv_heads % start.cores else 1
    share = p.batch // cores
    members = [n for n in (1, 2, 4, 8) if share % n == 0 and (n == 1 or not start.one_by_one)]
    taken = start.buffers * start.block_kv * start.members

    def fits(config: tpu_kernel.Config) -> bool:
        return config.buffers * config.block_kv * config.members <= MORE_IN_VMEM * taken

    return Space(start, {"block_kv": sizes, "members": members, "buffers": (2, 3, 4)}, fits)


def triton(problem: Problem) -> Space:
    """Blocks of tokens, splits of the cache, how much is loaded ahead, and how a program is run."""
    start, most = gpu_kernel.heuristic(problem), gpu_to_plan_for().program_shared_bytes
    blocks = -(-problem.max_len // start.block_kv)
    return Space(
        start,
        {
            "splits": [1 << n for n in range(8) if 1 << n <= blocks],
            "block_kv": (16, 32, 64, 128, 256),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4, 5),
        },
        lambda config: gpu_kernel.loaded_bytes(problem, config) <= most,
    )
