"""Block sizes of the Mosaic GPU kernels of decode_attention."""

from __future__ import annotations

import dataclasses
from typing import Final

from palladion.kernels.checks import check
from palladion.kernels.decode_attention.splits import MAX_SPLITS
from palladion.kernels.gpu_cluster import MERGES, MOST_IN_CLUSTER, Merge

TILE: Final = 64
"""Rows of the left operand of a wgmma: tokens of a block, and features of a head, come in multiples of it."""

MAX_BLOCK_ROWS: Final = 64
"""Most query rows of a program for a few rows: more of them leave no registers."""

MANY_ROWS: Final = (128, 192)
"""Query rows of a program for many rows, 64 in each warpgroup."""

BLOCKS_KV: Final = (64, 128, 256)
"""Tokens of a KV block; for many rows, registers have no room for the logits of 256."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the Mosaic GPU kernels, one for a few query rows and one for many.

    Attributes:
      block_kv: cached tokens of a KV block: 64, 128 or 256; for many rows 64 or 128.
      block_rows: query rows of a program: for a few rows a multiple of 8, at most 64; for many rows 128 or 192.
      splits: shares that a sequence's cache is cut into; the mean over all sequences where they are balanced.
      num_stages: KV blocks in the ring: one is multiplied, the others are on their way; at least 2 with `overlaps`.
      balanced: whether shares have one size for all sequences, so that the longest has the most, for a few rows only;
        a batch-invariant call, and one of more than 32 sequences, give each sequence `splits` shares all the same.
      ping_pong: whether two warpgroups take turns, so that one multiplies while the other computes its softmax; 128
        rows only.
      overlaps: whether a warpgroup multiplies the weights of a block while it computes the softmax of the next; many
        rows only.
      merge: where splits are merged: in a "launch" of its own, or by the programs of the splits, which are a "cluster"
        and read each other's shared memory; that is for a few rows and at most 8 splits that are not balanced.
    """

    block_kv: int
    block_rows: int
    splits: int = 1
    num_stages: int = 3
    balanced: bool = False
    ping_pong: bool = False
    overlaps: bool = False
    merge: Merge = "launch"

    def __post_init__(self) -> None:
        rows = (*range(8, MAX_BLOCK_ROWS + 1, 8), *MANY_ROWS)
        accepted = f"a multiple of 8, at most {MAX_BLOCK_ROWS}, or {' or '.join(map(str, MANY_ROWS))}"
        check(self.block_rows in rows, "config.block_rows", self.block_rows, accepted)
        many = self.warpgroups > 1
        blocks_kv = BLOCKS_KV[: 2 if many else None]
        check(self.block_kv in blocks_kv, "config.block_kv", self.block_kv, ", ".join(map(str, blocks_kv)))
        check(1 <= self.splits <= MAX_SPLITS, "config.splits", self.splits, f"1 to {MAX_SPLITS}")
        least = 2 if self.overlaps else 1
        check(self.num_stages >= least, "config.num_stages", self.num_stages, f"at least {least}")
        check(not (many and self.balanced), "config.balanced", self.balanced, "False for many rows")
        turns = not self.ping_pong or self.warpgroups == 2
        check(turns, "config.ping_pong", self.ping_pong, "False, except for 128 rows")
        check(many or not self.overlaps, "config.overlaps", self.overlaps, "False, except for many rows")
        check(self.merge in MERGES, "config.merge", self.merge, " or ".join(map(repr, MERGES)))
        if self.merge == "cluster":
            check(not many, "config.merge", self.merge, f"'launch' for more than {MAX_BLOCK_ROWS} rows")
            few = self.splits <= MOST_IN_CLUSTER
            check(few, "config.splits", self.splits, f"up to {MOST_IN_CLUSTER} for merge='cluster'")
            check(not self.balanced, "config.balanced", self.balanced, "False for merge='cluster'")

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute, each for some of the rows."""
        return self.block_rows // TILE if self.block_rows in MANY_ROWS else 1

    @property
    def in_cluster(self) -> bool:
        """Whether there are splits that a cluster merges."""
        return self.merge == "cluster" and self.splits > 1
