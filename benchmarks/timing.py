"""Times that can be trusted: contenders in turns, inputs that no cache still holds, every sample kept.

A `Runner` is a contender that is compiled, warmed up, and owns several copies of its inputs. `measure` gives each as
many calls as make a sample long enough for the clock, and then takes samples in turns, forwards and backwards, so that
a machine that is slow for a minute is slow for all. What a call takes is told by `Samples`: a median, and where the
fifth and the four fifths of the samples lie.

On a CPU a call is waited for before the next one starts. On an accelerator several calls make one program, on inputs
of their own, and programs are dispatched without a pause: what counts is the device, not Python.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp

from palladion.kernels.devices import READ_BYTES, cpu_compiler_options
from palladion.reference.platforms import target_platform

SAMPLE_SECONDS: Final = 0.02
"""How long a sample takes at least: far above the resolution of the clock and the cost of asking it."""

CACHE_BYTES: Final = {"cpu": 64 * 2**20, "gpu": 256 * 2**20, "tpu": 256 * 2**20}
"""What passes by between two uses of the same input: more than a last-level cache, several times where it is known."""

MOST_COPIES: Final = 128
MOST_BYTES: Final = 4 * 2**30
"""Of all copies of a contender's inputs."""

CALLS_IN_A_PROGRAM: Final = 8
"""On an accelerator: what a dispatch costs is divided among so many."""

NOISY: Final = 0.15
"""(p80 - p20) / median from which on a machine is called noisy."""


