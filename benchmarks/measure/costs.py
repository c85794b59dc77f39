"""Cost models of contenders: times on this machine's accelerator, and estimates for a TPU that is not here."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp

from palladion.benchmarks.measure.bench import DeviceLostError, compile_calls, config_text, one_line, warm_runner
from palladion.benchmarks.measure.device_time import kernel_seconds
from palladion.benchmarks.measure.model_shapes import ACTIVATIONS
from palladion.benchmarks.measure.operations import CallOptions, Case, Operation, operation
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.samples import Samples
from palladion.benchmarks.measure.search import Contender, ContendersLostError, RejectedError
from palladion.benchmarks.measure.timing import CompiledCalls, JaxRunner, measure
from palladion.benchmarks.static import Examiner, WorkloadName
from palladion.benchmarks.static.workloads import with_scalars
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips

ROUNDS: Final = {"device": 3, "wall": 5}
"""Samples of a contender, by clock."""

COMPARISON_ROUNDS: Final = {"device": 7, "wall": 15}
"""Samples of each contender where they are compared, by clock."""

SAMPLE_SECONDS: Final = 0.01
"""Minimum length of a sample by wall clock; short, because many configs are tried."""


class MeasuredCost:
    """Times contenders on JAX's default device, and rejects those with a wrong result.

    The time is that of the device for a call's kernels where the profiler shows it, on a GPU; otherwise wall clock.

    Args:
      chosen: the operation.
      case: the workload.
      interpret: interprets kernels; only for tests, because it says nothing of their speed.
    """

    def __init__(self, chosen: Operation, case: Case, interpret: bool | None = None) -> None:
        self.origin = "interpreted" if interpret else "measured"
        self._operation, self._case, self._interpret = chosen, case, interpret
        self._inputs = chosen.inputs(case)
        self._calls: dict[Contender, CompiledCalls | Exception] = {}
        reference = compile_calls(chosen, case, backend="xla", timed=False)
        self._reference = warm_runner(chosen, "xla", reference, self._inputs).result
        self.clock = best_clock()

    def samples(self, contenders: Sequence[Contender], *, thorough: bool) -> dict[Contender, Samples | RejectedError]:
        """Implements `CostModel.samples`: runs all contenders once, judges their results, and times those in turns."""
        self._compile(contenders)
        found: dict[Contender, Samples | RejectedError] = {}
        runners: dict[Contender, JaxRunner] = {}
        for contender in contenders:
            try:
                runners[contender] = self._runner(contender)
            except RejectedError as error:
                found[contender] = error
            except DeviceLostError as error:
                raise ContendersLostError([contender], str(error)) from error
        judge = functools.partial(self._operation.judge, self._case, self._inputs, reference=self._reference)
        verdicts = side_by_side([functools.partial(judge, result=runner.result) for runner in runners.values()])
        for contender, verdict in zip(list(runners), verdicts, strict=True):
            if isinstance(verdict, Exception) or not verdict.right:
                wrong = one_line(verdict) if isinstance(verdict, Exception) else f"wrong: {verdict.description}"
                found[contender] = RejectedError(wrong)
                del runners[contender]
        rounds = (COMPARISON_ROUNDS if thorough else ROUNDS)[self.clock]
        try:
            found |= self._timed(runners, rounds)
        except DeviceLostError as error:
            raise ContendersLostError(list(runners), str(error)) from error
        return {contender: found[contender] for contender in contenders}

    def _timed(self, runners: dict[Contender, JaxRunner], rounds: int) -> dict[Contender, Samples | RejectedError]:
        """Times contenders in turns; where one of them fails, each alone."""
        try:
            if self.clock == "device":
                times = kernel_seconds(list(runners.values()), rounds)
                samples = {name: one.samples for name, one in times.items()}
            else:
                samples = measure(list(runners.values()), rounds=rounds, sample_seconds=SAMPLE_SECONDS)
        except Exception as error:  # it compiles, but does not run
            if len(runners) == 1:
                return {contender: RejectedError(one_line(error)) for contender in runners}
            one_line(error)  # raises if the device is lost
            alone = [self._timed({contender: runner}, rounds) for contender, runner in runners.items()]
            return {contender: outcome for one in alone for contender, outcome in one.items()}
        unseen = RejectedError("the profiler shows no kernel of it")
        return {contender: samples.get(runner.name, unseen) for contender, runner in runners.items()}

    def _compile(self, contenders: Sequence[Contender]) -> None:
        """Compiles what is not compiled yet, on all cores; nothing is timed then."""
        missing = [one for one in dict.fromkeys(contenders) if one not in self._calls]
        jobs = [
            functools.partial(compile_calls, self._operation, self._case, **self._call_options(one)) for one in missing
        ]
        self._calls.update(zip(missing, side_by_side(jobs), strict=True))

    def _call_options(self, contender: Contender) -> CallOptions:
        return {"backend": contender.implementation, "config": contender.config, "interpret": self._interpret}

    def _runner(self, contender: Contender) -> JaxRunner:
        name, calls = f"{contender.implementation} {config_text(contender.config)}".strip(), self._calls[contender]
        try:
            if isinstance(calls, Exception):  # compilers raise what they like
                raise calls
            return warm_runner(self._operation, name, calls, self._inputs)
        except Exception as error:
            raise RejectedError(one_line(error)) from error


@functools.cache
def best_clock() -> str:
    """Returns "device" where the profiler shows kernels of JAX's default device, on a GPU, otherwise "wall"."""
    probe = JaxRunner.compile("probe", lambda x: x + 1, jnp.ones(8), copies=1)
    return "device" if kernel_seconds([probe], 1) else "wall"


