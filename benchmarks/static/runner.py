"""Examines workloads in a process of its own: where the compiler takes its process down, that costs one workload."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import jax

from palladion.benchmarks import tpu_compiler
from palladion.benchmarks.static import workloads
from palladion.benchmarks.static.processes import why_it_ended
from palladion.benchmarks.static.roofline import KernelReport, examine
from palladion.benchmarks.static.simulator import Simulation, SimulatorFailed, simulate
from palladion.kernels.backend import Unsupported

MOST_SECONDS: Final = 600.0
"""What a workload may take."""

LOG: Final = "log.txt"
MOST_LINES: Final = 12
"""Of a compiler's message that are shown."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What came out for a workload on a chip.

    Attributes:
      workload: which one.
      chip: a name in `tpu_chips()`.
      reports: on each of its kernels.
      failure: why there are none, in the compiler's words where they are its; None where there are.
      simulations: what libtpu's simulator says of them, or why it does not; None where it was not asked.
    """

    workload: workloads.Reference
    chip: str
    reports: tuple[KernelReport, ...]
    failure: str | None
    simulations: tuple[Simulation, ...] | str | None = None


def run(tasks: Sequence[tuple[workloads.Reference, str]], *, simulated: bool = False) -> Iterator[Row]:
    """Examines workloads on chips, one after the other; rows come as they are ready.

    Args:
      tasks: workloads, and for which chips.
      simulated: whether libtpu's simulator is asked, too.
    """
    worker: _Worker | None = None
    try:
        for workload, chip in tasks:
            worker = worker or _Worker()
            row = worker.examine(workload, chip)
            if row is None:
                row = Row(workload, chip, (), worker.last_words())
                worker.stop()
                worker = None
            yield _simulated(row) if simulated and row.failure is None else row
    finally:
        if worker is not None:
            worker.stop()


def _simulated(row: Row) -> Row:
    try:
        return dataclasses.replace(row, simulations=tuple(simulate(row.workload, row.chip)))
    except SimulatorFailed as failure:
        return dataclasses.replace(row, simulations=str(failure))


class _Worker:
    """A process that examines."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        # A process that is killed cannot tidy up.
        self._folder = tempfile.TemporaryDirectory(prefix="palladion_static_")
        self._process = context.Process(target=_serve, args=(other, Path(self._folder.name)), daemon=True)
        self._process.start()
        other.close()

    def examine(self, workload: workloads.Reference, chip: str) -> Row | None:
        """The result; None where the process did not survive it."""
        try:
            self._connection.send((workload, chip))
            if self._connection.poll(MOST_SECONDS):
                row: Row = self._connection.recv()
                return row
        except (EOFError, OSError):
            self._process.join()
        return None

    def last_words(self) -> str:
        """What a process that ended has written, as far as it says why."""
        if self._process.is_alive():
            return f"took longer than {MOST_SECONDS:.0f} s"
        words = (Path(self._folder.name) / LOG).read_text(errors="replace")
        return f"the compiler ended its process: {why_it_ended(self._process.exitcode or 0, words)}"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._folder.cleanup()


def _serve(connection: Any, folder: Path) -> None:
    """Examines what is asked for until nobody asks any more; what libraries write goes into a log in the folder."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip, even where there is one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process stops this one
    descriptor = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    listings = folder / "listings"
    listings.mkdir()
    tpu_compiler.keep_listings(listings)
    while True:
        try:
            workload, chip = connection.recv()
        except EOFError:
            return
        connection.send(_examine(workload, chip))


def _examine(workload: workloads.Reference, chip: str) -> Row:
    try:
        made = workloads.load(workload)
        found = examine(made.function, *made.arguments, chip=chip, bytes_needed=made.bytes_needed)
    except Unsupported as error:
        return Row(workload, chip, (), str(error))
    except Exception as error:  # whatever the user's function or the compiler raises is the answer
        return Row(workload, chip, (), _message(error))
    return Row(workload, chip, tuple(found), None if found else "no Pallas kernel in it")


def _message(error: Exception) -> str:
    """What an error says, without the text of programs that compilers quote."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + "\n".join(lines[:MOST_LINES])
