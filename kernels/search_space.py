"""Block sizes that the tuner may try, and the properties of a problem that they depend on."""

from __future__ import annotations

import dataclasses
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

    def neighbours(self, config: Any) -> Iterator[Any]:
        """Yields configs that differ by one step along one axis, then by two steps, which skip a bad value."""
        for steps in (1, 2):
            for name in self.axes:
                values = self.values(name)
                index = values.index(getattr(config, name))
                for other in (index + steps, index - steps):
                    if not 0 <= other < len(values):
                        continue
                    try:
                        changed = dataclasses.replace(config, **{name: values[other]})
                    except ValueError:
                        continue  # the config rejects this combination
                    if self.fits(changed):
                        yield changed
