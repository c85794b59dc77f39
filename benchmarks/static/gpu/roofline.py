"""Examines kernels for a GPU that need not be there: facts of the compiled code, and estimates of times.

The kernel is compiled to machine code. Facts: registers, shared memory, and the programs that they leave room for
(`occupancy.py`); instructions, widths of loads and bytes in flight (`sass.py`); how often loops run, from the PTX
(`trip_counts.py`); which bytes a program reads together (`strips.py`). Instructions that branches skip count as if they
were executed, and loads as if all threads took part.

From these facts follows the kernel's work (`work.py`), and from this an estimate of its time (`prediction.py`), for
GPUs on which such kernels were measured.

All this is true of Triton kernels. In Mosaic GPU kernels TMA reads, of which the machine code does not say how much,
and how often their loops run is not evaluated: there are facts of the compiled code alone.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from palladion.benchmarks.static.gpu import compiler, mosaic
from palladion.benchmarks.static.gpu.loops import Loop
from palladion.benchmarks.static.gpu.occupancy import occupancy
from palladion.benchmarks.static.gpu.report import SCHEDULERS, GpuReport, LoopTrip
from palladion.benchmarks.static.gpu.sass import (
    ISSUE,
    LOAD_STORE,
    WARP,
    Code,
    Instruction,
    by_loop,
    bytes_awaited,
    parse,
)
from palladion.benchmarks.static.gpu.strips import Reads, reads_of
from palladion.benchmarks.static.gpu.trip_counts import TripCounts, count_trips
from palladion.benchmarks.static.gpu.work import Trips, work_of
from palladion.benchmarks.static.kernel_calls import KernelCall, kernel_calls
from palladion.benchmarks.static.opaque import Undecided
from palladion.kernels.devices import Gpu
from palladion.kernels.implementation import Unsupported

LANES: Final = {
    "integer": 64,
    "multiply": 64,
    "float": 128,
    "special": 16,
}
"""Threads whose instruction a multiprocessor's pipe takes in a cycle, from sm_86 on.

Sources: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; for the pipe of each instruction,
Nsight Compute's "Pipelines". For loads and stores see `Instruction.load_store_cycles`. The rate of tensor cores follows
from the GPU's peak rate, which the older HMMA does not quite reach where there are newer instructions (sm_90, sm_100).
"""

FLOAT_LANES_80: Final = 64
"""Lanes of sm_80's float pipe, which is half as wide."""


def examine_for_gpu(
    function: Callable[..., Any], *arguments: Any, arch: int = 90, bytes_needed: int | None = None
) -> list[GpuReport]:
    """Compiles the Pallas kernels of a function for a GPU that need not be there, and examines each.

    Args:
      function: a function of arrays, jitted or not.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree. Integer arrays should have values: lengths and page
        tables decide how often loops run.
      arch: one of `compiler.ARCHITECTURES`.
      bytes_needed: bytes that must move between device memory and the chip, for the kernel with the largest arguments.
        By default, and for other kernels, every argument and result moves once.

    Returns:
      A report for each kernel, first those in Triton, then those in Mosaic GPU.

    Raises:
      ValueError: there is no such architecture.
      Unsupported: there are Mosaic GPU kernels, and the architecture is not theirs.
      Exception: whatever the compiler raises if it refuses the function.
    """
    gpu = compiler.gpu_of(arch)
    left = kernel_calls(function, arguments, compiler.tracing_for(arch))
    lowered = compiler.stablehlo_for_gpu(function, *arguments, arch=arch)
    triton, in_mosaic = compiler.kernels_in(lowered), _mosaic_kernels(lowered, function, arguments, arch)
    calls = [*(_take(kernel, left) for kernel in triton), *(_take_by_name(kernel, left) for kernel in in_mosaic)]
    own = [None if call is None else call.bytes for call in calls]
    if bytes_needed is not None and own:
        own[max(range(len(own)), key=lambda number: own[number] or 0)] = bytes_needed
    found = list(zip(calls, own, strict=True))
    return [
        *(
            _report(compiler.compile_kernel(kernel, arch), call, gpu, needed)
            for kernel, (call, needed) in zip(triton, found[: len(triton)], strict=True)
        ),
        *(
            _mosaic_report(kernel, call, gpu, needed)
            for kernel, (call, needed) in zip(in_mosaic, found[len(triton) :], strict=True)
        ),
    ]


def _mosaic_kernels(
    lowered: Any, function: Callable[..., Any], arguments: Sequence[Any], arch: int
) -> list[mosaic.MosaicKernel]:
    """Returns the Mosaic GPU kernels of a function that was lowered; XLA compiles it only where there are any."""
    if not any(compiler.calls(one, compiler.MOSAIC_CALL) for one in compiler.operations_in(lowered.operation)):
        return []
    if arch not in mosaic.TENSOR:
        raise Unsupported(
            f"mosaic_gpu: kernels are examined for sm_{', sm_'.join(map(str, mosaic.TENSOR))}; got sm_{arch}"
        )
    return mosaic.compile_mosaic_kernels(function, *arguments, arch=arch)[1]


