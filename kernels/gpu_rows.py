"""Tiling of a product of one or a few rows on a GPU, without tensor cores.

A program computes a block of channels over all of `in`, so that it has whole sums and no second launch adds them up. A
thread reads chunks of up to 16 rows of the weight, 16 bytes of channels wide; neighbouring threads share a row, and the
other threads of the program read other chunks at the same time.

              channels ->
    in    ┌────────┬────────┐
     |    │ thread │ thread │  a chunk: consecutive rows
     v    ├────────┼────────┤
          │ thread │ thread │  `lanes`: chunks that the program reads at the same time
          └────────┴────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.devices import target_gpu
from palladion.kernels.types import Interpret

CHUNK_ROWS: Final = 16
"""Loads that a thread has in flight, with up to eight warps: 64 KiB per multiprocessor."""

LOAD_BYTES: Final = 16
"""Bytes of one load of a thread."""

WARP: Final = 32
"""Threads of a warp."""

REGISTERS: Final = 65536
"""32-bit registers of a multiprocessor."""

MAX_WARPS: Final = 16
"""Warps per multiprocessor that suffice to keep memory busy: they too have 64 KiB in flight."""

MIN_WARPS: Final = 2
"""Fewest warps per program, if there are chunks for them, however many programs a multiprocessor has."""


def lanes(block_bytes: int, num_warps: int) -> int:
    """Returns the chunks that a program reads at the same time.

    Args:
      block_bytes: bytes of a row of the program's block.
      num_warps: warps per program.
    """
    return max(1, WARP * num_warps * LOAD_BYTES // block_bytes)


def chunk_rows(num_warps: int, parts: int) -> int:
    """Returns the most rows of a chunk, a power of two; with more than eight warps a thread has fewer registers.

    Args:
      num_warps: warps per program.
      parts: products per result, two if gated; each has a chunk of that many rows.
    """
    return (CHUNK_ROWS if num_warps <= MAX_WARPS // 2 else CHUNK_ROWS // 2) // parts


def busiest(channels: int, block: int, multiprocessors: int) -> int:
    """Returns the channels of the multiprocessor that has the most, for blocks of a given width."""
    return block * pl.cdiv(pl.cdiv(channels, block), multiprocessors)


def even_block(channels: int, blocks: Sequence[int], multiprocessors: int, enough: float) -> int:
    """Returns the widest block that spreads channels evenly enough over the multiprocessors.

    Args:
      channels: channels of the result.
      blocks: block widths to choose from, the widest first.
      multiprocessors: number of multiprocessors.
      enough: accepted ratio of the busiest multiprocessor's channels to the fewest that any of the blocks gives it.
    """
    most_channels = {block: busiest(channels, block, multiprocessors) for block in blocks}
    return next(block for block, most in most_channels.items() if most <= enough * min(most_channels.values()))


def warps_for(trips: Callable[[int], int], programs: int, registers: int) -> int:
    """Returns the most warps per program that all have chunks and let all programs of a multiprocessor be resident.

    Args:
      trips: returns the loop iterations that a number of warps takes.
      programs: programs per multiprocessor.
      registers: registers per thread, approximately.
    """
    most = min(REGISTERS // (WARP * registers), MAX_WARPS) // programs
    num_warps = 1
    while trips(num_warps) > 1 and (num_warps < MIN_WARPS or 2 * num_warps <= most):
        num_warps *= 2
    return num_warps


def for_nvidia(interpret: Interpret) -> bool:
    """Returns whether a kernel is compiled for an NVIDIA GPU, so that it may contain PTX."""
    return not interpret and target_gpu() is not None


def together(loaded: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns its arguments unchanged, and forces all loads to be issued before the first result is used.

    By default NVIDIA's assembler places each load right before its use, to save registers: a thread then waits for
    memory repeatedly, with two loads in flight instead of 16. The assembler does not move loads over a barrier. A
    barrier of one warp, whose threads run in lockstep anyway, takes no time, and as an operation on loaded numbers it
    stays after the loads. The assembler drops it if no load follows in the loop: load something small after it.
    """
    first, *rest = loaded
    per_register = 4 // first.dtype.itemsize
    (first,) = plgpu.elementwise_inline_asm(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
        args=loaded,
        constraints=",".join(["=r"] + ["r"] * len(loaded)),
        pack=per_register,
        result_shape_dtypes=[jax.ShapeDtypeStruct(first.shape, first.dtype)],
    )
    return [first, *rest]


def inverse_root(squares: jax.Array, features: int, eps: float) -> jax.Array:
    """Returns the factor of RMS normalization, given the sum of a row's squares."""
    return jax.lax.rsqrt(squares / features + eps)
