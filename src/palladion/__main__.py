"""The command `palladion`, or `python -m palladion`: generates text, chats, quantizes models and runs benchmarks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import jax

import palladion
from palladion.model.commands.program import Program


def _bench(command_line: Sequence[str], called: str) -> int:
    """Runs a command of the benchmarks, which are imported only here."""
    from palladion.benchmarks.commands import PROGRAM_OF_BENCHMARKS

    return dataclasses.replace(PROGRAM_OF_BENCHMARKS, called=called).main(command_line)


PROGRAM: Final = Program(
    name="palladion",
    summary="Runs language models with hand-written kernels, and measures how close to the memory's limit they come.",
    commands={
        "generate": "palladion.model.commands.generate",
        "chat": "palladion.model.commands.chat",
        "quantize": "palladion.model.commands.quantize",
    },
    compiling=("generate", "chat"),
    nested={"bench": ("measures kernels and models; palladion bench lists its own commands", _bench)},
)


def main() -> NoReturn:
    """Runs the command that this process was called with, and exits with its status."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        print(f"palladion {palladion.__version__}, jax {jax.__version__}")
        sys.exit(0)
    by_module = Path(sys.argv[0]).name == "__main__.py"
    dataclasses.replace(PROGRAM, called="python -m palladion" if by_module else None).run()


if __name__ == "__main__":
    main()
