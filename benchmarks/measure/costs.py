"""Cost models of block sizes: times on this machine's accelerator, and estimates for a TPU that is not here."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.measure.bench import compile_calls, one_line, warm_runner
from palladion.benchmarks.measure.model_shapes import ACTIVATIONS
from palladion.benchmarks.measure.operations import CallOptions, Case, Operation, operation
from palladion.benchmarks.measure.parallel import cores, side_by_side
from palladion.benchmarks.measure.samples import Samples, ratio
from palladion.benchmarks.measure.search import RejectedError
from palladion.benchmarks.measure.timing import CompiledCalls, JaxRunner, measure
from palladion.benchmarks.static import Examiner, WorkloadName
from palladion.benchmarks.static.workloads import with_scalars
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips
from palladion.kernels.implementation import Implementation

TRIAL_ROUNDS: Final = 5
"""Samples of a config."""

DUEL_ROUNDS: Final = 15
"""Samples of each config where two are compared."""

SAMPLE_SECONDS: Final = 0.01
"""Minimum length of a sample; short, because many configs are tried."""

AGREEMENT: Final = 0.8
"""Share of the rounds in which a config must be faster for its speedup to count."""


class MeasuredCost:
    """Times configs on JAX's default device, and rejects those with a wrong result.

    Args:
      chosen: the operation.
      case: the workload.
      implementation: the kernel whose configs are timed.
      interpret: interprets the kernel; only for tests, because it says nothing of its speed.
    """

    origin = "measured"

    def __init__(
        self, chosen: Operation, case: Case, implementation: Implementation, interpret: bool | None = None
    ) -> None:
        self._operation, self._case = chosen, case
        self._call: CallOptions = {"backend": implementation.name, "interpret": interpret}
        self._inputs = chosen.inputs(case)
        self._next: list[Any] = []
        self._calls: dict[Any, CompiledCalls | Exception] = {}
        reference = compile_calls(chosen, case, backend="xla", timed=False)
        self._reference = warm_runner(chosen, "xla", reference, self._inputs).result

    def prepare(self, configs: Sequence[Any]) -> None:
        """Implements `CostModel.prepare`: as many as there are cores are compiled with the next one asked for."""
        self._next = list(configs)

    def seconds(self, config: Any) -> float:
        """Returns the median of a few samples."""
        return self._measure([self._runner(config, "config")], rounds=TRIAL_ROUNDS)["config"].median

    def gain(self, better: Any, start: Any) -> float:
        """Implements `CostModel.gain`: times both in turns, more often; see `certain_gain`."""
        runners = [self._runner(better, "better"), self._runner(start, "start")]
        return certain_gain(**self._measure(runners, rounds=DUEL_ROUNDS))

    def _compiled(self, config: Any) -> CompiledCalls:
        """Returns a config's calls, compiled together with configs that are likely to follow; nothing is timed then."""
        if config not in self._calls:
            others = [one for one in self._next if one != config and one not in self._calls]
            together = [config, *others[: cores() - 1]]
            jobs = [
                functools.partial(compile_calls, self._operation, self._case, **(self._call | {"config": one}))
                for one in together
            ]
            self._calls.update(zip(together, side_by_side(jobs), strict=True))
        calls = self._calls[config]
        if isinstance(calls, Exception):  # compilers raise what they like
            raise calls
        return calls

    def _runner(self, config: Any, name: str) -> JaxRunner:
        try:
            runner = warm_runner(self._operation, name, self._compiled(config), self._inputs)
        except Exception as error:
            raise RejectedError(one_line(error)) from error
        verdict = self._operation.judge(self._case, self._inputs, runner.result, self._reference)
        if not verdict.right:
            raise RejectedError(f"wrong: {verdict.description}")
        return runner

    def _measure(self, runners: Sequence[JaxRunner], rounds: int) -> dict[str, Samples]:
        try:
            return measure(runners, rounds=rounds, sample_seconds=SAMPLE_SECONDS)
        except Exception as error:  # it compiles, but does not run
            raise RejectedError(one_line(error)) from error


def certain_gain(better: Samples, start: Samples) -> float:
    """Returns the median speedup over the rounds; at most 1 unless four rounds in five agree that it is one."""
    rounds = [old / new for new, old in zip(better.seconds, start.seconds, strict=False)]
    agree = sum(1 for one in rounds if one > 1) >= AGREEMENT * len(rounds)
    return statistics.median(rounds) if agree else min(1.0, ratio(start, better))


class EstimatedCost:
    """Estimates configs for a TPU that need not be there, from the compiler's schedule.

    Args:
      chosen: the operation.
      case: the workload.
      chip: a name in `tpu_chips()`.
    """

    origin = "estimated"

    def __init__(self, chosen: Operation, case: Case, chip: str) -> None:
        check(chip in tpu_chips(), "--chip", chip, ", ".join(tpu_chips()))
        self._operation, self._case, self._chip = chosen, case, chip
        self._examiner = Examiner()
        self._folder = tempfile.TemporaryDirectory(prefix="palladion_costs_")
        self._file = Path(self._folder.name) / "candidate.py"
        self._file.write_text(CANDIDATE)

    def prepare(self, configs: Sequence[Any]) -> None:
        """Implements `CostModel.prepare`: nothing is compiled ahead, the compiler's process takes one at a time."""

    def close(self) -> None:
        """Ends the compiler's process."""
        self._examiner.stop()
        self._folder.cleanup()

    def seconds(self, config: Any) -> float:
        """Returns the estimated seconds of all kernels of a call together."""
        case = encode_case(self._case)
        given = {"operation": self._operation.name, "case": case, "config": dataclasses.asdict(config)}
        self._file.with_suffix(".json").write_text(json.dumps(given))
        found = self._examiner.examine(WorkloadName("", "candidate", str(self._file)), self._chip)
        if found.failure is not None:
            raise RejectedError(found.failure.splitlines()[0][:200])
        times = [report.seconds for report in found.reports]
        if not times or any(time is None for time in times):
            raise RejectedError("the compiler's listing does not tell its time")
        return sum(time for time in times if time is not None)

    def gain(self, better: Any, start: Any) -> float:
        """Returns the ratio of the estimates, which have no noise."""
        return self.seconds(start) / self.seconds(better)


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
