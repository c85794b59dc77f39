r"""Benchmarks: how long a decode step takes, beside the bytes that it must move, the reference and the peers.

  python -m palladion.benchmarks                    lists the commands
  python -m palladion.benchmarks run --help         lists the options of one command

A command is a module with `HELP`, one line; `add_arguments(parser)`; and `run(arguments)`, which returns the exit
status and finds the command line in `arguments.command_line`. For mistakes that the user can correct it raises
ValueError, ImportError or OSError, with a message that says how.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final, NoReturn

from palladion.kernels import compilation_cache
from palladion.model.exit_status import INTERRUPTED, USER_ERROR

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


def run_as_program(*prefix: str) -> NoReturn:
    """Runs the command that this process was called with, and exits with its status.

    SIGTERM, from `timeout` or the suite, is treated as Ctrl-C: what has been measured is kept. SIGINT alone would not
    do, because processes that a script starts in the background ignore it.

    Args:
      prefix: arguments that come before those of this process.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main([*prefix, *sys.argv[1:]]))


def main(command_line: Sequence[str]) -> int:
    """Runs a command; returns the exit status.

    Args:
      command_line: the command's name and its arguments.
    """
    given = list(command_line)
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
        if name in COMPILING:
            parser.add_argument(compilation_cache.OPTION, metavar="FOLDER", help=compilation_cache.HELP)
        parsed = parser.parse_args(rest)
        said = compilation_cache.use_compilation_cache(parsed.compilation_cache) if name in COMPILING else None
        if said:
            print(said, file=sys.stderr)
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
    """Returns the page that lists every command with its line of help."""
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
            "How long a decode step takes, beside the bytes that it must move, the reference and the peers.\n",
            *listed,
            f"\n{PROGRAM} COMMAND --help lists the options of a command.",
        )
    )


def _load(name: str) -> ModuleType:
    return importlib.import_module(COMMANDS[name])
