r"""Examines kernels with the real compilers of chips that are not there: estimates from their code, no measurements.

  python -m palladion.benchmarks static tpu
  python -m palladion.benchmarks static tpu --operation=decode_attention --chips=v5e,v6e --json=report.json
  python -m palladion.benchmarks static gpu --cases=llama-3-8b,gpt-oss-20b --plot=roofline.png
  python -m palladion.benchmarks static gpu --operation=quantized_matmul --backends=mosaic_gpu
  python -m palladion.benchmarks static gpu --file=path/to/kernels.py:case --archs=sm_90

tpu: libtpu compiles every kernel. The scalar instructions of the schedule are executed with the workload's lengths and
page tables, which gives how often each bundle runs, the transfers between HBM and the chip, and the waits for them.
Where these depend on a value that is not known, times are UNKNOWN.

gpu: Triton or Mosaic GPU, and NVIDIA's assembler, compile every kernel. Registers, shared memory and the grid give the
occupancy; the machine code gives the cost of a loop trip and the instructions of TMA and tensor cores. Of Triton
kernels the workload's values give the number of trips and the width of what is read, and for an H200 times are
estimated (docs/gpu_model.md); Mosaic GPU kernels have no estimates. An architecture is examined as one of its GPUs:
sm_80 as an A100, sm_90 as an H200, sm_100 as a B200. Mosaic GPU kernels are for sm_90.

A function in a file, `def case():`, returns (function, arguments), or (function, arguments, bytes that must move).
Arguments are arrays or jax.ShapeDtypeStructs, in any pytree; integers that decide loops must be given as NumPy arrays.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import jax

from palladion.benchmarks.commands import options
from palladion.benchmarks.plotting import require_matplotlib
from palladion.benchmarks.static import examiner, figures, workloads
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import mosaic, program
from palladion.benchmarks.static.gpu import table as gpu_table
from palladion.benchmarks.static.table import Table
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu import table as tpu_table
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips
from palladion.model.exit_status import INTERRUPTED

HELP: Final = "examines kernels with the TPU and GPU compilers, without a chip: times, traffic, spills; estimates"


@dataclasses.dataclass(frozen=True)
class Target:
    """A platform whose compiler can be asked.

    Attributes:
      chips: names of the chips that it compiles for.
      option: the command's option that chooses among them, "chips" or "archs".
      table: how reports are shown.
      package: the distribution that the compiler comes in.
      installed: whether the compiler is installed.
    """

    chips: tuple[str, ...]
    option: str
    table: Table
    package: str
    installed: Callable[[], bool]


TARGETS: Final = {
    "tpu": Target(tuple(tpu_chips()), "chips", tpu_table.TABLE, "libtpu", tpu_compiler.installed),
    "gpu": Target(tuple(examiner.architectures()), "archs", gpu_table.TABLE, "triton", gpu_compiler.installed),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("platform", nargs="?", help=f"whose compiler to ask: {' or '.join(TARGETS)}")
    parser.add_argument("--cases", type=options.names, metavar="NAMES", help="names or patterns (those of real models)")
    parser.add_argument("--operation", metavar="NAME", help="only cases of this operation")
    parser.add_argument("--file", metavar="PATH:FUNCTION", help="a function of your own instead of cases")
    for target in TARGETS.values():
        known = ", ".join(target.chips)
        parser.add_argument(f"--{target.option}", type=options.names, default=target.chips, metavar="NAMES", help=known)
    known = ", ".join(workloads.BACKENDS["gpu"])
    parser.add_argument("--backends", type=options.names, metavar="NAMES", help=f"GPUs: {known} (those installed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that is known to this file")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="also write key figures, a line for each kernel")
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="put tables of --figures in <operation>_static.md")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw a roofline of each chip")
    parser.add_argument("--simulate", action="store_true", help="TPUs: also ask libtpu's own simulator, which is slow")


def run(arguments: argparse.Namespace) -> int:
    """Examines the chosen workloads, prints a table, and writes the files that are asked for."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip, even where there is one
    target, tasks = _tasks(arguments)
    table = target.table
    examinations: list[examiner.Examination] = []
    interrupted = False
    try:
        for found in examiner.examine_all(tasks, simulated=arguments.simulate):
            examinations.append(found)  # before it is printed, so that an interruption keeps what was seen
            _print(table, found, examinations[:-1])
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted after {len(examinations)} of {len(tasks)}", file=sys.stderr)
    if examinations:
        print(f"\n{table.legend}")
        _write(examinations, target, arguments)
    if interrupted:
        return INTERRUPTED
    return 1 if all(one.failure is not None for one in examinations) else 0


def _tasks(arguments: argparse.Namespace) -> tuple[Target, list[examiner.Task]]:
    """Returns the platform, and what is to be examined."""
    platform = arguments.platform or "nothing"
    check(platform in TARGETS, "the compiler to ask", platform, ", ".join(TARGETS))
    target = TARGETS[platform]
    if not target.installed():
        raise ImportError(
            f"{target.package} is not installed, the {platform.upper()} compiler: pip install {target.package}"
        )
    chips: tuple[str, ...] = getattr(arguments, target.option)
    for chip in chips:
        check(chip in target.chips, f"--{target.option}", chip, ", ".join(target.chips))
    check(platform == "tpu" or not arguments.simulate, "--simulate", platform, "tpu")
    alone = not (arguments.cases or arguments.operation or arguments.backends)
    check(arguments.file is None or alone, "--file", arguments.file, "without --cases, --operation and --backends")
    check(platform == "gpu" or not arguments.backends, "--backends", platform, "gpu")
    check(arguments.pages is None or arguments.figures, "--pages", arguments.pages, "with --figures")
    check(arguments.pages is None or platform == "tpu", "--pages", platform, "figures of TPUs")
    if arguments.plot:
        require_matplotlib("--plot")
    if arguments.file:
        return target, [examiner.Task(workloads.from_argument(arguments.file), chip) for chip in chips]
    chosen = workloads.select(arguments.cases, arguments.operation, platform)
    if platform == "tpu":
        return target, [examiner.Task(workload, chip) for workload in chosen for chip in chips]
    backends, examined = _gpu_backends(arguments.backends), [f"sm_{arch}" for arch in mosaic.TENSOR]
    tasks = [
        examiner.Task(workload, chip, backend)
        for workload in chosen
        for chip in chips
        for backend in backends
        if workloads.row(workload.operation, backend) is not None and (backend != "mosaic_gpu" or chip in examined)
    ]
    accepted = f"mosaic_gpu for {', '.join(examined)} and operations that have it"
    check(bool(tasks), "--backends", ", ".join(backends), accepted)
    return target, tasks


def _gpu_backends(given: Sequence[str] | None) -> Sequence[str]:
    """Returns the backends whose kernels are examined for GPUs; Mosaic GPU needs XLA's compiler, too."""
    known = workloads.BACKENDS["gpu"]
    for backend in given or ():
        check(backend in known, "--backends", backend, ", ".join(known))
    if "mosaic_gpu" in (given or ()) and not program.installed():
        raise ImportError("jax-cuda12-plugin is not installed, XLA's compiler: pip install 'palladion[cuda]'")
    return given or [backend for backend in known if backend != "mosaic_gpu" or program.installed()]


def _print(table: Table, found: examiner.Examination, before: Sequence[examiner.Examination]) -> None:
    """Prints an examination, under headings where it is the first one, or the first one of its workload."""
    if not before:
        print(table.heading())
    if not before or before[-1].workload != found.workload:
        print(f"\n{found.workload}")
    for line in table.lines(found):
        print(line, flush=True)


def _write(examinations: Sequence[examiner.Examination], target: Target, arguments: argparse.Namespace) -> None:
    """Writes the files that are asked for."""
    table = target.table
    if arguments.json:
        arguments.json.write_text(json.dumps([table.record(one) for one in examinations], indent=1) + "\n")
    if arguments.figures:
        versions = {"jax": jax.__version__, target.package: importlib.metadata.version(target.package)}
        figures.write(arguments.figures, versions, table.figures(examinations), pages=arguments.pages)
    if arguments.plot:
        for file in table.plot(examinations, arguments.plot):
            print(f"wrote {file}", file=sys.stderr)
