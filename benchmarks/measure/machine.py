"""Where and with what something was measured, and what that machine could do at best."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jax

from palladion.kernels.devices import target_chip, target_gpu

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
)
"""Whose versions may decide how fast something is."""

BUSY: Final = 0.5
"""Processes that want a core, for each core, from which on a machine is called busy."""


@dataclasses.dataclass(frozen=True)
class Datasheet:
    """What a datasheet says of a device.

    Attributes:
      name: "h200", "v6e", …
      bytes_per_second: of its memory; None where it is not known.
      flops_per_second: of its matrix units in bfloat16; None where it is not known.
    """

    name: str
    bytes_per_second: float | None
    flops_per_second: float | None


def datasheet() -> Datasheet | None:
    """The datasheet of JAX's default device; None where nothing is known of it, as of CPUs."""
    chip = target_chip() or target_gpu()
    if chip is None:
        return None
    return Datasheet(chip.name, chip.hbm_bytes_per_second, chip.bf16_flops_per_second)


def provenance(command: str = "") -> dict[str, Any]:
    """Device, driver, versions, commit and time: what belongs to every result.

    Args:
      command: with which it was measured.
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
    """What JAX's default device is called; of a CPU the processor, and how many of its cores are here."""
    device = jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else f"{_processor()}, {os.cpu_count()} cores"


def warn_if_busy() -> str | None:
    """A warning where other processes want this machine's cores, which makes any time doubtful; else None."""
    load, cores = _load(), os.cpu_count() or 1
    if load is None or load / cores < BUSY:
        return None
    return f"this machine is busy: {load:.1f} processes want its {cores} cores. Believe ratios, not times"


def _load() -> float | None:
    """Processes that wanted a core in the last minute."""
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
    """The NVIDIA driver's name of the GPU, its version and limits, as `nvidia-smi` has them."""
    fields = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory,memory.total"
    return _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader") if shutil.which("nvidia-smi") else None


def commit() -> str | None:
    """The commit that the code was taken from, "+" where it was changed since; None where there is none."""
    here = str(Path(__file__).resolve().parent)
    commit = _said("git", "-C", here, "rev-parse", "--short=12", "HEAD") if shutil.which("git") else None
    if commit is None:
        return None
    return commit + ("+" if _said("git", "-C", here, "status", "--porcelain", "--untracked-files=no") else "")


def _said(*command: str) -> str | None:
    """What a program says, or None where it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else None
