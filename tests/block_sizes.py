"""A fake kernel whose block sizes can be chosen, and a device, for tests of tuning."""

from __future__ import annotations

import contextlib
import dataclasses

import jax

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


def on_h200() -> contextlib.AbstractContextManager[object]:
    """Returns a context that traces for an H200, which need not be there."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