class Runner(Protocol):
    """A contender, ready to run."""

    name: str

    def seconds(self, calls: int) -> float:
        """Runs so many calls or a few more, over its inputs in turns; returns what one of them took, in seconds."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What calls of a contender took.

    Attributes:
      seconds: of a call, one entry for each sample, in the order in which they were taken.
      calls: in a sample.
    """

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """Half of the samples took longer."""
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        """A fifth of the samples was faster."""
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        """A fifth of the samples took longer."""
        return quantile(self.seconds, 0.8)

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / self.median

    @property
    def noisy(self) -> bool:
        """Whether the samples differ so much that a median of them says little."""
        return self.spread > NOISY


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(of: Samples, to: Samples) -> float:
    """How much longer a call of one takes than of the other: the median over the rounds, which both shared."""
    pairs = zip(of.seconds, to.seconds, strict=False)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def measure(
    runners: Sequence[Runner],
    *,
    rounds: int = 7,
    sample_seconds: float = SAMPLE_SECONDS,
    deadline: float | None = None,
    failed: Callable[[Runner, Exception], None] | None = None,
) -> dict[str, Samples]:
    """Takes samples of contenders in turns.

    Args:
      runners: of different names.
      rounds: samples of each.
      sample_seconds: how long a sample takes at least.
      deadline: of `time.perf_counter()`: no round begins later, but for the first.
      failed: told of a contender that raises; it is left out from there on. None lets the error pass.

    Returns:
      The samples of each by its name, of those that did not fail.
    """
    calls: dict[str, int] = {}
    taken: dict[str, list[float]] = {}
    left = list(runners)

    def attempt(runner: Runner, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # whatever a peer raises costs that peer alone
            if failed is None:
                raise
            left.remove(runner)
            taken.pop(runner.name, None)
            failed(runner, error)

    def calibrate(runner: Runner) -> None:
        calls[runner.name] = _calls(runner, sample_seconds)
        taken[runner.name] = []

    def sample(runner: Runner) -> None:
        taken[runner.name].append(runner.seconds(calls[runner.name]))

    for runner in runners:
        attempt(runner, lambda runner=runner: calibrate(runner))  # type: ignore[misc]
    for number in range(rounds):
        if number and deadline is not None and time.perf_counter() > deadline:
            break
        # There and back: nobody always follows the same one.
        for runner in list(left) if number % 2 == 0 else list(reversed(left)):
            attempt(runner, lambda runner=runner: sample(runner))  # type: ignore[misc]
    return {name: Samples(tuple(seconds), calls[name]) for name, seconds in taken.items() if seconds}


def _calls(runner: Runner, sample_seconds: float) -> int:
    """How many calls take that long; also warms up."""
    calls = 1
    while (spent := runner.seconds(calls) * calls) < sample_seconds / 2:
        # Not all at once: the first calls may be slow.
        calls = min(8 * calls, max(calls + 1, round(calls * sample_seconds / max(spent, 1e-9))))
    return max(1, round(calls * sample_seconds / spent))


def copies_of(nbytes: int, platform: str | None = None) -> int:
    """How many copies of inputs of that size no cache holds, as far as memory allows."""
    passing = CACHE_BYTES[platform or target_platform()]
    wanted = -(-passing // max(nbytes, 1)) + 1
    return max(1, min(wanted, MOST_COPIES, MOST_BYTES // max(nbytes, 1)))


class JaxRunner:
    """A function of arrays on JAX's default device.

    Args:
      name: of the contender.
      function: takes one pytree, or two where something is donated: `function(inputs)`, `function(donated, inputs)`.
      inputs: of every call, a pytree; copies are made of it.
      donated: a pytree that the function updates in place and returns; copies are made of it too.
      copies: of inputs; None takes as many as no cache holds.

    Attributes:
      result: of the first call.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        inputs: Any,
        *,
        donated: Any = None,
        copies: int | None = None,
    ) -> None:
        self.name = name
        self._donates = donated is not None
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((inputs, donated)))
        copies = copies or copies_of(nbytes)
        self._width = 1 if target_platform() == "cpu" else min(CALLS_IN_A_PROGRAM, copies)
        several = jax.jit(
            self._several(function), donate_argnums=0 if self._donates else (), compiler_options=cpu_compiler_options()
        )
        groups = -(-copies // self._width)
        # Arguments are distinct arrays: XLA would compute twice the same only once.
        self._inputs = [tuple(_copied(inputs) for _ in range(self._width)) for _ in range(groups)]
        self._donated = [
            tuple(_copied(donated) for _ in range(self._width)) for _ in range(groups if self._donates else 0)
        ]
        self._next = 0
        self._compiled = several.lower(*self._arguments(0)).compile()
        self.result = jax.block_until_ready(self._step())[0]
        if self._donates:
            self.result = _copied(self.result)

    def _several(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def several(*arguments: Any) -> Any:
            results: list[Any] = []
            for *donated, inputs in zip(*arguments, strict=True):
                # One after the other, as they come in a model: XLA would fuse what does not depend on each other.
                results.append(function(*donated, _after(results[-1], inputs) if results else inputs))
            return tuple(results)

        return several

    def _arguments(self, group: int) -> tuple[Any, ...]:
        return (self._donated[group], self._inputs[group]) if self._donates else (self._inputs[group],)

    def _step(self) -> Any:
        """One program on the next inputs."""
        group = self._next
        self._next = (group + 1) % len(self._inputs)
        results = self._compiled(*self._arguments(group))
        if self._donates:
            self._donated[group] = results
        return results

    def seconds(self, calls: int) -> float:
        """As `Runner` has it."""
        programs = -(-calls // self._width)
        one_by_one = target_platform() == "cpu"
        start = time.perf_counter()
        for _ in range(programs):
            results = self._step()
            if one_by_one:
                jax.block_until_ready(results)  # a CPU would run several at a time
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / (programs * self._width)


class CallRunner:
    """Any function that returns when its work is done; it is called with one argument after the other.

    Args:
      name: of the contender.
      function: of one argument.
      arguments: in turns.
      synchronize: called before the clock is asked, where `function` returns before its work is done.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Any], Any],
        arguments: Sequence[Any],
        synchronize: Callable[[], object] | None = None,
    ) -> None:
        self.name = name
        self._function = function
        self._turns = _endlessly(arguments)
        self._synchronize = synchronize or (lambda: None)

    def seconds(self, calls: int) -> float:
        """As `Runner` has it."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            self._function(next(self._turns))
        self._synchronize()
        return (time.perf_counter() - start) / calls


def memory_probe(name: str = "memory") -> JaxRunner:
    """A contender that reads memory as fast as XLA can: its bytes over its time are the bandwidth of this very minute.

    `probe_bytes` says how many bytes a call reads.
    """
    x = jnp.ones((probe_bytes() // (4 * 512), 512), jnp.float32)
    return JaxRunner(name, lambda x: jnp.max(x, axis=0), x, copies=1)


def probe_bytes() -> int:
    """Bytes that a call of `memory_probe` reads."""
    return READ_BYTES[target_platform()]


def _endlessly(values: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from values


def _after(result: Any, inputs: Any) -> Any:
    """Inputs that are not there before a result is: the first of their arrays waits for it."""
    (first, *others), structure = jax.tree.flatten(inputs)
    first, _ = jax.lax.optimization_barrier((first, result))
    return jax.tree.unflatten(structure, [first, *others])


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
