"""The search for block sizes: a walk from the heuristic's block sizes to better neighbours.

A `CostModel` says how long a call takes with given block sizes (`costs.py`), and rejects those that do not compile or
compute a wrong result. The best block sizes must then beat the heuristic's in a comparison of their own, beyond noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from palladion.benchmarks.measure.bench import DeviceLostError
from palladion.kernels.search_space import Space

LEAST_GAIN: Final = 1.03
"""Speedup over the heuristic from which on block sizes are worth an entry."""


class RejectedError(Exception):
    """Block sizes do not compile, or compute a wrong result; the message says which."""


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
    """Says how long a call takes with given block sizes.

    Attributes:
      origin: "measured" or "estimated".
    """

    origin: str

    def prepare(self, configs: Sequence[Any]) -> None:
        """Announces the configs that are likely to be asked for next, in order; some may be compiled ahead."""

    def seconds(self, config: Any) -> float:
        """Returns the seconds of a call, or raises RejectedError."""

    def gain(self, better: Any, start: Any) -> float:
        """Returns the certain speedup of one config over another; both have been tried before."""


def search(
    space: Space,
    cost_model: CostModel,
    *,
    known: dict[Any, Trial] | None = None,
    proceed: Callable[[], bool] = lambda: True,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> tuple[Trial | None, list[Trial]]:
    """Walks from the heuristic's block sizes to better ones, until no neighbour is better.

    Args:
      space: the block sizes that may be tried.
      cost_model: says what they cost.
      known: trials of an earlier search, by config; they are not repeated.
      proceed: called before each new trial; False ends the search with the best so far.
      on_trial: called with each new trial.

    Raises:
      DeviceLostError: a config has left the device useless for this process; `on_trial` was called with it.

    Returns:
      The best trial, or None if all were rejected; and all trials, including those of `known` on the way.
    """
    trials: dict[Any, Trial] = {}
    earlier = known or {}

    def attempt(config: Any) -> Trial | None:
        if config in trials:
            return trials[config]
        if config in earlier:
            trials[config] = earlier[config]
        elif not proceed():
            return None
        else:
            try:
                trials[config] = Trial(config, cost_model.seconds(config))
            except RejectedError as error:
                trials[config] = Trial(config, None, str(error))
            except DeviceLostError as error:
                # Reported, so that the next search skips it.
                on_trial(Trial(config, None, str(error)))
                raise
            on_trial(trials[config])
        return trials[config]

    def prepare(configs: Sequence[Any]) -> None:
        cost_model.prepare([config for config in configs if config not in trials and config not in earlier])

    prepare([space.start, *space.neighbours(space.start)])
    best = attempt(space.start)
    moved = best is not None
    while moved:
        moved = False
        assert best is not None
        neighbours = list(space.neighbours(best.config))
        prepare(neighbours)
        for config in neighbours:
            trial = attempt(config)
            if trial is None:
                break
            if trial.seconds is not None and (best.seconds is None or trial.seconds < best.seconds):
                best, moved = trial, True
                break  # the walk goes on from there
    accepted = best if best is not None and best.seconds is not None else None
    return accepted, list(trials.values())


def winner(space: Space, best: Trial | None, cost_model: CostModel) -> tuple[Trial, float] | None:
    """Returns the best trial and its speedup over the heuristic, or None if it is not certainly faster."""
    if best is None or best.config == space.start:
        return None
    try:
        gain = cost_model.gain(best.config, space.start)
    except RejectedError:
        gain = float("inf")  # the heuristic's block sizes are rejected: any others are better
    return (best, gain) if gain >= LEAST_GAIN else None
