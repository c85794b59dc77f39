"""Measures a workload: every contender's result is checked first, and those that are right are timed in turns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Unpack

from palladion.benchmarks.measure.device_time import KernelTimes, kernel_seconds
from palladion.benchmarks.measure.operations import CallOptions, Case, Operation, Verdict
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.peers import Peer
from palladion.benchmarks.measure.records import Measurement
from palladion.benchmarks.measure.timing import CompiledCalls, JaxRunner, Runner, measure, memory_probe, probe_bytes
from palladion.kernels.backend import record_choices
from palladion.kernels.implementation import Implementation, Problem, Unsupported, find_implementation
from palladion.reference.platforms import target_platform

REASON_LENGTH: Final = 300
"""Characters of an error message that are kept."""

DEVICE_LOST_MESSAGES: Final = (
    "ILLEGAL_ADDRESS",
    "illegal memory access",
    "LAUNCH_FAILED",
    "unspecified launch failure",
)
"""Messages of a GPU after which nothing works any more in this process."""

COMPILING: Final = "compiling ahead"
"""The turn that `compile_ahead` announces; where `RunOptions.crashed` has it, nothing is compiled ahead."""

WorkloadKey = tuple[str, str, str]
"""Names of an operation, a case and an implementation."""


class DeviceLostError(RuntimeError):
    """A contender has left the device useless for this process."""


@dataclasses.dataclass(frozen=True)
class CompiledImplementation:
    """An implementation of an operation, compiled for a workload.

    Attributes:
      calls: the compiled calls.
      config: the block sizes, as text.
      config_source: where the block sizes come from, one of `tuning.SOURCES`.
    """

    calls: CompiledCalls
    config: str
    config_source: str


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a measurement: who takes part, and for how long.

    Attributes:
      backends: names of implementations. The reference always judges results; it is timed where it is named here.
      peers: other packages' implementations of the operation.
      interpret: interprets kernels that do not run on this platform, to check their results; they are not timed.
      config: fields of block sizes for the one kernel in `backends`, whose heuristic chooses the rest; None for tuned
        ones, or all of the heuristic's.
      rounds: samples of each contender; 0 only checks results.
      sample_seconds: minimum length of a sample.
      crashed: contenders that ended an earlier process, and how; they are not run again.
      on_turn: called with each contender's name before it runs, and with None when the workload is done.
      compiled: what `compile_ahead` returned.
    """

    backends: tuple[str, ...]
    peers: tuple[Peer, ...] = ()
    interpret: bool = False
    config: Mapping[str, Any] | None = None
    rounds: int = 7
    sample_seconds: float = 0.02
    crashed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    on_turn: Callable[[str | None], None] = lambda _: None
    compiled: Mapping[WorkloadKey, CompiledImplementation] = dataclasses.field(default_factory=dict)

    def call_options(self, row: Implementation, problem: Problem, interpret: bool | None) -> CallOptions:
        """Returns the options of an implementation's calls; `config` does not apply to the reference."""
        config = None
        if self.config is not None and row.heuristic is not None:
            heuristic = row.heuristic(problem.planned())
            has_blocks = row.config_class is not None and isinstance(heuristic, row.config_class)
            if not has_blocks:
                raise Unsupported(f"{row.name} runs XLA's own operations here, which have no block sizes")
            config = dataclasses.replace(heuristic, **self.config)
        return {"backend": row.name, "config": config, "interpret": interpret}


def run_workload(operation: Operation, case: Case, options: RunOptions) -> list[Measurement]:
    """Checks and times every contender on a workload.

    Args:
      operation: the operation.
      case: the workload.
      options: who takes part, and for how long.

    Returns:
      A measurement of each contender: implementations in the order of their table, the reference last, then peers.

    Raises:
      DeviceLostError: the device does nothing any more; the last call of `options.on_turn` names the contender.
    """
    workload = _Workload(operation, case, options)
    for implementation in operation.table:
        if implementation.name in options.backends:
            workload.check_implementation(implementation)
    for peer in options.peers:
        workload.check_peer(peer)
    workload.time()
    options.on_turn(None)
    return list(workload.measurements.values())


