"""Properties of TPUs and GPUs from datasheets, and measurements of memory bandwidth and arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import time
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.reference.platforms import target_platform

READ_BYTES: Final = {"cpu": 256 * 2**20, "gpu": 2**30, "tpu": 2**30}
"""Bytes that a pass reads: several times any cache, and on accelerators enough to make dispatch negligible."""

ROW: Final = 512
"""Columns of the float32 matrix that is read: on a CPU the fastest of 256 to 4096."""

REPEATS: Final = 12
"""Timed repetitions, of which the fastest counts."""

PASSES: Final = {"cpu": 1, "gpu": 8, "tpu": 8}
"""Passes per repetition, dispatched without waiting, so that an accelerator runs them back to back."""

SQUARE: Final = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
"""Rows and columns of the matrices whose product measures arithmetic."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation, as one JAX device represents it; `chips.json` has the figures and their sources.

    Attributes:
      name: short name, for example "v6e".
      device_kind: JAX's name.
      topology: smallest topology that libtpu compiles for.
      cores: tensor cores of the device.
      hbm_bytes_per_second: memory bandwidth.
      vmem_bytes: on-chip memory of a core.
      clock_hertz: clock rate; one bundle of instructions takes one cycle.
      dma_latency_seconds: time from the start of a DMA to its first byte.
      one_byte_operands: one-byte dtypes that the MXU takes directly: int8 with int8, float8 with bfloat16.
      dma_granule_bytes: unit of DMA sizes in the compiler's listings.
      branch_delay_slots: bundles after a branch that are always executed.
      hbm_bytes: size of the memory.
      bf16_flops_per_second: peak rate of the MXUs for bfloat16 operands with float32 results.
    """

    name: str
    device_kind: str
    topology: str
    cores: int
    hbm_bytes_per_second: float
    vmem_bytes: int
    clock_hertz: float
    dma_latency_seconds: float
    one_byte_operands: tuple[str, ...]
    dma_granule_bytes: int
    branch_delay_slots: int
    hbm_bytes: float
    bf16_flops_per_second: float


@functools.cache
def tpu_chips() -> dict[str, Chip]:
    """Returns the TPU generations that kernels are compiled for, by name, oldest first."""
    data = json.loads(importlib.resources.files(__package__).joinpath("chips.json").read_text())
    chips = data["chips"].items()
    return {
        name: Chip(name=name, **figures | {"one_byte_operands": tuple(figures["one_byte_operands"])})
        for name, figures in chips
    }


def target_device_kind() -> str:
    """Returns JAX's name of the device that is traced for; aliases are resolved."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    aliases = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
    return aliases.get(kind, kind)


def target_chip() -> Chip | None:
    """Returns the TPU that is traced for; None for other devices and for unknown TPUs.

    The current abstract mesh decides if it names a device, as for `target_platform`.
    """
    kind = target_device_kind()
    return next((chip for chip in tpu_chips().values() if chip.device_kind == kind), None)


