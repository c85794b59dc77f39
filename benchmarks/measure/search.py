"""Searches block sizes: a walk from those of the heuristic to better neighbours, which remembers what it has tried.

What a config costs is said by a judge: `Measured` on this machine's accelerator, `Estimated` by the TPU compiler's
schedule without one. A judge refuses what does not compile, and what is wrong. A winner has to beat the heuristic in a
duel, beyond noise: what cannot be told apart from the heuristic is not worth an entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import jax

from palladion.benchmarks.measure.bench import DeviceLostError, in_a_line, program_of, ready
from palladion.benchmarks.measure.model_shapes import ACTIVATIONS
from palladion.benchmarks.measure.operations import Operation, operation
from palladion.benchmarks.measure.parallel import cores, side_by_side
from palladion.benchmarks.measure.timing import JaxRunner, Program, Samples, measure, ratio
from palladion.benchmarks.static import Examiner, Reference
from palladion.benchmarks.static.workloads import Workload
from palladion.kernels.backend import Implementation
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips
from palladion.kernels.tuning import Space

LEAST_GAIN: Final = 1.03
"""Times as fast as the heuristic's that tuned block sizes are at least."""

DUEL_ROUNDS: Final = 15
"""Samples of each in a duel."""

SAMPLE_SECONDS: Final = 0.01
"""How long a sample takes: many configs are tried."""


class RejectedError(Exception):
    """Block sizes that do not compile, or compute something wrong; the message says what."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of a config: seconds of a call, or why it was rejected."""

    config: Any
    seconds: float | None
    reason: str = ""


class Judge(Protocol):
    """Says what a config costs.

    Attributes:
      origin: "measured" or "estimated".
    """

    origin: str

    def expect(self, configs: Sequence[Any]) -> None:
        """Told which configs are likely to be asked about next, in this order: some may be compiled ahead."""

    def seconds(self, config: Any) -> float:
        """What a call takes; raises RejectedError."""

    def gain(self, better: Any, start: Any) -> float:
        """How many times as fast the first is as the second, at least; both have been judged before."""


def search(
    space: Space,
    judge: Judge,
    *,
    known: dict[Any, Trial] | None = None,
    goes_on: Callable[[], bool] = lambda: True,
    tried: Callable[[Trial], None] = lambda _: None,
) -> tuple[Trial | None, list[Trial]]:
    """Walks from the heuristic's block sizes to better ones, until no neighbour is better.

    Args:
      space: what may be tried.
      judge: what it costs.
      known: trials of an earlier search, by config: they are not repeated.
      goes_on: asked before each trial; False ends the search with the best so far.
      tried: told of each new trial.

    Raises:
      DeviceLostError: a config has left the device useless for this process; `tried` was told of it.

    Returns:
      The best trial, or None where none was accepted; and all trials, those of `known` that were met among them.
    """
    trials: dict[Any, Trial] = {}
    earlier = known or {}

    def attempt(config: Any) -> Trial | None:
        if config in trials:
            return trials[config]
        if config in earlier:
            trials[config] = earlier[config]
        elif not goes_on():
            return None
        else:
            try:
                trials[config] = Trial(config, judge.seconds(config))
            except RejectedError as error:
                trials[config] = Trial(config, None, str(error))
            except DeviceLostError as error:
                # Remembered, so that the next search passes it over.
                tried(Trial(config, None, str(error)))
                raise
            tried(trials[config])
        return trials[config]

    def expect(configs: Sequence[Any]) -> None:
        judge.expect([config for config in configs if config not in trials and config not in earlier])

    expect([space.start, *space.neighbours(space.start)])
    best = attempt(space.start)
    moved = best is not None
    while moved:
        moved = False
        assert best is not None
        nearby = list(space.neighbours(best.config))
        expect(nearby)
        for config in nearby:
            trial = attempt(config)
            if trial is None:
                moved = False
                break
            if trial.seconds is not None and (best.seconds is None or trial.seconds < best.seconds):
                best, moved = trial, True
                break  # on from there
    accepted = best if best is not None and best.seconds is not None else None
    return accepted, list(trials.values())


def winner(space: Space, best: Trial | None, judge: Judge) -> tuple[Trial, float] | None:
    """The best trial and its gain over the heuristic, where it wins a duel with it; None where it does not."""
    if best is None or best.config == space.start:
        return None
    try:
        gain = judge.gain(best.config, space.start)
    except RejectedError:
        gain = float("inf")  # the heuristic's are rejected: anything is better
    return (best, gain) if gain >= LEAST_GAIN else None


