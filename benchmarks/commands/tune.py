r"""Searches block sizes of kernels for shapes and a device, and writes them where calls find them.

  PALLADION_CACHE=~/.cache/palladion python -m palladion.benchmarks tune decode_attention --model=llama3-8b --batch=1,8
  python -m palladion.benchmarks tune model --model=qwen3-4b --batch=1 --kv-len=8192 --scheme=int4-g128
  python -m palladion.benchmarks tune quantized_matmul --chip=v6e --scheme=int8 --rows=1

"model" stands for everything that a decode step of a model calls. On an accelerator configs are judged by the float64
oracle and timed. --chip names a TPU that need not be here: its compiler's schedule then says what a config takes, and
the entries are marked as estimated. Found block sizes go to $PALLADION_CACHE, or with --package beside the kernels.
Every trial is kept in a log: what was interrupted goes on where it was.
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

from palladion.benchmarks.commands import options as workloads
from palladion.benchmarks.measure import bench
from palladion.benchmarks.measure import search as tuner
from palladion.benchmarks.measure.bench import config_text
from palladion.benchmarks.measure.operations import OPERATIONS, Operation, operation
from palladion.benchmarks.measure.records import duration
from palladion.benchmarks.measure.search import Estimated, Judge, Measured, Trial
from palladion.kernels import tuning
from palladion.kernels.backend import Implementation
from palladion.kernels.checks import check
from palladion.kernels.devices import target_device_kind, tpu_chips
from palladion.reference.platforms import target_platform

HELP: Final = "searches block sizes for shapes and a device, and writes them where calls find them"

MODEL: Final = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("operation", help=f"{MODEL}, {', '.join(OPERATIONS)}")
    workloads.add_arguments(parser)
    parser.add_argument("--chip", metavar="NAME", help=f"estimate for a TPU without one: {', '.join(tpu_chips())}")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="for all shapes together (10)")
    parser.add_argument("--trials", type=int, default=60, metavar="N", help="for each shape, at most (60)")
    parser.add_argument("--package", action="store_true", help="write beside the kernels, for everybody")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of trials ($PALLADION_CACHE/trials/<device>.jsonl)")
    parser.add_argument("--interpret", action="store_true", help="time interpreted kernels: only to see this work")


def run(arguments: argparse.Namespace) -> int:
    """Tunes; says what it does, and writes entries as they are found."""
    chosen = list(OPERATIONS.values()) if arguments.operation == MODEL else [operation(arguments.operation)]
    cases = [(one, case) for one in chosen for case in workloads.selected(one, arguments)]
    check(arguments.minutes > 0, "--minutes", arguments.minutes, "more than 0")
    check(arguments.trials >= 1, "--trials", arguments.trials, "at least 1")
    cached = tuning.CACHE in os.environ
    check(cached or arguments.package, tuning.CACHE, "not set", "a folder for what is found, or --package")
    if arguments.chip is None:
        here = target_platform() in ("gpu", "tpu") or arguments.interpret
        check(here, "device", target_platform(), "a GPU or TPU, or --chip for a TPU that is not here")
        return _tune(cases, arguments, None)
    check(arguments.chip in tpu_chips(), "--chip", arguments.chip, ", ".join(tpu_chips()))
    with tuner.as_if_on(arguments.chip):
        return _tune(cases, arguments, arguments.chip)


def _tune(cases: list[tuple[Operation, Any]], arguments: argparse.Namespace, chip: str | None) -> int:
    deadline = time.perf_counter() + 60 * arguments.minutes
    device_kind = target_device_kind()
    found = 0
    for number, (chosen, case) in enumerate(cases):
        for row in tunable(chosen, case, interpret=arguments.interpret):
            share = max(bench.seconds_left(deadline), 0.0) / (len(cases) - number)
            if share <= 0:
                bench.progress("no time left: start again with more --minutes, it goes on where it was")
                return 0
            bench.progress(f"[{number + 1}/{len(cases)}] {chosen.name} {case.name}: {row.name} on {device_kind}")
            judge: Judge = Estimated(chosen, case, chip) if chip else Measured(chosen, case, row, _interpret(arguments))
            try:
                entry = tune_case(
                    chosen,
                    case,
                    row,
                    judge,
                    log=log_file(arguments.log, device_kind),
                    deadline=time.perf_counter() + share,
                    most_trials=arguments.trials,
                )
            except bench.DeviceLostError as error:
                bench.progress(f"{error}\nthe device does nothing any more: start again, it goes on after that")
                return 1
            finally:
                if isinstance(judge, Estimated):
                    judge.close()
            if entry is None:
                continue
            path = tuning.user_file(chosen.name, device_kind)
            if arguments.package or path is None:
                path = tuning.package_file(chosen.name, device_kind)
            tuning.save(path, device_kind, [entry])
            found += 1
            bench.progress(f"  wrote {path}")
    print(f"{found} of {len(cases)} shapes have better block sizes than the heuristic's")
    return 0


def _interpret(arguments: argparse.Namespace) -> bool | None:
    return True if arguments.interpret else None


def tunable(chosen: Operation, case: Any, *, interpret: bool = False) -> Iterator[Implementation]:
    """The kernels of the platform that is traced for that take a case and have something to choose."""
    problem = case.problem()
    for row in chosen.table:
        here = row.platform == target_platform() or (interpret and row.platform is not None)
        if row.space is not None and here and row.unsupported(problem) is None:
            yield row


def tune_case(
    chosen: Operation,
    case: Any,
    row: Implementation,
    judge: Judge,
    *,
    log: Path | None,
    deadline: float,
    most_trials: int,
) -> tuning.Entry | None:
    """Searches block sizes for a case.

    Args:
      chosen: the operation.
      case: the workload.
      row: whose block sizes.
      judge: says what they cost.
      log: of trials, read first and added to; or None.
      deadline: of `time.perf_counter()`.
      most_trials: new ones.

    Returns:
      What is better than the heuristic, or None.
    """
    assert row.space is not None
    space, key = row.space(case.problem()), case.problem().tuning_key()
    place = {"operation": chosen.name, "implementation": row.name, "kind": key.kind, "sizes": dict(key.sizes)}
    place |= {"origin": judge.origin, "versions": _versions(chosen)}
    known = {trial.config: trial for trial in _logged(log, place, row)}
    if known:
        bench.progress(f"  {len(known)} trials are known from before")
    new: list[Trial] = []

    def tried(trial: Trial) -> None:
        new.append(trial)
        said = duration(trial.seconds) if trial.seconds is not None else f"rejected: {trial.reason[:80]}"
        bench.progress(f"  {len(new):3d} {config_text(trial.config)}: {said}")
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            entry = place | {"config": dataclasses.asdict(trial.config), "seconds": trial.seconds}
            with log.open("a") as file:
                file.write(json.dumps(entry | {"reason": trial.reason}) + "\n")

    best, trials = tuner.search(
        space,
        judge,
        known=known,
        goes_on=lambda: time.perf_counter() < deadline and len(new) < most_trials,
        tried=tried,
    )
    won = tuner.winner(space, best, judge)
    rejected = sum(1 for trial in trials if trial.seconds is None)
    start = next((trial.seconds for trial in trials if trial.config == space.start), None)
    if won is None:
        bench.progress(f"  {len(trials)} tried, {rejected} rejected: nothing better than {config_text(space.start)}")
        return None
    trial, gain = won
    assert trial.seconds is not None
    bench.progress(f"  {len(trials)} tried, {rejected} rejected: {config_text(trial.config)} is {gain:.2f} x as fast")
    return tuning.Entry(
        implementation=row.name,
        kind=key.kind,
        sizes=dict(key.sizes),
        config=dataclasses.asdict(trial.config),
        seconds=trial.seconds,
        heuristic_seconds=trial.seconds * gain if start is None else start,
        origin=judge.origin,
        versions=_versions(chosen),
    )


def log_file(given: Path | None, device_kind: str) -> Path | None:
    """Where trials are kept."""
    cache = os.environ.get(tuning.CACHE)
    name = f"{tuning.file_stem(device_kind)}.jsonl"
    return given or (Path(cache).expanduser() / "trials" / name if cache else None)


def _logged(log: Path | None, place: dict[str, Any], row: Implementation) -> Iterator[Trial]:
    """Earlier trials of the same problem with the same versions; a line that was cut off is none."""
    if log is None or not log.is_file() or row.config_class is None:
        return
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
            if all(entry[name] == value for name, value in place.items()):
                yield Trial(row.config_class(**entry["config"]), entry["seconds"], entry["reason"])
        except (KeyError, TypeError, ValueError):
            continue


def _versions(chosen: Operation) -> dict[str, str]:
    """Of what decides how fast a config is: jax, and the operation's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(importlib.resources.files(chosen.package))).glob("*.py")):
        digest.update(path.read_bytes())
    return {"jax": jax.__version__, "source": digest.hexdigest()[:12]}
