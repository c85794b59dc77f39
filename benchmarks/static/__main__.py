"""Runs `python -m palladion.benchmarks.static tpu` and `… gpu`: the command `static`."""

from palladion.benchmarks.commands import run_as_program

if __name__ == "__main__":
    run_as_program("static")
