r"""Measures an operation on shapes of models: kernels, the reference and peers in turns, beside the memory's bandwidth.

  python -m palladion.benchmarks run decode_attention --model=llama3-8b --batch=1,8 --kv-len=4096
  python -m palladion.benchmarks run quantized_matmul --scheme=int8,int4-g32 --rows=1,16 --layers=qkv,down
  python -m palladion.benchmarks run decode_attention --cases='gqa*' --backends=triton,xla --interpret

Every contender is first judged by a float64 oracle; what is wrong is never timed. A kernel for another platform can be
interpreted (--interpret) to see whether it is right; how long that takes says nothing, and is not shown. A contender
that raises an error, or takes its process down, costs its own row only. --json keeps every sample, and what was
measured before an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.commands import options as workloads
from palladion.benchmarks.measure import bench, machine, peers, plots
from palladion.benchmarks.measure import records as results
from palladion.benchmarks.measure.operations import OPERATIONS, Operation, operation
from palladion.benchmarks.measure.records import Row
from palladion.benchmarks.static.processes import why_it_ended
from palladion.kernels.backend import BACKENDS
from palladion.kernels.checks import check

HELP: Final = "times an operation: kernels, the reference and peers, beside the memory's bandwidth"

MARK: Final = "PALLADION_BENCHMARK_TURN"
"""Names the file in which a supervised process notes whose turn it is."""

CRASHED: Final = "PALLADION_BENCHMARK_CRASHED"
"""Contenders that have ended a process before, and how, as JSON."""

LOST_STATUS: Final = 70
"""Exit status where the device does nothing any more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("operation", help=", ".join(OPERATIONS))
    workloads.add_arguments(parser)
    add_measuring_arguments(parser)
    parser.add_argument("--config", type=json.loads, metavar="JSON", help="block sizes of the one kernel in --backends")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file, JSON lines")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw how close to the bandwidth each comes")


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say who takes part, and for how long."""
    who = parser.add_argument_group("who takes part, and for how long")
    who.add_argument("--backends", type=workloads.names, metavar="NAMES", help="of ours (those of this platform)")
    who.add_argument("--peers", type=workloads.names, metavar="NAMES", help="all (by default), none, or names")
    who.add_argument("--interpret", action="store_true", help="see whether kernels for other platforms are right")
    who.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each (7)")
    who.add_argument(
        "--sample-ms", type=float, default=20.0, metavar="MS", help="how long a sample takes at least (20)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table for each workload, and writes what is asked for."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need memory, too
    chosen = operation(arguments.operation)
    plan = plan_of(chosen, arguments)
    cases = workloads.selected(chosen, arguments)
    if arguments.plot:
        plots.require_matplotlib()
    if MARK not in os.environ:
        # What takes its process down is to cost its own row only: another process does the work.
        return supervise(chosen, arguments.command_line)
    try:
        return work([(chosen, case, plan) for case in cases], arguments.json, arguments.plot, arguments.command_line)
    except bench.DeviceLostError as error:
        bench.progress(str(error))
        return LOST_STATUS


def plan_of(chosen: Operation, arguments: argparse.Namespace) -> bench.Plan:
    """Who takes part.

    Raises:
      ValueError: something is not known; the message lists what is.
    """
    rows = {row.name: row for row in chosen.table}
    backends = arguments.backends or tuple(rows if arguments.interpret else bench.kernels_here(chosen))
    for name in backends:
        check(name in rows, "--backends", name, f"{', '.join(rows)} for {chosen.name}, of {', '.join(BACKENDS)}")
    wanted = list(arguments.peers) if arguments.peers else None
    check(arguments.rounds >= 1, "--rounds", arguments.rounds, "at least 1")
    given = getattr(arguments, "config", None)
    return bench.Plan(
        backends=tuple(backends),
        peers=tuple(peers.select(wanted, chosen.name)),
        crashed=json.loads(os.environ.get(CRASHED, "{}")),
        interpret=arguments.interpret,
        config=None if given is None else explicit_config([rows[name] for name in backends], given),
        rounds=arguments.rounds,
        sample_seconds=arguments.sample_ms / 1e3,
        before=_note,
    )


def explicit_config(rows: Sequence[Any], given: Any) -> Any:
    """Block sizes from the command line.

    Raises:
      ValueError: several kernels are named, or the fields are not those of its `Config`.
    """
    kernels = [row for row in rows if row.config_class is not None]
    check(len(kernels) == 1, "--config", f"with {len(kernels)} kernels", "with one kernel in --backends")
    fields = [field.name for field in dataclasses.fields(kernels[0].config_class)]
    known = isinstance(given, dict) and set(given) <= set(fields)
    check(known, "--config", given, f'{{"field": value}} of {", ".join(fields)}')
    try:
        return kernels[0].config_class(**given)
    except TypeError as error:
        raise ValueError(f"--config: {error}; fields are {', '.join(fields)}") from error


def _note(contender: str | None) -> None:
    """Notes whose turn it is, for who supervises this process."""
    if path := os.environ.get(MARK):
        Path(path).write_text(contender or "")


def work(
    tasks: Sequence[tuple[Operation, Any, bench.Plan]],
    json_file: Path | None,
    plot: Path | None,
    command_line: Sequence[str],
) -> int:
    """Measures workloads, and says what came out as it comes.

    Args:
      tasks: operations, cases and who takes part.
      json_file: takes every row as it is ready, or None.
      plot: takes a picture at the end, or None.
      command_line: for the provenance.

    Returns:
      0, or 1 where a kernel or the reference was wrong or failed.
    """
    warning = machine.warn_if_busy()
    if warning:
        bench.progress(f"warning: {warning}")
    limits = bench.limits()
    print(heading(limits))
    rows: list[Row] = []
    start = time.perf_counter()
    if ahead := bench.compile_ahead(tasks):
        bench.progress(f"{len(ahead)} programs compiled ({time.perf_counter() - start:.0f} s)")
    provenance = machine.provenance(f"python -m palladion.benchmarks {shlex.join(command_line)}")
    with results.Writer(json_file, provenance, limits) as writer:
        for chosen, case, plan in tasks:
            start = time.perf_counter()
            found = bench.run_workload(chosen, case, dataclasses.replace(plan, compiled=ahead))
            for row in found:
                writer.write(row)
            rows += found
            print(f"\n{chosen.name} {case.name}: {found[0].shape if found else ''}")
            print(results.table(results.HEADINGS, results.cells(found, limits)), flush=True)
            if any(row.samples and row.samples.noisy for row in found):
                bench.progress("warning: samples differ by more than 15 %: this machine is noisy. Believe ratios")
            bench.progress(f"({time.perf_counter() - start:.0f} s)")
    print(f"\n{results.LEGEND}")
    if plot and rows:
        plots.bars(rows, limits, machine.device_name(), plot)
        print(f"wrote {plot}")
    wrong = [row for row in rows if row.kind != "peer" and row.status in ("wrong", "failed")]
    return 1 if wrong else 0


def heading(limits: results.Limits) -> str:
    """What the machine can do, in a line or two."""
    lines = [
        f"{machine.device_name()}, measured: reads memory at {limits.bandwidth / 1e9:,.1f} GB/s, multiplies "
        f"{limits.matrix_dtype} at {limits.matrix_rate / 1e12:.3g} TFLOP/s"
    ]
    if limits.datasheet_bandwidth:
        flops = f", {limits.datasheet_flops / 1e12:,.0f} TFLOP/s in bfloat16" if limits.datasheet_flops else ""
        lines.append(f"datasheet of {limits.datasheet}: {limits.datasheet_bandwidth / 1e9:,.0f} GB/s{flops}")
    return "\n".join(lines)


def supervise(chosen: Operation, command_line: Sequence[str]) -> int:
    """Runs the command in a process of its own; where a contender ends it, starts again without that contender.

    Returns:
      The exit status of the last process, or 1 where a kernel or the reference ended one.
    """
    crashed: dict[str, str] = {}
    ours = {row.name for row in chosen.table}
    with tempfile.TemporaryDirectory(prefix="palladion_benchmark_") as folder:
        mark = Path(folder) / "turn"
        while True:
            environment = os.environ | {MARK: str(mark), CRASHED: json.dumps(crashed)}
            command = [sys.executable, "-m", "palladion.benchmarks", *command_line]
            status = subprocess.run(command, env=environment, check=False).returncode
            turn = mark.read_text() if mark.is_file() else ""
            ended = status < 0 or status == LOST_STATUS
            if not ended or turn in ("", "measuring", "xla", *crashed):
                return 1 if crashed.keys() & ours else abs(status)
            how = why_it_ended(status, "") if status < 0 else "an error after which the device does nothing"
            bench.progress(f"\n{turn} ended the process by {how}: again, without it")
            crashed[turn] = f"ended its process by {how}"
            mark.unlink()


def lines_of(rows: Sequence[Row], limits: results.Limits) -> Iterator[str]:
    """Tables of rows that were read from a file."""
    for title, group in results.by_workload(rows):
        yield f"\n{title}: {group[0].shape}"
        yield results.table(results.HEADINGS, results.cells(group, limits))
