"""The search for block sizes: coarsely over the whole space first, then around the best that were found.

A `CostModel` says how long a call takes with given block sizes (`costs.py`), and rejects those that do not compile or
compute a wrong result. The best block sizes must then beat the heuristic's in turns with them, beyond noise (`settle`).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from palladion.benchmarks.measure.bench import DeviceLostError
from palladion.benchmarks.measure.samples import Samples, ratio
from palladion.kernels.search_space import Space
from palladion.kernels.tuning import LEAST_GAIN

COARSE: Final = 0.4
"""Share of the budget that is spent on configs from the whole space."""

FEW: Final = 3
"""Best configs around which the search goes on."""

AHEAD: Final = 32
"""Configs that are announced to the cost model before they are asked for."""

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

    def prepare(self, contenders: Sequence[Contender]) -> None:
        """Announces what is likely to be asked for next, in order; some of it may be compiled ahead."""

    def seconds(self, contender: Contender) -> float:
        """Returns the seconds of a call, or raises RejectedError."""

    def compare(self, contenders: Sequence[Contender]) -> dict[Contender, Samples]:
        """Times contenders in turns, for longer than `seconds`; those that are rejected are left out.

        Raises:
          RejectedError: one of them fails when it is timed.
        """


def search(
    name: str,
    space: Space,
    cost_model: CostModel,
    *,
    spent: Callable[[], float],
    known: Mapping[Any, Trial] | None = None,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:
    """Tries block sizes: the heuristic's, then some from all over the space, then those around the best so far.

    Args:
      name: the implementation's name.
      space: the block sizes that may be tried.
      cost_model: says what they cost.
      spent: returns the share of the budget that is spent; from 1 on no trial begins.
      known: trials of an earlier search, by config; they are not repeated.
      on_trial: called with each new trial.

    Raises:
      DeviceLostError: a config has left the device useless for this process; `on_trial` was called with it.

    Returns:
      All trials, including those of `known` on the way.
    """
    trials: dict[Any, Trial] = {}
    earlier = known or {}

    def attempt(config: Any) -> None:
        if config in earlier:
            trials[config] = earlier[config]
            return
        try:
            trials[config] = Trial(config, cost_model.seconds(Contender(name, config)))
        except RejectedError as error:
            trials[config] = Trial(config, None, str(error))
        except DeviceLostError as error:
            # Reported, so that the next search skips it.
            on_trial(Trial(config, None, str(error)))
            raise
        on_trial(trials[config])

    def announce(configs: Sequence[Any]) -> None:
        cost_model.prepare([Contender(name, config) for config in configs if config not in earlier])

    everything = itertools.chain([space.start], space.spread())
    while spent() < COARSE and (coarse := _untried(everything, trials)):
        announce(coarse)
        for config in coarse:
            if spent() < COARSE:
                attempt(config)
    while spent() < 1 and (nearby := _untried(_around(space, trials), trials)):
        announce(nearby)
        attempt(nearby[0])  # what comes next depends on its time
    return list(trials.values())


def _untried(configs: Iterator[Any], trials: Mapping[Any, Trial]) -> list[Any]:
    """Returns the next configs without a trial, as many as are announced together."""
    found: dict[Any, None] = {}
    for config in configs:
        if config not in trials:
            found[config] = None
        if len(found) == AHEAD:
            break
    return list(found)


def _around(space: Space, trials: Mapping[Any, Trial]) -> Iterator[Any]:
    """Yields configs around the best few, ring by ring, and then from all over the space."""
    rings = [space.neighbours(trial.config) for trial in best_of(trials.values(), FEW)]
    for together in zip(*rings, strict=True):
        yield from itertools.chain(*together)
    yield from space.spread()


def best_of(trials: Iterable[Trial], number: int) -> list[Trial]:
    """Returns the fastest of the trials that were not rejected, the fastest first."""
    accepted = [(one.seconds, place, one) for place, one in enumerate(trials) if one.seconds is not None]
    return [one for _, _, one in heapq.nsmallest(number, accepted)]


def settle(name: str, space: Space, trials: Sequence[Trial], cost_model: CostModel) -> Any:
    """Returns the fastest block sizes in a comparison with the heuristic's; these, if none is certainly faster.

    Args:
      name: the implementation's name.
      space: the block sizes that were tried.
      trials: what `search` returned.
      cost_model: compares them.

    Returns:
      A config, or None if all were rejected.
    """
    finalists = [trial.config for trial in best_of(trials, FINALISTS)]
    contenders = [Contender(name, config) for config in dict.fromkeys([*finalists, space.start])]
    samples = cost_model.compare(contenders) if finalists else {}
    if not samples:
        return None
    best = min(samples, key=lambda contender: samples[contender].median)
    start = samples.get(Contender(name, space.start))
    certain = start is None or certain_gain(samples[best], start) >= LEAST_GAIN
    return best.config if certain else space.start


def certain_gain(better: Samples, start: Samples) -> float:
    """Returns the median speedup over the rounds; at most 1 unless four rounds in five agree that it is one."""
    rounds = [old / new for new, old in zip(better.seconds, start.seconds, strict=False)]
    agree = sum(1 for one in rounds if one > 1) >= AGREEMENT * len(rounds)
    return statistics.median(rounds) if agree else min(1.0, ratio(start, better))
