"""Timing that can be trusted: contenders take turns, inputs are in no cache, and every sample is kept.

A `Runner` is a contender that is compiled and warmed up, and owns several copies of its inputs. `measure` finds how
many calls make a sample long enough for the clock, and then takes samples of all contenders in turns, forwards and
backwards: a machine that is slow for a minute is slow for all of them.

On a CPU each call is waited for. On an accelerator several calls, on different inputs, are compiled as one program, and
programs are dispatched without a pause, so that the device is timed and not Python. Programs are compiled from shapes
alone: several can be compiled at the same time, before their arrays exist (`parallel.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp

from palladion.benchmarks.measure.samples import Samples
from palladion.kernels.devices import READ_BYTES, cpu_compiler_options
from palladion.reference.platforms import target_platform

SAMPLE_SECONDS: Final = 0.02
"""Minimum length of a sample: far above the resolution of the clock and the cost of reading it."""

CACHE_BYTES: Final = {"cpu": 64 * 2**20, "gpu": 256 * 2**20, "tpu": 256 * 2**20}
"""Bytes that are read between two uses of the same input: more than the last-level cache of any known device."""

MOST_COPIES: Final = 128
"""Maximum number of copies of a contender's inputs."""

MOST_BYTES: Final = 4 * 2**30
"""Maximum size of all copies of a contender's inputs together."""

CALLS_IN_A_PROGRAM: Final = 32
"""Maximum number of calls in a program on an accelerator, among which the cost of a dispatch is divided."""

PROGRAM_BYTES: Final = 2**30
"""Size of the inputs of a program on an accelerator, where `CALLS_IN_A_PROGRAM` allows it.

The fastest memory takes more than 150 µs to read them, and the host takes less to dispatch the next program.
"""


