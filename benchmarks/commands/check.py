r"""Checks the results of every kernel on this device, case by case, against the float64 oracle; nothing is timed.

  python -m palladion.benchmarks check --minutes=2 --json=check.jsonl
  python -m palladion.benchmarks check quantized_matmul --cases='int4*' --interpret
  python -m palladion.benchmarks check --backends=mosaic_gpu --dtype=bfloat16

Kernels are compiled for this device; on a CPU, which has none, --interpret is needed. The cases are the small ones of
the tests, which cover what goes wrong easily; many of them are in float32, which not every kernel takes: --dtype checks
all of them in another one. Most of the time is spent on compiling, so cases are checked in parallel
on all cores. Operations take turns, so that a check which ends early has covered some of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import itertools
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from palladion.benchmarks.commands import PROGRAM, options
from palladion.benchmarks.commands.progress import report_progress, seconds_left
from palladion.benchmarks.measure import bench, machine, records
from palladion.benchmarks.measure.operations import OPERATIONS, Case, Operation, operation
from palladion.benchmarks.measure.parallel import cores, side_by_side
from palladion.benchmarks.measure.records import Measurement
from palladion.kernels.checks import check
from palladion.reference.platforms import target_platform

HELP: Final = "checks on this device that every kernel is as right as the reference"


DTYPES: Final = ("bfloat16", "float16", "float32")
"""Dtypes of queries and activations."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("operation", nargs="?", help=f"{', '.join(OPERATIONS)}; all by default")
    parser.add_argument("--cases", type=options.names, metavar="NAMES", help="names or patterns (all of the tests)")
    parser.add_argument(
        "--backends", type=options.names, metavar="NAMES", help="kernels to check (those of this platform)"
    )
    parser.add_argument("--dtype", metavar="NAME", help="of all queries and activations (that of each case)")
    parser.add_argument("--interpret", action="store_true", help="interpret kernels for other platforms")
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="N", help=f"cases side by side ({cores()}, all cores)"
    )
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N", help="no case begins later (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, as JSON lines")


def run(arguments: argparse.Namespace) -> int:
    """Checks the cases; prints those that are not right, and the counts."""
    chosen = list(OPERATIONS.values()) if arguments.operation is None else [operation(arguments.operation)]
    known = {kernel.name for one in chosen for kernel in one.table if kernel.platform is not None}
    for name in arguments.backends or ():
        check(name in known, "--backends", name, ", ".join(sorted(known)))
    check(arguments.workers >= 1, "--workers", arguments.workers, "at least 1")
    if not arguments.interpret:
        _require_kernels(chosen, arguments.backends)
    check(arguments.dtype in (None, *DTYPES), "--dtype", arguments.dtype, ", ".join(DTYPES))
    tasks = list(_in_turns(chosen, arguments.cases, arguments.dtype))
    check(bool(tasks), "--cases", arguments.cases, "patterns of the names of test cases")
    deadline = time.perf_counter() + 60 * arguments.minutes
    counts: Counter[str] = Counter()
    provenance = machine.provenance(f"{PROGRAM} {shlex.join(arguments.command_line)}")
    # Nothing is timed, so the limits of the machine do not matter.
    limits = records.Limits(bandwidth=0.0, matrix_rate=0.0, matrix_dtype="")
    done = 0
    # The interpreter of TPU kernels has global state.
    workers = 1 if arguments.interpret else arguments.workers
    jobs = [functools.partial(_check_case, one, case, arguments, deadline) for one, case in tasks]
    with records.Writer(arguments.json, provenance, limits) as writer:
        for (one, case), found in zip(tasks, side_by_side(jobs, workers), strict=True):
            if isinstance(found, bench.DeviceLostError):
                print(f"{one.name} {case.name}: {found}\nNothing can be checked after it in this process")
                if workers > 1:
                    print("It may be the fault of a case beside it: --workers=1 tells which")
                return 1
            if isinstance(found, Exception):
                raise found
            if found is None:
                continue
            for measured in found:
                writer.write(measured)
                right = measured.status in ("ok", "untimed")
                counts["right" if right else measured.status] += 1
                if measured.status in ("wrong", "failed"):
                    said = f"{measured.contender} {measured.status}: {measured.reason}"
                    print(f"{one.name} {case.name}: {said}", flush=True)
            done += 1
            if done % 20 == 0:
                report_progress(f"{done} of {len(tasks)} cases: {_summary(counts)}")
    print(f"{done} of {len(tasks)} cases checked: {_summary(counts)}")
    if not counts["right"]:
        print("No kernel was found right: there was no time, or none takes these cases (--json=FILE says why)")
    return 0 if counts["right"] and not counts["wrong"] and not counts["failed"] else 1


def _require_kernels(chosen: Sequence[Operation], names: Sequence[str] | None) -> None:
    """Raises a ValueError if none of the kernels to check can be compiled for this platform."""
    kernels = [kernel for one in chosen for kernel in one.table if kernel.has_kernel]
    kernels = [kernel for kernel in kernels if names is None or kernel.name in names]
    platform = target_platform()
    if all(kernel.platform != platform for kernel in kernels):
        known = ", ".join(sorted({f"{kernel.name} for a {kernel.platform}" for kernel in kernels}))
        raise ValueError(
            f"--interpret: got none on a {platform}, for which no kernel can be compiled ({known or 'there is none'}); "
            "accepted: --interpret, which runs kernels of other platforms in an interpreter"
        )


def _check_case(
    chosen: Operation, case: Case, arguments: argparse.Namespace, deadline: float
) -> list[Measurement] | None:
    """Returns the results of a case; None if there is no time left for it."""
    if seconds_left(deadline) <= 0:
        return None
    kernels = [one.name for one in chosen.table if one.platform is not None]
    turns: list[str | None] = []
    run_options = bench.RunOptions(
        backends=tuple(name for name in arguments.backends or kernels if name in kernels),
        interpret=arguments.interpret,
        rounds=0,
        on_turn=turns.append,
    )
    try:
        return bench.run_workload(chosen, case, run_options)
    except bench.DeviceLostError as error:
        raise bench.DeviceLostError(f"{turns[-1]}: {error}") from error


def _summary(counts: Counter[str]) -> str:
    """Formats the counts: "12 right, 1 wrong"."""
    order = ("right", "wrong", "failed", "skipped")
    return ", ".join(f"{counts[name]} {name}" for name in order if counts[name]) or "nothing"


def _in_turns(
    chosen: list[Operation], patterns: tuple[str, ...] | None, dtype: str | None
) -> Iterator[tuple[Operation, Case]]:
    """Yields the matching cases: the first one of each operation, then the second one of each, and so on."""

    def cases(one: Operation) -> list[Case]:
        wanted = patterns or ("*",)
        found = [case for case in one.cases.TESTS if any(fnmatch.fnmatchcase(case.name, each) for each in wanted)]
        return found if dtype is None else [dataclasses.replace(case, dtype=dtype) for case in found]

    for round_ in itertools.zip_longest(*(cases(one) for one in chosen)):
        yield from ((one, case) for one, case in zip(chosen, round_, strict=True) if case is not None)
