"""Times that can be trusted: contenders in turns, inputs that no cache still holds, every sample kept.

A `Runner` is a contender that is compiled, warmed up, and owns several copies of its inputs. `measure` gives each as
many calls as make a sample long enough for the clock, and then takes samples in turns, forwards and backwards, so that
a machine that is slow for a minute is slow for all. What a call takes is told by `Samples`: a median, and where the
fifth and the four fifths of the samples lie.

On a CPU a call is waited for before the next one starts. On an accelerator several calls make one program, on inputs
of their own, and programs are dispatched without a pause: what counts is the device, not Python. Programs are compiled
from shapes alone, so that many may be, side by side (`parallel.py`), before there is an array of any.
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

CALLS_IN_A_PROGRAM: Final = 32
"""On an accelerator, at most: what a dispatch costs, tens of microseconds, is divided among so many."""

PROGRAM_BYTES: Final = 2**30
"""On an accelerator: calls of a program have inputs of so much together, where they are not more than that many. It
takes the fastest of memories 150 µs or more to read them, and the host less to dispatch the next program."""

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


@dataclasses.dataclass(frozen=True)
class Layout:
    """How calls are put into programs.

    Attributes:
      width: calls of a program, one after the other, each with inputs of its own.
      held: copies of what is donated to a program; calls take turns with them where they are fewer.
      groups: programs in turns, each with inputs of its own.
    """

    width: int
    held: int
    groups: int

    @classmethod
    def of(cls, nbytes: int, donated_bytes: int = 0, *, copies: int | None = None) -> Layout:
        """For a call's inputs of that size.

        Args:
          nbytes: of what is not donated.
          donated_bytes: of what is; a call may touch little of it.
          copies: of everything; None takes as many as no cache holds.
        """
        if target_platform() == "cpu":
            width = 1
        else:
            width = min(CALLS_IN_A_PROGRAM, copies or max(1, PROGRAM_BYTES // max(nbytes, 1)))
        copies = copies or copies_of(nbytes + donated_bytes)
        return cls(width, min(width, copies), -(-copies // width))


@dataclasses.dataclass(frozen=True)
class Program:
    """Calls of a function, compiled as one program.

    Attributes:
      run: takes a tuple of what is donated, where anything is, and one of inputs; returns a tuple of results, of what
        was donated where anything was.
      layout: how many of each.
    """

    run: Callable[..., tuple[Any, ...]]
    layout: Layout

    @classmethod
    def of(
        cls, function: Callable[..., Any], inputs: Any, donated: Any = None, *, copies: int | None = None
    ) -> Program:
        """Compiles calls of a function of arrays for JAX's default device.

        Args:
          function: takes one pytree, or two where something is donated: `function(inputs)`,
            `function(donated, inputs)`.
          inputs: of a call, a pytree of arrays or of `jax.ShapeDtypeStruct`s.
          donated: the same of what the function updates in place and returns; or None.
          copies: of everything; None takes as many as no cache holds.
        """
        layout = Layout.of(_nbytes(inputs), _nbytes(donated), copies=copies)
        arguments = [] if donated is None else [(donated,) * layout.held]
        arguments.append((inputs,) * layout.width)
        return cls(calls_of(function, donates=donated is not None).lower(*arguments).compile(), layout)


def calls_of(function: Callable[..., Any], *, donates: bool) -> Any:
    """Calls of a function one after the other, as a jitted function that takes what `Program.run` takes.

    They wait for each other, as in a model: XLA would fuse what does not depend on each other. However many there are,
    the function is traced once.
    """
    call = jax.jit(function)

    def without_donation(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        results: list[Any] = []
        for one in inputs:
            results.append(call(_after(results[-1], one) if results else one))
        return tuple(results)

    def in_place(donated: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        held, last = list(donated), None
        for number, one in enumerate(inputs):
            last = call(held[number % len(held)], one if last is None else _after(last, one))
            held[number % len(held)] = last
        return tuple(held)

    options = cpu_compiler_options()
    if donates:
        return jax.jit(in_place, donate_argnums=0, compiler_options=options)
    return jax.jit(without_donation, compiler_options=options)


class JaxRunner:
    """A function of arrays on JAX's default device.

    Args:
      name: of the contender.
      program: its calls.
      inputs: of every call, a pytree as the program was compiled for; copies are made of it.
      donated: the same of what is updated in place; copies are made of it too.

    Attributes:
      result: of the first call; where something is donated, what has become of it after the calls of one program.
    """

    def __init__(self, name: str, program: Program, inputs: Any, *, donated: Any = None) -> None:
        self.name = name
        self._program = program
        layout = program.layout
        # Arguments are distinct arrays: XLA would compute twice the same only once.
        self._inputs = [tuple(_copied(inputs) for _ in range(layout.width)) for _ in range(layout.groups)]
        self._donated: list[tuple[Any, ...]] | None = None
        if donated is not None:
            self._donated = [tuple(_copied(donated) for _ in range(layout.held)) for _ in range(layout.groups)]
        self._next = 0
        self.result = jax.block_until_ready(self._step())[0]
        if self._donated is not None:
            self.result = _copied(self.result)

    @classmethod
    def of(
        cls,
        name: str,
        function: Callable[..., Any],
        inputs: Any,
        *,
        donated: Any = None,
        copies: int | None = None,
    ) -> JaxRunner:
        """Compiles a function and makes it ready; arguments are those of `Program.of`."""
        return cls(name, Program.of(function, inputs, donated, copies=copies), inputs, donated=donated)

    def _step(self) -> tuple[Any, ...]:
        """One program on the next inputs."""
        group = self._next
        self._next = (group + 1) % len(self._inputs)
        if self._donated is None:
            return self._program.run(self._inputs[group])
        results = self._program.run(self._donated[group], self._inputs[group])
        self._donated[group] = results
        return results

    def seconds(self, calls: int) -> float:
        """As `Runner` has it."""
        width = self._program.layout.width
        programs = -(-calls // width)
        one_by_one = target_platform() == "cpu"
        start = time.perf_counter()
        for _ in range(programs):
            results = self._step()
            if one_by_one:
                jax.block_until_ready(results)  # a CPU would run several at a time
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / (programs * width)


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
    return JaxRunner.of(name, lambda x: jnp.max(x, axis=0), x, copies=1)


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


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
