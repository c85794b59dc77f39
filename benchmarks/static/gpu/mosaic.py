"""Compiles Mosaic GPU kernels on a machine without a GPU.

XLA's CUDA plugin compiles the whole call; Mosaic GPU writes to a folder the PTX of its kernels, what NVIDIA's assembler
says of them, and the host's code, which has the launch. The assembler that comes with triton makes machine code of the
PTX, which may differ a little from that of the plugin's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.static.gpu import compiler, program
from palladion.benchmarks.static.gpu.sass import WARP, Code, by_loop, parse

TENSOR: Final = {90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA",)}
"""Beginnings of the instructions of tensor cores, by compute capability: Hopper's wgmma, Blackwell's tcgen05.mma."""

DUMPS: Final = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
"""Environment variables with which Mosaic GPU writes what is read here, beside MOSAIC_GPU_DUMP_TO."""

SUFFIX: Final = "_mosaic_gpu_kernel"
"""Ending that Mosaic GPU adds to the name of a kernel."""

LAUNCH: Final = re.compile(r"call void @mosaic_gpu_launch_kernel\(ptr %\d+((?:, i32 \d+){10}), ptr")
"""The launch in the host's code: blocks of the grid, of a cluster, threads, and bytes of shared memory."""


@dataclasses.dataclass(frozen=True)
class MosaicKernel:
    """A compiled kernel.

    Attributes:
      name: its name.
      grid: programs along each axis.
      num_warps: warps of a program.
      registers: registers of a thread when it starts; warpgroups may change theirs.
      spilled: bytes of registers that a thread spills to memory.
      shared: bytes of shared memory of a program.
      ptx: its PTX.
      arch: compute capability that it is compiled for.
    """

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    registers: int
    spilled: int
    shared: int
    ptx: str = dataclasses.field(repr=False)
    arch: int = 90

    @functools.cached_property
    def code(self) -> Code:
        """The machine code; triton must be installed."""
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text(self.ptx)
            compiler.run_tool("ptxas-blackwell", f"-arch=sm_{self.arch}a", source, "-o", binary)
            return parse(compiler.disassembled(binary.read_bytes()))

    def count(self, prefix: str) -> int:
        """Counts instructions: those of `TENSOR`, "UTMALDG" loads by TMA, "UTMASTG" stores."""
        return sum(one.opcode.startswith(prefix) for one in self.code.instructions)

    @property
    def tensor_instructions(self) -> int:
        """Instructions that multiply on tensor cores."""
        return sum(map(self.count, TENSOR[self.arch]))

    @property
    def longest_product_loop(self) -> int:
        """Instructions of the longest loop that multiplies on tensor cores; 0 if there is none."""
        loops = [instructions for loop, instructions in by_loop(self.code) if loop is not None]
        with_products = [loop for loop in loops if any(one.opcode.startswith(TENSOR[self.arch]) for one in loop)]
        return max(map(len, with_products), default=0)


def compile_mosaic_kernels(
    function: Callable[..., Any], *avals: Any, arch: int = 90
) -> tuple[program.CompiledProgram, list[MosaicKernel]]:
    """Compiles a function for a GPU that need not be there; for arguments see `program.compile_program`.

    A process can do that for one architecture only: jaxlib sets up its compiler of these kernels for the first one.

    Returns:
      The program, and its Mosaic GPU kernels in order.
    """
    with tempfile.TemporaryDirectory() as folder, _environment(DUMPS | {"MOSAIC_GPU_DUMP_TO": folder}):
        compiled = program.compile_program(function, *avals, arch=arch)
        sources = sorted(Path(folder).glob("*.ptx"), key=lambda source: int(source.stem.rpartition("_")[2]))
        return compiled, [
            _kernel(arch, *(source.with_suffix(kind).read_text() for kind in (".ptx", ".ptxas", ".ll")))
            for source in sources
        ]


def _kernel(arch: int, ptx: str, report: str, host: str) -> MosaicKernel:
    found = [
        re.search(pattern, text)
        for pattern, text in (
            (r"\.entry\s+(\w+)", ptx),
            (r"Used (\d+) registers", report),
            (r"(\d+) bytes spill stores", report),
            (LAUNCH, host),
        )
    ]
    if None in found:
        raise RuntimeError(f"the assembler's report, or the launch, has another form: {report!r}")
    name, registers, spilled, launch = (match[1] for match in found if match is not None)
    x, y, z, *_, threads_x, threads_y, threads_z, shared = map(int, re.findall(r"i32 (\d+)", launch))
    return MosaicKernel(
        name=name.removesuffix(SUFFIX),
        grid=(x, y, z),
        num_warps=math.prod((threads_x, threads_y, threads_z)) // WARP,
        registers=int(registers),
        spilled=int(spilled),
        shared=shared,
        ptx=ptx,
        arch=arch,
    )


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables inside a `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
