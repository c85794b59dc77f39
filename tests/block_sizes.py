"""A fake kernel whose block sizes can be chosen, for tests of tuning."""

from __future__ import annotations

import dataclasses

from palladion.kernels.implementation import Implementation
from palladion.kernels.search_space import Space, TuningKey


@dataclasses.dataclass(frozen=True)
class Config:
    block: int
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    length: int
    batch: int = 1

    def planned(self) -> Problem:
        return self

    def tuning_key(self) -> TuningKey:
        return TuningKey("bfloat16", {"length": self.length, "batch": self.batch})


def space(problem: Problem) -> Space:
    blocks = [1 << n for n in range(4, 12)]
    return Space(Config(64), {"block": blocks, "warps": (2, 4, 8)}, lambda config: problem.length % config.block == 0)


ROW = Implementation("triton", "gpu", lambda _: None, lambda *_: None, Config, lambda _: Config(64), space)