class EstimatedCost:
    """Estimates configs for a TPU that need not be there, from the compiler's schedule.

    Args:
      chosen: the operation.
      case: the workload.
      chip: a name in `tpu_chips()`.
    """

    origin, clock = "estimated", ""

    def __init__(self, chosen: Operation, case: Case, chip: str) -> None:
        check(chip in tpu_chips(), "--chip", chip, ", ".join(tpu_chips()))
        self._operation, self._case, self._chip = chosen, case, chip
        self._examiner = Examiner()
        self._folder = tempfile.TemporaryDirectory(prefix="palladion_costs_")
        self._file = Path(self._folder.name) / "candidate.py"
        self._file.write_text(CANDIDATE)

    def close(self) -> None:
        """Ends the compiler's process."""
        self._examiner.stop()
        self._folder.cleanup()

    def samples(self, contenders: Sequence[Contender], *, thorough: bool) -> dict[Contender, Samples | RejectedError]:
        """Implements `CostModel.samples`: the estimates have no noise."""
        del thorough
        found: dict[Contender, Samples | RejectedError] = {}
        for contender in contenders:
            try:
                found[contender] = Samples((self._seconds(contender),), 1)
            except RejectedError as error:
                found[contender] = error
        return found

    def _seconds(self, contender: Contender) -> float:
        """Returns the estimated seconds of all kernels of a call together."""
        case, config = encode_case(self._case), dataclasses.asdict(contender.config)
        given = {"operation": self._operation.name, "case": case, "config": config}
        self._file.with_suffix(".json").write_text(json.dumps(given))
        found = self._examiner.examine(WorkloadName("", "candidate", str(self._file)), self._chip)
        if found.failure is not None:
            raise RejectedError(found.failure.splitlines()[0][:200])
        times = [report.seconds for report in found.reports]
        if not times or any(time is None for time in times):
            raise RejectedError("the compiler's listing does not tell its time")
        return sum(time for time in times if time is not None)


CANDIDATE: Final = """from pathlib import Path

from palladion.benchmarks.measure.costs import candidate_workload


def candidate():
    return candidate_workload(Path(__file__).with_suffix(".json"))
"""
"""Source of the file with the function that the compiler's process examines."""


def candidate_workload(path: Path) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    """Reads what `EstimatedCost` has written, and returns a workload as `static.workloads` takes it from a file."""
    given = json.loads(path.read_text())
    chosen = operation(given["operation"])
    case = decode_case(chosen, given["case"])
    (implementation,) = (one for one in chosen.table if one.platform == "tpu")
    assert implementation.config_class is not None
    config, problem = implementation.config_class(**given["config"]), case.problem()

    def function(inputs: Any) -> Any:
        return implementation.run(problem, inputs, config=config, interpret=False)

    return function, (with_scalars(case.shapes(), case),), chosen.bytes_moved(case)


def encode_case(case: Any) -> dict[str, Any]:
    """Returns a case's fields as JSON has them, with the activation by its name."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    if fields.get("activation") is not None:
        named = {function: name for name, function in ACTIVATIONS.items()}
        check(fields["activation"] in named, "activation", fields["activation"], ", ".join(ACTIVATIONS))
        fields["activation"] = named[fields["activation"]]
    return fields


def decode_case(chosen: Operation, fields: dict[str, Any]) -> Any:
    """Returns the case that `encode_case` has encoded."""
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if given.get("activation") is not None:
        given["activation"] = ACTIVATIONS[given["activation"]]
    return chosen.cases.Case(**given)
