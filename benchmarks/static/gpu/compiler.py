"""Compiles Pallas-Triton kernels on a machine without a GPU, with the triton package from PyPI; nothing is executed.

XLA contains a Triton of its own, so that small differences from what runs on a chip are possible.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import jax
from jaxlib.mlir import ir

from palladion.kernels import devices
from palladion.kernels.devices import Gpu, gpus

ARCHITECTURES: Final = {80: "NVIDIA A100-SXM4-80GB", 90: "NVIDIA H200", 100: "NVIDIA B200"}
"""Compute capabilities, and for each the GPU, as JAX names it, that it is examined as."""

TRITON_CALL: Final = "__gpu$xla.gpu.triton"
"""Target name of a Pallas-Triton kernel's custom call in XLA."""

MOSAIC_CALL: Final = "mosaic_gpu_v2"
"""Target name of a Mosaic GPU kernel's custom call in XLA."""


@dataclasses.dataclass(frozen=True)
class TritonKernel:
    """A kernel as Pallas lowers it.

    Attributes:
      name: name of the `pallas_call`.
      grid: programs along each axis.
      num_warps: warps of a program.
      num_stages: stages of pipelined loops.
      operands: number of elements and element type ("i8", "bf16", …) of each argument.
      source: Triton's intermediate representation, as text.
    """

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    operands: tuple[tuple[int, str], ...]
    source: str


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A compiled kernel.

    Attributes:
      kernel: the kernel.
      registers: registers of a thread, of at most 255.
      spilled: bytes of registers that a thread spills to memory.
      shared: bytes of shared memory of a program.
      ptx: the PTX that Triton hands to NVIDIA's assembler.
      binary: what the assembler makes of it.
    """

    kernel: TritonKernel
    registers: int
    spilled: int
    shared: int
    ptx: str = dataclasses.field(repr=False)
    binary: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def code(self) -> str:
        """The machine code, as `nvdisasm -c` lists it, which takes about as long as the compilation."""
        return disassembled(self.binary)

    @functools.cached_property
    def instructions(self) -> collections.Counter[str]:
        """Number of occurrences of each opcode in the machine code."""
        return collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", self.code))

    def count(self, prefix: str) -> int:
        """Counts the instructions with a prefix: "HMMA" for tensor cores, "LDG" loads, "LDGSTS" asynchronous copies."""
        return sum(count for name, count in self.instructions.items() if name.startswith(prefix))


def installed() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def gpu_of(arch: int) -> Gpu:
    """Returns the GPU that an architecture is compiled for and examined as, which `ARCHITECTURES` names.

    Raises:
      ValueError: there is no such architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: got {arch!r}; accepted: {', '.join(map(str, ARCHITECTURES))}")
    return next(gpu for gpu in gpus().values() if gpu.device_kind == ARCHITECTURES[arch])


@contextlib.contextmanager
def tracing_for(arch: int) -> Iterator[None]:
    """Traces functions as if they ran on this GPU, so that they take the Triton kernels.

    Args:
      arch: one of `ARCHITECTURES`.

    Raises:
      ValueError: there is no such architecture.
    """
    with devices.tracing_for(gpu_of(arch).device_kind):
        yield


def lower_for_gpu(function: Callable[..., Any], *avals: Any, arch: int = 90) -> list[TritonKernel]:
    """Returns the Pallas-Triton kernels of a function.

    Args:
      function: a function of arrays, jitted (with donated arguments, say) or not.
      avals: its arguments, arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      arch: one of `ARCHITECTURES`.

    Raises:
      ValueError: there is no such architecture.
    """
    return kernels_in(stablehlo_for_gpu(function, *avals, arch=arch))


def stablehlo_for_gpu(function: Callable[..., Any], *avals: Any, arch: int = 90) -> Any:
    """Returns the StableHLO module of a function, traced for a GPU; for arguments see `lower_for_gpu`."""
    return lowered_for_gpu(function, *avals, arch=arch).compiler_ir()


