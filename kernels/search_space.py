"""Block sizes that the tuner may try, and the properties of a problem that they depend on."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TuningKey:
    """Properties of a problem that its best block sizes depend on.

    Attributes:
      kind: properties in which a problem and an entry must agree: dtypes, layouts, fixed sizes.
      sizes: sizes in which they may differ, by name.
    """

    kind: str
    sizes: Mapping[str, int]

    def distance(self, other: TuningKey) -> float:
        """Returns the sum of |log2| of the ratios of sizes; infinity for another kind."""
        if self.kind != other.kind or self.sizes.keys() != other.sizes.keys():
            return math.inf
        pairs = ((size, other.sizes[name]) for name, size in self.sizes.items())
        return sum(abs(math.log2(max(size, 1) / max(other_size, 1))) for size, other_size in pairs)


@dataclasses.dataclass(frozen=True)
class Space:
    """Block sizes that the tuner may try for a problem; `config in space` tells whether one is among them.

    Attributes:
      start: block sizes of the heuristic; fields without an axis keep their values.
      axes: values to try for a field, in order, besides its value in `start`.
      fits: returns whether the kernel accepts a combination.
    """

    start: Any
    axes: Mapping[str, Sequence[Any]]
    fits: Callable[[Any], bool] = lambda _: True

    def values(self, field: str) -> list[Any]:
        """Returns the values that a field may take, in ascending order."""
        return sorted({getattr(self.start, field), *self.axes.get(field, ())})

    def __contains__(self, config: Any) -> bool:
        if type(config) is not type(self.start):
            return False
        fields = [field.name for field in dataclasses.fields(config)]
        return all(getattr(config, name) in self.values(name) for name in fields) and self.fits(config)

    def spread(self) -> Iterator[Any]:
        """Yields every config that fits; any number of the first ones is spread evenly over the space.

        Axes of words, such as the form of a kernel, come first: each combination of them has its turn, however few
        configs of it fit. Within it, see `_sequence`.
        """
        words = [axis for axis in self.axes if isinstance(self.values(axis)[0], str)]
        kinds = list(itertools.product(*map(self.values, words)))
        turns = [
            self._sequence(dict(zip(words, kind, strict=True)), number, len(kinds)) for number, kind in enumerate(kinds)
        ]
        while turns:
            for turn in list(turns):
                config = next(turn, None)
                if config is None:
                    turns.remove(turn)
                else:
                    yield config

    def _sequence(self, fixed: Mapping[str, Any], number: int, step: int) -> Iterator[Any]:
        """Yields every config that fits and has the fixed values.

        The other axes take their values in the order of a low-discrepancy sequence (M. Roberts' R sequence): equally
        often, and in ever new combinations. What the sequence leaves out follows.

        Args:
          fixed: values of some axes.
          number: first number of the sequence.
          step: distance to the next, so that several calls divide the sequence.
        """
        axes = [axis for axis in self.axes if axis not in fixed]
        values = [self.values(axis) for axis in axes]
        root = 1.5
        for _ in range(50):  # the root of x ** (axes + 1) = x + 1
            root = (1 + root) ** (1 / (len(axes) + 1))
        places = (
            tuple(each[int((0.5 + n / root ** (axis + 1)) % 1 * len(each))] for axis, each in enumerate(values))
            for n in range(number, step * math.prod(map(len, values)), step)
        )
        seen: set[tuple[Any, ...]] = set()
        for chosen in itertools.chain(places, itertools.product(*values)):
            if chosen not in seen:
                seen.add(chosen)
                yield from self._changed(self.start, {**fixed, **dict(zip(axes, chosen, strict=True))})

    def neighbours(self, config: Any) -> Iterator[Any]:
        """Yields the configs of all rings around one."""
        return itertools.chain.from_iterable(self.rings(config))

    def rings(self, config: Any) -> Iterator[Iterator[Any]]:
        """Yields rings of configs around one, the closest first.

        The first ring is a step along one axis. The second is a step along each of two axes: where two fields only
        make up for each other, no single step is better. The third is two steps along one axis, which skip a bad value.
        """
        axes = list(self.axes)
        yield self._moved(config, [{axis: step} for axis in axes for step in (1, -1)])
        pairs = itertools.product(itertools.combinations(axes, 2), itertools.product((1, -1), repeat=2))
        yield self._moved(config, [dict(zip(two, steps, strict=True)) for two, steps in pairs])
        yield self._moved(config, [{axis: step} for axis in axes for step in (2, -2)])

    def _moved(self, config: Any, moves: Sequence[Mapping[str, int]]) -> Iterator[Any]:
        """Yields the configs that fit, for each move the one that it leads to."""
        for move in moves:
            changes: dict[str, Any] = {}
            for axis, step in move.items():
                values = self.values(axis)
                place = values.index(getattr(config, axis)) + step
                if 0 <= place < len(values):
                    changes[axis] = values[place]
            if len(changes) == len(move):
                yield from self._changed(config, changes)

    def _changed(self, config: Any, changes: Mapping[str, Any]) -> Iterator[Any]:
        """Yields the config with other values in some fields, unless it rejects them or does not fit."""
        try:
            changed = dataclasses.replace(config, **changes)
        except ValueError:
            return
        if self.fits(changed):
            yield changed
