"""What a Triton kernel would take on a GPU, put together from what the compilers say of it: estimates, no measurements.

The kernel is compiled to machine code. How often its loops run follows from its PTX (`ptx.py`); what a trip of them
costs, from the machine code (`sass.py`); how many programs a multiprocessor keeps, from registers and shared memory
(`occupancy.py`). From these:

    memory    bytes that must move / bandwidth of the device memory
    compute   of the busiest multiprocessor: instructions of all its programs / what its schedulers, or the pipe that
              has most to do, take in a second
    at least  the longer of the two
    roofline  memory / at least: the share of the bandwidth that the kernel can reach at most

Both are lower bounds. What is not in them: waits of too few programs for memory and for each other, conflicts in shared
memory, bytes that are read twice and missed in the L2 cache, programs of unequal length. A kernel near 100 % here may
be slower on a chip; one that is far from it cannot be fast. What branches go around is counted as if it were executed,
and loads as if all threads did them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import ptx
from palladion.benchmarks.static.gpu.loops import Loop
from palladion.benchmarks.static.gpu.occupancy import Occupancy, occupancy
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
from palladion.benchmarks.static.kernel_calls import KernelCall, kernel_calls, limiting_resource
from palladion.benchmarks.static.opaque import Undecided
from palladion.kernels.devices import Gpu

SCHEDULERS: Final = 4
"""Of a multiprocessor: each issues an instruction of a warp in a cycle."""

LANES: Final = {
    "integer": 64,
    "multiply": 64,
    "float": 128,
    "special": 16,
}
"""Threads whose instruction a multiprocessor's pipe takes in a cycle: from sm_86 on.

Sources: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; which instruction goes to which
pipe, Nsight Compute's "Pipelines". For loads and stores see `Instruction.load_store_cycles`. What tensor cores take
follows from the GPU's peak rate, which the older HMMA does not quite reach where there are newer instructions (sm_90,
sm_100).
"""

FLOAT_LANES_80: Final = 64
"""Of sm_80's float pipe, which is half as wide."""


@dataclasses.dataclass(frozen=True)
class LoopTrip:
    """A trip of the innermost loop that matters, of one program; of the whole kernel where it has no loop.

    Attributes:
      instructions: of a warp.
      bytes_loaded: from global memory, by all warps, at most; None where the listing does not say.
      copies: whether it does so asynchronously, ahead of its use.
      awaited: bytes that a thread waits for at a time, at most, where it does not.
      use: of each unit, the cycles of a multiprocessor that the program takes of it.
      total: trips of all programs together; None where that is not known.
      most: of the program that has most.
    """

    instructions: int
    bytes_loaded: int | None
    copies: bool
    awaited: int
    use: dict[str, float]
    total: int | None
    most: int | None

    @property
    def busiest(self) -> str:
        """The unit that it takes longest of."""
        return max(self.use, key=lambda unit: self.use[unit])

    def instructions_per_byte(self, num_warps: int) -> float | None:
        """Instructions of a thread for each byte that is loaded; None where nothing is, or it is not known how much."""
        return self.instructions * num_warps * WARP / self.bytes_loaded if self.bytes_loaded else None


