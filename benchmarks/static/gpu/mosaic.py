r"""Compiles Mosaic GPU kernels on a machine without a GPU, and counts what is in their machine code.

  python -m palladion.benchmarks.static.gpu.mosaic quantized_matmul 'llama-3-8b-qkv-*-8' --arch=100

XLA's CUDA plugin compiles the whole call; Mosaic GPU writes the PTX of its kernels and what NVIDIA's assembler says of
them to a folder. The assembler that comes with triton makes machine code of the PTX, which may differ a little from
that of the plugin's own. Nothing is estimated: how often a loop runs, and what TMA reads, the listing does not say.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.static import workloads
from palladion.benchmarks.static.gpu import compiler, program
from palladion.benchmarks.static.gpu.sass import Instruction, by_loop, parse
from palladion.kernels.implementation import Unsupported

TENSOR: Final = {90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA",)}
"""Beginnings of the instructions of tensor cores, by compute capability: Hopper's wgmma, Blackwell's tcgen05.mma."""

DUMPS: Final = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
"""Environment variables with which Mosaic GPU writes what is read here, beside MOSAIC_GPU_DUMP_TO."""

HEADINGS: Final = (
    "registers",
    "spilled",
    "TMA loads",
    "prefetches",
    "TMA stores",
    "products",
    "instructions",
    "in loop",
)


@dataclasses.dataclass(frozen=True)
class MosaicKernel:
    """A compiled kernel.

    Attributes:
      name: its name.
      registers: registers of a thread when it starts; warpgroups may change theirs.
      spilled: bytes of registers that a thread spills to memory.
      ptx: its PTX.
      arch: compute capability that it is compiled for.
    """

    name: str
    registers: int
    spilled: int
    ptx: str = dataclasses.field(repr=False)
    arch: int = 90

    @functools.cached_property
    def loops(self) -> list[list[Instruction]]:
        """The instructions of each loop, and of what is in none; triton must be installed."""
        import triton

        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text(self.ptx)
            subprocess.run([tools / "ptxas-blackwell", f"-arch=sm_{self.arch}a", source, "-o", binary], check=True)
            code = subprocess.run([tools / "nvdisasm", "-c", binary], check=True, capture_output=True, text=True).stdout
        return [instructions for _, instructions in by_loop(parse(code))]

    def count(self, prefix: str) -> int:
        """Counts instructions: those of `TENSOR`, "UTMALDG" loads by TMA, "UTMASTG" stores."""
        return sum(one.opcode.startswith(prefix) for loop in self.loops for one in loop)

    @property
    def tensor_instructions(self) -> int:
        """Instructions that multiply on tensor cores."""
        return sum(map(self.count, TENSOR[self.arch]))

    @property
    def longest_product_loop(self) -> int:
        """Instructions of the longest loop that multiplies on tensor cores; 0 if there is none."""
        with_products = [
            loop for loop in self.loops[1:] if any(one.opcode.startswith(TENSOR[self.arch]) for one in loop)
        ]
        return max(map(len, with_products), default=0)


def compile_mosaic_kernels(
    function: Callable[..., Any], *avals: Any, arch: int = 90
) -> tuple[program.CompiledProgram, list[MosaicKernel]]:
    """Compiles a function for a GPU that need not be there; for arguments see `program.compile_program`.

    A process can do that for one architecture only: jaxlib sets up its compiler of these kernels for the first one.

    Returns:
      The program, and its Mosaic GPU kernels.
    """
    with tempfile.TemporaryDirectory() as folder, _environment(DUMPS | {"MOSAIC_GPU_DUMP_TO": folder}):
        compiled = program.compile_program(function, *avals, arch=arch)
        sources = sorted(Path(folder).glob("*.ptx"))
        reports = [source.with_suffix(".ptxas").read_text() for source in sources]
        kernels = [_kernel(source.read_text(), one, arch) for source, one in zip(sources, reports, strict=True)]
        return compiled, kernels


def _kernel(ptx: str, report: str, arch: int) -> MosaicKernel:
    found = [
        re.search(pattern, text)
        for pattern, text in (
            (r"\.entry\s+(\w+)", ptx),
            (r"Used (\d+) registers", report),
            (r"(\d+) bytes spill stores", report),
        )
    ]
    if None in found:
        raise RuntimeError(f"the assembler's report has another form: {report!r}")
    name, registers, spilled = (match[1] for match in found if match is not None)
    return MosaicKernel(name, int(registers), int(spilled), ptx, arch)


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


def _cells(operation: str, name: str, arch: int) -> Iterator[tuple[str, list[int]]]:
    """Yields the kernels of a case, and their counts."""
    row = workloads.row(operation, "hopper")
    if row is None:
        raise Unsupported(f"{operation} has no Mosaic GPU kernel")
    with compiler.tracing_for(arch):
        case = workloads.named_cases(operation)[name]
        problem = case.problem()
        if (reason := row.unsupported(problem)) is not None:
            raise Unsupported(f"mosaic_gpu: {reason}")
        shapes = case.shapes()
    run = functools.partial(row.run, problem, config=None, interpret=False)
    _, kernels = compile_mosaic_kernels(run, shapes, arch=arch)
    for one in kernels:
        counts = [one.count(prefix) for prefix in ("UTMALDG", "UTMAPF", "UTMASTG")]
        total = sum(map(len, one.loops))
        yield one.name, [one.registers, one.spilled, *counts, one.tensor_instructions, total, one.longest_product_loop]


def main() -> None:
    """Prints a line for each kernel of the chosen cases."""
    parser = argparse.ArgumentParser(description="Counts what is in the machine code of Mosaic GPU kernels.")
    parser.add_argument("operation")
    parser.add_argument("cases", nargs="+", help="names or patterns")
    parser.add_argument("--arch", type=int, choices=TENSOR, default=90, help="compute capability to compile for")
    arguments = parser.parse_args()
    print("".join(f"{heading:>14}" for heading in HEADINGS))
    for workload in workloads.select(arguments.cases, arguments.operation):
        try:
            for name, counts in _cells(workload.operation, workload.name, arguments.arch):
                print("".join(f"{count:14,}" for count in counts), f" {name}, {workload.name}")
        except Unsupported as error:
            print(f"{workload.name}: {error}")


if __name__ == "__main__":
    main()
