"""Block sizes of the tensor-core form of quantized_matmul on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Final

import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.devices import Gpu
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton import matrix as gpu_matrix
from palladion.kernels.quantized_matmul.triton.config import MIN_BLOCK, Config

SKINNY_ROWS: Final = 64
"""Rows up to which memory is what a multiplication waits for; their products are scaled, not the weights."""

TILED_TILE: Final = 64
"""Weights along `in` of a trip where rows are many: with twice as many of x there would be room for one program."""

MAX_STAGES: Final = 4


PROGRAMS: Final = 2
"""Programs per multiprocessor that together keep enough bytes in flight."""


def heuristic(problem: Problem, gpu: Gpu) -> Config:
    """Returns blocks that suit the rows, and splits that keep all multiprocessors busy."""
    p = problem
    if p.rows <= SKINNY_ROWS or p.dot_dtype == "float32":
        # float32 rows are three numbers to hold and to multiply by each.
        narrow = p.x_dtype == "float32" and p.quantize_x is None
        block_rows = min(max(pl.next_power_of_2(p.rows), MIN_BLOCK), SKINNY_ROWS // 2 if narrow else SKINNY_ROWS)
        block_out = 64 if narrow or (p.gated and block_rows > 32) else 128
        config = Config("tensor_core", block_rows, block_out, 64 if narrow else 128, splits=1)
    else:
        block_rows = 128 if p.rows > 128 or not p.gated else 64
        scales_weights = gpu_matrix.can_scale_weights(p, TILED_TILE)
        config = Config(
            "tensor_core",
            block_rows,
            128 // p.parts,
            TILED_TILE,
            1,
            num_warps=8 // p.parts,
            scales_weights=scales_weights,
        )
    config = dataclasses.replace(config, num_stages=_stages(p, config, gpu))
    return dataclasses.replace(config, splits=_splits(p, config, gpu))


def _stages(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Tiles in flight: as many as `MAX_STAGES`, and as leave shared memory for a second program."""
    room = min(gpu.shared_bytes // 2, gpu.program_shared_bytes) * 3 // 4
    return min(max(room // tile_bytes(problem, config), 2), MAX_STAGES)


def tile_bytes(problem: Problem, config: Config) -> int:
    """Shared memory that a tile of the tensor-core form takes on its way: codes, and the rows of x that they meet."""
    p = problem
    x = config.block_rows * jnp.dtype(gpu_matrix.operand(p) if p.x_dtype != "float32" else "float32").itemsize
    codes = config.block_out * p.parts // (2 if p.scheme.packed else 1)
    return config.tile * (x + codes)


def loaded_bytes(problem: Problem, config: Config) -> int:
    """Shared memory that what is loaded ahead takes, at least: a tile for each stage but the one at work."""
    return (config.num_stages - 1) * tile_bytes(problem, config)


def _splits(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Returns the shares of `in` that give every multiprocessor its programs."""
    p = problem
    programs = pl.cdiv(p.rows, config.block_rows) * pl.cdiv(p.result_features, config.block_out)
    return splits_for(pl.cdiv(p.in_features, config.tile), programs, PROGRAMS, gpu)


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
