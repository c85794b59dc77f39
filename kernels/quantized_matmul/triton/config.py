"""The configuration of quantized_matmul's Triton kernels: the form, and its block sizes."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from palladion.kernels.checks import check, check_num_warps

MIN_BLOCK: Final = 16
"""The smallest side of a matrix that tensor cores multiply."""

MIN_TILE: Final = 32
"""The fewest weights along `in` of a trip."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The form of the kernel, and its block sizes.

    Attributes:
      form: "vector" for up to `vector.MAX_ROWS` rows, or "tensor_core".
      block_rows: rows of x in a program: all of them in the vector form, otherwise a power of two of at least 16.
      block_out: output channels of a program, a power of two of at least 16.
      tile: weights along `in` of a trip, a power of two of at least 32; the vector form has tiles of its own.
      splits: shares that `in` is cut into.
      num_warps: warps of a program.
      num_stages: tiles that are loaded ahead.
      scales_weights: whether weights are scaled, and not products; for the tensor-core form and results of 16 bits.
      merge: how splits of the tensor-core form are added up: by XLA, in a "launch" of its own, or by the "last" program
        of a block.
    """

    form: Literal["vector", "tensor_core"]
    block_rows: int
    block_out: int
    tile: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3
    scales_weights: bool = False
    merge: Literal["launch", "last"] = "launch"

    def __post_init__(self) -> None:
        check(self.form in ("vector", "tensor_core"), "config.form", self.form, "'vector' or 'tensor_core'")
        least = {"block_rows": 1 if self.form == "vector" else MIN_BLOCK, "block_out": MIN_BLOCK, "tile": MIN_TILE}
        for name, value in ((name, getattr(self, name)) for name in least):
            power = value >= least[name] and (value & (value - 1) == 0 or (self.form, name) == ("vector", "block_rows"))
            check(power, f"config.{name}", value, f"a power of two of at least {least[name]}")
        check(self.merge in ("launch", "last"), "config.merge", self.merge, "'launch' or 'last'")
        for name in ("splits", "num_stages"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")
        check_num_warps("config.num_warps", self.num_warps)