@dataclasses.dataclass(frozen=True)
class GpuReport:
    """What is known of a kernel on a GPU before it runs. Times are lower bounds; None where they are not known.

    Attributes:
      name: of the kernel.
      gpu: for which it was compiled.
      grid: programs along each axis.
      times: how often the function calls it, where that is known.
      num_warps: of a program.
      num_stages: into which loops are pipelined.
      registers: of a thread.
      spilled: bytes of a thread that lie in memory for want of registers.
      shared_bytes: shared memory of a program.
      occupancy: programs that a multiprocessor keeps.
      wide_loads: instructions that load 128 bits or more of global memory for each thread, into registers.
      wide_copies: the same, asynchronously into shared memory.
      narrow_loads: all other loads of global memory.
      tensor: instructions of tensor cores.
      bytes_needed: that must move between device memory and the chip.
      trip: of the loop that matters.
      cycles: of each unit, those that the busiest multiprocessor takes of it; empty where that is not known.
      unknown: why times are not known; None where they are.
    """

    name: str
    gpu: Gpu
    grid: tuple[int, ...]
    times: int | None
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared_bytes: int
    occupancy: Occupancy
    wide_loads: int
    wide_copies: int
    narrow_loads: int
    tensor: int
    bytes_needed: int | None
    trip: LoopTrip
    cycles: dict[str, float]
    unknown: str | None

    @property
    def programs(self) -> int:
        """Of the grid."""
        return math.prod(self.grid)

    @property
    def waves(self) -> float | None:
        """Programs of the grid over those that all multiprocessors keep at a time; None where not one fits."""
        slots = self.occupancy.programs * self.gpu.multiprocessors
        return self.programs / slots if slots else None

    @property
    def idle_in_last_wave(self) -> float | None:
        """The share of the places for programs that are empty in the last wave."""
        return None if self.waves is None else math.ceil(self.waves) - self.waves

    @property
    def idle_multiprocessors(self) -> int:
        """Multiprocessors without any program at all."""
        return max(self.gpu.multiprocessors - self.programs, 0)

    @property
    def bytes_loaded(self) -> int | None:
        """Bytes that the loop that matters loads in all programs, at most, from the L2 cache or beyond."""
        if self.trip.total is None or self.trip.bytes_loaded is None:
            return None
        return self.trip.total * self.trip.bytes_loaded

    @property
    def bytes_in_flight(self) -> int | None:
        """Bytes that a multiprocessor's programs wait for at a time, at most; None where they are not known.

        A pipelined loop copies as many trips ahead as it has stages, less the one that it works on; what is loaded into
        registers is on its way until the first use of it.
        """
        if self.trip.bytes_loaded is None:
            return None
        at_once = min(self.occupancy.programs, math.ceil(self.programs / self.gpu.multiprocessors))
        if self.trip.copies:
            return at_once * max(self.num_stages - 1, 1) * self.trip.bytes_loaded
        return at_once * self.trip.awaited * WARP * self.num_warps

    @property
    def instructions_per_byte(self) -> float | None:
        """Instructions of a thread for each byte that the loop that matters loads."""
        return self.trip.instructions_per_byte(self.num_warps)

    @property
    def affordable_instructions_per_byte(self) -> float | None:
        """What the schedulers issue meanwhile, at the full bandwidth of the memory."""
        if self.gpu.clock_hertz is None or self.gpu.hbm_bytes_per_second is None:
            return None
        rate = WARP * SCHEDULERS * self.gpu.multiprocessors * self.gpu.clock_hertz
        return rate / self.gpu.hbm_bytes_per_second

    @property
    def busiest(self) -> str | None:
        """The unit that takes longest."""
        return max(self.cycles, key=lambda unit: self.cycles[unit], default=None)

    @property
    def memory_seconds(self) -> float | None:
        """What moving the bytes that must move takes at the full bandwidth."""
        if self.bytes_needed is None or self.gpu.hbm_bytes_per_second is None:
            return None
        return self.bytes_needed / self.gpu.hbm_bytes_per_second

    @property
    def compute_seconds(self) -> float | None:
        """What the busiest unit of the busiest multiprocessor takes."""
        if self.busiest is None or self.gpu.clock_hertz is None:
            return None
        return self.cycles[self.busiest] / self.gpu.clock_hertz

    @property
    def seconds(self) -> float | None:
        """What the kernel takes at least."""
        if self.memory_seconds is None or self.compute_seconds is None:
            return None
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def bound(self) -> str:
        """See `limiting_resource`."""
        return limiting_resource(self.memory_seconds, self.compute_seconds)

    @property
    def roofline(self) -> float | None:
        """The share of the bandwidth at which the bytes that must move can do so at most."""
        if self.seconds is None or self.memory_seconds is None:
            return None
        return self.memory_seconds / self.seconds


