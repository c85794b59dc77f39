"""The search for block sizes: coarsely over the whole space first, then around the best that were found.

A `CostModel` says how long a call takes with given block sizes (`costs.py`), and rejects those that do not compile or
compute a wrong result. The best block sizes then take turns with the heuristic's, and must beat these beyond noise.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from palladion.benchmarks.measure.bench import DeviceLostError
from palladion.benchmarks.measure.parallel import cores
from palladion.benchmarks.measure.samples import Samples, ratio
from palladion.kernels.search_space import Space
from palladion.kernels.tuning import LEAST_GAIN

COARSE: Final = 0.4
"""Share of the budget that is spent on configs from the whole space."""

FEW: Final = 3
"""Best configs around which the search goes on."""

TOGETHER: Final = min(max(4, cores()), 16)
"""Configs that are tried together, in turns: compiled and judged on all cores, and timed in one trace of the profiler.

Most of the time is for compiling: a config that was compiled beside others and not timed would be time lost.
"""

FINALISTS: Final = 2
"""Best configs that are compared with the heuristic's once more."""

AGREEMENT: Final = 0.8
"""Share of the rounds in which a config must be faster for its speedup to count."""


class RejectedError(Exception):
    """Block sizes do not compile, or compute a wrong result; the message says which."""


class Contender(NamedTuple):
    """An implementation of an operation with block sizes.

    Attributes:
      implementation: its name.
      config: the block sizes; None where it has none.
    """

    implementation: str
    config: Any


class ContendersLostError(DeviceLostError):
    """Contenders have left the device useless for this process.

    Args:
      contenders: those that may be why.
      message: the device's.
    """

    def __init__(self, contenders: Sequence[Contender], message: str) -> None:
        super().__init__(message)
        self.contenders = tuple(contenders)


@dataclasses.dataclass(frozen=True)
class Trial:
    """Block sizes that were tried.

    Attributes:
      config: the block sizes.
      seconds: seconds of a call; None where they were rejected.
      reason: why they were rejected, or empty.
    """

    config: Any
    seconds: float | None
    reason: str = ""


class CostModel(Protocol):
    """Says how long a call takes.

    Attributes:
      origin: "measured", "estimated" or "interpreted".
      clock: what measured times are of, "device" or "wall"; empty for estimates.
    """

    origin: str
    clock: str

    def samples(self, contenders: Sequence[Contender], *, thorough: bool) -> dict[Contender, Samples | RejectedError]:
        """Times contenders in turns, with more samples where they are to be compared with each other (`thorough`).

        Raises:
          ContendersLostError: the device does nothing any more.
        """


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a search, which begin to count at once.

    Attributes:
      trials: maximum number of new trials.
      seconds: time after which no trial begins.
      begin: `time.perf_counter()` at the beginning.
    """

    trials: int
    seconds: float
    begin: float = dataclasses.field(default_factory=time.perf_counter)

    def left(self, tried: int, share: float = 1.0) -> int:
        """Returns how many trials may begin, after so many, before this share of the budget is spent."""
        late = time.perf_counter() - self.begin >= share * self.seconds
        return 0 if late else max(math.ceil(share * self.trials) - tried, 0)


def search(
    name: str,
    space: Space,
    cost_model: CostModel,
    budget: Budget,
    *,
    known: Mapping[Any, Trial] | None = None,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:
    """Tries block sizes: the heuristic's, then some from all over the space, then those around the best so far.

    Args:
      name: the implementation's name.
      space: the block sizes that may be tried.
      cost_model: says what they cost.
      budget: limits of the search.
      known: trials of an earlier search, by config; they are not repeated.
      on_trial: called with each new trial.

    Raises:
      ContendersLostError: the device does nothing any more; `on_trial` was called with the configs that may be why.

    Returns:
      All trials, including those of `known` on the way.
    """
    trials: dict[Any, Trial] = {}
    earlier = known or {}
    tried = 0
    while True:
        coarse = budget.left(tried, COARSE)
        whole = itertools.chain([space.start], space.spread())
        configs = _untried(whole if coarse else _around(space, trials), trials)
        batch = configs[: min(TOGETHER, coarse or budget.left(tried))]
        if not batch:
            return list(trials.values())
        trials |= {config: earlier[config] for config in batch if config in earlier}
        new = [Contender(name, config) for config in batch if config not in earlier]
        try:
            found = cost_model.samples(new, thorough=False) if new else {}
        except ContendersLostError as error:
            for contender in error.contenders:  # the next search skips them
                on_trial(Trial(contender.config, None, str(error)))
            raise
        for contender, samples in found.items():
            if isinstance(samples, RejectedError):
                trial = Trial(contender.config, None, str(samples))
            else:
                trial = Trial(contender.config, samples.median)
            trials[contender.config] = trial
            on_trial(trial)
        tried += len(new)


def _untried(configs: Iterator[Any], trials: Mapping[Any, Trial]) -> list[Any]:
    """Returns the next configs without a trial, as many as are tried together."""
    found: dict[Any, None] = {}
    for config in configs:
        if config not in trials:
            found[config] = None
        if len(found) == TOGETHER:
            break
    return list(found)


def _around(space: Space, trials: Mapping[Any, Trial]) -> Iterator[Any]:
    """Yields configs around the best few, ring by ring, and then from all over the space."""
    rings = [space.rings(trial.config) for trial in best_of(trials.values(), FEW)]
    for together in zip(*rings, strict=True):
        yield from itertools.chain(*together)
    yield from space.spread()


def best_of(trials: Iterable[Trial], number: int) -> list[Trial]:
    """Returns the fastest of the trials that were not rejected, the fastest first."""
    timed = [(one.seconds, place, one) for place, one in enumerate(trials) if one.seconds is not None]
    return [one for _, _, one in heapq.nsmallest(number, timed)]


def finalists(name: str, space: Space, trials: Sequence[Trial]) -> list[Contender]:
    """Returns the best block sizes and the heuristic's, which are to be compared; none if all were rejected."""
    best = [trial.config for trial in best_of(trials, FINALISTS)]
    return [Contender(name, config) for config in dict.fromkeys([*best, space.start])] if best else []


def settle(samples: Mapping[Contender, Samples], start: Contender) -> Contender:
    """Returns the fastest of the finalists, or the heuristic's block sizes if none is certainly faster than these.

    Args:
      samples: times of finalists that took turns.
      start: the heuristic's block sizes.
    """
    best = min(samples, key=lambda contender: samples[contender].median)
    certain = start not in samples or certain_gain(samples[best], samples[start]) >= LEAST_GAIN
    return best if certain else start


def accepted(samples: Mapping[Contender, Samples | RejectedError]) -> dict[Contender, Samples]:
    """Returns the contenders that were not rejected."""
    return {one: each for one, each in samples.items() if isinstance(each, Samples)}


def certain_gain(better: Samples, start: Samples) -> float:
    """Returns the median speedup over the rounds; at most 1 unless four rounds in five agree that it is one."""
    rounds = [old / new for new, old in zip(better.seconds, start.seconds, strict=False)]
    agree = sum(1 for one in rounds if one > 1) >= AGREEMENT * len(rounds)
    return statistics.median(rounds) if agree else min(1.0, ratio(start, better))
