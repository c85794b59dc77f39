"""How a quantized_matmul call is cut up on a TPU, and how rows of x are stacked: numbers that the kernel goes by."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from palladion.kernels.quantized_matmul.mosaic_tpu.stream import Blocks
from palladion.kernels.quantized_matmul.mosaic_tpu.widening import Widening, is_narrow, widenings
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.tpu_layout import SUBLANES, round_up, tile_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up, and how the rows of x are stacked.

    Attributes:
      problem: the call.
      widening: name of the way to widen codes.
      block_rows: rows of x in a grid step.
      block_out: output channels of a grid step.
      block_in: weights along `in` of a grid step.
      chunk: weights along `in` that are multiplied at a time.
      lanes: output channels that are multiplied at a time.
      buffers: blocks of the weight that VMEM holds.
      cores: that share the channels.
      scales_weights: whether weights are scaled before they are multiplied, and not their products.
    """

    problem: Problem
    widening: str
    block_rows: int
    block_out: int
    block_in: int
    chunk: int
    lanes: int
    buffers: int
    cores: int
    scales_weights: bool

    @property
    def widen(self) -> Widening:
        """The widening of that name."""
        return widenings(self.problem.scheme)[self.widening]

    @property
    def x_operand(self) -> str:
        """The dtype in which x is multiplied."""
        operand = self.widen.operand
        if self.scales_weights:
            return "bfloat16" if is_narrow(self.problem) else "float32"
        return operand if operand in ("int8", "float32") else "bfloat16"

    @property
    def pieces(self) -> int:
        """The bfloat16 numbers that a float32 x is split into: their 8 bits each are what the result shows of it."""
        if self.x_operand == "float32" or self.problem.quantize_x is not None or self.problem.x_dtype == "bfloat16":
            return 1
        return 3 if self.problem.out_dtype == "float32" else 2

    @property
    def together(self) -> int:
        """Groups that share a chunk, each with rows of x of its own."""
        return 1 if self.scales_weights or not self.grouped else self.chunk // self.problem.group_size

    @property
    def slots(self) -> int:
        """Groups whose rows share a tile of x."""
        tile = tile_rows(self.x_operand)
        fitting = tile // math.gcd(self.pieces * self.block_rows, tile)
        return fitting if self.together % fitting == 0 else 1

    @property
    def stacked_rows(self) -> int:
        """Rows of x as they are multiplied: by slot, then by piece; padded to whole tiles."""
        return round_up(self.slots * self.pieces * self.block_rows, tile_rows(self.x_operand))

    @property
    def masked(self) -> int:
        """Copies of the stacked rows that a chunk is multiplied with, each with columns of other groups."""
        return self.together // self.slots

    def blocks(self, first: int) -> Blocks:
        """How the weight is cut from a channel on."""
        p = self.problem
        return Blocks(
            first=first,
            channels=p.result_features,
            parts=p.parts,
            block_out=self.block_out,
            in_blocks=self.in_blocks,
            row_blocks=pl.cdiv(p.rows, self.block_rows),
            cores=self.cores,
        )

    @property
    def in_blocks(self) -> int:
        """Grid steps along `in`."""
        return self.problem.in_features // self.block_in

    @property
    def groups(self) -> int:
        """Scales of an output channel in a grid step."""
        return self.block_in // self.problem.group_size if self.grouped else 1

    @property
    def needs_sums(self) -> bool:
        """Whether sums of x are needed, for what was added to codes or weights."""
        return self.constant_offset != 0 or self.problem.scheme.offset != "none"

    @property
    def offsets_first(self) -> bool:
        """Whether offsets of groups are taken off before anything is scaled: all of them together cost a few bits."""
        return self.grouped and self.problem.out_dtype == "float32"

    @property
    def sum_blocks(self) -> int:
        """Blocks of sums along `in`: one where products are scaled after the last step."""
        return self.in_blocks if self.grouped else 1

    @property
    def grouped(self) -> bool:
        """Whether scales differ along `in`."""
        return self.problem.scheme.group_size is not None

    @property
    def constant_offset(self) -> float:
        """What is in every operand too much, as far as it is the same in all."""
        return self.widen.offset + self.problem.scheme.implied_zero / self.widen.unit

    @property
    def sum_dtype(self) -> Any:
        """In what products are added up before they are scaled."""
        return jnp.int32 if self.x_operand == "int8" else jnp.float32

    @property
    def total_dtype(self) -> Any:
        """In what the steps along `in` are added up: products as they are where all of `in` shares a scale."""
        return jnp.float32 if self.grouped else self.sum_dtype

    def masks(self) -> np.ndarray:
        """Which columns of a chunk each stacked row keeps, as words of all ones: `[together / slots, words, chunk]`."""
        column = self.widen.arrange(np.arange(self.chunk) // self.problem.group_size, self.chunk)
        slot = np.arange(self.stacked_rows) // (self.pieces * self.block_rows)
        first = np.arange(0, self.together, self.slots)
        kept = column == (first[:, None] + slot)[:, :: tile_rows(self.x_operand) // SUBLANES, None]
        return -kept.astype(np.int32)
