r"""Searches block sizes of kernels, compares them with XLA's form, and writes what calls then take.

  PALLADION_CACHE=~/.cache/palladion python -m palladion.benchmarks tune decode_attention --model=llama3-8b --batch=1,8
  python -m palladion.benchmarks tune model --model=qwen3-4b --batch=1 --kv-len=8192 --scheme=int4-g128 --package
  python -m palladion.benchmarks tune quantized_matmul --chip=v6e --scheme=int8 --rows=1 --package
  python -m palladion.benchmarks tune model --ship=results/tuned

"model" tunes every operation of a model's decode step. For each shape the block sizes of every kernel of the platform
are searched: coarsely over the whole space, then around the best. The best of each kernel and XLA's own form then take
turns, and an entry is written for each of them: backend="auto" takes the fastest. Results are checked against the
float64 oracle. On a GPU the device's time counts, as the profiler shows it, elsewhere wall clock. With --chip, which
names a TPU that need not be here, the time is estimated from the compiler's schedule, and entries are marked as
estimated; XLA's form takes no part. Entries go to $PALLADION_CACHE, or with --package beside the kernels. Every trial
is logged: an interrupted search continues where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import importlib.resources
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import jax

from palladion.benchmarks.commands import options
from palladion.benchmarks.commands.progress import report_progress, seconds_left
from palladion.benchmarks.measure import machine
from palladion.benchmarks.measure.bench import DeviceLostError, config_text
from palladion.benchmarks.measure.costs import EstimatedCost, MeasuredCost
from palladion.benchmarks.measure.operations import OPERATIONS, Case, Operation, operation
from palladion.benchmarks.measure.samples import Samples
from palladion.benchmarks.measure.search import (
    Budget,
    Contender,
    CostModel,
    Trial,
    accepted,
    finalists,
    search,
    settle,
)
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.text import duration
from palladion.kernels import tuning
from palladion.kernels.checks import check
from palladion.kernels.devices import target_device_kind, tpu_chips
from palladion.kernels.implementation import Implementation, Problem
from palladion.kernels.search_space import Space
from palladion.reference.platforms import target_platform

HELP: Final = "searches block sizes, compares kernels with XLA's form, and writes what calls then take"

MODEL: Final = "model"
"""Stands for all operations of a model's decode step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("operation", help=f"{MODEL}, {', '.join(OPERATIONS)}")
    options.add_arguments(parser)
    parser.add_argument("--chip", metavar="NAME", help=f"estimate for a TPU that is not here: {', '.join(tpu_chips())}")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="for all shapes together (10)")
    parser.add_argument(
        "--backends", type=options.names, metavar="NAMES", help="kernels to search (those of this platform)"
    )
    parser.add_argument("--trials", type=int, default=60, metavar="N", help="for each kernel and shape, at most (60)")
    parser.add_argument("--package", action="store_true", help="write beside the kernels, for everybody")
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="only add the entries there to the package's")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of trials ($PALLADION_CACHE/trials/<device>.jsonl)")
    parser.add_argument("--interpret", action="store_true", help="time interpreted kernels: only to try the command")


def run(arguments: argparse.Namespace) -> int:
    """Tunes the chosen cases, and writes entries as they are found."""
    chosen = list(OPERATIONS.values()) if arguments.operation == MODEL else [operation(arguments.operation)]
    if arguments.ship is not None:
        return _ship(chosen, arguments.ship)
    cases = [(one, case) for one in chosen for case in options.selected(one, arguments)]
    known = {row.name for one in chosen for row in one.table if row.has_kernel}
    for name in arguments.backends or ():
        check(name in known, "--backends", name, ", ".join(sorted(known)))
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


def _ship(chosen: Sequence[Operation], folder: Path) -> int:
    """Adds what was measured elsewhere, in `folder/<operation>/<device kind>.json`, to the package's entries."""
    files = {one.name: sorted((folder / one.name).glob("*.json")) for one in chosen}
    check(any(files.values()), "--ship", folder, "a folder with <operation>/<device kind>.json")
    for name, paths in files.items():
        for path in paths:
            entries = [entry for entry in tuning.load(path) if entry.origin == "measured"]
            if entries:
                target = tuning.package_file(name, entries[0].device)
                tuning.save(target, entries)
                print(f"{len(entries)} entries of {path} added to {target}")
    return 0


