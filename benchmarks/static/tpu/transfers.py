"""A model of the transfers between HBM and a core's memories, in cycles.

Transfers of a core pass through HBM one after the other, each at the full rate. A transfer is done a latency after its
last byte has passed, and then signals its semaphore. So a small transfer costs its latency if the kernel waits for each
one, and only its bytes if it does not.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Final

from palladion.benchmarks.static.opaque import Undecided

WORDS: Final = 2**32
"""Number of values of a 32-bit word."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """Speed of transfers.

    Attributes:
      bytes_per_cycle: HBM bandwidth of one core.
      latency_cycles: cycles from the last byte of a transfer to its completion.
      granule_bytes: unit of transfer sizes.
    """

    bytes_per_cycle: float
    latency_cycles: float
    granule_bytes: int


@dataclasses.dataclass
class Traffic:
    """Transfers in one direction.

    Attributes:
      transfers: number of transfers.
      bytes: bytes of all transfers together.
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
      moved: transfers by direction ("hbm_to_vmem", …).
      stalls: cycles that the core has waited for transfers, by direction.
    """

    def __init__(self, rate: Rate):
        self.moved: dict[str, Traffic] = collections.defaultdict(Traffic)
        self.stalls: dict[str, float] = collections.defaultdict(float)
        self._rate = rate
        self._free = 0.0  # cycle at which the HBM is idle again
        # Signals of each semaphore in order of time: (time, amount, direction).
        self._signals: dict[int, collections.deque[tuple[float, int, str]]] = collections.defaultdict(collections.deque)

    def start(self, now: float, direction: str, granules: int, semaphore: int) -> None:
        """Starts a transfer, which adds its size to the semaphore when it is done."""
        size = granules * self._rate.granule_bytes
        moved = self.moved[direction]
        moved.transfers += 1
        moved.bytes += size
        done = now
        if "hbm" in direction:
            done = max(now, self._free) + size / self._rate.bytes_per_cycle
            self._free = done
        self._signals[semaphore].append((done + self._rate.latency_cycles, granules, direction))

    def wait(self, now: float, semaphore: int, amount: int) -> float:
        """Waits until the semaphore has that amount; returns the cycle at which it has."""
        missing = amount
        for time, signalled, direction in self._signals[semaphore]:
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
        """Adds an amount to a semaphore, or subtracts one: amounts are 32-bit words in two's complement."""
        signals = self._signals[semaphore]
        if amount < WORDS // 2:
            signals.append((now, amount, "signal"))
            return
        remaining = WORDS - amount
        while remaining > 0 and signals:
            time, signalled, direction = signals.popleft()
            if signalled > remaining:
                signals.appendleft((time, signalled - remaining, direction))
            remaining -= signalled

    def reset(self, semaphore: int) -> None:
        """Sets a semaphore to zero."""
        self._signals[semaphore].clear()
