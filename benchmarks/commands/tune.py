r"""Searches block sizes of kernels for given shapes and a device, and writes them where calls find them.

  PALLADION_CACHE=~/.cache/palladion python -m palladion.benchmarks tune decode_attention --model=llama3-8b --batch=1,8
  python -m palladion.benchmarks tune model --model=qwen3-4b --batch=1 --kv-len=8192 --scheme=int4-g128
  python -m palladion.benchmarks tune quantized_matmul --chip=v6e --scheme=int8 --rows=1

"model" tunes every operation of a model's decode step. On an accelerator the results of a config are checked against
the float64 oracle, and its calls are timed. With --chip, which names a TPU that need not be here, the time is estimated
from the compiler's schedule, and entries are marked as estimated. Block sizes go to $PALLADION_CACHE, or with --package
beside the kernels. Every trial is logged: an interrupted search continues where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.resources
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax

from palladion.benchmarks.commands import options
from palladion.benchmarks.commands.progress import report_progress, seconds_left
from palladion.benchmarks.measure.bench import DeviceLostError, config_text
from palladion.benchmarks.measure.costs import EstimatedCost, MeasuredCost
from palladion.benchmarks.measure.operations import OPERATIONS, Case, Operation, operation
from palladion.benchmarks.measure.search import CostModel, Trial, search, winner
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.text import duration
from palladion.kernels import tuning
from palladion.kernels.checks import check
from palladion.kernels.devices import target_device_kind, tpu_chips
from palladion.kernels.implementation import Implementation
from palladion.reference.platforms import target_platform

HELP: Final = "searches block sizes for shapes and a device, and writes them where calls find them"

MODEL: Final = "model"
"""Stands for all operations of a model's decode step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("operation", help=f"{MODEL}, {', '.join(OPERATIONS)}")
    options.add_arguments(parser)
    parser.add_argument("--chip", metavar="NAME", help=f"estimate for a TPU that is not here: {', '.join(tpu_chips())}")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="for all shapes together (10)")
    parser.add_argument("--trials", type=int, default=60, metavar="N", help="for each shape, at most (60)")
    parser.add_argument("--package", action="store_true", help="write beside the kernels, for everybody")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of trials ($PALLADION_CACHE/trials/<device>.jsonl)")
    parser.add_argument("--interpret", action="store_true", help="time interpreted kernels: only to try the command")


def run(arguments: argparse.Namespace) -> int:
    """Tunes the chosen cases, and writes entries as they are found."""
    chosen = list(OPERATIONS.values()) if arguments.operation == MODEL else [operation(arguments.operation)]
    cases = [(one, case) for one in chosen for case in options.selected(one, arguments)]
    check(arguments.minutes > 0, "--minutes", arguments.minutes, "more than 0")
    check(arguments.trials >= 1, "--trials", arguments.trials, "at least 1")
    cached = tuning.CACHE in os.environ
    check(cached or arguments.package, tuning.CACHE, "not set", "a folder for what is found, or --package")
    if arguments.chip is None:
        here = target_platform() in ("gpu", "tpu") or arguments.interpret
        check(here, "device", target_platform(), "a GPU or TPU, or --chip for a TPU that is not here")
        return _tune(cases, arguments, None)
    check(arguments.chip in tpu_chips(), "--chip", arguments.chip, ", ".join(tpu_chips()))
    with tpu_compiler.tracing_for(arguments.chip):
        return _tune(cases, arguments, arguments.chip)


def _tune(cases: list[tuple[Operation, Case]], arguments: argparse.Namespace, chip: str | None) -> int:
    """Searches block sizes for each case within its share of the time; returns the exit status."""
    deadline = time.perf_counter() + 60 * arguments.minutes
    device_kind = target_device_kind()
    found = 0
    for number, (chosen, case) in enumerate(cases):
        for implementation in tunable(chosen, case, interpret=arguments.interpret):
            share = max(seconds_left(deadline), 0.0) / (len(cases) - number)
            if share <= 0:
                report_progress("no time left: start again with more --minutes, it goes on where it was")
                return 0
            report_progress(
                f"[{number + 1}/{len(cases)}] {chosen.name} {case.name}: {implementation.name} on {device_kind}"
            )
            cost_model: CostModel
            if chip is not None:
                cost_model = EstimatedCost(chosen, case, chip)
            else:
                cost_model = MeasuredCost(chosen, case, implementation, True if arguments.interpret else None)
            try:
                entry = tune_case(
                    chosen,
                    case,
                    implementation,
                    cost_model,
                    log=log_file(arguments.log, device_kind),
                    deadline=time.perf_counter() + share,
                    most_trials=arguments.trials,
                )
            except DeviceLostError as error:
                report_progress(f"{error}\nthe device does nothing any more: start again, it goes on after that")
                return 1
            finally:
                if isinstance(cost_model, EstimatedCost):
                    cost_model.close()
            if entry is None:
                continue
            path = tuning.user_file(chosen.name, device_kind)
            if arguments.package or path is None:
                path = tuning.package_file(chosen.name, device_kind)
            tuning.save(path, device_kind, [entry])
            found += 1
            report_progress(f"  wrote {path}")
    print(f"{found} of {len(cases)} shapes have better block sizes than the heuristic's")
    return 0


