"""What a device can do: what the datasheets say of TPUs and GPUs, and the memory bandwidth that is measured."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import time
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.kernels.compat import known_options
from palladion.reference.platforms import target_platform

READ_BYTES: Final = {"cpu": 256 * 2**20, "gpu": 2**30, "tpu": 2**30}
"""Read at a time: several times larger than any cache, and on an accelerator long enough that a dispatch is nothing."""

ROW: Final = 512
"""float32 numbers in a row: of the shapes tried (256 to 4096 wide, sums and maxima) the fastest on a CPU."""

REPEATS: Final = 12

DISPATCHED: Final = {"cpu": 1, "gpu": 8, "tpu": 8}
"""Passes that are started before the first is waited for: on an accelerator one begins where the last one ends."""

SQUARE: Final = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
"""Rows and columns of the matrices that are multiplied to measure arithmetic."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation, as one JAX device shows it; figures and their sources stand in `chips.json`.

    Attributes:
      name: "v6e" for example.
      device_kind: what JAX calls it.
      topology: the smallest one that libtpu compiles for.
      cores: tensor cores behind the device.
      hbm_bytes_per_second: memory bandwidth.
      vmem_bytes: on-chip memory of a core.
      clock_hertz: cycles per second; one bundle of instructions takes a cycle.
      dma_latency_seconds: from the start of a transfer to its first byte.
      one_byte_operands: dtypes that the matrix unit takes as they are: int8 against int8, float8 against bfloat16.
      dma_granule_bytes: unit of transfers in the compiler's listings.
      branch_delay_slots: bundles after a branch that are executed whether it is taken or not.
      hbm_bytes: how much memory it has.
      bf16_flops_per_second: of the matrix units, bfloat16 in, float32 out.
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
    """The TPU generations that kernels are compiled for, by name, oldest first."""
    data = json.loads(importlib.resources.files(__package__).joinpath("chips.json").read_text())
    chips = data["chips"].items()
    return {
        name: Chip(name=name, **figures | {"one_byte_operands": tuple(figures["one_byte_operands"])})
        for name, figures in chips
    }


def target_device_kind() -> str:
    """What JAX calls the device that is being traced for, whichever name of several it goes by."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    aliases = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
    return aliases.get(kind, kind)


def target_chip() -> Chip | None:
    """The TPU that is being traced for; None where it is no TPU, or one that is not known here.

    As for `target_platform`, the current abstract mesh says so where it names a device.
    """
    kind = target_device_kind()
    return next((chip for chip in tpu_chips().values() if chip.device_kind == kind), None)


def vmem_budget(chip: Chip | None = None) -> int:
    """Returns the bytes of VMEM that a kernel's blocks may take: three quarters of what a core has.

    Args:
      chip: the TPU; None means the one with the least VMEM, so that the kernel fits all.
    """
    vmem_bytes = min(known.vmem_bytes for known in tpu_chips().values()) if chip is None else chip.vmem_bytes
    return vmem_bytes * 3 // 4


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; figures and their sources stand in `gpus.json`.

    Attributes:
      name: "h200" for example.
      device_kind: what JAX calls it.
      compute_capability: of sm_90, for example, 90.
      multiprocessors: on the chip.
      clock_hertz: cycles per second of the multiprocessors; None where it is not known.
      hbm_bytes_per_second: memory bandwidth; None where it is not known.
      bf16_flops_per_second: of the tensor cores, without sparsity; None where it is not known.
      shared_bytes: shared memory of a multiprocessor; every program on it takes 1 KiB more than it asks for.
      program_shared_bytes: the most that one program can ask for.
      registers: 32-bit registers of a multiprocessor.
      warps: that a multiprocessor keeps at a time, of 32 threads each.
      programs: that a multiprocessor keeps at a time.
      float8: whether it converts float8 numbers in hardware.
      hbm_bytes: how much memory it has; None where it is not known.
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
    hbm_bytes: float | None = None


@functools.cache
def gpus() -> dict[str, Gpu]:
    """The GPUs that are known here, by name, oldest architecture first."""
    return {
        name: Gpu(name=name, **figures, **_architectures()[figures["compute_capability"]])
        for name, figures in _gpu_data()["gpus"].items()
    }


DEFAULT_GPU: Final = "h200"
"""The GPU that kernels are laid out for where it is not known which one they will run on."""


def target_gpu() -> Gpu | None:
    """The GPU that is being traced for; None where it is no GPU, or one of which nothing is known here.

    As for `target_platform`, the current abstract mesh says so where it names a device. Of a GPU that is here and not
    in `gpus.json` (a new product, or a slice of a chip) the driver knows the architecture and the multiprocessors.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else None
    here = jax.devices()[0] if kind is None and jax.default_backend() == "gpu" else None
    kind = here.device_kind if here is not None else kind
    known = next((gpu for gpu in gpus().values() if gpu.device_kind == kind), None)
    if known is not None or here is None:
        return known
    return _described(here.device_kind, str(here.compute_capability), int(here.core_count))


