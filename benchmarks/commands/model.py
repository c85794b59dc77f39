r"""Times whole decode steps of a model for growing batches, beside the bytes that a step must read.

  python -m palladion.benchmarks model --model=smollm2-135m --scheme=int8 --batch=1,2,4,8,16,32,64
  python -m palladion.benchmarks model --model=llama3-8b --scheme=bfloat16 --batch=1 --prompt=1024 --json=8b.json

Weights are random, in the shapes of the model; the loop is the engine's own, with several steps to a dispatch, and
dispatches kept ahead of the device: a sample is a run of them. A step must read all weights once, and each sequence's
cache: MBU is these bytes over the time, in parts of the measured bandwidth. While a step is bound by memory, more
sequences cost little, and throughput grows at nearly the same latency. On a GPU the profiler tells in which part of a
step no kernel ran ("idle"). MFU is the prefill's arithmetic over its time, in parts of the measured matrix rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax

from palladion.benchmarks import text
from palladion.benchmarks.commands import PROGRAM, options
from palladion.benchmarks.commands.progress import report_progress, seconds_left
from palladion.benchmarks.measure import machine, model_shapes, plots, records
from palladion.benchmarks.measure.decode_steps import TINY, BatchPoint, cache_length, engines, measure_batch
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.benchmarks.plotting import require_matplotlib
from palladion.benchmarks.text import amount, duration
from palladion.kernels.backend import BACKENDS
from palladion.kernels.checks import check
from palladion.model.engine import STEPS_PER_DISPATCH, EngineOptions
from palladion.model.exit_status import INTERRUPTED
from palladion.reference.platforms import target_platform

HELP: Final = "times whole decode steps of a model for growing batches: latency, tokens/s, MBU, MFU"

NEARLY: Final = 1.25
"""Latency, in parts of that of the smallest batch, up to which it counts as nearly the same."""

HEADINGS: Final = (
    "sequences",
    "step",
    "p20 to p80",
    "idle",
    "tokens/s",
    "x one",
    "must read",
    "GB/s",
    "MBU",
    "prompt tokens/s",
    "MFU",
)


KERNEL_HEADINGS: Final = ("kernel", "time", "share", "calls")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    known = ", ".join(model_shapes.models())
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME", help=known)
    parser.add_argument("--scheme", default="int8", help="of weights: int8, int4-g32, … or a float dtype (int8)")
    parser.add_argument("--dtype", help="of activations (float32 on a CPU, else bfloat16)")
    parser.add_argument("--kv-dtype", help="of the cache (that of activations)")
    parser.add_argument("--batch", type=options.numbers, default=(1, 2, 4, 8, 16, 32, 64), metavar="N,…")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of each prompt (128)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps of a run (64)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs of each batch size (3)")
    parser.add_argument("--steps-per-dispatch", type=int, metavar="N", help=f"by platform: {STEPS_PER_DISPATCH}")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="no batch size begins later (10)")
    parser.add_argument("--backend", help="of the operations")
    parser.add_argument("--interpret", action="store_true", help="interpret kernels: only to try the command")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="keep the traces of runs in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latency and throughput")


def run(arguments: argparse.Namespace) -> int:
    """Measures the batch sizes, prints a table, and writes the files that are asked for."""
    shape = TINY if arguments.model == TINY.name else model_shapes.model(arguments.model)
    check(arguments.backend in (None, *BACKENDS), "--backend", arguments.backend, ", ".join(BACKENDS))
    if arguments.steps_per_dispatch is None:
        arguments.steps_per_dispatch = STEPS_PER_DISPATCH[target_platform()]
    dispatch = arguments.steps_per_dispatch
    for name in ("prompt", "steps", "runs", "steps_per_dispatch"):
        check(getattr(arguments, name) >= 1, f"--{name.replace('_', '-')}", getattr(arguments, name), "at least 1")
    if arguments.plot:
        require_matplotlib()
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    title = f"{shape.name}, {arguments.scheme} weights, prompts of {arguments.prompt}"
    record: dict[str, Any] = {
        "model": shape.name,
        "title": title,
        "scheme": arguments.scheme,
        "dtype": dtype,
        "kv_dtype": arguments.kv_dtype or dtype,
        "backend": arguments.backend or "auto",
        "steps_per_dispatch": dispatch,
        "provenance": machine.provenance(f"{PROGRAM} {shlex.join(arguments.command_line)}"),
        "limits": dataclasses.asdict(machine.limits()),
        "points": [],
    }
    if warning := machine.busy_warning():
        report_progress(f"warning: {warning}")
    parameters = random_parameters(shape, arguments.scheme, dtype=dtype)
    engine_options = EngineOptions(
        max_len=cache_length(arguments.prompt, arguments.steps, dispatch),
        dtype=dtype,
        kv_dtype=arguments.kv_dtype or dtype,
        backend=arguments.backend,
        interpret=True if arguments.interpret else None,
        steps_per_dispatch=dispatch,
    )
    deadline = time.perf_counter() + 60 * arguments.minutes
    status = 0
    try:
        for engine in engines(parameters, shape, engine_options, arguments.batch, arguments.prompt):
            batch = engine.batch
            if record["points"] and seconds_left(deadline) <= 0:
                report_progress(f"no time left for {batch} sequences and more")
                break
            point = measure_batch(
                engine,
                shape,
                parameters,
                arguments.prompt,
                steps=arguments.steps,
                runs=arguments.runs,
                profile_folder=None if arguments.profile is None else arguments.profile / f"batch-{batch}",
            )
            record["points"].append(dataclasses.asdict(point))
            report_progress(
                f"{batch} sequences: {duration(point.step.median)} a step, {point.tokens_per_second:,.1f} tokens/s"
            )
            if arguments.json:
                records.write_record(arguments.json, record)
    except KeyboardInterrupt:
        report_progress("interrupted: the table has what was measured")
        status = INTERRUPTED
    if record["points"]:
        _print(record, arguments.plot)
    return status


def _print(record: dict[str, Any], plot: Path | None) -> None:
    """Prints the tables of a record, and draws it if a picture is asked for."""
    headings, lines = table_of(record)
    device = machine.device_name()
    print(f"{record['title']} on {device}\n\n{text.table(headings, lines)}\n\n{conclusion(record)}")
    for point in points_of(record):
        if point.kernels:
            print(f"\nwhere a step of {point.batch} sequences spends its time:")
            print(text.table(KERNEL_HEADINGS, kernel_lines(point)))
    if plot:
        plots.scaling(scaling_points(record), device, record["title"], plot)
        print(f"wrote {plot}")


def points_of(record: dict[str, Any]) -> list[BatchPoint]:
    """Returns the batch sizes of a record."""
    return [BatchPoint.from_record(entry) for entry in record["points"]]


def scaling_points(record: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Returns the points of a record as `plots.scaling` takes them."""
    return {
        point.batch: {
            "step": point.step.median,
            "limit": point.step_bytes / point.bandwidth,
            "tokens": point.tokens_per_second,
        }
        for point in points_of(record)
    }