def lowered_for_gpu(function: Callable[..., Any], *avals: Any, arch: int = 90) -> jax.stages.Lowered:
    """Lowers a function for a GPU; for arguments see `lower_for_gpu`."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with tracing_for(arch), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        lowered: jax.stages.Lowered = jitted.trace(*avals).lower(lowering_platforms=("cuda",))
        return lowered


def kernels_in(module: Any) -> list[TritonKernel]:
    """Returns the Pallas-Triton kernels of a module, in order."""
    return [_kernel_of(operation) for operation in operations_in(module.operation) if calls(operation, TRITON_CALL)]


def compile_for_gpu(function: Callable[..., Any], *avals: Any, arch: int = 90) -> list[CompiledKernel]:
    """Compiles the Pallas-Triton kernels of a function for a GPU; for arguments see `lower_for_gpu`."""
    return [compile_kernel(kernel, arch) for kernel in lower_for_gpu(function, *avals, arch=arch)]


def operations_in(operation: Any) -> Iterator[Any]:
    """Yields all operations inside an MLIR operation, at any depth."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from operations_in(inner.operation)


def calls(operation: Any, target: str) -> bool:
    """Returns whether an MLIR operation is a custom call of a target, `TRITON_CALL` or `MOSAIC_CALL`."""
    if operation.name != "stablehlo.custom_call":
        return False
    return bool(ir.StringAttr(operation.attributes["call_target_name"]).value == target)


def _kernel_of(operation: Any) -> TritonKernel:
    from jax._src.interpreters.mlir import make_ir_context
    from jax._src.lib import triton as dialects

    config = operation.attributes["mhlo.backend_config"]
    types = [ir.RankedTensorType(operand.type) for operand in operation.operands]
    operands = tuple((math.prod(one.shape), str(one.element_type)) for one in types)
    # A plain context lacks the GPU dialect, whose barrier it prints with properties that Triton cannot parse.
    with make_ir_context() as context:
        dialects.dialect.register_dialect(context)  # type: ignore[attr-defined]  # not exported, and all there is
        # The kernel is MLIR bytecode in an attribute.
        module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
        source = str(module.operation.get_asm(enable_debug_info=False))

        def integer(name: str) -> int:
            return int(ir.IntegerAttr(config[name]).value)

        return TritonKernel(
            name=ir.StringAttr(config["name"]).value,
            grid=(integer("grid_x"), integer("grid_y"), integer("grid_z")),
            num_warps=integer("num_warps"),
            num_stages=integer("num_stages"),
            operands=operands,
            source=source,
        )


def compile_kernel(kernel: TritonKernel, arch: int) -> CompiledKernel:
    """Compiles a kernel for a GPU of this compute capability."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as in XLA
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ttir"
        source.write_text(_with_cache_policies(kernel.source))
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        source.write_text(_simplified(source, GPUTarget("cuda", arch, 32), options))
        compiled = triton.compile(str(source), target=GPUTarget("cuda", arch, 32), options=options)
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", binary)
    resources = re.search(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump says nothing about the registers of {kernel.name}: {usage!r}")
    return CompiledKernel(
        kernel=kernel,
        registers=int(resources["registers"]),
        spilled=int(resources["stack"]) + int(resources["local"]),
        shared=int(compiled.metadata.shared),
        ptx=str(compiled.asm["ptx"]),
        binary=compiled.asm["cubin"],
    )


_EVICTION: Final = re.compile(r" evictionPolicy = (?P<policy>\w+) :")
"""The eviction policy of a load or a store, as jaxlib writes it."""


def _with_cache_policies(source: str) -> str:
    """Rewrites eviction policies, which triton writes differently from 3.9 on."""
    policy = r"#tt.cache_policy<cache_modifier = none, eviction_policy = \g<policy>>"
    return _EVICTION.sub(rf" {{cachePolicy = {policy}}} :", source)


def _simplified(source: Path, target: Any, options: dict[str, Any]) -> str:
    """Runs the passes over Triton's own representation, which XLA runs and `triton.compile` skips for a file."""
    from triton._C.libtriton import ir as triton_ir
    from triton.backends.nvidia.compiler import CUDABackend

    backend, context = CUDABackend(target), triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    module = triton_ir.parse_mlir_module(str(source), context)
    module.context = context
    return str(backend.make_ttir(module, {}, backend.parse_options(options), target.arch))


def disassembled(binary: bytes) -> str:
    """Returns the machine code in a binary, as `nvdisasm -c` lists it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return run_tool("nvdisasm", "-c", file.name)


def run_tool(name: str, *arguments: Any) -> str:
    """Returns what one of NVIDIA's tools that come with triton prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