class _Workload:
    """A workload while it is measured.

    Attributes:
      measurements: what is known of each contender so far, by name.
    """

    def __init__(self, operation: Operation, case: Case, options: RunOptions) -> None:
        self.measurements: dict[str, Measurement] = {}
        self._operation, self._case, self._options = operation, case, options
        self._inputs = operation.inputs(case)
        self._runners: dict[str, Runner] = {}
        self._blank = Measurement(
            operation=operation.name,
            workload=case.name,
            shape=str(case.problem()),
            contender="",
            kind="peer",
            status="failed",
            bytes=operation.bytes_moved(case),
            flops=operation.flops(case),
        )
        options.on_turn("xla")
        self._reference, self._reference_config = self._prepare("xla", case)

    def check_implementation(self, implementation: Implementation) -> None:
        """Compiles and runs an implementation once, and judges its result."""

        def check(measurement: Measurement) -> tuple[Measurement, Runner | None]:
            case = _case_for(self._operation, self._case, implementation)
            reason, interpreted = _unavailable(implementation, case.problem(), self._options)
            if reason is not None:
                return dataclasses.replace(measurement, status="skipped", reason=reason), None
            if measurement.kind == "reference":
                runner, config = self._reference, self._reference_config
            else:
                runner, config = self._prepare(implementation.name, case, interpreted)
            measurement = self._judge(measurement, runner, lambda verdict: verdict.right)
            measurement = dataclasses.replace(measurement, config=config[0], config_source=config[1])
            if measurement.status == "ok" and interpreted:
                reason = "interpreted, which says nothing of its speed"
                return dataclasses.replace(measurement, status="untimed", reason=reason), None
            return measurement, runner

        kind = "reference" if implementation.platform is None else "kernel"
        self._check(dataclasses.replace(self._blank, contender=implementation.name, kind=kind), check)

    def check_peer(self, peer: Peer) -> None:
        """Runs a peer's implementation once, and judges its result."""

        def check(measurement: Measurement) -> tuple[Measurement, Runner | None]:
            reason = peer.unavailable() or peer.unsupported(self._case)
            if reason is not None:
                return dataclasses.replace(measurement, status="skipped", reason=reason), None
            runner = peer.make(peer.name, self._case, self._inputs)
            return self._judge(measurement, runner, lambda verdict: verdict.comparable), runner

        self._check(dataclasses.replace(self._blank, contender=peer.name), check)

    def time(self) -> None:
        """Times all contenders whose results are right, in turns."""
        options = self._options
        if not self._runners or not options.rounds:
            return
        options.on_turn("measuring")
        probe = memory_probe()
        samples = measure(
            [probe, *self._runners.values()],
            rounds=options.rounds,
            sample_seconds=options.sample_seconds,
            failed=lambda runner, error: self._update(runner.name, status="failed", reason=one_line(error)),
        )
        on_device, why = self._device_times([probe, *(self._runners[name] for name in samples if name != probe.name)])
        bandwidth = probe_bytes() / samples.pop(probe.name).p20
        if probe.name in on_device:
            bandwidth = probe_bytes() / on_device[probe.name].samples.p20
        for name, taken in samples.items():
            self._update(name, seconds=taken.seconds, calls=taken.calls, bandwidth=bandwidth, reason=why)
            if name in on_device:
                times = on_device[name]
                self._update(name, device_seconds=times.seconds, kernels=times.text)

    def _device_times(self, runners: Sequence[Runner]) -> tuple[dict[str, KernelTimes], str]:
        """Returns device times by contender, and why there are none if the profiler fails."""
        try:
            return kernel_seconds(runners, self._options.rounds), ""
        except Exception as error:  # wall clock is there already
            return {}, f"no device time: {one_line(error)}"

    def _check(
        self, measurement: Measurement, check: Callable[[Measurement], tuple[Measurement, Runner | None]]
    ) -> None:
        """Keeps what `check` returns for a contender; an error costs that contender alone."""
        name, options = measurement.contender, self._options
        if name in options.crashed:
            self.measurements[name] = dataclasses.replace(measurement, reason=options.crashed[name])
            return
        options.on_turn(name)
        runner: Runner | None = None
        try:
            measurement, runner = check(measurement)
        except Unsupported as error:
            measurement = dataclasses.replace(measurement, status="skipped", reason=one_line(error))
        except Exception as error:  # compilers and peers raise what they like
            measurement = dataclasses.replace(measurement, reason=one_line(error))
        if runner is not None and measurement.status == "ok":
            self._runners[name] = runner
        self.measurements[name] = measurement

    def _judge(self, measurement: Measurement, runner: Runner, accepted: Callable[[Verdict], bool]) -> Measurement:
        verdict = self._operation.judge(self._case, self._inputs, runner.result, self._reference.result)
        measurement = dataclasses.replace(measurement, units=verdict.units, error=verdict.error)
        if not accepted(verdict):
            return dataclasses.replace(measurement, status="wrong", reason=verdict.description)
        return dataclasses.replace(measurement, status="ok")

    def _prepare(self, backend: str, case: Case, interpret: bool | None = None) -> tuple[JaxRunner, tuple[str, str]]:
        """Returns an implementation, run once on the case's inputs, with its block sizes and their source."""
        operation, options = self._operation, self._options
        compiled = options.compiled.get((operation.name, case.name, backend))
        if compiled is None:
            compiled = _compile(operation, case, find_implementation(operation.table, backend), options, interpret)
        # The same values, in another storage order, for a kernel of another platform.
        inputs = self._inputs if case is self._case else operation.inputs(case)
        runner = warm_runner(operation, backend, compiled.calls, inputs)
        return runner, (compiled.config, compiled.config_source)

    def _update(self, name: str, **changes: Any) -> None:
        self.measurements[name] = dataclasses.replace(self.measurements[name], **changes)


