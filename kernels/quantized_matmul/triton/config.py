"""The configuration of quantized_matmul's Triton kernels: the form, and its block sizes."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from palladion.kernels.checks import check, check_num_warps, check_power_of_two

MIN_BLOCK: Final = 16
"""The smallest side of a matrix that tensor cores multiply."""

MIN_TILE: Final = 32
"""The fewest weights along `in` of a trip."""

FORMS: Final = ("few_rows", "tensor_core")
MERGES: Final = ("launch", "last")
MULTIPLIES: Final = ("float", "bytes")


@dataclasses.dataclass(frozen=True)
class Config:
    """The form of the kernel, and its block sizes.

    Attributes:
      form: "few_rows" for up to four rows, or "tensor_core".
      block_out: output channels of a program, a power of two; of at least 16 for tensor cores.
      num_warps: warps of a program.
      multiply: how few rows are multiplied: "float", or "bytes" where x and the result have 16 bits and codes are
        integers or mxfp4.
      ahead: whether few rows load the codes of a trip while those of the one before it are multiplied.
      normalizes: whether a norm of few rows is part of the kernel, and not a launch before it.
      block_rows: rows of x in a program of the tensor-core form, a power of two of at least 16.
      tile: weights along `in` of a trip of the tensor-core form, a power of two of at least 32.
      splits: shares that `in` is cut into, in the tensor-core form.
      num_stages: tiles that the tensor-core form loads ahead.
      scales_weights: whether weights are scaled, and not products; for the tensor-core form and results of 16 bits.
      merge: how splits of the tensor-core form are added up: by XLA, in a "launch" of its own, or by the "last" program
        of a block.
    """

    form: Literal["few_rows", "tensor_core"]
    block_out: int
    num_warps: int = 4
    multiply: Literal["float", "bytes"] = "float"
    ahead: bool = False
    normalizes: bool = False
    block_rows: int = MIN_BLOCK
    tile: int = 128
    splits: int = 1
    num_stages: int = 3
    scales_weights: bool = False
    merge: Literal["launch", "last"] = "launch"

    def __post_init__(self) -> None:
        check(self.form in FORMS, "config.form", self.form, " or ".join(map(repr, FORMS)))
        check(self.multiply in MULTIPLIES, "config.multiply", self.multiply, " or ".join(map(repr, MULTIPLIES)))
        check(self.merge in MERGES, "config.merge", self.merge, " or ".join(map(repr, MERGES)))
        check_power_of_two("config.block_out", self.block_out, MIN_BLOCK if self.form == "tensor_core" else 1)
        check_power_of_two("config.block_rows", self.block_rows, MIN_BLOCK)
        check_power_of_two("config.tile", self.tile, MIN_TILE)
        for name in ("splits", "num_stages"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")
        check_num_warps("config.num_warps", self.num_warps)
