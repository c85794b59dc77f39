"""Samples of the time of a call, and their statistics."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Final

NOISY: Final = 0.15
"""Spread of the samples above which a measurement is called noisy."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Times of a contender's calls.

    Attributes:
      seconds: seconds of a call, one entry for each sample, in the order in which they were taken.
      calls: calls in a sample.
    """

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        """20th percentile of the samples, in seconds."""
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        """80th percentile of the samples, in seconds."""
        return quantile(self.seconds, 0.8)

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / self.median

    @property
    def noisy(self) -> bool:
        """Whether the samples differ so much that their median says little."""
        return self.spread > NOISY


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the value below which a share of the values lies, linearly interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(numerator: Samples, denominator: Samples) -> float:
    """Returns how many times as long a call takes as another: the median over the rounds that both took part in."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=False)
    return statistics.median(one / other for one, other in pairs)
