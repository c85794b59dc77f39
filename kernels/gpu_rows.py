"""How a product of one row, or a few, is cut for a GPU that adds and multiplies it without tensor cores.

A program takes a block of channels, of all of `in`: whoever has all of a row's products adds them up, and leaves no
launch for it. A thread takes chunks of up to 16 rows of a weight, of as many channels as 16 bytes hold; threads beside
each other share a row, and what is left of them takes other rows at the same time.

              channels ->
    in    ┌────────┬────────┐
     |    │ thread │ thread │  a chunk: rows below each other
     v    ├────────┼────────┤
          │ thread │ thread │  as many chunks at a time as there are threads: `lanes`
          └────────┴────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.devices import target_gpu

CHUNK_ROWS: Final = 16
"""Loads of a thread that are on their way together, in eight warps or fewer: 64 KiB for a multiprocessor."""

LOAD_BYTES: Final = 16
"""What a thread loads at a time."""

WARP: Final = 32

REGISTERS: Final = 65536
"""Of a multiprocessor."""

MAX_WARPS: Final = 16
"""Of a multiprocessor, which are enough to keep its memory busy: again 64 KiB are on their way to them."""

MIN_WARPS: Final = 2
"""Of a program, where there is work for them, however many programs a multiprocessor has."""


def lanes(block_bytes: int, num_warps: int) -> int:
    """Chunks that a program works on at a time.

    Args:
      block_bytes: of a row of a program's block.
      num_warps: of the program.
    """
    return max(1, WARP * num_warps * LOAD_BYTES // block_bytes)


def chunk_rows(num_warps: int, parts: int) -> int:
    """Rows of a chunk at most, a power of two, of each part; with more than eight warps a thread has fewer registers.

    Args:
      num_warps: of a program.
      parts: products that rows are read for, two where a gate and an up are.
    """
    return (CHUNK_ROWS if num_warps <= MAX_WARPS // 2 else CHUNK_ROWS // 2) // parts


def busiest(channels: int, block: int, multiprocessors: int) -> int:
    """Channels of a multiprocessor that has the most, of blocks of that many."""
    return block * pl.cdiv(pl.cdiv(channels, block), multiprocessors)


def even_block(channels: int, blocks: Sequence[int], multiprocessors: int, enough: float) -> int:
    """The widest of some blocks by which channels are spread evenly enough.

    Args:
      channels: of the result.
      blocks: the widest first.
      multiprocessors: over which channels are spread.
      enough: times the channels of the busiest multiprocessor, beside the fewest that any of the blocks gives it.
    """
    of_busiest = {block: busiest(channels, block, multiprocessors) for block in blocks}
    return next(block for block, most in of_busiest.items() if most <= enough * min(of_busiest.values()))


def warps_for(trips: Callable[[int], int], programs: int, registers: int) -> int:
    """Warps of a program: as many as have a chunk to do, and as let all programs of a multiprocessor run at a time.

    Args:
      trips: that so many warps take.
      programs: of a multiprocessor.
      registers: that a thread takes, about.
    """
    most = min(REGISTERS // (WARP * registers), MAX_WARPS) // programs
    num_warps = 1
    while trips(num_warps) > 1 and (num_warps < MIN_WARPS or 2 * num_warps <= most):
        num_warps *= 2
    return num_warps


def for_nvidia(interpret: Any) -> bool:
    """Whether a kernel is compiled, not interpreted, and for an NVIDIA GPU: its instructions may be called by name."""
    return not interpret and target_gpu() is not None


def together(loaded: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays that were loaded, as they are; all of them are on their way before the first one is used.

    Left alone, NVIDIA's assembler puts each load right before its use, which saves registers: a thread then waits for
    the memory again and again, with two loads on their way and not 16. It does not move loads over a barrier. That of
    a warp, whose threads run in step anyhow, takes no time; and as an operation on what was loaded it stays behind the
    loads. It is dropped where no load follows it in the loop: load something small after it that is needed then.
    """
    first, *rest = loaded
    pack = 4 // first.dtype.itemsize  # numbers of a register
    (first,) = plgpu.elementwise_inline_asm(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
        args=loaded,
        constraints=",".join(["=r"] + ["r"] * len(loaded)),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(first.shape, first.dtype)],
    )
    return [first, *rest]


def inverse_root(squares: jax.Array, features: int, eps: float) -> jax.Array:
    """By what a normalized row is multiplied, given the sum of its squares."""
    return jax.lax.rsqrt(squares / features + eps)