def table_of(record: dict[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Returns headings and lines of the table of a record that this command has written."""
    points, rate = points_of(record), record["limits"]["matrix_rate"]
    smallest = points[0].step.median if points else 1.0
    lines: list[tuple[str, ...]] = []
    for point in points:
        achieved = point.step_bytes / point.step.median
        prefill = sorted(point.prefill_seconds)[len(point.prefill_seconds) // 2]
        lines.append(
            (
                str(point.batch),
                duration(point.step.median),
                f"{duration(point.step.p20)} to {duration(point.step.p80)}{' noisy' if point.step.noisy else ''}",
                "" if point.idle_seconds is None else f"{point.idle_seconds / point.step.median:.1%}",
                f"{point.tokens_per_second:,.1f}",
                f"{point.step.median / smallest:.2f}",
                amount(point.step_bytes),
                f"{achieved / 1e9:,.3g}",
                f"{achieved / point.bandwidth:.0%}",
                f"{point.batch * point.prompt / prefill:,.0f}",
                f"{point.prefill_flops / prefill / rate:.0%}",
            )
        )
    return HEADINGS, lines


def kernel_lines(point: BatchPoint) -> list[tuple[str, ...]]:
    """Returns the lines of the table of a point's kernels, and of the time in which none ran."""
    step = point.step.median
    lines: list[tuple[str, ...]] = [
        (name[:60], duration(seconds), f"{seconds / step:.1%}", f"{calls:.3g}")
        for name, calls, seconds in point.kernels
    ]
    if point.idle_seconds is None:
        return lines
    waits = (
        f"in the trace {duration(point.launch_gap_seconds)} between launches, {duration(point.wait_seconds)} in "
        f"{point.waits:.3g} longer waits"
    )
    return [*lines, (f"no kernel ({waits})", duration(point.idle_seconds), f"{point.idle_seconds / step:.1%}", "")]


def conclusion(record: dict[str, Any]) -> str:
    """Says up to which batch size throughput grows at nearly the same latency."""
    points = points_of(record)
    if not points:
        return "nothing was measured"
    smallest = points[0]
    nearly_free = [point for point in points if point.step.median <= NEARLY * smallest.step.median]
    largest = max(nearly_free, key=lambda point: point.batch)
    best = max(points, key=lambda point: point.tokens_per_second)
    return (
        f"Up to {largest.batch} sequences a step takes no more than {NEARLY:g} times that of {smallest.batch}: "
        f"{largest.tokens_per_second / smallest.tokens_per_second:.1f} times the tokens. "
        f"Most tokens/s: {best.tokens_per_second:,.0f} with {best.batch} sequences."
    )
