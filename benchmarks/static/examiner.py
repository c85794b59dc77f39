"""Examines workloads in a process of its own: a compiler that ends its process costs only one workload."""

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
from typing import Final, NamedTuple

import jax

from palladion.benchmarks.static import workloads
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu.report import GpuReport
from palladion.benchmarks.static.gpu.roofline import examine_for_gpu
from palladion.benchmarks.static.processes import exit_reason
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu.report import KernelReport
from palladion.benchmarks.static.tpu.roofline import examine
from palladion.benchmarks.static.tpu.simulator import Simulation, SimulatorFailed, simulate
from palladion.kernels.implementation import Unsupported

MOST_SECONDS: Final = 600.0
"""Default time limit for a workload."""

LOG: Final = "log.txt"
"""File for the output of libraries, in the worker's folder."""

MOST_LINES: Final = 12
"""Lines of a compiler's message that are shown."""

NO_KERNEL: Final = "no Pallas kernel in it"
NO_GPU_KERNEL: Final = (
    "no Pallas kernel for GPUs in it: pallas_call takes Triton where compiler_params is a "
    "pallas.triton.CompilerParams, and pallas.mosaic_gpu.kernel Mosaic GPU"
)

Report = KernelReport | GpuReport


class Task(NamedTuple):
    """An examination to be made.

    Attributes:
      workload: the workload.
      chip: a name in `tpu_chips()`, or a GPU architecture, "sm_90".
      backend: the backend whose kernel a case calls; None means the platform's default. A file calls its own.
    """

    workload: workloads.WorkloadName
    chip: str
    backend: str | None = None


@dataclasses.dataclass(frozen=True)
class Examination:
    """A workload, examined for a chip.

    Attributes:
      workload: the workload.
      chip: a name in `tpu_chips()`, or a GPU architecture, "sm_90".
      reports: a report on each of its kernels.
      failure: why there are no reports, often the compiler's message; None if there are.
      backend: the backend whose kernel a case calls, where one was chosen.
      simulations: results of libtpu's simulator, or why there are none; None if it was not asked.
    """

    workload: workloads.WorkloadName
    chip: str
    reports: tuple[Report, ...]
    failure: str | None
    backend: str | None = None
    simulations: tuple[Simulation, ...] | str | None = None


def architectures() -> dict[str, int]:
    """Returns the GPU architectures by name ("sm_90"), with their compute capabilities."""
    return {f"sm_{arch}": arch for arch in gpu_compiler.ARCHITECTURES}


def examine_all(tasks: Sequence[Task], *, simulated: bool = False) -> Iterator[Examination]:
    """Examines workloads for chips, one after the other, and yields each result as soon as it is there.

    Args:
      tasks: what to examine.
      simulated: whether to ask libtpu's simulator, too.
    """
    with Examiner() as examiner:
        for task in tasks:
            found = examiner.examine(*task)
            yield _with_simulations(found) if simulated and found.failure is None else found


def _with_simulations(found: Examination) -> Examination:
    try:
        return dataclasses.replace(found, simulations=tuple(simulate(found.workload, found.chip)))
    except SimulatorFailed as failure:
        return dataclasses.replace(found, simulations=str(failure))


class Examiner:
    """Examines workloads in a process whose libtpu writes listings; if the compiler ends it, a new one is started.

    Each GPU architecture has a process of its own: jaxlib compiles Mosaic GPU kernels for one of them in a process.

    Example:
      with Examiner() as examiner:
          found = examiner.examine(WorkloadName("decode_attention", "llama-3-8b"), "v6e")

    Attributes:
      most_seconds: time limit for a workload.
    """

    def __init__(self, most_seconds: float = MOST_SECONDS) -> None:
        self.most_seconds = most_seconds
        self._workers: dict[str, _Worker] = {}

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def examine(self, workload: workloads.WorkloadName, chip: str, backend: str | None = None) -> Examination:
        """Examines a workload for a chip; a failure is part of the result. For arguments see `Task`."""
        kind = chip if chip in architectures() else "tpu"
        if kind not in self._workers:
            self._workers[kind] = _Worker()
        worker = self._workers[kind]
        found = worker.examine(Task(workload, chip, backend), self.most_seconds)
        if found is None:
            found = Examination(workload, chip, (), worker.failure(self.most_seconds), backend)
            self._workers.pop(kind).stop()
        return found

    def stop(self) -> None:
        """Ends the processes."""
        while self._workers:
            self._workers.popitem()[1].stop()


class _Worker:
    """The process of an `Examiner`: reads tasks from standard input, and writes results to standard output."""

    def __init__(self) -> None:
        # The folder belongs to this process: one that is killed cannot remove it.
        self._folder = tempfile.TemporaryDirectory(prefix="palladion_static_")
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is for this process, not for the worker
        )

    def examine(self, task: Task, most_seconds: float) -> Examination | None:
        """Returns the result; None if the process ended, or took too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], most_seconds)[0]:
                found: Examination = pickle.load(self._process.stdout)
                return found
        except (EOFError, BrokenPipeError):
            self._process.wait()
        return None

    def failure(self, most_seconds: float) -> str:
        """Says why the process gave no result."""
        if self._process.poll() is None:
            return f"took longer than {most_seconds:.0f} s"
        log = Path(self._folder.name) / LOG
        written = log.read_text(errors="replace") if log.exists() else ""
        return f"the compiler ended its process: {exit_reason(self._process.returncode, written)}"

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._folder.cleanup()


def serve() -> None:
    """Runs the process of an `Examiner`: examines until there are no more tasks; libraries write into a log."""
    folder = Path(sys.argv[1])
    tasks, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
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
        pickle.dump(_examine(task), results)
        results.flush()


def _examine(task: Task) -> Examination:
    workload, chip, backend = task
    try:
        arch = architectures().get(chip)
        # What a case stores, and in which order, may depend on the platform.
        with contextlib.nullcontext() if arch is None else gpu_compiler.tracing_for(arch):
            made = workloads.load(workload, backend or workloads.BACKENDS["tpu" if arch is None else "gpu"][0])
        found: Sequence[Report]
        if arch is None:
            found = examine(made.function, *made.arguments, chip=chip, bytes_needed=made.bytes_needed)
        else:
            found = examine_for_gpu(made.function, *made.arguments, arch=arch, bytes_needed=made.bytes_needed)
    except Unsupported as error:
        return Examination(workload, chip, (), str(error), backend)
    except Exception as error:  # whatever the user's function or the compiler raises is the result
        return Examination(workload, chip, (), _message(error), backend)
    failure = None if found else NO_KERNEL if arch is None else NO_GPU_KERNEL
    return Examination(workload, chip, tuple(found), failure, backend)


def _message(error: Exception) -> str:
    """Formats an error, without the programs that compilers quote."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + "\n".join(lines[:MOST_LINES])