class Measured:
    """Times configs on JAX's default device; what is wrong is rejected.

    Args:
      chosen: the operation.
      case: the workload.
      row: whose configs.
      interpret: as for the operation; True is for tests, and says nothing of speed.
    """

    origin = "measured"

    def __init__(self, chosen: Operation, case: Any, row: Implementation, interpret: Any = None) -> None:
        self._operation, self._case, self._row, self._interpret = chosen, case, row, interpret
        self._inputs = chosen.inputs(case)
        self._expected: list[Any] = []
        self._programs: dict[Any, Program | Exception] = {}
        self._reference = ready(
            chosen, "xla", program_of(chosen, case, backend="xla", timed=False), self._inputs
        ).result

    def expect(self, configs: Sequence[Any]) -> None:
        """They are compiled together with the next one that is asked about, as many as there are cores."""
        self._expected = list(configs)

    def _program(self, config: Any) -> Program:
        """A config's, compiled with some of those that are expected beside it; nothing is timed meanwhile."""
        if config not in self._programs:
            others = [one for one in self._expected if one != config and one not in self._programs]
            together = [config, *others[: cores() - 1]]
            how = {"backend": self._row.name, "interpret": self._interpret}
            jobs = [functools.partial(program_of, self._operation, self._case, config=one, **how) for one in together]
            self._programs.update(zip(together, side_by_side(jobs), strict=True))
        program = self._programs[config]
        if isinstance(program, Exception):  # compilers raise what they like
            raise program
        return program

    def _runner(self, config: Any, name: str) -> JaxRunner:
        try:
            runner = ready(self._operation, name, self._program(config), self._inputs)
        except Exception as error:
            raise RejectedError(in_a_line(error)) from error
        verdict = self._operation.judge(self._case, self._inputs, runner.result, self._reference)
        if not verdict.right:
            raise RejectedError(f"wrong: {verdict.said}")
        return runner

    def seconds(self, config: Any) -> float:
        """The median of a few samples."""
        return self._measured([self._runner(config, "config")], rounds=5)["config"].median

    def gain(self, better: Any, start: Any) -> float:
        """In turns, more often; what lies within the noise of both is no gain."""
        runners = [self._runner(better, "better"), self._runner(start, "start")]
        return certain_gain(**self._measured(runners, rounds=DUEL_ROUNDS))

    def _measured(self, runners: Sequence[JaxRunner], rounds: int) -> dict[str, Samples]:
        try:
            return measure(runners, rounds=rounds, sample_seconds=SAMPLE_SECONDS)
        except Exception as error:  # it compiles, and does not run
            raise RejectedError(in_a_line(error)) from error


def certain_gain(better: Samples, start: Samples) -> float:
    """How many times as fast one is: the median over rounds, or 1 where four rounds in five do not agree."""
    rounds = [old / new for new, old in zip(better.seconds, start.seconds, strict=False)]
    agree = sum(1 for one in rounds if one > 1) >= 0.8 * len(rounds)
    return statistics.median(rounds) if agree else min(1.0, ratio(start, better))


class Estimated:
    """Estimates what configs take on a TPU that need not be there, from the compiler's schedule.

    Args:
      chosen: the operation.
      case: the workload.
      chip: a name in `tpu_chips()`.
    """

    origin = "estimated"

    def __init__(self, chosen: Operation, case: Any, chip: str) -> None:
        check(chip in tpu_chips(), "--chip", chip, ", ".join(tpu_chips()))
        self._operation, self._case, self._chip = chosen, case, chip
        self._examiner = Examiner()
        self._folder = tempfile.TemporaryDirectory(prefix="palladion_tuner_")
        self._file = Path(self._folder.name) / "candidate.py"
        self._file.write_text(CANDIDATE)

    def expect(self, configs: Sequence[Any]) -> None:
        """Nothing is done ahead: the compiler's process takes one after the other."""

    def close(self) -> None:
        """Ends the compiler's process."""
        self._examiner.stop()
        self._folder.cleanup()

    def seconds(self, config: Any) -> float:
        """All kernels of a call together."""
        given = {"operation": self._operation.name, "case": encoded(self._case), "config": dataclasses.asdict(config)}
        self._file.with_suffix(".json").write_text(json.dumps(given))
        row = self._examiner.examine(Reference("", "candidate", str(self._file)), self._chip)
        if row.failure is not None:
            raise RejectedError(row.failure.splitlines()[0][:200])
        times = [report.seconds for report in row.reports]
        if not times or any(time is None for time in times):
            raise RejectedError("the compiler's listing does not tell its time")
        return sum(time for time in times if time is not None)

    def gain(self, better: Any, start: Any) -> float:
        """An estimate has no noise."""
        return self.seconds(start) / self.seconds(better)


CANDIDATE: Final = """from pathlib import Path

from palladion.benchmarks.measure.search import candidate_workload


def candidate():
    return candidate_workload(Path(__file__).with_suffix(".json"))
"""
"""The function that another process examines."""


def candidate_workload(path: Path) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    """What `Estimated` has written down, as `palladion.benchmarks.static` takes a function from a file."""
    from palladion.benchmarks.static.workloads import with_scalars

    given = json.loads(path.read_text())
    chosen = operation(given["operation"])
    case = decoded(chosen, given["case"])
    (row,) = (row for row in chosen.table if row.platform == "tpu")
    assert row.config_class is not None
    config, problem = row.config_class(**given["config"]), case.problem()

    def function(inputs: Any) -> Any:
        return row.run(problem, inputs, config=config, interpret=False)

    workload = Workload(function, (with_scalars(case.shapes(), case),), chosen.bytes_moved(case))
    return workload.function, workload.arguments, workload.bytes_needed or 0


def encoded(case: Any) -> dict[str, Any]:
    """A case as JSON has it: an activation by its name."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    if fields.get("activation") is not None:
        named = {function: name for name, function in ACTIVATIONS.items()}
        check(fields["activation"] in named, "activation", fields["activation"], ", ".join(ACTIVATIONS))
        fields["activation"] = named[fields["activation"]]
    return fields


def decoded(chosen: Operation, fields: dict[str, Any]) -> Any:
    """The inverse of `encoded`."""
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if given.get("activation") is not None:
        given["activation"] = ACTIVATIONS[given["activation"]]
    return chosen.cases.Case(**given)


@contextlib.contextmanager
def as_if_on(chip: str) -> Iterator[None]:
    """While this lasts, whoever asks which device is traced for is told of this TPU."""
    known = tpu_chips()[chip]
    device = jax.sharding.AbstractDevice(device_kind=known.device_kind, num_cores=known.cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield
