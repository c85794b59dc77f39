r"""What the real compilers say of kernels for chips that are not there: estimates from their code, no measurements.

  python -m palladion.benchmarks.static tpu
  python -m palladion.benchmarks.static tpu --operation=decode_attention --chips=v5e,v6e --json=report.json
  python -m palladion.benchmarks.static gpu --cases=llama-3-8b,gpt-oss-20b --plot=roofline.png
  python -m palladion.benchmarks.static gpu --file=path/to/kernels.py:case --archs=sm_90

tpu: every kernel is compiled by libtpu. Of what it has scheduled, the scalar instructions are executed, with the
lengths and tables of the workload: that says which bundles run how often, what moves between HBM and the chip, and
what waits for it. Where that depends on something that is not known, times are UNKNOWN.

gpu: every kernel is compiled by Triton and NVIDIA's assembler. Registers, shared memory and the grid say how many
programs a GPU keeps; the machine code, what a trip of a loop costs; and the values of the workload, how many trips
there are. An architecture is examined as one of its GPUs: sm_80 as an A100, sm_90 as an H200, sm_100 as a B200.

A function in a file, `def case():`, returns (function, arguments), or (function, arguments, bytes that must move).
Arguments are arrays or jax.ShapeDtypeStructs, in any pytree; integers that decide loops must be given as NumPy arrays.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import jax
from absl import app, flags

from palladion.benchmarks.measure import machine
from palladion.benchmarks.static import examiner as runner
from palladion.benchmarks.static import figures, workloads
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import table as gpu_report
from palladion.benchmarks.static.table import Table, require_matplotlib
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu import table as report
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips

CASES = flags.DEFINE_list("cases", None, "Names of cases, or patterns; by default those of real models.")
OPERATION = flags.DEFINE_string("operation", None, "Only cases of this operation.")
FILE = flags.DEFINE_string("file", None, "A function of your own instead of cases: path/to/file.py:function.")
CHIPS = flags.DEFINE_list("chips", list(tpu_chips()), "Generations of TPUs to compile for.")
ARCHS = flags.DEFINE_list("archs", list(runner.architectures()), "Architectures of GPUs to compile for.")
JSON = flags.DEFINE_string("json", None, "Also write everything that is known to this file.")
FIGURES = flags.DEFINE_string("figures", None, "Also put the figures in short into this file, a line for each kernel.")
PLOT = flags.DEFINE_string("plot", None, "Also draw a roofline of each chip: roofline.png.")

SIMULATE = flags.DEFINE_bool("simulate", False, "TPUs: also ask libtpu's own simulator, which takes longer.")

USER_ERROR: Final = 2
"""Exit status where what was asked for cannot be done."""

INTERRUPTED: Final = 130


@dataclasses.dataclass(frozen=True)
class Instrument:
    """What is asked about a kind of chips.

    Attributes:
      chips: those that are asked for, and those that there are.
      flag: by which they are asked for.
      table: how the answers are shown.
      installed: whether there is its compiler.
      compiler: the package that it comes in.
    """

    chips: Callable[[], tuple[list[str], list[str]]]
    flag: str
    table: Table
    installed: Callable[[], bool]
    compiler: str


INSTRUMENTS: Final = {
    "tpu": Instrument(
        lambda: (CHIPS.value, list(tpu_chips())), "--chips", report.TABLE, tpu_compiler.installed, "libtpu"
    ),
    "gpu": Instrument(
        lambda: (ARCHS.value, list(runner.architectures())),
        "--archs",
        gpu_report.TABLE,
        gpu_compiler.installed,
        "triton",
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Runs the command; errors that the user can mend are one message and exit status 2."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip, even where there is one
    try:
        instrument, tasks = _tasks(arguments[1:])
    except (ValueError, ImportError) as error:
        _fail(str(error))
    table = instrument.table
    rows: list[runner.Row] = []
    interrupted = False
    try:
        for row in runner.run(tasks, simulated=SIMULATE.value):
            rows.append(row)  # first: whoever interrupts because of what is printed finds it there
            _print(table, row, rows[:-1])
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted after {len(rows)} of {len(tasks)}", file=sys.stderr)
    if rows:
        print(f"\n{table.legend}")
    if JSON.value and rows:
        Path(JSON.value).write_text(json.dumps([table.record(row) for row in rows], indent=1) + "\n")
    if FIGURES.value and rows:
        compiler = instrument.compiler
        versions = {"jax": jax.__version__, compiler: importlib.metadata.version(compiler)}
        figures.write(Path(FIGURES.value), versions, table.figures(rows))
    if PLOT.value and rows:
        for file in table.plot(rows, Path(PLOT.value)):
            print(f"wrote {file}", file=sys.stderr)
    if interrupted:
        sys.exit(INTERRUPTED)
    if all(row.failure is not None for row in rows):
        sys.exit(1)


def _tasks(arguments: Sequence[str]) -> tuple[Instrument, list[tuple[workloads.Reference, str]]]:
    """What is asked for: workloads and chips."""
    accepted = ", ".join(INSTRUMENTS)
    check(len(arguments) == 1, "the compiler to ask", " ".join(arguments) or "nothing", accepted)
    check(arguments[0] in INSTRUMENTS, "the compiler to ask", arguments[0], accepted)
    instrument = INSTRUMENTS[arguments[0]]
    if not instrument.installed():
        what = f"{instrument.compiler} is not installed, the {arguments[0].upper()} compiler"
        raise ImportError(f"{what}: pip install {instrument.compiler}")
    chips, known = instrument.chips()
    for chip in chips:
        check(chip in known, instrument.flag, chip, ", ".join(known))
    check(not (SIMULATE.value and arguments[0] != "tpu"), "--simulate", arguments[0], "tpu")
    check(
        not (FILE.value and (CASES.value or OPERATION.value)), "--file", FILE.value, "without --cases and --operation"
    )
    if PLOT.value:
        require_matplotlib()
    if FILE.value:
        chosen = [workloads.from_argument(FILE.value)]
    else:
        chosen = workloads.select(CASES.value, OPERATION.value, arguments[0])
    return instrument, [(workload, chip) for workload in chosen for chip in chips]


def _print(table: Table, row: runner.Row, before: Sequence[runner.Row]) -> None:
    if not before:
        print(table.heading())
    if not before or before[-1].workload != row.workload:
        print(f"\n{row.workload}")
    for line in table.lines(row):
        print(line, flush=True)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    machine.end_as_interrupted()
    app.run(main)