def tracing_for(chip: str) -> contextlib.AbstractContextManager[Any]:
    """Makes calls traced inside a `with` block those of a chip that need not be here, to export or to inspect them.

    Example:
      with tracing_for("v6e"):
          exported = jax.export.export(jax.jit(step), platforms=["tpu"])(*arguments)

    Args:
      chip: name of a chip in `chips.json` or `gpus.json`, such as "v6e" or "h200", or JAX's name of its kind.

    Raises:
      ValueError: the chip is not known.
    """
    tpus = {name: ("tpu", known.device_kind, known.cores) for name, known in tpu_chips().items()}
    chips = tpus | {name: ("gpu", known.device_kind, None) for name, known in gpus().items()}
    found = next((known for name, known in chips.items() if chip in (name, known[1])), None)
    if found is None:
        raise ValueError(f"chip: got {chip!r}; accepted: {', '.join(chips)}, or JAX's name of their kind")
    platform, kind, cores = found
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def vmem_budget(chip: Chip | None = None) -> int:
    """Returns the bytes of VMEM that a kernel's blocks may take: three quarters of what a core has.

    Args:
      chip: the TPU; None means the one with the least VMEM, so that the kernel fits all.
    """
    vmem_bytes = min(known.vmem_bytes for known in tpu_chips().values()) if chip is None else chip.vmem_bytes
    return vmem_bytes * 3 // 4


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; `gpus.json` has the figures and their sources.

    Attributes:
      name: short name, for example "h200".
      device_kind: JAX's name.
      compute_capability: for example 90 for sm_90.
      multiprocessors: number of multiprocessors.
      clock_hertz: clock rate of the multiprocessors; None if unknown.
      hbm_bytes_per_second: memory bandwidth; None if unknown.
      bf16_flops_per_second: peak rate of the tensor cores, without sparsity; None if unknown.
      shared_bytes: shared memory of a multiprocessor; each resident program takes 1 KiB more than it requests.
      program_shared_bytes: most shared memory that one program can request.
      registers: 32-bit registers of a multiprocessor.
      warps: most resident warps of a multiprocessor, of 32 threads each.
      programs: most resident programs (thread blocks) of a multiprocessor.
      float8: whether the hardware converts float8 numbers.
      mosaic_gpu: operations whose Mosaic GPU kernel was right on such a GPU.
      hbm_bytes: size of the memory; None if unknown.
    """

    name: str
    device_kind: str
    compute_capability: int
    multiprocessors: int
    clock_hertz: float | None
    hbm_bytes_per_second: float | None
    bf16_flops_per_second: float | None
    shared_bytes: int
    program_shared_bytes: int
    registers: int
    warps: int
    programs: int
    float8: bool
    mosaic_gpu: tuple[str, ...]
    hbm_bytes: float | None = None


@functools.cache
def gpus() -> dict[str, Gpu]:
    """Returns the known GPUs, by name, oldest architecture first."""
    return {
        name: Gpu(name=name, **figures, **_architectures()[figures["compute_capability"]])
        for name, figures in _gpu_data()["gpus"].items()
    }


DEFAULT_GPU: Final = "h200"
"""GPU that block sizes are chosen for if the target is unknown."""


def target_gpu() -> Gpu | None:
    """Returns the GPU that is traced for; None for other devices and for unknown GPUs.

    The current abstract mesh decides if it names a device, as for `target_platform`. If a GPU of this machine is not in
    `gpus.json` (a new product, or a slice of a chip), the driver reports its architecture and multiprocessors.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else None
    here = jax.devices()[0] if kind is None and jax.default_backend() == "gpu" else None
    kind = here.device_kind if here is not None else kind
    known = next((gpu for gpu in gpus().values() if gpu.device_kind == kind), None)
    if known is not None or here is None:
        return known
    return _gpu_from_driver(here.device_kind, str(here.compute_capability), int(here.core_count))


def gpu_to_plan_for() -> Gpu:
    """Returns the GPU that is traced for, or `DEFAULT_GPU`: for choices that affect speed but not correctness."""
    return target_gpu() or gpus()[DEFAULT_GPU]


@functools.cache
def _gpu_data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(importlib.resources.files(__package__).joinpath("gpus.json").read_text())
    return data


def _architectures() -> dict[int, dict[str, Any]]:
    architectures = _gpu_data()["architectures"].items()
    return {int(number): figures | {"mosaic_gpu": tuple(figures["mosaic_gpu"])} for number, figures in architectures}


def _gpu_from_driver(kind: str, capability: str, multiprocessors: int) -> Gpu | None:
    """Returns a GPU from what its driver reports, with figures of the newest known architecture up to its own."""
    major, _, minor = capability.partition(".")
    number = 10 * int(major) + int(minor or 0) if major.isdigit() else 0
    older = [known for known in _architectures() if known <= number]
    if not older:
        return None  # older than all known architectures, or not from NVIDIA
    return Gpu(
        name=kind,
        device_kind=kind,
        compute_capability=number,
        multiprocessors=multiprocessors,
        clock_hertz=None,
        hbm_bytes_per_second=None,
        bf16_flops_per_second=None,
        **_architectures()[max(older)],
    )


def cpu_compiler_options() -> dict[str, Any]:
    """Returns options that let XLA use the full width of a CPU's vector units; none on other platforms."""
    return {"xla_cpu_prefer_vector_width": 512} if target_platform() == "cpu" else {}


@functools.cache
def measured_bandwidth() -> float:
    """Returns the bytes per second that JAX's default device reads from memory, the best of several repetitions.

    A maximum along the slow axis of a large array is the fastest read that XLA compiles; its arithmetic is negligible.
    """
    x = jnp.ones((READ_BYTES[target_platform()] // (4 * ROW), ROW), jnp.float32)
    return x.nbytes / _least_seconds(lambda x: jnp.max(x, axis=0), x)


@functools.cache
def measured_matrix_rate(dtype: str = "bfloat16") -> float:
    """Returns the floating-point operations per second of JAX's default device in products of large square matrices.

    Operands are normal-distributed, because chips clock down if many bits toggle. Results are float32.

    Args:
      dtype: dtype of the operands.
    """
    size = SQUARE[target_platform()]
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return 2 * size**3 / _least_seconds(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32), x)


def _least_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Returns the time of a pass in the fastest repetition; disturbances only ever make one slower."""
    compiled = jax.jit(function, compiler_options=cpu_compiler_options()).lower(x).compile()
    compiled(x).block_until_ready()
    passes = PASSES[target_platform()]
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([compiled(x) for _ in range(passes)])
        seconds.append((time.perf_counter() - start) / passes)
    return min(seconds)
