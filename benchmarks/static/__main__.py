r"""What the real compiler says of kernels for chips that are not there: estimates from its schedule, no measurements.

  python -m palladion.benchmarks.static tpu
  python -m palladion.benchmarks.static tpu --operation=decode_attention --chips=v5e,v6e --json=report.json
  python -m palladion.benchmarks.static tpu --cases=llama-3-8b,gpt-oss-20b --plot=roofline.png
  python -m palladion.benchmarks.static tpu --file=path/to/kernels.py:case

Every kernel is compiled by libtpu. Of what it has scheduled, the scalar instructions are executed, with the lengths and
tables of the workload: that says which bundles run how often, what moves between HBM and the chip, and what waits for
it. Where that depends on something that is not known, times are UNKNOWN.

A function in a file, `def case():`, returns (function, arguments), or (function, arguments, bytes that must move).
Arguments are arrays or jax.ShapeDtypeStructs, in any pytree; integers that decide loops must be given as NumPy arrays.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import jax
from absl import app, flags

from palladion.benchmarks import tpu_compiler
from palladion.benchmarks.static import report, runner, workloads
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips

CASES = flags.DEFINE_list("cases", None, "Names of cases, or patterns; by default those of real models.")
OPERATION = flags.DEFINE_string("operation", None, "Only cases of this operation.")
FILE = flags.DEFINE_string("file", None, "A function of your own instead of cases: path/to/file.py:function.")
CHIPS = flags.DEFINE_list("chips", list(tpu_chips()), "Generations to compile for.")
JSON = flags.DEFINE_string("json", None, "Also write everything that is known to this file.")
FIGURES = flags.DEFINE_string("figures", None, "Also write the figures in short to this file, a line for each kernel.")
PLOT = flags.DEFINE_string("plot", None, "Also draw a roofline of each generation: roofline.png.")

SIMULATE = flags.DEFINE_bool("simulate", False, "Also ask libtpu's own simulator, which takes longer.")

USER_ERROR: Final = 2
"""Exit status where what was asked for cannot be done."""

INTERRUPTED: Final = 130


def main(arguments: Sequence[str]) -> None:
    """Runs the command; errors that the user can mend are one message and exit status 2."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip, even where there is one
    try:
        tasks = _tasks(arguments[1:])
    except (ValueError, ImportError) as error:
        _fail(str(error))
    rows: list[runner.Row] = []
    interrupted = False
    try:
        for row in runner.run(tasks, simulated=SIMULATE.value):
            _print(row, rows)
            rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted after {len(rows)} of {len(tasks)}", file=sys.stderr)
    if rows:
        print(f"\n{report.LEGEND}")
    if JSON.value and rows:
        Path(JSON.value).write_text(json.dumps([report.record(row) for row in rows], indent=1) + "\n")
    if FIGURES.value and rows:
        versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
        lines = [json.dumps(entry) for entry in (versions, *report.figures(rows))]
        Path(FIGURES.value).write_text("\n".join(lines) + "\n")
    if PLOT.value and rows:
        for file in report.plot(rows, Path(PLOT.value)):
            print(f"wrote {file}", file=sys.stderr)
    if interrupted:
        sys.exit(INTERRUPTED)
    if all(row.failure is not None for row in rows):
        sys.exit(1)


def _tasks(arguments: Sequence[str]) -> list[tuple[workloads.Reference, str]]:
    """What is asked for: workloads and chips."""
    check(len(arguments) == 1, "the compiler to ask", " ".join(arguments) or "nothing", "tpu")
    check(arguments[0] == "tpu", "the compiler to ask", arguments[0], "tpu; there is no instrument for GPUs yet")
    if not tpu_compiler.installed():
        raise ImportError("libtpu is not installed, the TPU compiler: pip install libtpu")
    for chip in CHIPS.value:
        check(chip in tpu_chips(), "--chips", chip, ", ".join(tpu_chips()))
    check(
        not (FILE.value and (CASES.value or OPERATION.value)), "--file", FILE.value, "without --cases and --operation"
    )
    if PLOT.value:
        report.require_matplotlib()
    if FILE.value:
        chosen = [workloads.from_argument(FILE.value)]
    else:
        chosen = workloads.select(CASES.value, OPERATION.value)
    return [(workload, chip) for workload in chosen for chip in CHIPS.value]


def _print(row: runner.Row, before: Sequence[runner.Row]) -> None:
    if not before:
        print(report.heading())
    if not before or before[-1].workload != row.workload:
        print(f"\n{row.workload}")
    for line in report.lines(row):
        print(line, flush=True)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    app.run(main)
