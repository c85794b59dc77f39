"""Stacks of matrices that behave as arrays where they can: a shape, and an index of leading dimensions."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from typing import Any, NoReturn, Self

import numpy as np


class MatrixStack(abc.ABC):
    """A matrix, or a stack of them, of which only leading dimensions can be indexed: the last two are stored as codes.

    NumPy's arrays leave `x @ w` to it, and neither NumPy nor JAX converts it to an array in silence.
    """

    __array_ufunc__ = None

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape, the two axes of a matrix last."""

    @abc.abstractmethod
    def select(self, key: tuple[Any, ...]) -> Self:
        """Returns the matrices that an index of leading dimensions selects."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and minimums."""

    @property
    def ndim(self) -> int:
        """Number of dimensions, the two of a matrix included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def check_is_matrix(self) -> None:
        """Raises AttributeError where T, which reverses all axes of an array, is asked of a stack."""
        if self.ndim != 2:
            raise AttributeError(f"T: a stack of shape {self.shape} has none; mT swaps the last two axes")

    def __getitem__(self, index: Any) -> Self:
        """Returns the matrices that an index of leading dimensions selects, or this object where it selects all.

        Raises:
          IndexError: the index selects less than all of the last two dimensions, or is out of bounds.
        """
        key = leading_index(index, self.shape)
        return self.select(key) if key else self

    def __len__(self) -> int:
        if self.ndim == 2:
            raise TypeError(f"a {type(self).__name__} of shape {self.shape} is one matrix: it has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Self]:
        return (self[index] for index in range(len(self)))

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is no dense array: `x @ w` and palladion.quantized_matmul multiply by it, "
            "palladion.dequantize makes it dense"
        )


def leading_index(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns an index of leading dimensions without its whole dimensions at the end; empty where it selects all.

    Args:
      index: whatever stands in the brackets: integers, slices, arrays, None, an ellipsis, or a tuple of them.
      shape: shape of what is indexed; its last two dimensions can only be selected as a whole.

    Raises:
      IndexError: the index selects less than all of the last two dimensions, or is out of bounds.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    ellipses = [n for n, entry in enumerate(entries) if entry is Ellipsis]
    missing = len(shape) - sum(map(_indexed_dimensions, entries))
    if len(ellipses) > 1 or missing < 0:
        raise IndexError(f"[{index}]: accepted: one ellipsis at most, and {len(shape)} indices, for shape {shape}")
    at = ellipses[0] if ellipses else len(entries)
    entries[at : at + 1] = [slice(None)] * missing

    leading = len(shape) - 2
    key: list[Any] = []
    dimension = 0
    for entry in entries:
        after = dimension + _indexed_dimensions(entry)
        if after <= leading:
            if isinstance(entry, int | np.integer) and not -shape[dimension] <= entry < shape[dimension]:
                raise IndexError(f"[{index}]: {entry} is out of bounds for dimension {dimension} of shape {shape}")
            key.append(entry)
        elif not isinstance(entry, slice) or not _is_whole(entry, shape[dimension]):
            raise IndexError(
                f"[{index}]: accepted: an index of the {leading} leading dimensions of shape {shape}; codes of the "
                "last two share bytes and scales, and palladion.dequantize(w) makes an array of them"
            )
        dimension = after
    while key and isinstance(key[-1], slice) and _is_whole(key[-1], shape[len(key) - 1]):
        key.pop()
    return tuple(key)


def _indexed_dimensions(entry: Any) -> int:
    """Returns how many dimensions an entry of an index is for."""
    if entry is None or entry is Ellipsis:
        return 0
    return entry.ndim if getattr(entry, "dtype", None) == np.dtype(bool) else 1


def _is_whole(entry: slice, size: int) -> bool:
    """Returns whether a slice selects a whole dimension."""
    return entry.start in (None, 0) and entry.stop in (None, size) and entry.step in (None, 1)
