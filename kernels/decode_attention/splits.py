"""Into how many shares a GPU kernel cuts the cache of each sequence."""

from __future__ import annotations

from typing import Final

from jax.experimental import pallas as pl

from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.devices import Gpu

MAX_SPLITS: Final = 256
"""Most splits of a sequence."""

HIDDEN_FROM: Final = 2
"""Least programs on a multiprocessor for which one computes while another waits for memory."""

START: Final = 1
"""Cost of a program's queries, first block and result, in iterations of its loop."""

MERGE: Final = 2
"""Cost of merging the splits, in iterations."""


def visible_blocks(problem: Problem, block_kv: int) -> int:
    """Returns the KV blocks that the queries of a full sequence see."""
    p = problem
    visible = p.max_len if p.sliding_window is None else min(p.max_len, p.sliding_window + p.q_len - 1)
    return pl.cdiv(visible, block_kv)


def splits_of(problem: Problem, programs: int, block_kv: int, gpu: Gpu, most_resident: int) -> int:
    """Returns the number of splits with which the busiest multiprocessor finishes first, given full caches.

    A multiprocessor goes through the KV blocks of its programs at the rate of its memory, if it has at least
    `HIDDEN_FROM` programs. More programs than are resident at a time would leave most of the chip idle at the end.
    On an H200, a launch took 2.6 µs and the time of the busiest multiprocessor's bytes, at 4.3 TB/s for all of them.

    Args:
      problem: the call.
      programs: programs without splits.
      block_kv: tokens of a KV block.
      gpu: the device.
      most_resident: programs that a multiprocessor has room for.
    """
    blocks = visible_blocks(problem, block_kv)

    def busiest_time(splits: int) -> int:
        resident = pl.cdiv(programs * splits, gpu.multiprocessors)
        time = max(resident, HIDDEN_FROM) * pl.cdiv(blocks, splits) + resident * START
        return time + (MERGE if splits > 1 else 0)

    most = min(blocks, MAX_SPLITS, max(most_resident * gpu.multiprocessors // programs, 1))
    return min(range(1, most + 1), key=busiest_time)