def compile_calls(
    operation: Operation, case: Case, *, timed: bool = True, **call: Unpack[CallOptions]
) -> CompiledCalls:
    """Compiles calls of an operation for a workload, from the shapes of its inputs.

    Args:
      operation: the operation.
      case: the workload.
      timed: whether the calls will be timed; without, one copy of the inputs is enough.
      **call: options of the calls.
    """
    donated, rest = operation.split(case.shapes())
    once = not timed or call.get("interpret")
    return CompiledCalls.compile(operation.function(case, **call), rest, donated, copies=1 if once else None)


def warm_runner(operation: Operation, name: str, calls: CompiledCalls, inputs: Any) -> JaxRunner:
    """Runs calls that `compile_calls` returned for the first time, on inputs of the same workload."""
    donated, rest = operation.split(inputs)
    return JaxRunner(name, calls, rest, donated=donated)


def compile_implementation(
    operation: Operation, case: Case, *, timed: bool = True, **call: Unpack[CallOptions]
) -> CompiledImplementation:
    """Compiles an implementation for a workload and records its block sizes; for arguments see `compile_calls`."""
    with record_choices() as choices:
        calls = compile_calls(operation, case, timed=timed, **call)
    (choice, *_) = choices
    return CompiledImplementation(calls, config_text(choice.config), choice.config_source)


def compile_ahead(
    tasks: Sequence[tuple[Operation, Case, RunOptions]],
) -> dict[WorkloadKey, CompiledImplementation]:
    """Compiles the implementations of several workloads on all cores, before anything is timed.

    This saves most of the time of a measurement on an accelerator. On a CPU, with few cores and little to compile,
    nothing is compiled ahead. What does not compile is left out: it is tried again, and reported, in its turn.

    Args:
      tasks: operations, cases and who takes part.

    Returns:
      The value for `RunOptions.compiled`.
    """
    jobs: dict[WorkloadKey, Callable[[], CompiledImplementation]] = {}
    for operation, case, options in tasks:
        if target_platform() == "cpu" or COMPILING in options.crashed:
            continue
        options.on_turn(COMPILING)
        for implementation in operation.table:
            own = _case_for(operation, case, implementation)
            name = implementation.name
            if name != "xla" and (name not in options.backends or name in options.crashed):
                continue  # the reference always takes part
            reason, interpreted = _unavailable(implementation, own.problem(), options)
            if reason is None:
                jobs[operation.name, case.name, name] = functools.partial(
                    _compile, operation, own, implementation, options, interpreted
                )
    compiled = dict(zip(jobs, side_by_side(list(jobs.values())), strict=True))
    for _, _, options in tasks:
        options.on_turn(None)
    return {key: found for key, found in compiled.items() if isinstance(found, CompiledImplementation)}


def _compile(
    operation: Operation, case: Case, row: Implementation, options: RunOptions, interpret: bool | None
) -> CompiledImplementation:
    call = options.call_options(row, case.problem(), interpret)
    return compile_implementation(operation, case, timed=options.rounds > 0, **call)


def _case_for(operation: Operation, case: Case, implementation: Implementation) -> Case:
    """Returns the case as an implementation takes it: a kernel of another platform has its own storage order."""
    if implementation.platform in (None, target_platform()):
        return case
    stored: Case = operation.stored_for(case, implementation.platform)
    return stored


def _unavailable(
    implementation: Implementation, problem: Problem, options: RunOptions
) -> tuple[str | None, bool | None]:
    """Returns why an implementation cannot take part, or None; and the `interpret` that its calls need."""
    elsewhere = implementation.platform not in (None, target_platform())
    if elsewhere and not options.interpret:
        return f"runs on a {implementation.platform} (--interpret sees whether it is right)", None
    return implementation.unsupported(problem), elsewhere or None


def local_backends(operation: Operation) -> Sequence[str]:
    """Returns the names of the implementations that run on this platform, the reference last."""
    return [one.name for one in operation.table if one.platform in (None, target_platform())]


def config_text(config: Any) -> str:
    """Formats block sizes as text: "block_kv=256 splits=8"."""
    if config is None:
        return ""
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())


def one_line(error: Exception) -> str:
    """Formats an error as one line of limited length.

    Raises:
      DeviceLostError: nothing works any more in this process after such an error.
    """
    text = " ".join(str(error).split())
    if any(sign in text for sign in DEVICE_LOST_MESSAGES):
        raise DeviceLostError(text[:REASON_LENGTH]) from error
    return f"{type(error).__name__}: {text}"[:REASON_LENGTH]
