"""Measures what can run a workload, in turns: kernels, the reference and peers; what is wrong is never timed."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from palladion.benchmarks.measure.machine import datasheet
from palladion.benchmarks.measure.operations import Operation, Verdict
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.peers import Contender, Peer
from palladion.benchmarks.measure.records import Limits, Row
from palladion.benchmarks.measure.timing import JaxRunner, Program, Runner, measure, memory_probe, probe_bytes
from palladion.kernels.backend import Implementation, Unsupported, record_choices
from palladion.kernels.devices import measured_bandwidth, measured_matrix_rate
from palladion.reference.platforms import target_platform

REASON_LENGTH: Final = 300
"""Characters of an error that are kept."""

LOST: Final = ("ILLEGAL_ADDRESS", "illegal memory access", "LAUNCH_FAILED", "unspecified launch failure")
"""What a GPU says after which nothing works any more in this process."""

COMPILING: Final = "compiling ahead"
"""Whose turn it is while `compile_ahead` is at work; among `Plan.crashed`, it does nothing."""


class DeviceLostError(RuntimeError):
    """A contender has left the device useless for this process."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One of an operation's implementations, compiled for a workload.

    Attributes:
      program: its calls.
      config: the block sizes that it has taken, in short.
      config_source: where they come from, one of `tuning.SOURCES`.
    """

    program: Program
    config: str
    config_source: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What takes part, and for how long.

    Attributes:
      backends: names of implementations; the reference is always there to judge by, and timed where it is named.
      peers: of the operation.
      interpret: whether kernels that do not run here are interpreted, to see whether they are right: that says nothing
        of their speed, so that they are not timed.
      config: block sizes for kernels, or None.
      rounds: samples of each contender; 0 judges them only.
      sample_seconds: how long a sample takes at least.
      crashed: contenders that have ended their process, and how: they are not touched again.
      before: told of each contender before it is touched, and None when the workload is done.
      compiled: what `compile_ahead` has made.
    """

    backends: tuple[str, ...]
    peers: tuple[Peer, ...] = ()
    interpret: bool = False
    config: Any = None
    rounds: int = 7
    sample_seconds: float = 0.02
    crashed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    before: Callable[[str | None], None] = lambda _: None
    compiled: Mapping[tuple[str, str, str], Compiled] = dataclasses.field(default_factory=dict)


def limits() -> Limits:
    """What this machine can do: measured, and from its datasheet where it has one."""
    dtype = "float32" if target_platform() == "cpu" else "bfloat16"
    sheet = datasheet()
    return Limits(
        bandwidth=measured_bandwidth(),
        matrix_rate=measured_matrix_rate(dtype),
        matrix_dtype=dtype,
        datasheet=None if sheet is None else sheet.name,
        datasheet_bandwidth=None if sheet is None else sheet.bytes_per_second,
        datasheet_flops=None if sheet is None else sheet.flops_per_second,
    )


