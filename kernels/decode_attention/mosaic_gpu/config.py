"""Block sizes of the Mosaic GPU kernel of decode_attention."""

from __future__ import annotations

import dataclasses
from typing import Final

from palladion.kernels.checks import check
from palladion.kernels.decode_attention.splits import MAX_SPLITS

TILE: Final = 64
"""Rows of the left operand of a wgmma: tokens of a block, and features of a head, come in multiples of it."""

MAX_BLOCK_ROWS: Final = 64
"""Most query rows of a program: more of them leave no registers."""

BLOCKS_KV: Final = (64, 128, 256)
"""Tokens of a KV block."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the Mosaic GPU kernel.

    Attributes:
      block_kv: cached tokens of a KV block: 64, 128 or 256.
      block_rows: query rows of a program, a multiple of 8, at most 64.
      splits: shares that a sequence's cache is cut into; the mean over all sequences where they are balanced.
      num_stages: KV blocks in the ring: one is multiplied, the others are on their way.
      balanced: whether shares have one size for all sequences, so that the longest has the most; a batch-invariant
        call, and one of more than 32 sequences, give each sequence `splits` shares all the same.
    """

    block_kv: int
    block_rows: int
    splits: int
    num_stages: int = 3
    balanced: bool = False

    def __post_init__(self) -> None:
        check(self.block_kv in BLOCKS_KV, "config.block_kv", self.block_kv, ", ".join(map(str, BLOCKS_KV)))
        accepted = f"a multiple of 8, at most {MAX_BLOCK_ROWS}"
        check(self.block_rows in range(8, MAX_BLOCK_ROWS + 1, 8), "config.block_rows", self.block_rows, accepted)
        check(1 <= self.splits <= MAX_SPLITS, "config.splits", self.splits, f"1 to {MAX_SPLITS}")
        check(self.num_stages >= 1, "config.num_stages", self.num_stages, "at least 1")