def examine_for_gpu(
    function: Callable[..., Any], *arguments: Any, arch: int = 90, bytes_needed: int | None = None
) -> list[GpuReport]:
    """Compiles the Pallas-Triton kernels of a function for a GPU that need not be there, and reports on each.

    Args:
      function: of arrays; jitted or not.
      arguments: arrays or `jax.ShapeDtypeStruct`s, in any pytree. The values of integer arrays count: lengths and page
        tables decide how often loops run.
      arch: one of `gpu_compiler.ARCHITECTURES`.
      bytes_needed: that must move between device memory and the chip, in the whole function: those of its kernel with
        the largest arguments. By default, and for the other kernels, each argument and result once.

    Returns:
      A report for each kernel; none where there are no Pallas-Triton kernels.

    Raises:
      ValueError: there is no such architecture.
      Exception: whatever the compiler raises where it refuses the function.
    """
    gpu = gpu_compiler.gpu_of(arch)
    left = kernel_calls(function, arguments, gpu_compiler.tracing_for(arch))
    kernels = gpu_compiler.lower_for_gpu(function, *arguments, arch=arch)
    calls = [_take(kernel, left) for kernel in kernels]
    own = [None if call is None else call.bytes for call in calls]
    if bytes_needed is not None and kernels:
        own[max(range(len(own)), key=lambda number: own[number] or 0)] = bytes_needed
    return [
        _report(gpu_compiler.compile_kernel(kernel, arch), call, gpu, needed)
        for kernel, call, needed in zip(kernels, calls, own, strict=True)
    ]


def _take(kernel: gpu_compiler.TritonKernel, calls: list[KernelCall]) -> KernelCall | None:
    """The call that a kernel comes from: of its shapes, and of its name if there is one; taken out of `calls`."""
    sizes = [size for size, _ in kernel.operands]
    alike = [call for call in calls if [math.prod(array.shape) for array in call.operands] == sizes]
    found = next((call for call in alike if call.name == kernel.name), next(iter(alike), None))
    if found is not None:
        calls.remove(found)
    return found


def _report(
    compiled: gpu_compiler.CompiledKernel, call: KernelCall | None, gpu: Gpu, bytes_needed: int | None
) -> GpuReport:
    kernel, code = compiled.kernel, parse(compiled.code)
    trips, unknown = _trips(compiled, call, code)
    parts = by_loop(code)
    costs = [_use(instructions, gpu) for _, instructions in parts]
    cycles = (
        {}
        if trips is None
        else _busiest(kernel, gpu, [(loop, cost) for (loop, _), cost in zip(parts, costs, strict=True)], trips)
    )
    loads = [one for one in code.instructions if one.thread_bytes != 0]
    wide = [one for one in loads if (one.thread_bytes or 16) >= 16]
    return GpuReport(
        name=kernel.name,
        gpu=gpu,
        grid=kernel.grid,
        times=None if call is None else call.times,
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        registers=compiled.registers,
        spilled=compiled.spilled,
        shared_bytes=compiled.shared,
        occupancy=occupancy(
            gpu, registers=compiled.registers, shared_bytes=compiled.shared, num_warps=kernel.num_warps
        ),
        wide_loads=sum(not one.asynchronous for one in wide),
        wide_copies=sum(one.asynchronous for one in wide),
        narrow_loads=len(loads) - len(wide),
        tensor=sum(one.pipe == "tensor" for one in code.instructions),
        bytes_needed=bytes_needed,
        trip=_trip(parts, costs, trips, kernel),
        cycles=dict(cycles),
        unknown=unknown,
    )


