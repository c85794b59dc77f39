"""Block sizes that the Triton kernels of append_kv and append_qkv share: both write blocks of rows."""

from __future__ import annotations

import dataclasses

from palladion.kernels.checks import check_num_warps, check_power_of_two


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the Triton kernels of append_kv and append_qkv.

    Attributes:
      block_rows: rows (heads of tokens) per program, a power of two.
      num_warps: warps per program.
    """

    block_rows: int
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_power_of_two("config.block_rows", self.block_rows)
        check_num_warps("config.num_warps", self.num_warps)
