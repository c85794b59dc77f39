"""The machine: where and with what something is measured, and what the machine can do at best."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

import jax

from palladion.benchmarks.measure.records import Limits, Provenance
from palladion.kernels.devices import measured_bandwidth, measured_matrix_rate, target_chip, target_gpu
from palladion.reference.platforms import target_platform

PACKAGES: Final = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "numpy",
    "torch",
    "transformers",
    "triton",
    "llama-cpp-python",
    "flashinfer-python",
    "flash-attn",
    "gemlite",
)
"""Packages whose versions may affect how fast something is."""

BUSY: Final = 0.5
"""Load per core above which a machine is called busy."""


@dataclasses.dataclass(frozen=True)
class Datasheet:
    """Figures of a device from its datasheet.

    Attributes:
      name: "h200", "v6e", …
      bytes_per_second: memory bandwidth; None if unknown.
      flops_per_second: peak rate of the matrix units in bfloat16; None if unknown.
    """

    name: str
    bytes_per_second: float | None
    flops_per_second: float | None


def datasheet() -> Datasheet | None:
    """Returns the datasheet of JAX's default device; None for CPUs and unknown devices."""
    chip = target_chip() or target_gpu()
    if chip is None:
        return None
    return Datasheet(chip.name, chip.hbm_bytes_per_second, chip.bf16_flops_per_second)


def limits() -> Limits:
    """Returns what this machine can do at best: measured, and from its datasheet if there is one."""
    dtype = "float32" if target_platform() == "cpu" else "bfloat16"
    sheet = datasheet()
    return Limits(
        bandwidth=measured_bandwidth(),
        matrix_rate=measured_matrix_rate(dtype),
        matrix_dtype=dtype,
        datasheet=None if sheet is None else sheet.name,
        datasheet_bandwidth=None if sheet is None else sheet.bytes_per_second,
        datasheet_flops=None if sheet is None else sheet.flops_per_second,
    )


def provenance(command: str = "") -> Provenance:
    """Returns device, driver, versions, commit and time, which are kept with every result.

    Args:
      command: the command line that measures.
    """
    device = jax.devices()[0]
    return {
        "command": command,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(),
        "device_kind": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "driver": _driver(),
        "cores": os.cpu_count(),
        "load": _load(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def device_name() -> str:
    """Returns the name of JAX's default device; for a CPU the processor and its number of cores."""
    device = jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else f"{_processor()}, {os.cpu_count()} cores"


def busy_warning() -> str | None:
    """Returns a warning if other processes use this machine's cores, which makes times doubtful; else None."""
    load, cores = _load(), os.cpu_count() or 1
    if load is None or load / cores < BUSY:
        return None
    return f"this machine is busy: {load:.1f} processes want its {cores} cores. Believe ratios, not times"


def _load() -> float | None:
    """Returns the load of the last minute: the average number of processes that were ready to run."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(information) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    """Returns the GPU's name, driver version and limits as `nvidia-smi` prints them, or None."""
    fields = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory,memory.total"
    return (
        _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader") if shutil.which("nvidia-smi") else None
    )


def commit() -> str | None:
    """Returns the commit of this checkout, followed by "+" if files have changed since; None if there is none."""
    here = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD") if shutil.which("git") else None
    if commit is None:
        return None
    return commit + ("+" if _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str | None:
    """Returns a program's output, or None if it fails or prints nothing."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else None