def _busiest(
    kernel: gpu_compiler.TritonKernel,
    gpu: Gpu,
    costs: Sequence[tuple[Loop | None, dict[str, float]]],
    trips: dict[Loop, tuple[int, int]],
) -> dict[str, float]:
    """Cycles that the busiest multiprocessor takes of each unit, at least."""
    programs = math.prod(kernel.grid)
    total: dict[str, float] = collections.defaultdict(float)
    longest: dict[str, float] = collections.defaultdict(float)
    for loop, cost in costs:
        of_all, of_one = (programs, 1) if loop is None else trips[loop]
        for unit, taken in cost.items():
            total[unit] += taken * of_all * kernel.num_warps
            longest[unit] += taken * of_one * kernel.num_warps
    # Programs that are alike can be dealt out as whole ones only.
    alike = all(of_all == of_one * programs for of_all, of_one in trips.values())
    share = math.ceil(programs / gpu.multiprocessors) / programs if alike else 1 / gpu.multiprocessors
    return {unit: max(total[unit] * share, longest[unit]) for unit in total}


def _trip(
    parts: Sequence[tuple[Loop | None, Sequence[Instruction]]],
    costs: Sequence[dict[str, float]],
    trips: dict[Loop, tuple[int, int]] | None,
    kernel: gpu_compiler.TritonKernel,
) -> LoopTrip:
    """Of the loop that issues most in all; of those whose trips are not known, in a trip."""

    def issued(number: int) -> tuple[int, int]:
        loop, instructions = parts[number]
        if loop is None:
            return 0, 0
        return len(instructions) * (1 if trips is None else trips[loop][0]), len(instructions)

    chosen = max(range(len(parts)), key=issued)
    loop, instructions = parts[chosen]
    sizes = [one.thread_bytes for one in instructions]
    loaded = None if None in sizes else sum(size or 0 for size in sizes) * WARP * kernel.num_warps
    total, most = (math.prod(kernel.grid), 1) if loop is None else (None, None) if trips is None else trips[loop]
    use = {unit: taken * kernel.num_warps for unit, taken in costs[chosen].items()}
    copies = any(one.asynchronous and one.thread_bytes != 0 for one in instructions)
    return LoopTrip(len(instructions), loaded, copies, bytes_awaited(instructions), use, total, most)


def _trips(
    compiled: gpu_compiler.CompiledKernel, call: KernelCall | None, code: Code
) -> tuple[dict[Loop, tuple[int, int]] | None, str | None]:
    """Of each loop of the code, trips in all programs and in the one that has most; or why they are not known."""
    kernel = compiled.kernel
    if not code.loops:
        return {}, None
    values = [None] * len(kernel.operands) if call is None else call.values
    try:
        counted = ptx.count_trips(compiled.ptx, kernel.grid, values, kernel.num_warps)
    except Undecided as reason:
        return None, str(reason)
    loops = code.loops
    found: dict[Loop, tuple[int, int]] = {}
    if len(counted.loops) == 1 < len(loops):
        # The assembler has unrolled it, and does what is left over in a loop of its own.
        main = max(loops, key=lambda loop: len(code.inside(loop)))
        found, loops = dict.fromkeys(loops, (0, 0)), (main,)
    if [loop.depth for loop in counted.loops] != [loop.depth for loop in loops]:
        made = f"{len(counted.loops)} loops of the kernel are {len(loops)} in the machine code"
        return None, f"it is not known which loop is which: {made}"
    for number, loop in enumerate(loops):
        unrolled = _unrolled(code.inside(loop), counted.loads[number], counted.products[number])
        found[loop] = math.ceil(counted.total[number] / unrolled), math.ceil(counted.most[number] / unrolled)
    return found, None


def _unrolled(instructions: Sequence[Instruction], loads: int, products: int) -> float:
    """TripCounts of a loop as Triton wrote it in one of the machine code."""
    loaded = sum(one.thread_bytes != 0 for one in instructions)
    if loads and loaded:
        return loaded / loads
    multiplied = sum(one.pipe == "tensor" for one in instructions)
    return multiplied / products if products and multiplied else 1.0


def _use(instructions: Sequence[Instruction], gpu: Gpu) -> dict[str, float]:
    """Cycles of a multiprocessor that a warp takes of each unit."""
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
