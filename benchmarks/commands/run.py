r"""Times an operation on shapes of models: kernels, the reference and peers in turns, beside the memory's bandwidth.

  python -m palladion.benchmarks run decode_attention --model=llama3-8b --batch=1,8 --kv-len=4096
  python -m palladion.benchmarks run quantized_matmul --scheme=int8,int4-g32 --rows=1,16 --layers=qkv,down
  python -m palladion.benchmarks run decode_attention --cases='gqa*' --backends=triton,xla --interpret

Every contender's result is first compared with a float64 oracle; what is wrong is not timed. --interpret runs kernels
for other platforms in an interpreter, to check their results; they are not timed. A contender that raises an error or
ends its process costs only its own line. --json keeps every sample, also of a run that is interrupted.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks import text
from palladion.benchmarks.commands import PROGRAM, options
from palladion.benchmarks.commands.progress import report_progress
from palladion.benchmarks.measure import bench, machine, peers, plots, records, tables
from palladion.benchmarks.measure.operations import OPERATIONS, Case, Operation, operation
from palladion.benchmarks.measure.records import Limits, Measurement
from palladion.benchmarks.plotting import require_matplotlib
from palladion.benchmarks.static.processes import exit_reason
from palladion.kernels.backend import BACKENDS
from palladion.kernels.checks import check
from palladion.kernels.implementation import Implementation

HELP: Final = "times an operation: kernels, the reference and peers, beside the memory's bandwidth"

TURN_FILE: Final = "PALLADION_BENCHMARK_TURN"
"""Environment variable with the file in which a supervised process notes which contender's turn it is."""

CRASHED: Final = "PALLADION_BENCHMARK_CRASHED"
"""Environment variable with the contenders that ended an earlier process, and how, as JSON."""

LOST_STATUS: Final = 70
"""Exit status after which the device does nothing any more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("operation", help=", ".join(OPERATIONS))
    options.add_arguments(parser)
    add_measuring_arguments(parser)
    parser.add_argument(
        "--config",
        type=json.loads,
        metavar="JSON",
        help="some fields of block sizes of the one kernel in --backends; its heuristic's for the rest",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file, JSON lines")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw how close to the bandwidth each comes")


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say who takes part, and for how long."""
    who = parser.add_argument_group("who takes part, and for how long")
    who.add_argument(
        "--backends", type=options.names, metavar="NAMES", help="our implementations (those of this platform)"
    )
    who.add_argument(
        "--peers", type=options.names, metavar="NAMES", help="all (by default), none, fast, slow, or names"
    )
    who.add_argument("--interpret", action="store_true", help="check kernels for other platforms")
    who.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each contender (7)")
    who.add_argument("--sample-ms", type=float, default=20.0, metavar="MS", help="minimum length of a sample (20)")