def gpu_to_plan_for() -> Gpu:
    """The GPU that is being traced for, or `DEFAULT_GPU`: for choices that are right anywhere, and good on that one."""
    return target_gpu() or gpus()[DEFAULT_GPU]


@functools.cache
def _gpu_data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(importlib.resources.files(__package__).joinpath("gpus.json").read_text())
    return data


def _architectures() -> dict[int, dict[str, Any]]:
    return {int(capability): figures for capability, figures in _gpu_data()["architectures"].items()}


def _described(kind: str, capability: str, multiprocessors: int) -> Gpu | None:
    """A GPU by what its driver says: the compute capability ("8.6"), as the newest architecture up to it."""
    major, _, minor = capability.partition(".")
    number = 10 * int(major) + int(minor or 0) if major.isdigit() else 0
    older = [known for known in _architectures() if known <= number]
    if not older:
        return None  # older than all that is known, or no NVIDIA GPU
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
    """Options with which XLA uses the full width of a CPU's vector units; none on other platforms."""
    return {"xla_cpu_prefer_vector_width": 512} if target_platform() == "cpu" else {}


def gpu_compiler_options() -> dict[str, Any]:
    """Options with which XLA runs a loop on a GPU as one CUDA graph ("command buffer"); none on other platforms.

    A step of decoding is many short kernels, and each launch takes some of their time. XLA records stretches of kernels
    into graphs by itself, Triton's included: from jax 0.10.2 to 0.12 it compiles the custom call
    `__gpu$xla.gpu.triton` into a kernel like those of its own, and the flag by which older versions were told to record
    it, --legacy_command_buffer_custom_call_targets (jax-ml/jax#27988), is gone; XLA_FLAGS with it end the process.

    But the default list of what is recorded (FUSION, CUBLAS, CUBLASLT, CUDNN, CUSTOM_CALL, CONDITIONAL and
    DYNAMIC_SLICE_FUSION, in 0.10.2, 0.11.2 and 0.12.0.1 alike) lacks WHILE: of a loop the body alone is a graph, and
    between two steps the host reads from the GPU whether there is another. This adds WHILE to the list: the loop is a
    node of the graph that decides by itself. Where a driver is too old for that (CUDA before 12.3), on AMD GPUs, and
    where something in the loop cannot be recorded, XLA leaves it out again. To record nothing at all, as when
    debugging: XLA_FLAGS=--xla_gpu_enable_command_buffer=
    """
    return known_options(xla_gpu_enable_command_buffer="WHILE") if target_platform() == "gpu" else {}


@functools.cache
def measured_bandwidth() -> float:
    """Bytes per second at which JAX's default device reads memory: the best of several passes over a large array.

    A reduction along the slow axis of a large array is the fastest read that XLA compiles, and needs no arithmetic to
    speak of. The best pass is what counts, because whatever disturbs a pass makes it slower.
    """
    x = jnp.ones((READ_BYTES[target_platform()] // (4 * ROW), ROW), jnp.float32)
    return x.nbytes / _least_seconds(lambda x: jnp.max(x, axis=0), x)


@functools.cache
def measured_matrix_rate(dtype: str = "bfloat16") -> float:
    """Floating-point operations per second with which JAX's default device multiplies large square matrices.

    The operands are normal-distributed: chips slow down where many bits change. Results are float32.

    Args:
      dtype: of the operands.
    """
    size = SQUARE[target_platform()]
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return 2 * size**3 / _least_seconds(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32), x)


def _least_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """What a pass takes, compiled ahead and warmed up; passes follow each other without a pause."""
    compiled = jax.jit(function, compiler_options=cpu_compiler_options()).lower(x).compile()
    compiled(x).block_until_ready()
    passes = DISPATCHED[target_platform()]
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([compiled(x) for _ in range(passes)])
        seconds.append((time.perf_counter() - start) / passes)
    return min(seconds)
