"""Compiles a whole program for a GPU on a machine without one, with XLA's own compiler.

`compiler.py` compiles single kernels. A chip runs a program: launches of those kernels, of XLA's own kernels, and
copies, one after the other. JAX's CUDA plugin compiles for a GPU that is only described, with XLA's own Triton. Without
a chip XLA cannot autotune: on a chip it may choose other algorithms for dense products.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from jax.experimental import topologies

from palladion.benchmarks.static.gpu.compiler import gpu_of, lowered_for_gpu
from palladion.benchmarks.static.tpu.compiler import described
from palladion.kernels.devices import Gpu

PLUGINS: Final = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
"""Modules of JAX's CUDA plugins."""

L2_BYTES: Final = {80: 40 * 2**20, 90: 50 * 2**20, 100: 126 * 2**20}
"""Size of the L2 cache of the GPUs in `compiler.ARCHITECTURES`, from NVIDIA's datasheets."""

CONTROL: Final = ("While", "Conditional", "Sequential", "CommandBuffer")
"""Kinds of steps that launch nothing themselves."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel or a copy that a program starts on the GPU.

    Attributes:
      name: the kernel's name, or the kind of copy.
      kind: XLA's name for the kind: "CustomKernel", "Copy", "Memzero", …
      loops: number of loops around it.
      grid: programs along each axis; None if it is no kernel.
      threads: threads of a program along each axis; None if it is no kernel.
      shared: bytes of shared memory of a program.
    """

    name: str
    kind: str
    loops: int
    grid: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A function compiled by XLA.

    Attributes:
      launches: launches in order.
      temporary_bytes: memory beside arguments and results.
      aliased_bytes: bytes of results that take the place of donated arguments.
      text: the optimized program (HLO).
    """

    launches: tuple[Launch, ...]
    temporary_bytes: int
    aliased_bytes: int
    text: str = dataclasses.field(repr=False)


def installed() -> bool:
    """Whether one of JAX's CUDA plugins is installed."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, PLUGINS))


@functools.cache
def device(arch: int) -> Any:
    """Returns a device to compile for; nothing can run on it.

    Raises:
      ValueError: there is no such architecture.
    """
    return devices(arch, 1)[0]


def devices(arch: int, number: int) -> np.ndarray:
    """Returns devices of one host, as `device` does.

    Args:
      arch: one of `compiler.ARCHITECTURES`.
      number: how many GPUs the host has.

    Raises:
      ValueError: there is no such architecture.
    """
    target = _target(gpu_of(arch))
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{number}")
    return np.array(topology.devices)


def compile_program(function: Callable[..., Any], *avals: Any, arch: int = 90) -> CompiledProgram:
    """Compiles a function for a GPU that need not be there, with the backends that it takes on that GPU.

    Args:
      function: a function of arrays, jitted (with donated arguments, say) or not.
      avals: its arguments, arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      arch: one of `compiler.ARCHITECTURES`.

    Raises:
      ValueError: there is no such architecture.
      jax.errors.JaxRuntimeError: XLA refuses the function.
    """
    sharding = jax.sharding.SingleDeviceSharding(device(arch))
    arguments = jax.tree.map(lambda leaf: described(leaf, sharding), avals)
    lowered = lowered_for_gpu(function, *arguments, arch=arch)
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        (listing,) = Path(folder).glob("*thunk_sequence.txt")
        launches = launches_in(listing.read_text())
    memory: Any = compiled.memory_analysis()
    return CompiledProgram(launches, memory.temp_size_in_bytes, memory.alias_size_in_bytes, compiled.as_text() or "")


STEP: Final = re.compile(
    r"(?P<indent> *)\d+: k(?P<kind>\w+) +\[[^\]]*\] *(?P<name>\S*)"
    r"( grid: \[(?P<grid>[\d, ]+)\] threads: \[(?P<threads>[\d, ]+)\] +shared_memory: (?P<shared>\d+) bytes)?"
)
"""A line of XLA's listing, in which a loop's condition and body are indented."""

INDENT: Final = 4
"""Spaces of indentation for each loop."""


def launches_in(listing: str) -> tuple[Launch, ...]:
    """Parses the launches of a program from XLA's listing of its steps ("thunks")."""
    found = []
    for step in map(STEP.match, listing.splitlines()):
        if step is None or step["kind"] in CONTROL:
            continue
        found.append(
            Launch(
                name=step["name"],
                kind=step["kind"],
                loops=len(step["indent"]) // INDENT,
                grid=_numbers(step["grid"]),
                threads=_numbers(step["threads"]),
                shared=int(step["shared"] or 0),
            )
        )
    return tuple(found)


def _numbers(listed: str | None) -> tuple[int, ...] | None:
    return None if listed is None else tuple(map(int, listed.split(",")))


def _target(gpu: Gpu) -> str:
    """Returns XLA's description of a GPU, as a text proto."""
    major, minor = divmod(gpu.compute_capability, 10)
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"  # wgmma and tcgen05
    figures: dict[str, Any] = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": gpu.shared_bytes,
        "shared_memory_per_block_optin": gpu.program_shared_bytes,
        "threads_per_core_limit": 32 * gpu.warps,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": 128 if major >= 9 else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": int(gpu.hbm_bytes_per_second or 0),
        "l2_cache_size": L2_BYTES[gpu.compute_capability],
        "clock_rate_ghz": (gpu.clock_hertz or 0) / 1e9,
        "device_memory_size": int(gpu.hbm_bytes or 0),
        "registers_per_core_limit": gpu.registers,
        "registers_per_block_limit": gpu.registers,
    }
    # Of a current driver: XLA records libraries' calls and custom calls in CUDA graphs from 12.3 on.
    versions = ("driver_version", "runtime_version", "compile_time_toolkit_version")
    figures |= dict.fromkeys(versions, '"12.9.0"')
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}"
    lines = "\n".join(f"{name}: {value}" for name, value in figures.items())
    described = f'platform_name: "CUDA"\ndevice_description_str: "{gpu.device_kind}"'
    return f"gpu_device_info {{\n{lines}\n{capability}\n}}\n{described}\n"
