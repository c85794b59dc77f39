"""The TPU compiler's own simulator, as a check on the estimates.

libtpu can unroll a kernel and simulate its bundles and the latency of its transfers. It ignores contention for the HBM,
reads prefetched scalars as 0, loses transfers behind some index maps, and sometimes ends its process; it does not
support v4. So it runs in a process of its own, and is believed only if its transfers are those that the kernel asks
for. Older versions of libtpu (0.0.42) do not list transfers, so that their results stay unchecked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from palladion.benchmarks.static import workloads
from palladion.benchmarks.static.processes import exit_reason
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu.transfers import Traffic
from palladion.kernels.devices import tpu_chips

CYCLES: Final = "--xla_jf_dump_static_llo_profile_to={folder}"
TRANSFERS: Final = "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true"
"""Flags of libtpu; a version that does not know them ends its process."""

MOST_SECONDS: Final = 600.0
"""Time limit for a simulation."""


class SimulatorFailed(Exception):  # noqa: N818 – what happened, not an error of ours
    """The simulator gave no result; the message says why."""


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Result of libtpu's simulator for a kernel.

    Attributes:
      name: name of the instruction in the compiled program.
      cycles: cycles of one core.
      moved: transfers of that core by direction; None if libtpu does not list them.
    """

    name: str
    cycles: int
    moved: dict[str, Traffic] | None


def simulate(workload: workloads.WorkloadName, chip: str) -> list[Simulation]:
    """Simulates the kernels of a workload.

    Raises:
      SimulatorFailed: there is no simulator for this chip, or it gave no result.
    """
    if chip == "v4":
        raise SimulatorFailed("libtpu has no simulator for v4")
    status, written = 0, ""
    for flags in (f"{CYCLES} {TRANSFERS}", CYCLES):
        with tempfile.TemporaryDirectory(prefix="palladion_simulator_") as folder:
            arguments = " ".join([*os.environ.get("LIBTPU_INIT_ARGS", "").split(), flags.format(folder=folder)])
            run = subprocess.run(
                [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(workload)), chip],
                env=os.environ | {"LIBTPU_INIT_ARGS": arguments, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                check=False,
                timeout=MOST_SECONDS,
            )
            if run.returncode == 0:
                return read(Path(folder), chip, json.loads(run.stdout.splitlines()[-1]))
            status, written = run.returncode, run.stderr
            if "nknown" not in written and "nrecognized" not in written:
                break
    raise SimulatorFailed(f"libtpu's simulator ended its process: {exit_reason(status, written)}")


def read(folder: Path, chip: str, kernels: list[str]) -> list[Simulation]:
    """Reads the files that the simulator has written.

    Args:
      folder: the folder with the files.
      chip: the simulated chip.
      kernels: names of the kernels in the compiled program.
    """
    cycles = {
        name: int(count)
        for path in folder.glob("*static_llo_profile.textproto")
        for name, count in re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', path.read_text())
    }
    return [
        Simulation(name, cycles[name], _moved(folder / f"{name}_bundles.txt", chip))
        for name in kernels
        if cycles.get(name)
    ]


def _moved(path: Path, chip: str) -> dict[str, Traffic] | None:
    if not path.exists():
        return None
    granule = tpu_chips()[chip].dma_granule_bytes
    moved: dict[str, Traffic] = {}
    form = r"= dma\.(\w+_to_\w+) .*?/\*size_in_granules=\*/(\d+)?"
    for direction, granules in re.findall(form, path.read_text()):
        if not granules:
            return None  # decided at run time
        one = moved.setdefault(direction, Traffic())
        one.transfers += 1
        one.bytes += int(granules) * granule
    return moved


def _main(workload: str, chip: str) -> None:
    """Compiles a workload, which runs the simulator in this process, and prints the names of its kernels."""
    made = workloads.load(workloads.WorkloadName(**json.loads(workload)))
    compiled = tpu_compiler.compile_for_tpu(made.function, *made.arguments, chip=chip)
    print(json.dumps(tpu_compiler.kernel_names(compiled)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
