"""Block sizes of the tensor-core form of quantized_matmul on a GPU.

Measured on an H200, int8 by 16 rows: a block of 64 channels with tiles of 256 bytes and as many splits as give each
multiprocessor about two programs was the best of a dozen in a kernel of this shape (4096 -> 28672: no splits,
14336 -> 4096: 4 of them). The other choices follow from instructions of the compiled loops for each byte of codes, of
which an H200 has time for 7 where memory is the bound: README.md lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.devices import Gpu, gpu_to_plan_for
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import matrix as gpu_matrix
from palladion.kernels.quantized_matmul.triton.config import MIN_BLOCK, Config
from palladion.kernels.search_space import Space

SKINNY_ROWS: Final = 64
"""Rows up to which memory is the bound."""

READ: Final = 64
"""Least bytes of a group for which products are scaled in 16-bit results: shorter reads waste memory's sectors."""

MAX_STAGES: Final = 4
"""The most tiles in flight that the heuristic chooses."""

PROGRAMS: Final = 2
"""Programs of a multiprocessor that together keep enough bytes in flight."""

OPERAND_REGISTERS: Final = 128
"""The most registers of a thread for operands of a tile: as many remain for sums, addresses and codes."""


def heuristic(problem: Problem, gpu: Gpu) -> Config:
    """Returns blocks that suit the rows, and splits that keep all multiprocessors busy."""
    p = problem
    if p.rows > SKINNY_ROWS and p.dot_dtype != "float32":
        return _tiled(p, gpu)
    block_rows = min(max(pl.next_power_of_2(p.rows), MIN_BLOCK), SKINNY_ROWS)
    per_byte = 2 if p.scheme.packed else 1
    is_short = (p.scheme.group_size or p.in_features) < READ * per_byte
    scales_weights = gpu_matrix.can_scale_weights(p) and (is_short or block_rows == SKINNY_ROWS)
    # Scaled weights of 128 channels take more registers than Triton leaves a program of sm_100.
    is_wide = block_rows == SKINNY_ROWS or (p.scheme.packed and not (scales_weights and gpu.compute_capability >= 100))
    block_out = 128 if is_wide and not p.gated else 64
    if p.x_dtype == "float32" and p.quantize_x is None:  # rows are three numbers to hold and to multiply by each
        block_rows, block_out, tile = min(block_rows, SKINNY_ROWS // 2), 64, 64
    else:
        wide = block_out * p.parts == 128 and (scales_weights or per_byte == 1)
        tile = 128 if wide else 256
    config = _config(block_rows, block_out, tile, 4, scales_weights)
    return _with_splits(p, config, gpu)


def _tiled(problem: Problem, gpu: Gpu) -> Config:
    """Returns blocks for rows that tensor cores are busy with: narrow ones before splits.

    A program converts codes and waits for tensor cores in turn, so that two of them keep both busy.
    """
    p, block_rows = problem, 64 if problem.gated else 128  # a gated program has the sums of two products
    programs = pl.cdiv(p.rows, block_rows) * pl.cdiv(p.result_features, 128)
    block_out = 64 if programs < gpu.multiprocessors else 128
    config = _config(block_rows, block_out, 128, block_out // 16, gpu_matrix.can_scale_weights(p))
    return _with_splits(p, config, gpu)


def _config(block_rows: int, block_out: int, tile: int, num_warps: int, scales_weights: bool) -> Config:
    return Config(
        form="tensor_core",
        block_rows=block_rows,
        block_out=block_out,
        tile=tile,
        splits=1,
        num_warps=num_warps,
        scales_weights=scales_weights,
    )


def _with_splits(problem: Problem, config: Config, gpu: Gpu) -> Config:
    """Returns a config with splits for `PROGRAMS` of a multiprocessor, and the stages that fit."""
    p = problem
    blocks = pl.cdiv(p.rows, config.block_rows) * pl.cdiv(p.result_features, config.block_out)
    splits = splits_for(pl.cdiv(p.in_features, config.tile), blocks, PROGRAMS, gpu)
    return dataclasses.replace(config, splits=splits, num_stages=_stages(p, config, gpu))


def space(problem: Problem, start: Config) -> Space:
    """Returns the block sizes that the tuner may try, narrow blocks without splits among them."""
    most, tiles = gpu_to_plan_for().program_shared_bytes, pl.cdiv(problem.in_features, start.tile)
    axes: dict[str, Sequence[Any]] = {
        "splits": [1 << n for n in range(5) if 1 << n <= tiles],
        "block_out": (16, 32, 64, 128, 256),
        "tile": (128, 256, 512),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (2, 3, 4),
        "merge": ("launch", "last"),
        "scales_weights": (False, True) if gpu_matrix.can_scale_weights(problem) else (False,),
    }

    def fits(config: Config) -> bool:
        # A warp multiplies 16 channels at a time; warps beyond that would convert the same codes.
        warp = config.block_out // config.num_warps
        registers = config.block_out * config.tile // (64 * config.num_warps)
        return (
            warp in (MIN_BLOCK, 2 * MIN_BLOCK)
            and registers <= OPERAND_REGISTERS
            and loaded_bytes(problem, config) <= most
            and (config.splits > 1 or config.merge == start.merge)
        )

    return Space(start, axes, fits)


def _stages(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Returns the tiles in flight: as many as `MAX_STAGES`, and as leave shared memory for a second program."""
    room = min(gpu.shared_bytes // 2, gpu.program_shared_bytes) * 3 // 4
    return min(max(room // tile_bytes(problem, config), 2), MAX_STAGES)


def tile_bytes(problem: Problem, config: Config) -> int:
    """Returns the shared memory that a tile takes on its way: codes, and the rows of x that they meet."""
    p = problem
    x = config.block_rows * jnp.dtype(gpu_matrix.operand(p) if p.x_dtype != "float32" else "float32").itemsize
    codes = config.block_out * p.parts // (2 if p.scheme.packed else 1)
    return config.tile * (x + codes)


def loaded_bytes(problem: Problem, config: Config) -> int:
    """Returns the least shared memory of what is loaded ahead: a tile for each stage but the one at work."""
    return (config.num_stages - 1) * tile_bytes(problem, config)


def splits_for(trips: int, programs: int, wanted: int, gpu: Gpu) -> int:
    """Returns the fewest shares of the trips along `in` that fill the GPU, none of them empty.

    Every split writes and reads a float32 for each result; that is little beside the codes of its share.

    Args:
      trips: iterations along `in`.
      programs: programs without splits.
      wanted: programs per multiprocessor.
      gpu: the device.
    """
    splits = min(max(wanted * gpu.multiprocessors // programs, 1), trips)
    return pl.cdiv(trips, pl.cdiv(trips, splits))