def tunable(chosen: Operation, case: Case, *, interpret: bool = False) -> Iterator[Implementation]:
    """Yields the kernels of the traced platform that support a case and have block sizes to choose."""
    problem = case.problem()
    for one in chosen.table:
        here = one.platform == target_platform() or (interpret and one.platform is not None)
        if one.space is not None and here and one.unsupported(problem) is None:
            yield one


def tune_case(
    chosen: Operation,
    case: Case,
    implementation: Implementation,
    cost_model: CostModel,
    *,
    log: Path | None,
    deadline: float,
    most_trials: int,
) -> tuning.Entry | None:
    """Searches block sizes for a case.

    Args:
      chosen: the operation.
      case: the workload.
      implementation: the kernel whose block sizes are searched.
      cost_model: says what they cost.
      log: file of trials, read first and appended to; or None.
      deadline: `time.perf_counter()` after which no trial begins.
      most_trials: maximum number of new trials.

    Returns:
      An entry for the best block sizes, or None if the heuristic's are as good.
    """
    assert implementation.space is not None
    space, key = implementation.space(case.problem()), case.problem().tuning_key()
    problem: dict[str, Any] = {"operation": chosen.name, "implementation": implementation.name}
    problem |= {"kind": key.kind, "sizes": dict(key.sizes)}
    problem |= {"origin": cost_model.origin, "versions": _versions(chosen)}
    known = {trial.config: trial for trial in _logged(log, problem, implementation)}
    if known:
        report_progress(f"  {len(known)} trials are known from before")
    new: list[Trial] = []

    def on_trial(trial: Trial) -> None:
        new.append(trial)
        said = duration(trial.seconds) if trial.seconds is not None else f"rejected: {trial.reason[:80]}"
        report_progress(f"  {len(new):3d} {config_text(trial.config)}: {said}")
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            entry = problem | {"config": dataclasses.asdict(trial.config), "seconds": trial.seconds}
            with log.open("a") as file:
                file.write(json.dumps(entry | {"reason": trial.reason}) + "\n")

    best, trials = search(
        space,
        cost_model,
        known=known,
        proceed=lambda: time.perf_counter() < deadline and len(new) < most_trials,
        on_trial=on_trial,
    )
    won = winner(space, best, cost_model)
    rejected = sum(1 for trial in trials if trial.seconds is None)
    start = next((trial.seconds for trial in trials if trial.config == space.start), None)
    if won is None:
        report_progress(f"  {len(trials)} tried, {rejected} rejected: nothing better than {config_text(space.start)}")
        return None
    trial, gain = won
    assert trial.seconds is not None
    report_progress(f"  {len(trials)} tried, {rejected} rejected: {config_text(trial.config)} is {gain:.2f} x as fast")
    return tuning.Entry(
        implementation=implementation.name,
        kind=key.kind,
        sizes=dict(key.sizes),
        config=dataclasses.asdict(trial.config),
        seconds=trial.seconds,
        heuristic_seconds=trial.seconds * gain if start is None else start,
        origin=cost_model.origin,
        versions=_versions(chosen),
    )


def log_file(given: Path | None, device_kind: str) -> Path | None:
    """Returns the file where trials are logged, or None."""
    cache = os.environ.get(tuning.CACHE)
    name = f"{tuning.file_stem(device_kind)}.jsonl"
    return given or (Path(cache).expanduser() / "trials" / name if cache else None)


def _logged(log: Path | None, problem: dict[str, Any], implementation: Implementation) -> Iterator[Trial]:
    """Yields earlier trials of the same problem with the same versions; lines that were cut off are skipped."""
    if log is None or not log.is_file() or implementation.config_class is None:
        return
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
            if all(entry[name] == value for name, value in problem.items()):
                yield Trial(implementation.config_class(**entry["config"]), entry["seconds"], entry["reason"])
        except (KeyError, TypeError, ValueError):
            continue


def _versions(chosen: Operation) -> dict[str, str]:
    """Returns the versions that decide how fast a config is: jax, and a digest of the operation's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(importlib.resources.files(chosen.package))).rglob("*.py")):
        digest.update(path.read_bytes())
    return {"jax": jax.__version__, "source": digest.hexdigest()[:12]}