def run(arguments: argparse.Namespace) -> int:
    """Measures the workloads in a process of its own; see `supervise`."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need memory, too
    chosen = operation(arguments.operation)
    how = run_options(chosen, arguments)
    cases = options.selected(chosen, arguments)
    if arguments.plot:
        require_matplotlib()
    if TURN_FILE not in os.environ:
        # A contender that ends its process must not end this one.
        return supervise(chosen, arguments.command_line)
    try:
        tasks = [(chosen, case, how) for case in cases]
        return measure_workloads(tasks, arguments.json, arguments.plot, arguments.command_line)
    except bench.DeviceLostError as error:
        report_progress(str(error))
        return LOST_STATUS


def run_options(chosen: Operation, arguments: argparse.Namespace) -> bench.RunOptions:
    """Returns who takes part, and for how long.

    Raises:
      ValueError: a backend or a peer is not known; the message lists those that are.
    """
    known = {one.name: one for one in chosen.table}
    backends = arguments.backends or tuple(known if arguments.interpret else bench.local_backends(chosen))
    for name in backends:
        check(name in known, "--backends", name, f"{', '.join(known)} for {chosen.name}, of {', '.join(BACKENDS)}")
    wanted = list(arguments.peers) if arguments.peers else None
    check(arguments.rounds >= 1, "--rounds", arguments.rounds, "at least 1")
    given = getattr(arguments, "config", None)
    return bench.RunOptions(
        backends=tuple(backends),
        peers=tuple(peers.select(wanted, chosen.name)),
        crashed=json.loads(os.environ.get(CRASHED, "{}")),
        interpret=arguments.interpret,
        config=None if given is None else checked_config([known[name] for name in backends], given),
        rounds=arguments.rounds,
        sample_seconds=arguments.sample_ms / 1e3,
        on_turn=_note_turn,
    )


def checked_config(implementations: Sequence[Implementation], given: Any) -> dict[str, Any]:
    """Returns the fields of block sizes that the command line gives.

    Raises:
      ValueError: there is not exactly one kernel, or the fields are not those of its `Config`.
    """
    kernels = [one for one in implementations if one.config_class is not None]
    check(len(kernels) == 1, "--config", f"with {len(kernels)} kernels", "with one kernel in --backends")
    config_class: Any = kernels[0].config_class
    fields = [field.name for field in dataclasses.fields(config_class)]
    known = isinstance(given, dict) and set(given) <= set(fields)
    check(known, "--config", given, f'{{"field": value}} of {", ".join(fields)}')
    return dict(given)


def _note_turn(contender: str | None) -> None:
    """Notes whose turn it is, for the process that supervises this one."""
    if path := os.environ.get(TURN_FILE):
        Path(path).write_text(contender or "")


def measure_workloads(
    tasks: Sequence[tuple[Operation, Case, bench.RunOptions]],
    json_file: Path | None,
    plot: Path | None,
    command_line: Sequence[str],
) -> int:
    """Measures workloads, and prints and writes each result as soon as it is there.

    Args:
      tasks: operations, cases and who takes part.
      json_file: file for the measurements, or None.
      plot: picture to draw at the end, or None.
      command_line: the command line, for the provenance.

    Returns:
      The exit status: 1 if a kernel or the reference was wrong or failed, otherwise 0.
    """
    warning = machine.busy_warning()
    if warning:
        report_progress(f"warning: {warning}")
    limits = machine.limits()
    print(heading(limits))
    measurements: list[Measurement] = []
    start = time.perf_counter()
    if ahead := bench.compile_ahead(tasks):
        report_progress(f"{len(ahead)} programs compiled ({time.perf_counter() - start:.0f} s)")
    provenance = machine.provenance(f"{PROGRAM} {shlex.join(command_line)}")
    with records.Writer(json_file, provenance, limits) as writer:
        for chosen, case, how in tasks:
            start = time.perf_counter()
            found = bench.run_workload(chosen, case, dataclasses.replace(how, compiled=ahead))
            for one in found:
                writer.write(one)
            measurements += found
            print(f"\n{chosen.name} {case.name}: {found[0].shape if found else ''}")
            print(text.table(tables.HEADINGS, tables.cells(found, limits)), flush=True)
            if any(one.best_samples and one.best_samples.noisy for one in found):
                report_progress("warning: samples differ by more than 15 %: this machine is noisy. Believe ratios")
            report_progress(f"({time.perf_counter() - start:.0f} s)")
    print(f"\n{tables.LEGEND}")
    if plot and measurements:
        plots.bandwidth(measurements, machine.device_name(), plot)
        print(f"wrote {plot}")
    wrong = any(one.kind != "peer" and one.status in ("wrong", "failed") for one in measurements)
    return 1 if wrong else 0


def heading(limits: Limits) -> str:
    """Says what the machine can do, in a line or two."""
    lines = [
        f"{machine.device_name()}, measured: reads memory at {limits.bandwidth / 1e9:,.1f} GB/s, multiplies "
        f"{limits.matrix_dtype} at {limits.matrix_rate / 1e12:.3g} TFLOP/s"
    ]
    if limits.datasheet_bandwidth:
        flops = f", {limits.datasheet_flops / 1e12:,.0f} TFLOP/s in bfloat16" if limits.datasheet_flops else ""
        lines.append(f"datasheet of {limits.datasheet}: {limits.datasheet_bandwidth / 1e9:,.0f} GB/s{flops}")
    return "\n".join(lines)


def supervise(chosen: Operation, command_line: Sequence[str]) -> int:
    """Runs the command in a process of its own; if a contender ends it, starts it again without that contender.

    Returns:
      The exit status of the last process, or 1 if a kernel or the reference ended one.
    """
    crashed: dict[str, str] = {}
    ours = {one.name for one in chosen.table}
    with tempfile.TemporaryDirectory(prefix="palladion_benchmark_") as folder:
        turn_file = Path(folder) / "turn"
        while True:
            environment = os.environ | {TURN_FILE: str(turn_file), CRASHED: json.dumps(crashed)}
            command = [sys.executable, "-m", "palladion.benchmarks", *command_line]
            status = subprocess.run(command, env=environment, check=False).returncode
            turn = turn_file.read_text() if turn_file.is_file() else ""
            ended = status < 0 or status == LOST_STATUS
            if not ended or turn in ("", "measuring", "xla", *crashed):
                return 1 if crashed.keys() & ours else abs(status)
            reason = exit_reason(status, "") if status < 0 else "an error after which the device does nothing"
            report_progress(f"\n{turn} ended the process by {reason}: again, without it")
            crashed[turn] = f"ended its process by {reason}"
            turn_file.unlink()
