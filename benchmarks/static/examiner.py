"""Examines workloads in a process of its own: where the compiler takes its process down, that costs one workload."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import jax

from palladion.benchmarks.static import workloads
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu.roofline import GpuReport, examine_for_gpu
from palladion.benchmarks.static.processes import exit_reason
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu.roofline import KernelReport, examine
from palladion.benchmarks.static.tpu.simulator import Simulation, SimulatorFailed, simulate
from palladion.kernels.backend import Unsupported

MOST_SECONDS: Final = 600.0
"""What a workload may take where nothing else is said."""

LOG: Final = "log.txt"
MOST_LINES: Final = 12
"""Of a compiler's message that are shown."""


NO_KERNEL: Final = "no Pallas kernel in it"
NO_TRITON_KERNEL: Final = (
    "no Pallas-Triton kernel in it: pallas_call takes Triton where compiler_params is a pallas.triton.CompilerParams"
)

ARCHITECTURE: Final = "sm_{}"
"""How an architecture of GPUs is named."""

Report = KernelReport | GpuReport


@dataclasses.dataclass(frozen=True)
class Examination:
    """What came out for a workload on a chip.

    Attributes:
      workload: which one.
      chip: a name in `tpu_chips()`, or an architecture of GPUs, "sm_90".
      reports: on each of its kernels.
      failure: why there are none, in the compiler's words where they are its; None where there are.
      simulations: what libtpu's simulator says of them, or why it does not; None where it was not asked.
    """

    workload: workloads.WorkloadName
    chip: str
    reports: tuple[Report, ...]
    failure: str | None
    simulations: tuple[Simulation, ...] | str | None = None


def architectures() -> dict[str, int]:
    """The architectures of GPUs by name, and the compute capability of each."""
    return {ARCHITECTURE.format(arch): arch for arch in gpu_compiler.ARCHITECTURES}


def run(tasks: Sequence[tuple[workloads.WorkloadName, str]], *, simulated: bool = False) -> Iterator[Examination]:
    """Examines workloads on chips, one after the other; rows come as they are ready.

    Args:
      tasks: workloads, and for which chips: see `Examination`.
      simulated: whether libtpu's simulator is asked, too.
    """
    with Examiner() as examiner:
        for workload, chip in tasks:
            row = examiner.examine(workload, chip)
            yield _simulated(row) if simulated and row.failure is None else row


def _simulated(row: Examination) -> Examination:
    try:
        return dataclasses.replace(row, simulations=tuple(simulate(row.workload, row.chip)))
    except SimulatorFailed as failure:
        return dataclasses.replace(row, simulations=str(failure))


class Examiner:
    """Examines in a process of its own, with a libtpu that lists; one that the compiler ends is replaced.

    Example:
      with Examiner() as examiner:
          row = examiner.examine(WorkloadName("decode_attention", "llama-3-8b"), "v6e")

    Attributes:
      most_seconds: what a workload may take.
    """

    def __init__(self, most_seconds: float = MOST_SECONDS) -> None:
        self.most_seconds = most_seconds
        self._worker: _Worker | None = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def examine(self, workload: workloads.WorkloadName, chip: str) -> Examination:
        """Examines a workload."""
        self._worker = self._worker or _Worker()
        row = self._worker.examine(workload, chip, self.most_seconds)
        if row is None:
            row = Examination(workload, chip, (), self._worker.last_words(self.most_seconds))
            self.stop()
        return row

    def stop(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """The process of an `Examiner`: takes tasks from its standard input, and writes rows to its standard output."""

    def __init__(self) -> None:
        # A process that is killed cannot tidy up.
        self._folder = tempfile.TemporaryDirectory(prefix="palladion_static_")
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # an interrupt is for the process that started this one
        )

    def examine(self, workload: workloads.WorkloadName, chip: str, most_seconds: float) -> Examination | None:
        """The result; None where the process did not survive it, or was too slow."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((workload, chip), self._process.stdin)
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], most_seconds)[0]:
                row: Examination = pickle.load(self._process.stdout)
                return row
        except (EOFError, BrokenPipeError):
            self._process.wait()
        return None

    def last_words(self, most_seconds: float) -> str:
        """What a process that ended has written, as far as it says why."""
        if self._process.poll() is None:
            return f"took longer than {most_seconds:.0f} s"
        log = Path(self._folder.name) / LOG
        words = log.read_text(errors="replace") if log.exists() else ""
        return f"the compiler ended its process: {exit_reason(self._process.returncode, words)}"

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._folder.cleanup()


def serve() -> None:
    """What the process of an `Examiner` does: examines until there are no more tasks; libraries write into a log."""
    folder = Path(sys.argv[1])
    tasks, rows = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(log, standard)
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip, even where there is one
    listings = folder / "listings"
    listings.mkdir()
    tpu_compiler.keep_listings(listings)
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        pickle.dump(_examine(*task), rows)
        rows.flush()


def _examine(workload: workloads.WorkloadName, chip: str) -> Examination:
    try:
        arch = architectures().get(chip)
        made = workloads.load(workload, "tpu" if arch is None else "gpu")
        found: Sequence[Report]
        if arch is None:
            found = examine(made.function, *made.arguments, chip=chip, bytes_needed=made.bytes_needed)
        else:
            found = examine_for_gpu(made.function, *made.arguments, arch=arch, bytes_needed=made.bytes_needed)
    except Unsupported as error:
        return Examination(workload, chip, (), str(error))
    except Exception as error:  # whatever the user's function or the compiler raises is the answer
        return Examination(workload, chip, (), _message(error))
    return Examination(workload, chip, tuple(found), None if found else NO_KERNEL if arch is None else NO_TRITON_KERNEL)


def _message(error: Exception) -> str:
    """What an error says, without the text of programs that compilers quote."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + "\n".join(lines[:MOST_LINES])