class Runner(Protocol):
    """A contender that is compiled and warmed up.

    Attributes:
      name: its name.
      result: result of its first call, in the operation's form.
    """

    name: str
    result: Any

    def run(self, calls: int) -> int:
        """Runs at least `calls` calls, on different copies of the inputs in turn, and waits; returns how many."""

    def seconds(self, calls: int) -> float:
        """Runs at least `calls` calls, likewise; returns the seconds of one call."""


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
      runners: contenders with different names.
      rounds: samples of each.
      sample_seconds: minimum length of a sample.
      deadline: `time.perf_counter()` after which no round begins, except for the first.
      failed: called with a contender that raises, and its error; the contender takes no further part. None lets errors
        pass.

    Returns:
      Samples by contender's name, without those that failed.
    """
    calls: dict[str, int] = {}
    taken: dict[str, list[float]] = {}
    remaining = list(runners)

    def attempt(runner: Runner, step: Callable[[Runner], None]) -> None:
        try:
            step(runner)
        except Exception as error:  # whatever a peer raises costs that peer alone
            if failed is None:
                raise
            remaining.remove(runner)
            taken.pop(runner.name, None)
            failed(runner, error)

    def calibrate(runner: Runner) -> None:
        calls[runner.name] = _calls_in_a_sample(runner, sample_seconds)
        taken[runner.name] = []

    def sample(runner: Runner) -> None:
        taken[runner.name].append(runner.seconds(calls[runner.name]))

    for runner in runners:
        attempt(runner, calibrate)
    for number in range(rounds):
        if number and deadline is not None and time.perf_counter() > deadline:
            break
        # Forwards and backwards: nobody always follows the same contender.
        for runner in list(remaining) if number % 2 == 0 else list(reversed(remaining)):
            attempt(runner, sample)
    return {name: Samples(tuple(seconds), calls[name]) for name, seconds in taken.items() if seconds}


def _calls_in_a_sample(runner: Runner, sample_seconds: float) -> int:
    """Returns the number of calls that take that long; also warms the runner up."""
    calls = 1
    while (spent := runner.seconds(calls) * calls) < sample_seconds / 2:
        # Step by step, because the first calls may be slow.
        calls = min(8 * calls, max(calls + 1, round(calls * sample_seconds / max(spent, 1e-9))))
    return max(1, round(calls * sample_seconds / spent))


def copies_of(nbytes: int, platform: str | None = None) -> int:
    """Returns how many copies of inputs of that size exceed every cache, as far as memory allows."""
    cache_bytes = CACHE_BYTES[platform or target_platform()]
    wanted = -(-cache_bytes // max(nbytes, 1)) + 1
    return max(1, min(wanted, MOST_COPIES, MOST_BYTES // max(nbytes, 1)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The grouping of calls into programs.

    Attributes:
      width: calls in a program, one after the other, each with inputs of its own.
      held: copies of what is donated to a program; calls take turns with them where they are fewer than calls.
      groups: sets of inputs that the program is run with in turn.
    """

    width: int
    held: int
    groups: int

    @classmethod
    def choose(cls, nbytes: int, donated_bytes: int = 0, *, copies: int | None = None) -> Layout:
        """Chooses a layout for inputs of that size.

        Args:
          nbytes: size of the inputs that are not donated.
          donated_bytes: size of those that are; a call may touch little of them.
          copies: copies of everything; None takes more than a cache holds.
        """
        if target_platform() == "cpu":
            width = 1
        else:
            width = min(CALLS_IN_A_PROGRAM, copies or max(1, PROGRAM_BYTES // max(nbytes, 1)))
        copies = copies or copies_of(nbytes + donated_bytes)
        return cls(width, min(width, copies), -(-copies // width))


@dataclasses.dataclass(frozen=True)
class CompiledCalls:
    """Several calls of a function, compiled as one program.

    Attributes:
      run: the program. It takes a tuple of donated arguments, if anything is donated, and a tuple of inputs; it returns
        a tuple of results, or of the updated donated arguments.
      layout: how many of each.
    """

    run: Callable[..., tuple[Any, ...]]
    layout: Layout

    @classmethod
    def compile(
        cls, function: Callable[..., Any], inputs: Any, donated: Any = None, *, copies: int | None = None
    ) -> CompiledCalls:
        """Compiles calls of a function of arrays for JAX's default device.

        Args:
          function: takes one pytree, `function(inputs)`, or two if something is donated, `function(donated, inputs)`.
          inputs: inputs of a call, a pytree of arrays or of `jax.ShapeDtypeStruct`s.
          donated: likewise what the function updates in place and returns, or None.
          copies: copies of everything; None takes more than a cache holds.
        """
        layout = Layout.choose(_nbytes(inputs), _nbytes(donated), copies=copies)
        arguments = [] if donated is None else [(donated,) * layout.held]
        arguments.append((inputs,) * layout.width)
        return cls(calls_of(function, donates=donated is not None).lower(*arguments).compile(), layout)


def calls_of(function: Callable[..., Any], *, donates: bool) -> Any:
    """Returns a jitted function that makes several calls, and takes what `CompiledCalls.run` takes.

    Each call waits for the one before, as in a model: XLA would fuse calls that do not depend on each other. The
    function is traced once, however many calls there are.
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
    """Calls of a function of arrays on JAX's default device.

    Args:
      name: the contender's name.
      calls: the compiled calls.
      inputs: inputs of every call, a pytree as the calls were compiled for; they are copied.
      donated: likewise what is updated in place; it is copied, too.

    Attributes:
      result: result of the first call; if something is donated, its value after the calls of one program.
    """

    def __init__(self, name: str, calls: CompiledCalls, inputs: Any, *, donated: Any = None) -> None:
        self.name = name
        self._calls = calls
        layout = calls.layout
        # Distinct arrays: XLA would compute a call twice on the same arguments only once.
        self._inputs = [tuple(_copied(inputs) for _ in range(layout.width)) for _ in range(layout.groups)]
        self._donated: list[tuple[Any, ...]] | None = None
        if donated is not None:
            self._donated = [tuple(_copied(donated) for _ in range(layout.held)) for _ in range(layout.groups)]
        self._next = 0
        self.result = jax.block_until_ready(self._run_program())[0]
        if self._donated is not None:
            self.result = _copied(self.result)

    @classmethod
    def compile(
        cls,
        name: str,
        function: Callable[..., Any],
        inputs: Any,
        *,
        donated: Any = None,
        copies: int | None = None,
    ) -> JaxRunner:
        """Compiles a function and warms it up; for arguments see `CompiledCalls.compile`."""
        return cls(name, CompiledCalls.compile(function, inputs, donated, copies=copies), inputs, donated=donated)

    def _run_program(self) -> tuple[Any, ...]:
        """Dispatches the program on the next group of inputs."""
        group = self._next
        self._next = (group + 1) % len(self._inputs)
        if self._donated is None:
            return self._calls.run(self._inputs[group])
        results = self._calls.run(self._donated[group], self._inputs[group])
        self._donated[group] = results
        return results

    def run(self, calls: int) -> int:
        """Implements `Runner.run`."""
        width = self._calls.layout.width
        programs = -(-calls // width)
        one_by_one = target_platform() == "cpu"
        for _ in range(programs):
            results = self._run_program()
            if one_by_one:
                jax.block_until_ready(results)  # a CPU would run several at a time
        jax.block_until_ready(results)
        return programs * width

    def seconds(self, calls: int) -> float:
        """Implements `Runner.seconds`."""
        start = time.perf_counter()
        ran = self.run(calls)
        return (time.perf_counter() - start) / ran


class CallRunner:
    """Calls of any function that returns when its work is done, with one argument after the other.

    Args:
      name: the contender's name.
      function: a function of one argument.
      arguments: arguments, taken in turn.
      synchronize: called before the clock is read, if `function` returns before its work is done.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Any], Any],
        arguments: Sequence[Any],
        synchronize: Callable[[], object] = lambda: None,
    ) -> None:
        self.name = name
        self._function = function
        self._arguments = itertools.cycle(arguments)
        self._synchronize = synchronize

    def call(self, calls: int) -> None:
        """Makes calls without waiting for them."""
        for argument in itertools.islice(self._arguments, calls):
            self._function(argument)

    def run(self, calls: int) -> int:
        """Implements `Runner.run`."""
        self.call(calls)
        self._synchronize()
        return calls

    def seconds(self, calls: int) -> float:
        """Implements `Runner.seconds`."""
        self._synchronize()
        start = time.perf_counter()
        self.run(calls)
        return (time.perf_counter() - start) / calls


def memory_probe(name: str = "memory") -> JaxRunner:
    """Returns a contender that reads `probe_bytes()` of memory as fast as XLA can.

    Timed in turns with others, it gives the memory bandwidth in the same minutes.
    """
    rows = probe_bytes() // (4 * 512)
    return JaxRunner(name, _memory_reads(rows), jnp.ones((rows, 512), jnp.float32))


@functools.cache
def _memory_reads(rows: int) -> CompiledCalls:
    """Compiles the probe, once for all workloads."""
    x = jax.ShapeDtypeStruct((rows, 512), jnp.float32)
    return CompiledCalls.compile(lambda x: jnp.max(x, axis=0), x, copies=1)


def probe_bytes() -> int:
    """Returns the bytes that a call of `memory_probe` reads."""
    return READ_BYTES[target_platform()]


def _after(result: Any, inputs: Any) -> Any:
    """Returns the inputs, made to depend on a result: the first of their arrays waits for it."""
    (first, *others), structure = jax.tree.flatten(inputs)
    first, _ = jax.lax.optimization_barrier((first, result))
    return jax.tree.unflatten(structure, [first, *others])


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
