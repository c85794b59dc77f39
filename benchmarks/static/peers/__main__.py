"""Runs `python -m palladion.benchmarks.static.peers`: the command `static_peers`."""

from palladion.benchmarks.commands import run_as_program

if __name__ == "__main__":
    run_as_program("static_peers")
