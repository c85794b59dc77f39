"""Block sizes of the Triton kernel of decode_attention."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, get_args

from palladion.kernels.checks import check, check_num_warps, check_power_of_two
from palladion.kernels.decode_attention.splits import MAX_SPLITS

MIN_BLOCK: Final = 16
"""The smallest side of a matrix that tensor cores multiply."""

Merge = Literal["launch", "last"]
"""Where splits are merged: in a second launch, or by the last program of each sequence and KV head."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the Triton kernel.

    Attributes:
      block_kv: cached tokens of a KV block, a power of two of at least 16.
      block_rows: query rows of a program, a power of two of at least 16.
      splits: shares that a sequence's cache is cut into; the mean over all sequences where they are balanced.
      num_warps: warps of a program.
      num_stages: stages of the loop's software pipeline; one less are loaded ahead.
      integers: whether 16-bit queries are multiplied with int8 keys as integers; otherwise keys become floats.
      balanced: whether shares have one size for all sequences, so that the longest has the most; a batch-invariant
        call gives each sequence `splits` shares all the same.
      merge: where splits are merged.
    """

    block_kv: int
    block_rows: int
    splits: int
    num_warps: int = 4
    num_stages: int = 2
    integers: bool = True
    balanced: bool = False
    merge: Merge = "launch"

    def __post_init__(self) -> None:
        for name in ("block_kv", "block_rows"):
            check_power_of_two(f"config.{name}", getattr(self, name), MIN_BLOCK)
        check(1 <= self.splits <= MAX_SPLITS, "config.splits", self.splits, f"1 to {MAX_SPLITS}")
        check(self.num_stages >= 1, "config.num_stages", self.num_stages, "at least 1")
        check(self.merge in get_args(Merge), "config.merge", self.merge, ", ".join(get_args(Merge)))
        check_num_warps("config.num_warps", self.num_warps)
