"""XLA's compiler for GPUs on a machine without one: a whole program, with all that XLA adds to the kernels.

`gpu_compiler` compiles kernels one by one. What runs on a chip is a program: launches of those kernels, of XLA's own,
and copies, one after the other. JAX's plugin for CUDA compiles for a GPU that is only described, XLA's own Triton
included. There is no chip to try variants on: which of several algorithms multiplies a dense matrix may differ there.
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
from jax.experimental import topologies

from palladion.benchmarks.static.gpu.compiler import gpu_of, lowered_for_gpu
from palladion.benchmarks.static.tpu.compiler import described
from palladion.kernels.devices import Gpu

PLUGINS: Final = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")

L2_BYTES: Final = {80: 40 * 2**20, 90: 50 * 2**20, 100: 126 * 2**20}
"""Of the GPUs of `gpu_compiler.ARCHITECTURES`, by NVIDIA's datasheets."""

CONTROL: Final = ("While", "Conditional", "Sequential", "CommandBuffer")
"""Steps of a program that launch nothing themselves."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Something that a program starts on the GPU.

    Attributes:
      name: of the kernel; of a copy its kind.
      kind: what XLA calls it: "CustomKernel", "Copy", "Memzero", …
      loops: how many loops it is in.
      grid: programs along each axis; None where it is no kernel.
      threads: of a program.
      shared: bytes of shared memory that a program takes.
    """

    name: str
    kind: str
    loops: int
    grid: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A function as XLA has compiled it.

    Attributes:
      launches: in the order of the program.
      temporary_bytes: of memory beside arguments and results.
      aliased_bytes: of results that lie where donated arguments were.
      text: the optimized program (HLO).
    """

    launches: tuple[Launch, ...]
    temporary_bytes: int
    aliased_bytes: int
    text: str = dataclasses.field(repr=False)


def installed() -> bool:
    """Whether there is a plugin to compile with."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, PLUGINS))


@functools.cache
def device(arch: int) -> Any:
    """The GPU of an architecture, to compile for; nothing can be put on it.

    Raises:
      ValueError: there is no such architecture.
    """
    topology = topologies.get_topology_desc(platform="cuda", target_config=_target(gpu_of(arch)), topology="1x1x1")
    return topology.devices[0]


def compile_program(function: Callable[..., Any], *avals: Any, arch: int = 90) -> CompiledProgram:
    """Compiles a function for a GPU that need not be there, by the backends that it takes on one.

    Args:
      function: of arrays; jitted (with donated arguments, say) or not.
      avals: its arguments, arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      arch: one of `gpu_compiler.ARCHITECTURES`.

    Raises:
      ValueError: there is no such architecture.
      jax.errors.JaxRuntimeError: XLA does not compile it.
    """
    there = jax.sharding.SingleDeviceSharding(device(arch))
    arguments = jax.tree.map(lambda leaf: described(leaf, there), avals)
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
"""A line of XLA's listing; a loop's condition and body are indented."""

INDENT: Final = 4


def launches_in(listing: str) -> tuple[Launch, ...]:
    """The launches of a program as XLA lists its steps ("thunks")."""
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
    """A GPU as XLA wants it described."""
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
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}"
    lines = "\n".join(f"{name}: {value}" for name, value in figures.items())
    described = f'platform_name: "CUDA"\ndevice_description_str: "{gpu.device_kind}"'
    return f"gpu_device_info {{\n{lines}\n{capability}\n}}\n{described}\n"