def _take(kernel: compiler.TritonKernel, calls: list[KernelCall]) -> KernelCall | None:
    """Removes and returns the call that a kernel comes from: same shapes, and same name if there is one."""
    sizes = [size for size, _ in kernel.operands]
    alike = [call for call in calls if [math.prod(array.shape) for array in call.operands] == sizes]
    found = next((call for call in alike if call.name == kernel.name), next(iter(alike), None))
    if found is not None:
        calls.remove(found)
    return found


def _take_by_name(kernel: mosaic.MosaicKernel, calls: list[KernelCall]) -> KernelCall | None:
    """Removes and returns the call that a Mosaic GPU kernel comes from."""
    found = next((call for call in calls if call.name == kernel.name), None)
    if found is not None:
        calls.remove(found)
    return found


def _report(
    compiled: compiler.CompiledKernel, call: KernelCall | None, gpu: Gpu, bytes_needed: int | None
) -> GpuReport:
    kernel, code = compiled.kernel, parse(compiled.code)
    trips, reads, unknown = _evaluated(compiled, call, code)
    parts = by_loop(code)
    costs = [_use(instructions, gpu) for _, instructions in parts]
    cycles = _busiest(kernel, gpu, [(loop, cost) for (loop, _), cost in zip(parts, costs, strict=True)], trips)
    places = occupancy(gpu, registers=compiled.registers, shared_bytes=compiled.shared, num_warps=kernel.num_warps)
    return GpuReport(
        name=kernel.name,
        backend="triton",
        gpu=gpu,
        grid=kernel.grid,
        times=None if call is None else call.times,
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        registers=compiled.registers,
        spilled=compiled.spilled,
        shared_bytes=compiled.shared,
        occupancy=places,
        **_counted(code),
        strip_bytes=reads.arrays[0].strip_bytes if reads.arrays else None,
        bytes_needed=bytes_needed,
        trip=_trip(parts, costs, trips, math.prod(kernel.grid), kernel.num_warps),
        cycles=cycles,
        work=work_of(
            kernel,
            multiprocessors=gpu.multiprocessors,
            resident=places.programs,
            reads=reads,
            parts=parts,
            trips=trips,
            cycles=cycles,
        ),
        unknown=unknown,
    )


def _mosaic_report(
    kernel: mosaic.MosaicKernel, call: KernelCall | None, gpu: Gpu, bytes_needed: int | None
) -> GpuReport:
    parts = by_loop(kernel.code)
    costs = [_use(instructions, gpu) for _, instructions in parts]
    return GpuReport(
        name=kernel.name,
        backend="mosaic_gpu",
        gpu=gpu,
        grid=kernel.grid,
        times=None if call is None else call.times,
        num_warps=kernel.num_warps,
        num_stages=None,
        registers=kernel.registers,
        spilled=kernel.spilled,
        shared_bytes=kernel.shared,
        occupancy=occupancy(gpu, registers=kernel.registers, shared_bytes=kernel.shared, num_warps=kernel.num_warps),
        **_counted(kernel.code),
        strip_bytes=None,
        bytes_needed=bytes_needed,
        trip=_trip(parts, costs, None, math.prod(kernel.grid), kernel.num_warps),
        cycles={},
        work=None,
        unknown="trips of loops in Mosaic GPU kernels are not evaluated",
    )


def _counted(code: Code) -> dict[str, int]:
    """Returns the fields of a report that count instructions."""
    by_threads = [one for one in code.instructions if one.thread_bytes]
    wide = [one for one in by_threads if (one.thread_bytes or 0) >= 16]
    by_tma = collections.Counter(one.tma for one in code.instructions if not one.never)
    return {
        "wide_loads": sum(not one.asynchronous for one in wide),
        "wide_copies": sum(one.asynchronous for one in wide),
        "narrow_loads": len(by_threads) - len(wide),
        "tma_loads": by_tma["load"],
        "tma_prefetches": by_tma["prefetch"],
        "tma_stores": by_tma["store"],
        "tensor": sum(one.pipe == "tensor" for one in code.instructions),
    }


def _evaluated(
    compiled: compiler.CompiledKernel, call: KernelCall | None, code: Code
) -> tuple[Trips | None, Reads, str | None]:
    """Returns how often loops run, what programs read, and why the former is not known if it is not."""
    kernel = compiled.kernel
    values = [None] * len(kernel.operands) if call is None else call.values
    arguments = compiled.ptx, kernel.grid, values, kernel.num_warps
    reads = Reads()
    try:
        counted = count_trips(*arguments)
        reads = reads_of(*arguments, counted)
        return _trips(counted, code), reads, None
    except Undecided as reason:
        return (None, reads, str(reason)) if code.loops else ({}, reads, None)


