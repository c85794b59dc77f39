"""Plans a quantized_matmul call on a TPU: the static numbers by which it is cut and the rows of x are stacked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from palladion.kernels.integers import round_up
from palladion.kernels.quantized_matmul.mosaic_tpu.dequantize import Dequantizer, dequantizers, fits_bfloat16
from palladion.kernels.quantized_matmul.mosaic_tpu.ring import WeightBlocks
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.tpu_layout import SUBLANES, tile_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """The block sizes of a call, and how the rows of x are stacked in the matrix unit.

    Groups smaller than a chunk share it: the rows of x are repeated for each of them, with zeros in the columns of the
    others, so that every group has a product of its own. A float32 x is several bfloat16 pieces, which are rows, too.

    Attributes:
      problem: the call.
      dequantizer_name: key of the `Dequantizer` in `dequantizers(scheme)`.
      block_rows: rows of x in a grid step.
      block_out: output channels of a grid step.
      block_in: weights along `in` of a grid step.
      chunk: weights along `in` that are multiplied at a time.
      lanes: output channels that are multiplied at a time.
      buffers: blocks of the weight that VMEM holds.
      cores: cores that share the channels.
      scales_weights: whether weights are scaled before they are multiplied, rather than their products.
    """

    problem: Problem
    dequantizer_name: str
    block_rows: int
    block_out: int
    block_in: int
    chunk: int
    lanes: int
    buffers: int
    cores: int
    scales_weights: bool

    @property
    def dequantizer(self) -> Dequantizer:
        """The way in which codes become operands."""
        return dequantizers(self.problem.scheme)[self.dequantizer_name]

    @property
    def x_operand(self) -> str:
        """The dtype in which x is multiplied."""
        operand = self.dequantizer.operand
        if self.scales_weights:
            return "bfloat16" if fits_bfloat16(self.problem) else "float32"
        return operand if operand in ("int8", "float32") else "bfloat16"

    @property
    def pieces(self) -> int:
        """Number of bfloat16 numbers that a float32 x is split into: 8 bits each, as many as the result shows."""
        if self.x_operand == "float32" or self.problem.quantize_x is not None or self.problem.x_dtype == "bfloat16":
            return 1
        return 3 if self.problem.out_dtype == "float32" else 2

    @property
    def groups_per_chunk(self) -> int:
        """Number of groups that share a chunk, each with its own copy of the rows of x."""
        return 1 if self.scales_weights or not self.grouped else self.chunk // self.problem.group_size

    @property
    def groups_per_tile(self) -> int:
        """Number of groups whose copies of the rows are stacked in one operand, to fill a tile of x."""
        tile = tile_rows(self.x_operand)
        fitting = tile // math.gcd(self.pieces * self.block_rows, tile)
        return fitting if self.groups_per_chunk % fitting == 0 else 1

    @property
    def stacked_rows(self) -> int:
        """Rows of an operand of x: for each group of a tile all pieces of all rows, padded to whole tiles."""
        return round_up(self.groups_per_tile * self.pieces * self.block_rows, tile_rows(self.x_operand))

    @property
    def masked_copies(self) -> int:
        """Number of operands of x that a chunk is multiplied with, each with the columns of other groups."""
        return self.groups_per_chunk // self.groups_per_tile

    def weight_blocks(self, first_channel: int) -> WeightBlocks:
        """Returns how the weight is cut into blocks, from `first_channel` on."""
        p = self.problem
        return WeightBlocks(
            first_channel=first_channel,
            channels=p.result_features,
            parts=p.parts,
            block_out=self.block_out,
            in_blocks=self.in_blocks,
            row_blocks=pl.cdiv(p.rows, self.block_rows),
            cores=self.cores,
        )

    @property
    def in_blocks(self) -> int:
        """Number of grid steps along `in`."""
        return self.problem.in_features // self.block_in

    @property
    def groups(self) -> int:
        """Number of scales of an output channel in a grid step."""
        return self.block_in // self.problem.group_size if self.grouped else 1

    @property
    def needs_sums(self) -> bool:
        """Whether sums of x are needed, to subtract offsets of the operands or to add minimums."""
        return self.constant_offset != 0 or self.problem.scheme.offset != "none"

    @property
    def subtracts_before_scaling(self) -> bool:
        """Whether offsets are subtracted group by group before scales: all at once, later, costs a few bits."""
        return self.grouped and self.problem.out_dtype == "float32"

    @property
    def sum_blocks(self) -> int:
        """Number of blocks of sums along `in`: one where products are scaled after the last step."""
        return self.in_blocks if self.grouped else 1

    @property
    def grouped(self) -> bool:
        """Whether scales differ along `in`."""
        return self.problem.scheme.group_size is not None

    @property
    def constant_offset(self) -> float:
        """The part of the offset that is the same in all operands: the dequantizer's and the implied zero."""
        return self.dequantizer.offset + self.problem.scheme.implied_zero / self.dequantizer.unit

    @property
    def product_dtype(self) -> Any:
        """The dtype in which the matrix unit adds products up."""
        return jnp.int32 if self.x_operand == "int8" else jnp.float32

    @property
    def accumulator_dtype(self) -> Any:
        """The dtype in which steps along `in` are added up; products are unscaled where all of `in` shares a scale."""
        return jnp.float32 if self.grouped else self.product_dtype

    def masks(self) -> np.ndarray:
        """Returns which columns each stacked row keeps, as words of ones or zeros: `[masked_copies, words, chunk]`."""
        group_of_column = self.dequantizer.reorder(np.arange(self.chunk) // self.problem.group_size, self.chunk)
        group_in_tile = np.arange(self.stacked_rows) // (self.pieces * self.block_rows)
        first_group = np.arange(0, self.groups_per_chunk, self.groups_per_tile)
        group_of_row = first_group[:, None] + group_in_tile
        rows_per_word = tile_rows(self.x_operand) // SUBLANES
        return -(group_of_column == group_of_row[:, ::rows_per_word, None]).astype(np.int32)
