r"""Benchmarks: what a step takes, beside the bytes that it must move, the reference and the peers.

  python -m palladion.benchmarks                    lists the commands
  python -m palladion.benchmarks run --help         says what one of them takes

A command is a module with `HELP`, one line; `add_arguments(parser)`; and `run(arguments)`, which returns the exit
status, and finds in `arguments.command_line` how it was called. It raises ValueError, ImportError or OSError, with a
message that says the way out, for what the user can mend.
Beside these, `python -m palladion.benchmarks.static tpu` and `… gpu` say what the compilers make of the kernels.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

COMMANDS: Final[dict[str, str]] = {
    "suite": "palladion.benchmarks.commands.suite",
    "check": "palladion.benchmarks.commands.check",
    "run": "palladion.benchmarks.commands.run",
    "model": "palladion.benchmarks.commands.model",
    "decode_peers": "palladion.benchmarks.commands.decode_peers",
    "plan": "palladion.benchmarks.commands.plan",
    "launches": "palladion.benchmarks.commands.launches",
    "compare": "palladion.benchmarks.commands.compare",
    "report": "palladion.benchmarks.commands.report",
    "tune": "palladion.benchmarks.commands.tune",
    "numerics": "palladion.benchmarks.commands.numerics",
}
"""Which module runs a command; it is imported when it is asked for."""

USER_ERROR: Final = 2
"""Exit status where what was asked for cannot be done."""

INTERRUPTED: Final = 130

PROGRAM: Final = "python -m palladion.benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Args:
      arguments: of the command line, the command first; None takes those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given[:1]
    given = given[debug:]
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = given
    if name not in COMMANDS:
        print(f"error: command: got {name!r}; accepted: {', '.join(COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    try:
        command = _load(name)
        parser = argparse.ArgumentParser(
            prog=f"{PROGRAM} {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(parser)
        parsed = parser.parse_args(rest)
        parsed.command_line = [name, *rest]
        status: int = command.run(parsed)
    except (ValueError, ImportError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}\n({PROGRAM} --debug {name} … shows where)", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def overview() -> str:
    """One page: every command, and what it does."""
    listed = []
    for name in COMMANDS:
        try:
            line = _load(name).HELP
        except ImportError as error:
            line = f"cannot be run here: {error}"
        listed.append(f"  {name:13s} {line}")
    return "\n".join(
        (
            f"usage: {PROGRAM} [--debug] COMMAND [OPTIONS]\n",
            "What a step takes, beside the bytes that it must move, the reference and the peers.\n",
            *listed,
            f"\n{PROGRAM} COMMAND --help says what a command takes.",
            f"{PROGRAM}.static tpu, and gpu, say what the compilers make of the kernels, without a chip.",
        )
    )


def _load(name: str) -> ModuleType:
    return importlib.import_module(COMMANDS[name])
