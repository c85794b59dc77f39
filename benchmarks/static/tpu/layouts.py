"""XLA's layouts of integer arrays in a TPU's memory."""

from __future__ import annotations

import re

import numpy as np


def words_in_memory(value: np.ndarray, layout: str) -> tuple[int, ...] | None:
    """Returns the 32-bit words of an integer array in HBM; None if its layout is not supported.

    Args:
      value: the array.
      layout: the layout as XLA writes it: dimensions from minor to major, tiles, and tiles in these tiles for narrow
        numbers, "2,1,0:T(8,128)(4,1)". An array without a tile is laid out row by row.
    """
    order, _, tiles = layout.partition(":")
    found = re.fullmatch(r"(?:T\((?:(\d+),)?(\d+)\)(?:\((\d+),1\))?)?(?:S\(\d+\))?", tiles)
    row_major = order in ("", ",".join(str(axis) for axis in reversed(range(value.ndim))))
    if found is None or not row_major or value.dtype.itemsize not in (1, 2, 4):
        return None
    rows, columns, packed = (int(size or 1) for size in found.groups())
    array = value.reshape((1,) * (2 - value.ndim) + value.shape) if value.ndim < 2 else value
    padding = [(0, 0)] * (array.ndim - 2) + [(0, -array.shape[-2] % rows), (0, -array.shape[-1] % columns)]
    array = np.pad(array, padding)
    height, width = array.shape[-2:]
    array = array.reshape(-1, height // rows, rows // packed, packed, width // columns, columns)
    # Order: tile, group of rows that share words, column, row of the group.
    data = array.transpose(0, 1, 4, 2, 5, 3).tobytes()
    return tuple(np.frombuffer(data + bytes(-len(data) % 4), np.uint32).tolist())
