"""Transfers between HBM and the memories of a core, and the semaphores that say when they are done: a model in cycles.

Transfers of a core go through HBM one after the other, each at the full rate; a transfer is done when its last byte has
gone through and the latency has passed. So small transfers cost their latency where the kernel waits for each, and
their bytes where it does not.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Final

from palladion.benchmarks.static.opaque import Undecided

WORDS: Final = 2**32


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast transfers are.

    Attributes:
      bytes_per_cycle: of HBM, for one core.
      latency_cycles: from the last byte of a transfer to its arrival.
      granule_bytes: unit in which sizes are given.
    """

    bytes_per_cycle: float
    latency_cycles: float
    granule_bytes: int


@dataclasses.dataclass
class Traffic:
    """Transfers of one direction.

    Attributes:
      transfers: how many.
      bytes: in all of them.
    """

    transfers: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.transfers + other.transfers, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.transfers * times, self.bytes * times)


class Transfers:
    """The transfers that a core starts and waits for.

    Attributes:
      moved: by direction ("hbm_to_vmem", …), what was moved.
      stalls: by direction, cycles that the core has waited for transfers.
    """

    def __init__(self, rate: Rate):
        self.moved: dict[str, Traffic] = collections.defaultdict(Traffic)
        self.stalls: dict[str, float] = collections.defaultdict(float)
        self._rate = rate
        self._free = 0.0  # when the HBM has time again
        # For each semaphore what comes, in order of time: [time, amount, direction].
        self._coming: dict[int, collections.deque[tuple[float, int, str]]] = collections.defaultdict(collections.deque)

    def start(self, now: float, direction: str, granules: int, semaphore: int) -> None:
        """Starts a transfer, which signals the semaphore with its size when it is done."""
        size = granules * self._rate.granule_bytes
        moved = self.moved[direction]
        moved.transfers += 1
        moved.bytes += size
        done = now
        if "hbm" in direction:
            done = max(now, self._free) + size / self._rate.bytes_per_cycle
            self._free = done
        self._coming[semaphore].append((done + self._rate.latency_cycles, granules, direction))

    def wait(self, now: float, semaphore: int, amount: int) -> float:
        """Waits until the semaphore has been signalled so much; returns when that is."""
        missing = amount
        for time, signalled, direction in self._coming[semaphore]:
            missing -= signalled
            if missing <= 0:
                if time > now:
                    self.stalls[direction] += time - now
                    return time
                return now
        if missing > 0:
            raise Undecided("it waits for a signal that this core does not send")
        return now

    def add(self, now: float, semaphore: int, amount: int) -> None:
        """Adds to a semaphore, or takes from it: amounts are 32-bit numbers, negative ones wrapped around."""
        coming = self._coming[semaphore]
        if amount < WORDS // 2:
            coming.append((now, amount, "signal"))
            return
        left = WORDS - amount
        while left > 0 and coming:
            time, signalled, direction = coming.popleft()
            if signalled > left:
                coming.appendleft((time, signalled - left, direction))
            left -= signalled

    def reset(self, semaphore: int) -> None:
        """Sets a semaphore to zero."""
        self._coming[semaphore].clear()
