"""A program of several commands, each a module: finds the command, parses its options, and reports errors.

A command is a module with `HELP`, one line; `add_arguments(parser)`; and `run(arguments)`, which returns the exit
status and finds the command line in `arguments.command_line`. For mistakes that the user can correct it raises
ValueError, ImportError or OSError, with a message that says how.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Final, NoReturn

import jax

from palladion.kernels import compilation_cache
from palladion.kernels.implementation import Unsupported
from palladion.model.exit_status import INTERRUPTED, USER_ERROR

NO_READER: Final = 141
"""Exit status where nothing reads the output any more, as `head` does not: that of a shell after SIGPIPE."""


OUT_OF_MEMORY: Final = "RESOURCE_EXHAUSTED"
"""Word of XLA's errors where memory is not enough."""


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, as commands report theirs."""

    def error(self, message: str) -> NoReturn:
        """Prints the mistake, and exits with `USER_ERROR`."""
        first = message.removeprefix("unrecognized arguments: ")
        if first != message and not first.startswith("-"):
            message += ' (a text belongs to its option, in quotes: --prompt="…")'
        print(f"error: {message}\n({self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(USER_ERROR)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of several commands.

    Attributes:
      name: how the docstrings of its commands call it, "palladion" for example.
      summary: what it does, one line.
      commands: the module of each command, imported when the command is called.
      compiling: commands that run programs on this device, and keep them compiled for the next start.
      nested: programs that are commands of this one, by name: their line of help, and a function that runs them with
        their arguments and the name that they were called by.
      called: how it was called, which help and messages say; None means by `name`.
    """

    name: str
    summary: str
    commands: Mapping[str, str]
    compiling: Collection[str]
    nested: Mapping[str, tuple[str, Callable[[Sequence[str], str], int]]] = dataclasses.field(default_factory=dict)
    called: str | None = None

    @property
    def prog(self) -> str:
        """The name that it was called by."""
        return self.called or self.name

    def run(self, *prefix: str) -> NoReturn:
        """Runs the command that this process was called with, and exits with its status.

        SIGTERM, from `timeout` for example, is treated as Ctrl-C: what is there is kept. SIGINT alone would not do,
        because processes that a script starts in the background ignore it.

        Args:
          prefix: arguments that come before those of this process.
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(self.main([*prefix, *sys.argv[1:]]))

    def main(self, command_line: Sequence[str]) -> int:
        """Runs a command; returns the exit status.

        Args:
          command_line: the command's name and its arguments.
        """
        given = list(command_line)
        debug = "--debug" in given[:1]
        given = given[debug:]
        if not given or given[0] in ("-h", "--help", "help"):
            print(self.overview())
            return 0
        name, *rest = given
        if name in self.nested:
            return self.nested[name][1]([*["--debug"] * debug, *rest], f"{self.prog} {name}")
        if name not in self.commands:
            accepted = ", ".join([*self.commands, *self.nested])
            print(f"error: command: got {name!r}; accepted: {accepted}", file=sys.stderr)
            return USER_ERROR
        try:
            return self._run_command(name, rest)
        except BrokenPipeError:
            # Python would complain once more when it flushes the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return NO_READER
        except (ValueError, ImportError, OSError, Unsupported) as error:
            if debug:
                raise
            print(f"error: {error}\n({self.prog} --debug {name} … shows where)", file=sys.stderr)
            return USER_ERROR
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            said = str(error).partition("\n")[0]
            if debug or (isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY not in said):
                raise
            print(f"error: out of memory ({said}); use a smaller batch, context or model", file=sys.stderr)
            return USER_ERROR
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    def overview(self) -> str:
        """Returns the page that lists every command with its line of help."""
        lines = {name: _line_of_help(module) for name, module in self.commands.items()}
        lines |= {name: line for name, (line, _) in self.nested.items()}
        return "\n".join(
            (
                f"usage: {self.prog} [--debug] COMMAND [OPTIONS]\n",
                f"{self.summary}\n",
                *(f"  {name:13s} {line}" for name, line in lines.items()),
                f"\n{self.prog} COMMAND --help lists the options of a command.",
            )
        )

    def _run_command(self, name: str, command_line: Sequence[str]) -> int:
        command = _load(self.commands[name])
        parser = Parser(
            prog=f"{self.prog} {name}",
            description=(command.__doc__ or "").replace(self.name, self.prog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parser)
        compiles = name in self.compiling
        if compiles:
            parser.add_argument(compilation_cache.OPTION, metavar="FOLDER", help=compilation_cache.HELP)
        arguments = parser.parse_args(command_line)
        if compiles and (said := compilation_cache.use_compilation_cache(arguments.compilation_cache)):
            print(said, file=sys.stderr)
        arguments.command_line = [name, *command_line]
        status: int = command.run(arguments)
        return status


def _line_of_help(module: str) -> str:
    try:
        line: str = _load(module).HELP
    except ImportError as error:
        return f"cannot be run here: {error}"
    return line


def _load(module: str) -> ModuleType:
    return importlib.import_module(module)