def run_workload(operation: Operation, case: Any, plan: Plan) -> list[Row]:
    """Judges and measures every contender on a workload.

    Args:
      operation: what is done.
      case: on what.
      plan: who takes part.

    Returns:
      A row for each of them, the reference last of ours, then peers.

    Raises:
      DeviceLostError: the device does nothing any more; `plan.before` was told whose turn it was.
    """
    inputs = operation.inputs(case)
    problem = case.problem()
    blank = Row(
        operation=operation.name,
        workload=case.name,
        shape=str(problem),
        contender="",
        kind="peer",
        status="failed",
        bytes=operation.bytes_moved(case),
        flops=operation.flops(case),
    )
    plan.before("xla")
    reference = _ours(operation, case, inputs, "xla", plan)
    rows: dict[str, Row] = {}
    runners: dict[str, Runner] = {}

    def judged(row: Row, contender: Contender, right: Callable[[Verdict], bool]) -> Row:
        verdict = operation.judge(case, inputs, contender.result, reference[0].result)
        row = dataclasses.replace(row, units=verdict.units, error=verdict.error)
        if not right(verdict):
            return dataclasses.replace(row, status="wrong", reason=verdict.said)
        return dataclasses.replace(row, status="ok")

    for row_of_table in operation.table:
        if row_of_table.name not in plan.backends:
            continue
        row = dataclasses.replace(
            blank, contender=row_of_table.name, kind="reference" if row_of_table.platform is None else "kernel"
        )
        if row.contender in plan.crashed:
            rows[row.contender] = dataclasses.replace(row, reason=plan.crashed[row.contender])
            continue
        plan.before(row.contender)
        refused, interpreted = _not_here(row_of_table, problem, plan)
        if refused is not None:
            rows[row.contender] = dataclasses.replace(row, status="skipped", reason=refused)
            continue
        try:
            if row.kind == "reference":
                contender, chosen = reference
            else:
                contender, chosen = _ours(operation, case, inputs, row.contender, plan, interpreted)
            row = dataclasses.replace(row, **chosen)
            row = judged(row, contender, lambda verdict: verdict.right)
        except Unsupported as error:
            row = dataclasses.replace(row, status="skipped", reason=in_a_line(error))
        except Exception as error:  # a kernel that does not compile costs its own row
            row = dataclasses.replace(row, reason=in_a_line(error))
        if row.status == "ok" and interpreted:
            row = dataclasses.replace(row, status="untimed", reason="interpreted, which says nothing of its speed")
        elif row.status == "ok":
            runners[row.contender] = contender.runner
        rows[row.contender] = row

    for peer in plan.peers:
        row = dataclasses.replace(blank, contender=peer.name)
        if peer.name in plan.crashed:
            rows[peer.name] = dataclasses.replace(row, reason=plan.crashed[peer.name])
            continue
        plan.before(peer.name)
        try:
            reason = peer.missing() or peer.refuses(case)
            if reason is not None:
                row = dataclasses.replace(row, status="skipped", reason=reason)
            else:
                contender = peer.make(peer.name, case, inputs)
                row = judged(row, contender, lambda verdict: verdict.comparable)
                if row.status == "ok":
                    runners[peer.name] = contender.runner
        except Exception as error:  # whatever a peer raises costs its own row
            row = dataclasses.replace(row, status="failed", reason=in_a_line(error))
        rows[peer.name] = row

    def failed(runner: Runner, error: Exception) -> None:
        rows[runner.name] = dataclasses.replace(rows[runner.name], status="failed", reason=in_a_line(error))

    if runners and plan.rounds:
        plan.before("measuring")
        probe = memory_probe()
        samples = measure(
            [probe, *runners.values()], rounds=plan.rounds, sample_seconds=plan.sample_seconds, failed=failed
        )
        bandwidth = probe_bytes() / samples.pop(probe.name).p20
        for name, one in samples.items():
            rows[name] = dataclasses.replace(rows[name], seconds=one.seconds, calls=one.calls, bandwidth=bandwidth)
    plan.before(None)
    return list(rows.values())


def program_of(operation: Operation, case: Any, *, timed: bool = True, **how: Any) -> Program:
    """Compiles calls of an operation for a workload, from the shapes of its inputs.

    Args:
      operation: what is done.
      case: on what.
      timed: whether they will be; what is only judged is called once.
      **how: backend, config and interpret.
    """
    donated, rest = operation.split(case.shapes())
    once = not timed or how.get("interpret")
    return Program.of(operation.function(case, **how), rest, donated, copies=1 if once else None)


def ready(operation: Operation, name: str, program: Program, inputs: Any) -> JaxRunner:
    """A contender of that name: a program of `program_of`, with inputs of the workload that it was compiled for."""
    donated, rest = operation.split(inputs)
    return JaxRunner(name, program, rest, donated=donated)