def _busiest(
    kernel: compiler.TritonKernel,
    gpu: Gpu,
    costs: Sequence[tuple[Loop | None, dict[str, float]]],
    trips: Trips | None,
) -> dict[str, float]:
    """Returns the cycles of each unit on the busiest multiprocessor; none if they are not known."""
    if trips is None:
        return {}
    programs = math.prod(kernel.grid)
    total: dict[str, float] = collections.defaultdict(float)
    longest: dict[str, float] = collections.defaultdict(float)
    for loop, cost in costs:
        of_all, of_one = (programs, 1) if loop is None else trips[loop]
        for unit, taken in cost.items():
            total[unit] += taken * of_all * kernel.num_warps
            longest[unit] += taken * of_one * kernel.num_warps
    # If all programs are alike, the busiest multiprocessor runs a whole number of them.
    alike = all(of_all == of_one * programs for of_all, of_one in trips.values())
    share = math.ceil(programs / gpu.multiprocessors) / programs if alike else 1 / gpu.multiprocessors
    return {unit: max(total[unit] * share, longest[unit]) for unit in total}


def _trip(
    parts: Sequence[tuple[Loop | None, Sequence[Instruction]]],
    costs: Sequence[dict[str, float]],
    trips: Trips | None,
    programs: int,
    num_warps: int,
) -> LoopTrip:
    """Returns a trip of the loop that issues most instructions in all its trips.

    If their number is not known, it is the longest loop that multiplies on tensor cores, or the longest of all.
    """

    def issued(number: int) -> tuple[int, int]:
        loop, instructions = parts[number]
        if loop is None:
            return 0, 0
        if trips is None:
            return 1 + any(one.pipe == "tensor" for one in instructions), len(instructions)
        return len(instructions) * trips[loop][0], len(instructions)

    chosen = max(range(len(parts)), key=issued)
    loop, instructions = parts[chosen]
    sizes = [one.thread_bytes for one in instructions]
    loaded = None if None in sizes else sum(size or 0 for size in sizes) * WARP * num_warps
    total, most = (programs, 1) if loop is None else (None, None) if trips is None else trips[loop]
    use = {unit: taken * num_warps for unit, taken in costs[chosen].items()}
    copies = any(one.asynchronous and one.thread_bytes != 0 for one in instructions)
    return LoopTrip(len(instructions), loaded, copies, bytes_awaited(instructions), use, total, most)


def _trips(counted: TripCounts, code: Code) -> Trips:
    """Returns for each loop of the machine code its trips in all programs and in the one that has most.

    Raises:
      Undecided: it is not known which loop is which.
    """
    loops = code.loops
    found: dict[Loop, tuple[int, int]] = {}
    if len(counted.loops) == 1 < len(loops):
        # The assembler has unrolled the loop, and runs the remaining trips in a loop of its own.
        main = max(loops, key=lambda loop: len(code.inside(loop)))
        found, loops = dict.fromkeys(loops, (0, 0)), (main,)
    if loops and [loop.depth for loop in counted.loops] != [loop.depth for loop in loops]:
        made = f"{len(counted.loops)} loops of the kernel are {len(loops)} in the machine code"
        raise Undecided(f"it is not known which loop is which: {made}")
    for number, loop in enumerate(loops):
        unrolled = _unrolled(code.inside(loop), counted.loads[number], counted.products[number])
        found[loop] = math.ceil(counted.total[number] / unrolled), math.ceil(counted.most[number] / unrolled)
    return found


def _unrolled(instructions: Sequence[Instruction], loads: int, products: int) -> float:
    """Returns how many trips of Triton's loop a trip in the machine code makes."""
    loaded = sum(one.thread_bytes != 0 for one in instructions)
    if loads and loaded:
        return loaded / loads
    multiplied = sum(one.pipe == "tensor" for one in instructions)
    return multiplied / products if products and multiplied else 1.0


def _use(instructions: Sequence[Instruction], gpu: Gpu) -> dict[str, float]:
    """Returns the cycles of each of a multiprocessor's units that a warp takes."""
    use: dict[str, float] = {ISSUE: len(instructions) / SCHEDULERS}
    rate = None
    if gpu.bf16_flops_per_second is not None and gpu.clock_hertz is not None:
        rate = gpu.bf16_flops_per_second / gpu.multiprocessors / gpu.clock_hertz
    for one in instructions:
        if one.pipe == "tensor" and rate is not None:
            use["tensor"] = use.get("tensor", 0.0) + one.tensor_flops / rate
        elif one.pipe == LOAD_STORE:
            use[LOAD_STORE] = use.get(LOAD_STORE, 0.0) + one.load_store_cycles
        elif one.pipe in LANES:
            lanes = FLOAT_LANES_80 if one.pipe == "float" and gpu.compute_capability == 80 else LANES[one.pipe]
            use[one.pipe] = use.get(one.pipe, 0.0) + WARP / lanes
    return use
