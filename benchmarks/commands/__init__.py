r"""Benchmarks: how long a decode step takes, beside the bytes that it must move, the reference and the peers.

  python -m palladion.benchmarks                    lists the commands
  python -m palladion.benchmarks run --help         lists the options of one command

`palladion bench` is the same. A command is a module as `palladion.model.commands.program` describes it.
"""

from __future__ import annotations

from typing import Final

from palladion.model.commands.program import Program

COMMANDS: Final[dict[str, str]] = {
    "suite": "palladion.benchmarks.commands.suite",
    "check": "palladion.benchmarks.commands.check",
    "run": "palladion.benchmarks.commands.run",
    "model": "palladion.benchmarks.commands.model",
    "decode_peers": "palladion.benchmarks.commands.decode_peers",
    "plan": "palladion.benchmarks.commands.plan",
    "static": "palladion.benchmarks.commands.static",
    "static_peers": "palladion.benchmarks.commands.static_peers",
    "launches": "palladion.benchmarks.commands.launches",
    "compare": "palladion.benchmarks.commands.compare",
    "report": "palladion.benchmarks.commands.report",
    "tune": "palladion.benchmarks.commands.tune",
    "numerics": "palladion.benchmarks.commands.numerics",
}
"""The module of each command; it is imported when the command is called."""

COMPILING: Final = ("suite", "check", "run", "model", "decode_peers", "tune", "numerics")
"""Commands that run programs on this device, and keep them for the next start; others look at what compilers do."""

PROGRAM: Final = "python -m palladion.benchmarks"
"""How the program is called, for records of measurements."""


PROGRAM_OF_BENCHMARKS: Final = Program(
    name=PROGRAM,
    summary="How long a decode step takes, beside the bytes that it must move, the reference and the peers.",
    commands=COMMANDS,
    compiling=COMPILING,
)

main = PROGRAM_OF_BENCHMARKS.main
overview = PROGRAM_OF_BENCHMARKS.overview
run_as_program = PROGRAM_OF_BENCHMARKS.run