def compiled(operation: Operation, case: Any, **how: Any) -> Compiled:
    """Compiles an implementation for a workload, and notes its block sizes; arguments are those of `program_of`."""
    with record_choices() as choices:
        program = program_of(operation, case, **how)
    (choice, *_) = choices
    return Compiled(program, config_text(choice.config), choice.config_source)


def compile_ahead(tasks: Sequence[tuple[Operation, Any, Plan]]) -> dict[tuple[str, str, str], Compiled]:
    """Compiles what takes part in workloads, of ours, side by side: one by one that takes most of the time.

    On an accelerator only: on a CPU there are few cores, and little to compile. What does not compile is left out, to
    be tried again and told of in its turn.

    Args:
      tasks: operations, cases and who takes part.

    Returns:
      For `Plan.compiled`, by operation, case and implementation.
    """
    wanted: dict[tuple[str, str, str], Callable[[], Compiled]] = {}
    for operation, case, plan in tasks:
        if target_platform() == "cpu" or COMPILING in plan.crashed:
            continue
        plan.before(COMPILING)
        problem = case.problem()
        for row in operation.table:
            if row.name != "xla" and (row.name not in plan.backends or row.name in plan.crashed):
                continue  # the reference is always there
            refused, interpreted = _not_here(row, problem, plan)
            if refused is None:
                how = _how(row.name, plan, interpreted)
                wanted[operation.name, case.name, row.name] = functools.partial(compiled, operation, case, **how)
    made = dict(zip(wanted, side_by_side(list(wanted.values())), strict=True))
    for _, _, plan in tasks:
        plan.before(None)
    return {key: one for key, one in made.items() if isinstance(one, Compiled)}


def _how(backend: str, plan: Plan, interpret: Any) -> dict[str, Any]:
    """How an implementation is compiled; block sizes that are insisted on are not the reference's."""
    config = None if backend == "xla" else plan.config
    return {"backend": backend, "config": config, "interpret": interpret, "timed": plan.rounds > 0}


def _ours(
    operation: Operation, case: Any, inputs: Any, backend: str, plan: Plan, interpret: Any = None
) -> tuple[Contender, dict[str, Any]]:
    """A contender of the operation's own table, and which block sizes it has taken."""
    made = plan.compiled.get((operation.name, case.name, backend))
    if made is None:
        made = compiled(operation, case, **_how(backend, plan, interpret))
    runner = ready(operation, backend, made.program, inputs)
    return Contender(runner, runner.result), {"config": made.config, "config_source": made.config_source}


def config_text(config: Any) -> str:
    """Block sizes in short: "block_kv=256 splits=8"."""
    if config is None:
        return ""
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())


def _not_here(row: Implementation, problem: Any, plan: Plan) -> tuple[str | None, bool | None]:
    """Why an implementation cannot take part, or None; and whether it is interpreted."""
    elsewhere = row.platform not in (None, target_platform())
    if elsewhere and not plan.interpret:
        return f"runs on a {row.platform} (--interpret sees whether it is right)", None
    return row.unsupported(problem), elsewhere or None


def in_a_line(error: Exception) -> str:
    """An error in one line, not too long.

    Raises:
      DeviceLostError: it is one after which nothing works any more.
    """
    text = " ".join(str(error).split())
    if any(sign in text for sign in LOST):
        raise DeviceLostError(text[:REASON_LENGTH]) from error
    return f"{type(error).__name__}: {text}"[:REASON_LENGTH]


def progress(message: str) -> None:
    """Says something beside the results."""
    print(message, file=sys.stderr, flush=True)


def seconds_left(deadline: float | None) -> float:
    """Until a deadline of `time.perf_counter()`; infinity where there is none."""
    return float("inf") if deadline is None else deadline - time.perf_counter()


def kernels_here(operation: Operation) -> Sequence[str]:
    """The implementations that run on this platform, the reference last."""
    return [row.name for row in operation.table if row.platform in (None, target_platform())]
