"""Bytes that a Pallas kernel moves, counted from the kernel as it is written, without the compiler.

Two things move memory. The pipeline fetches a block of an input when its index changes from one grid step to the next,
and writes a block of an output before its index changes: so the index maps are evaluated over the grid. And a kernel
may start transfers itself: so its scalar operations are interpreted, step by step (`interpreter.py`).

Bytes are those of the elements. The chip moves more where XLA pads arrays to whole tiles; the number of transfers is
the same. `roofline.py` compares both with the compiled kernel.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from palladion.benchmarks.static.kernel_calls import KernelCall, item_bits
from palladion.benchmarks.static.opaque import Opaque, Undecided
from palladion.benchmarks.static.tpu.interpreter import Interpreter, MemoryArray
from palladion.benchmarks.static.tpu.transfers import Traffic

GridStep = tuple[int, ...]
"""Grid indices of a step."""


def count_traffic(call: KernelCall, *, cores: int = 1) -> dict[str, Traffic]:
    """Counts the transfers of a kernel by direction ("hbm_to_vmem", …), for all cores together.

    Args:
      call: the kernel's call.
      cores: number of cores among which parallel dimensions of the grid are divided.

    Raises:
      Undecided: the transfers depend on something that is not known.
    """
    grid = [_bound(bound) for bound in _grid(call)]
    counter = _Counter(call, grid)
    for steps in divide_among_cores(grid, call.semantics, cores):
        counter.run(steps)
    return dict(counter.traffic)


def divide_among_cores(grid: Sequence[int], semantics: Sequence[str], cores: int) -> list[list[GridStep]]:
    """Returns the grid steps of each core, as the compiler divides them.

    It divides the first parallel dimension whose size is a multiple of the number of cores; if there is none, all
    parallel dimensions together, and then cores run some steps twice.
    """
    steps = list(itertools.product(*map(range, grid)))
    parallel = [axis for axis, one in enumerate(semantics) if "parallel" in one]
    divided = [axis for axis in parallel if grid[axis] % cores == 0][:1] or parallel
    count = math.prod(grid[axis] for axis in divided)
    if cores == 1 or count < 2:
        return [steps]
    share = -(-count // cores)
    indices = itertools.product(*(range(grid[axis]) for axis in divided))
    numbers = {index: number for number, index in enumerate(indices)}

    def steps_of(core: int) -> list[GridStep]:
        first = min(core * share, count - share)
        own = range(first, first + share)
        return [step for step in steps if numbers[tuple(step[axis] for axis in divided)] in own]

    return [steps_of(core) for core in range(cores)]


def _grid(call: KernelCall) -> list[Any]:
    """Returns the bounds of the grid; those that are decided at run time are the kernel's first arguments."""
    dynamic = iter(call.values)
    return [bound if isinstance(bound, int) else next(dynamic) for bound in call.parameters["grid_mapping"].grid]


def _bound(bound: Any) -> int:
    if bound is None:
        raise Undecided("it depends on a bound of the grid that was not given")
    return int(np.asarray(bound).reshape(()))


class _Counter:
    """Steps through the grid of a kernel and counts its transfers.

    Attributes:
      traffic: transfers so far, by direction.
    """

    def __init__(self, call: KernelCall, grid: Sequence[int]) -> None:
        self.traffic: dict[str, Traffic] = collections.defaultdict(Traffic)
        self._interpreter = Interpreter(grid, self._count)
        mapping = call.parameters["grid_mapping"]
        self._kernel = call.parameters["jaxpr"]
        first = mapping.num_dynamic_grid_bounds
        last = first + mapping.num_index_operands
        self._arrays = [MemoryArray.of(variable.aval) for variable in self._kernel.invars]
        for array, value in zip(self._arrays, [*call.values[first:], *[None] * len(call.results)], strict=False):
            array.values = value
        self._scalars = self._arrays[: last - first]
        self._blocks = list(zip(mapping.block_mappings, self._arrays[last - first :], strict=False))
        self._whole_values = [array.values for _, array in self._blocks]
        self._inputs = len(self._blocks) - len(call.results)

    def run(self, steps: Sequence[GridStep]) -> None:
        """Runs these grid steps, as one core does."""
        for number, (block, array) in enumerate(self._blocks):
            if array.space != "hbm":
                self._count_blocks(block, array, number, steps)
        if not self._interpreter.has_effects(self._kernel):
            return
        for step in steps:
            self._interpreter.index = step
            for number, (block, array) in enumerate(self._blocks):
                if array.space == "smem":
                    array.values = self._block_values(block, number, step)
            self._interpreter.run(self._kernel, self._arrays)

    def _count_blocks(self, block: Any, array: MemoryArray, number: int, steps: Sequence[GridStep]) -> None:
        """Counts the pipeline's transfers of an argument: a block whenever its index changes."""
        indices = [self._block_index(block, step) for step in steps]
        direction = f"hbm_to_{array.space}" if number < self._inputs else f"{array.space}_to_hbm"
        for before, index in itertools.pairwise([None, *indices]):
            if index != before:
                sizes = self._block_sizes(block, index or ())
                self._count(direction, math.prod(sizes) * item_bits(block.array_aval.dtype) // 8)

    def _block_index(self, block: Any, step: GridStep) -> tuple[int, ...]:
        """Evaluates the index map."""
        closed = block.index_map_jaxpr
        index = self._interpreter.run(closed.jaxpr, [*step, *self._scalars], closed.consts)
        for one in index:
            if type(one) is Opaque:
                raise Undecided(one.reason)
        return tuple(index)

    def _block_sizes(self, block: Any, index: Sequence[int]) -> list[int]:
        """Returns the size of the part of a block inside the array, along each dimension."""
        sizes = []
        for dimension, place, whole in zip(block.block_shape, index, block.array_aval.shape, strict=True):
            size = _block_size(dimension)
            sizes.append(min(size, whole - _first(dimension, place)))
        return sizes

    def _block_values(self, block: Any, number: int, step: GridStep) -> np.ndarray | None:
        """Returns the values of a block; None where they are not known."""
        whole = self._whole_values[number]
        if whole is None:
            return None
        parts: list[Any] = []
        for dimension, place in zip(block.block_shape, self._block_index(block, step), strict=True):
            first = _first(dimension, place)
            squeezed = "Squeezed" in type(dimension).__name__
            parts.append(first if squeezed else slice(first, first + _block_size(dimension)))
        return np.asarray(whole[tuple(parts)])

    def _count(self, direction: str, size: int) -> None:
        self.traffic[direction].transfers += 1
        self.traffic[direction].bytes += size


def _block_size(dimension: Any) -> int:
    """Returns the elements of a block along a dimension of its block shape."""
    if dimension is None or "Squeezed" in type(dimension).__name__:
        return 1
    return int(getattr(dimension, "block_size", dimension))


def _first(dimension: Any, place: int) -> int:
    """Returns the first element of a block along a dimension, given what the index map returns for it."""
    return place * _block_size(dimension) if "Blocked" in type(dimension).__name__ else place
