"""The table of GPU kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from palladion.benchmarks.static.examiner import Examination, architectures
from palladion.benchmarks.static.gpu.compiler import gpu_of
from palladion.benchmarks.static.gpu.prediction import BYTES_PER_CYCLE
from palladion.benchmarks.static.gpu.report import GpuReport
from palladion.benchmarks.static.table import Roof, Table, about_times, microseconds, number, percent, rounded

HEADINGS: Final = (
    ("arch", 7),
    ("backend", 11),
    ("regs", 6),
    ("spill", 7),
    ("shared KiB", 12),
    ("programs", 18),
    ("waves", 7),
    ("idle", 6),
    ("loads", 11),
    ("TMA", 8),
    ("strip B", 9),
    ("tensor", 8),
    ("step", 15),
    ("instr/B", 10),
    ("flight KiB", 12),
    ("busiest", 20),
    ("memory µs", 11),
    ("~µs", 8),
    ("~of memory", 12),
    ("~limit", 8),
)
"""Names and widths of the columns; the kernel's name and grid follow. "~" marks estimates, all others are facts."""

LEGEND: Final = """\
Facts, counted in the compiled code; nothing was measured.
  programs   that a multiprocessor keeps at a time, and what allows no more
  waves      programs of the grid over those that the GPU keeps at a time; idle: empty places in the last wave
  loads      instructions that read global memory: 128-bit loads + 128-bit asynchronous copies + all narrower ones
  TMA        instructions of the unit that copies blocks: loads + prefetches into the L2 cache + stores
  strip      contiguous bytes of a row that a program reads together, of the array that is read most; a strip of 32
             bytes takes a multiprocessor as long as one of 128
  tensor     instructions of tensor cores
  step       instructions of a warp in a trip of the innermost loop that matters, and its trips in the longest program;
             "?" for Mosaic GPU kernels, whose trips and bytes are not counted
  instr/B    instructions of a thread in that loop for each byte that it loads, and how many the memory leaves time for
  flight     bytes that a multiprocessor's programs wait for at a time; the full bandwidth needs bandwidth x latency
             (most of a µs) / multiprocessors
  busiest    the unit with most cycles of the busiest multiprocessor, and these cycles
  memory     bytes that must move, at the GPU's bandwidth
Estimates (~), fitted to kernels that were measured on an H200 (docs/gpu_model.md); "-" for GPUs and kinds of kernels
that were not measured.
  ~µs        time of the kernel
  ~of memory memory, in parts of this time
  ~limit     what takes longest: memory, its strips, the fill of a GPU whose few busy multiprocessors read no faster,
             issue of instructions, or waits of programs for loads"""


def _notes(report: GpuReport, found: Examination) -> Iterable[str]:
    """Returns remarks on a kernel."""
    del found
    notes = []
    if report.unknown is not None and report.backend == "triton":
        notes.append(f"trips are UNKNOWN: {report.unknown}")
    if not report.occupancy.programs:
        notes.append(f"does not fit: a multiprocessor of the {report.gpu.name} has too little {report.occupancy.limit}")
    if report.idle_multiprocessors:
        idle, total = report.idle_multiprocessors, report.gpu.multiprocessors
        notes.append(f"{idle} of {total} multiprocessors have nothing to do{_reach(report, total - idle)}")
    if report.wide_loads + report.wide_copies + report.tma_loads == 0 and report.narrow_loads:
        notes.append("no load is 128 bits wide")
    return [*notes, *about_times(report.times)]


def _reach(report: GpuReport, busy: int) -> str:
    """Says how fast a few multiprocessors read, where that is slower than the memory."""
    clock, bandwidth = report.gpu.clock_hertz, report.gpu.hbm_bytes_per_second
    if clock is None or bandwidth is None or busy * BYTES_PER_CYCLE * clock >= bandwidth:
        return ""
    return f"; the others read at most {busy * BYTES_PER_CYCLE * clock / bandwidth:.0%} of what the memory gives"


def _cells(report: GpuReport) -> list[str]:
    trip, most = report.trip, report.trip.most
    spent, affordable = report.instructions_per_byte, report.affordable_instructions_per_byte
    flight = report.bytes_in_flight
    return [
        f"sm_{report.gpu.compute_capability}",
        report.backend,
        f"{report.registers}",
        f"{report.spilled}",
        f"{report.shared_bytes / 1024:.1f}",
        f"{report.occupancy.programs} {report.occupancy.limit}",
        number(report.waves),
        percent(report.idle_in_last_wave),
        f"{report.wide_loads}+{report.wide_copies}+{report.narrow_loads}",
        f"{report.tma_loads}+{report.tma_prefetches}+{report.tma_stores}",
        "-" if report.strip_bytes is None else f"{report.strip_bytes:,}",
        f"{report.tensor}",
        f"{trip.instructions:,} x {'?' if most is None else f'{most:,}'}",
        "-" if spent is None else f"{spent:.1f}" if affordable is None else f"{spent:.1f}/{affordable:.1f}",
        "-" if flight is None else f"{flight / 1024:.1f}",
        _busiest(report),
        microseconds(report.memory_seconds),
        microseconds(report.seconds),
        percent(report.roofline),
        "-" if report.seconds is None else report.bound,
    ]


def _busiest(report: GpuReport) -> str:
    if report.busiest is None:
        return f"{report.trip.busiest} ?"
    return f"{report.busiest} {report.cycles[report.busiest]:,.0f}"


def _figures(report: GpuReport) -> dict[str, Any]:
    return {
        "backend": report.backend,
        "registers": report.registers,
        "spilled": report.spilled,
        "shared_bytes": report.shared_bytes,
        "programs_at_a_time": report.occupancy.programs,
        "waves": rounded(report.waves, 3),
        "tma": [report.tma_loads, report.tma_prefetches, report.tma_stores],
        "tensor": report.tensor,
        "strip_bytes": report.strip_bytes,
        "instructions_per_byte": rounded(report.instructions_per_byte, 2),
        "bytes_needed": report.bytes_needed,
        "busiest": report.busiest,
        "estimated_microseconds": _short(report.seconds),
    }


def _short(seconds: float | None) -> float | None:
    return rounded(None if seconds is None else seconds * 1e6, 3)


def _record(report: GpuReport) -> dict[str, Any]:
    derived = (
        "programs",
        "waves",
        "idle_in_last_wave",
        "idle_multiprocessors",
        "bytes_loaded",
        "bytes_in_flight",
        "instructions_per_byte",
        "affordable_instructions_per_byte",
        "busiest",
        "memory_seconds",
    )
    estimates = ("seconds", "limits", "bound", "roofline", "not_estimated")
    fields = dataclasses.asdict(report) | {"gpu": report.gpu.name}
    fields |= {name: getattr(report, name) for name in derived}
    return fields | {"estimates": {name: getattr(report, name) for name in estimates}}


def _intensity(report: GpuReport) -> float:
    return max(report.bytes_needed or 0, 1) / max(report.cycles.values(), default=1)


def _roof(chip: str) -> Roof:
    gpu = gpu_of(architectures()[chip])
    title = f"{gpu.device_kind} ({chip}): estimated from compiled code, nothing measured"
    return Roof(title, gpu.hbm_bytes_per_second or 1.0, gpu.clock_hertz or 1.0)


TABLE: Final = Table(
    headings=HEADINGS,
    legend=LEGEND,
    cells=_cells,
    notes=_notes,
    fields=_record,
    figures_of=_figures,
    about=lambda _: {},
    roof=_roof,
    bytes_per_cycle=_intensity,
)