def _tune(cases: list[tuple[Operation, Case]], arguments: argparse.Namespace, chip: str | None) -> int:
    """Tunes each case within its share of the time, and writes its entries; returns the exit status."""
    deadline = time.perf_counter() + 60 * arguments.minutes
    device_kind = target_device_kind()
    log = log_file(arguments.log, device_kind)
    written = 0
    for number, (chosen, case) in enumerate(cases):
        rows = contenders(chosen, case, arguments.backends, interpret=arguments.interpret)
        if all(row.space is None for row in rows):
            continue
        seconds = seconds_left(deadline) / (len(cases) - number)
        if seconds <= 0:
            report_progress("no time left: start again with more --minutes, it goes on where it was")
            break
        names = ", ".join(row.name for row in rows if chip is None or row.space is not None)
        report_progress(f"[{number + 1}/{len(cases)}] {chosen.name} {case.name}: {names} on {device_kind}")
        estimate = EstimatedCost(chosen, case, chip) if chip is not None else None
        try:
            cost_model = estimate or MeasuredCost(chosen, case, True if arguments.interpret else None)
            entries = tune_case(chosen, case, rows, cost_model, log=log, seconds=seconds, trials=arguments.trials)
        except DeviceLostError as error:
            report_progress(f"{error}\nthe device does nothing any more: start again, it goes on after that")
            return 1
        finally:
            if estimate is not None:
                estimate.close()
        path = tuning.user_file(chosen.name, device_kind)
        if arguments.package or path is None:
            path = tuning.package_file(chosen.name, device_kind)
        if entries:
            tuning.save(path, entries)
            written += 1
            report_progress(f"  wrote {path}")
            times = ", ".join(f"{one.implementation} {duration(one.seconds)}" for one in entries)
            print(f"{chosen.name} {case.name}: {times}", flush=True)
    print(f"{written} of {len(cases)} shapes tuned")
    return 0


def contenders(
    chosen: Operation, case: Case, names: Sequence[str] | None = None, *, interpret: bool = False
) -> list[Implementation]:
    """Returns the implementations that support a case on the platform that is traced for, in the order of their table.

    A kernel's row that runs XLA's product for a case is left out: the reference stands for it.

    Args:
      chosen: the operation.
      case: the workload.
      names: kernels that take part beside XLA's form; None means all.
      interpret: whether kernels for other platforms take part, interpreted.
    """
    problem = case.problem()
    here = [one for one in chosen.table if one.platform in (None, target_platform()) or interpret]
    here = [one for one in here if names is None or one.platform is None or one.name in names]
    able = [one for one in here if one.unsupported(problem) is None]
    return [one for one in able if one.config_class is None or isinstance(_start(one, problem), one.config_class)]


def _start(row: Implementation, problem: Problem) -> Any:
    return None if row.heuristic is None else row.heuristic(problem)


