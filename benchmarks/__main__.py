"""Runs `python -m palladion.benchmarks COMMAND`; `commands` has the table of commands."""

from palladion.benchmarks.commands import run_as_program

if __name__ == "__main__":
    run_as_program()