def tune_case(
    chosen: Operation,
    case: Case,
    rows: Sequence[Implementation],
    cost_model: CostModel,
    *,
    log: Path | None,
    seconds: float,
    trials: int,
) -> list[tuning.Entry]:
    """Searches the block sizes of each implementation of a case, and compares the implementations.

    Args:
      chosen: the operation.
      case: the workload.
      rows: the implementations; `contenders` returns them.
      cost_model: says how fast they are.
      log: file of trials, read first and appended to; or None.
      seconds: time for all searches together.
      trials: maximum number of new trials of each implementation.

    Returns:
      An entry for each implementation that is right, the fastest first.
    """
    problem = case.problem().planned()
    key = problem.tuning_key()
    spaces = {row.name: row.space(problem) for row in rows if row.space is not None}
    final = [] if cost_model.origin == "estimated" else [Contender(row.name, None) for row in rows if row.space is None]
    deadline = time.perf_counter() + seconds
    for number, (name, space) in enumerate(spaces.items()):
        budget = Budget(trials, seconds_left(deadline) / (len(spaces) - number))
        searched: dict[str, Any] = {"operation": chosen.name, "implementation": name}
        searched |= {"kind": key.kind, "sizes": dict(key.sizes)}
        searched |= {"origin": cost_model.origin, "clock": cost_model.clock, "versions": _versions(chosen)}
        final += finalists(name, space, _trials(space, cost_model, budget, searched, log))
    samples = accepted(cost_model.samples(final, thorough=True))
    starts = {name: Contender(name, space.start) for name, space in spaces.items()}
    times: dict[Contender, Samples] = {}
    for row in rows:
        own = {one: each for one, each in samples.items() if one.implementation == row.name}
        if own:
            best = settle(own, starts.get(row.name, Contender(row.name, None)))
            times[best] = own[best]
    entries = [
        tuning.Entry(
            implementation=one.implementation,
            kind=key.kind,
            sizes=dict(key.sizes),
            config=None if one.config is None else dataclasses.asdict(one.config),
            seconds=float(f"{each.median:.4g}"),
            origin=cost_model.origin,
            clock=cost_model.clock,
            device=target_device_kind(),
            date=datetime.date.today().isoformat(),
            versions=_versions(chosen) | _driver(),
            heuristic=one in starts.values(),
        )
        for one, each in times.items()
    ]
    entries.sort(key=lambda entry: entry.seconds)
    for one in sorted(times, key=lambda one: times[one].median):
        name = f"{one.implementation} {config_text(one.config)}".strip()
        report_progress(f"  {duration(times[one].median)} {cost_model.clock or cost_model.origin}: {name}")
    return entries


def _trials(
    space: Space, cost_model: CostModel, budget: Budget, searched: dict[str, Any], log: Path | None
) -> list[Trial]:
    """Searches the block sizes of an implementation, and returns all trials.

    Args:
      space: the block sizes that may be tried.
      cost_model: says how fast they are.
      budget: limits of the search.
      searched: what the log says of each trial, besides its outcome: implementation, problem, clock, versions.
      log: file of trials, or None.
    """
    known = {trial.config: trial for trial in _logged(log, searched, type(space.start))}
    if known:
        report_progress(f"  {len(known)} trials are known from before")
    new: list[Trial] = []

    def on_trial(trial: Trial) -> None:
        new.append(trial)
        said = duration(trial.seconds) if trial.seconds is not None else f"rejected: {trial.reason[:80]}"
        report_progress(f"  {len(new):3d} {config_text(trial.config)}: {said}")
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            entry = searched | {"config": dataclasses.asdict(trial.config), "seconds": trial.seconds}
            with log.open("a") as file:
                file.write(json.dumps(entry | {"reason": trial.reason}) + "\n")

    trials = search(searched["implementation"], space, cost_model, budget, known=known, on_trial=on_trial)
    rejected = sum(1 for trial in trials if trial.seconds is None)
    report_progress(f"  {searched['implementation']}: {len(trials)} tried, {rejected} rejected")
    return trials


def log_file(given: Path | None, device_kind: str) -> Path | None:
    """Returns the file where trials are logged, or None."""
    cache = os.environ.get(tuning.CACHE)
    name = f"{tuning.file_stem(device_kind)}.jsonl"
    return given or (Path(cache).expanduser() / "trials" / name if cache else None)


def _logged(log: Path | None, problem: dict[str, Any], config_class: type) -> Iterator[Trial]:
    """Yields earlier trials of the same problem with the same versions; lines that were cut off are skipped."""
    if log is None or not log.is_file():
        return
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
            if all(entry[name] == value for name, value in problem.items()):
                yield Trial(config_class(**entry["config"]), entry["seconds"], entry["reason"])
        except (KeyError, TypeError, ValueError):
            continue


def _driver() -> dict[str, str]:
    """Returns the version of the GPU's driver, if there is one."""
    said = machine.provenance()["driver"]
    return {"driver": said.split(", ")[1]} if said else {}


def _versions(chosen: Operation) -> dict[str, str]:
    """Returns the versions that decide how fast a config is: jax, and a digest of the operation's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(importlib.resources.files(chosen.package))).rglob("*.py")):
        digest.update(path.read_bytes())
    return {"jax": jax.__version__, "source": digest.hexdigest()[:12]}
