r"""Measures whole decode steps: what a step of 1, 2, 4 … sequences takes, beside the bytes that it must read.

  python -m palladion.benchmarks model --model=smollm2-135m --scheme=int8 --batch=1,2,4,8,16,32,64
  python -m palladion.benchmarks model --model=llama3-8b --scheme=bfloat16 --batch=1 --prompt=1024 --json=8b.json

Weights are random, in the shapes of the model; the loop is the engine's own, several steps to a dispatch. A step must
read all weights once and each sequence's cache: MBU is that, over the time, in parts of the measured bandwidth. While a
step is bound by memory, more sequences cost little: throughput grows at nearly the same latency. MFU is the prompt's
arithmetic over its time, in parts of the measured matrix rate.
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
import numpy as np

from palladion.benchmarks.commands import options as workloads
from palladion.benchmarks.measure import bench, machine, plots
from palladion.benchmarks.measure import model_shapes as models
from palladion.benchmarks.measure import records as results
from palladion.benchmarks.measure.model_shapes import ModelShape
from palladion.benchmarks.measure.profile import device_times
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.benchmarks.measure.records import duration
from palladion.benchmarks.measure.timing import Samples
from palladion.kernels.backend import BACKENDS
from palladion.kernels.checks import check
from palladion.kernels.devices import measured_bandwidth
from palladion.kernels.tpu_layout import round_up
from palladion.model.engine import STEPS_PER_DISPATCH, Engine, EngineOptions
from palladion.model.parameters import Parameters
from palladion.model.sampling import Sampling

HELP: Final = "times whole decode steps of a model for growing batches: latency, tokens/s, MBU, MFU"

NEARLY: Final = 1.25
"""Times the latency of one sequence that counts as nearly the same."""

MOST_KERNELS: Final = 30
"""Of a profile that are kept."""

TINY: Final = ModelShape(
    name="tiny",
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    q_heads=4,
    kv_heads=2,
    head_dim=64,
    vocab_size=256,
    tied_embedding=True,
)
"""A model to see that all goes well, and nothing else."""

HEADINGS: Final = (
    "sequences",
    "step",
    "p20 to p80",
    "tokens/s",
    "x one",
    "must read",
    "GB/s",
    "MBU",
    "prompt tokens/s",
    "MFU",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A batch size, measured.

    Attributes:
      batch: sequences.
      step_seconds: of a decode step, every sample.
      step_bytes: that a step must read, averaged over the samples.
      prefill_seconds: of the prompts, every sample.
      prefill_flops: of all prompts.
      prompt: tokens of each.
      bandwidth: bytes per second at which memory was read just before.
      compile_seconds: spent on compiling.
      kernels: name, calls and seconds of what took longest in one dispatch, where it was profiled.
    """

    batch: int
    step_seconds: tuple[float, ...]
    step_bytes: int
    prefill_seconds: tuple[float, ...]
    prefill_flops: int
    prompt: int
    bandwidth: float
    compile_seconds: float
    kernels: tuple[tuple[str, int, float], ...] = ()

    @property
    def step(self) -> Samples:
        """What a decode step takes."""
        return Samples(self.step_seconds, STEPS_PER_DISPATCH)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences."""
        return self.batch / self.step.median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME", help=", ".join(models.models()))
    parser.add_argument("--scheme", default="int8", help="of weights: int8, int4-g32, … or a float dtype (int8)")
    parser.add_argument("--dtype", help="of activations (float32 on a CPU, else bfloat16)")
    parser.add_argument("--kv-dtype", help="of the cache (that of activations)")
    parser.add_argument("--batch", type=workloads.numbers, default=(1, 2, 4, 8, 16, 32, 64), metavar="N,…")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of each prompt (128)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps of each batch size (64)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="no batch size begins later (10)")
    parser.add_argument("--backend", help="of the operations")
    parser.add_argument("--interpret", action="store_true", help="interpret kernels: only to see that all goes well")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also say where a dispatch's time goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latency and throughput")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table as it grows, and writes what is asked for."""
    shape = TINY if arguments.model == TINY.name else models.model(arguments.model)
    check(arguments.backend in (None, *BACKENDS), "--backend", arguments.backend, ", ".join(BACKENDS))
    for name in ("prompt", "steps"):
        check(getattr(arguments, name) >= 1, f"--{name}", getattr(arguments, name), "at least 1")
    if arguments.plot:
        plots.require_matplotlib()
    on_cpu = jax.default_backend() == "cpu"
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    title = f"{shape.name}, {arguments.scheme} weights, prompts of {arguments.prompt}"
    record: dict[str, Any] = {
        "model": shape.name,
        "title": title,
        "scheme": arguments.scheme,
        "dtype": dtype,
        "kv_dtype": arguments.kv_dtype or dtype,
        "backend": arguments.backend or "auto",
        "provenance": machine.provenance(f"python -m palladion.benchmarks {shlex.join(arguments.command_line)}"),
        "limits": dataclasses.asdict(bench.limits()),
        "points": [],
    }
    if warning := machine.warn_if_busy():
        bench.progress(f"warning: {warning}")
    # One after the other would hold all caches at a time.
    parameters = random_parameters(shape, arguments.scheme, dtype=dtype)
    options = EngineOptions(
        max_len=arguments.prompt + round_up(arguments.steps, STEPS_PER_DISPATCH) + 2 * STEPS_PER_DISPATCH,
        dtype=dtype,
        kv_dtype=arguments.kv_dtype or dtype,
        backend=arguments.backend,
        interpret=True if arguments.interpret else None,
    )
    deadline = time.perf_counter() + 60 * arguments.minutes
    for batch in arguments.batch:
        if record["points"] and bench.seconds_left(deadline) <= 0:
            bench.progress(f"no time left for {batch} sequences and more")
            break
        folder = None if arguments.profile is None else arguments.profile / f"batch-{batch}"
        point = measure_point(parameters, shape, options, batch, arguments.prompt, arguments.steps, folder)
        record["points"].append(dataclasses.asdict(point))
        bench.progress(
            f"{batch} sequences: {duration(point.step.median)} a step, {point.tokens_per_second:,.1f} tokens/s"
        )
        if arguments.json:
            results.write_record(arguments.json, record)
    headings, lines = table_of(record)
    print(f"{title} on {machine.device_name()}\n\n{results.table(headings, lines)}\n\n{conclusion(record)}")
    for point in _points(record):
        if point.kernels:
            print(f"\nwhere a dispatch of {STEPS_PER_DISPATCH} steps of {point.batch} spends its time:")
            print(results.table(("kernel", "time", "share", "calls"), _kernel_lines(point)))
    if arguments.plot:
        plots.scaling(points(record), machine.device_name(), title, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


def measure_point(
    parameters: Parameters,
    shape: ModelShape,
    options: EngineOptions,
    batch: int,
    prompt: int,
    steps: int,
    profile_folder: Path | None = None,
) -> Point:
    """Reads prompts, twice by the clock, and decodes.

    Args:
      parameters: of the model.
      shape: of the model.
      options: of the engine; its max_len holds the prompt, the steps and two dispatches more.
      batch: sequences.
      prompt: tokens of each.
      steps: decode steps that are timed, in whole dispatches.
      profile_folder: where the trace of one more dispatch is kept; None makes none.
    """
    sampling = Sampling()
    engine = Engine(parameters, shape.config(options.max_len), batch, sampling, options, stop_tokens=())
    keys = engine.keys(0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, shape.vocab_size, prompt).tolist() for _ in range(batch)]
    prefill_seconds: list[float] = []
    for number in range(3):
        start = time.perf_counter()
        state = jax.block_until_ready(engine.prefill(prompts, keys, sampling))
        if number:
            prefill_seconds.append(time.perf_counter() - start)
        if number < 2:
            engine.release(state)
    # The first dispatch compiles, and warms up.
    _, state = jax.block_until_ready(engine.decode(state, STEPS_PER_DISPATCH, keys, sampling))
    seconds, contexts = [], []
    measured_bandwidth.cache_clear()
    context = int(state.lengths[0]) + (STEPS_PER_DISPATCH + 1) / 2
    start = time.perf_counter()
    for tokens, newest in engine.decode_ahead(state, round_up(steps, STEPS_PER_DISPATCH), keys, sampling):
        jax.block_until_ready(tokens)
        arrived = time.perf_counter()
        seconds.append((arrived - start) / STEPS_PER_DISPATCH)
        contexts.append(context)
        state, start, context = newest, arrived, context + STEPS_PER_DISPATCH
    bandwidth = measured_bandwidth()
    kernels: tuple[tuple[str, int, float], ...] = ()
    if profile_folder is not None:
        times = device_times(
            lambda: jax.block_until_ready(engine.decode(state, STEPS_PER_DISPATCH, keys, sampling)), profile_folder
        )
        kernels = tuple((one.name, one.calls, one.seconds) for one in times[:MOST_KERNELS])
    caches = engine.cache_like if isinstance(engine.cache_like, tuple) else (engine.cache_like,)
    per_token = sum(cache.bytes_per_token for cache in caches)
    return Point(
        batch=batch,
        step_seconds=tuple(seconds),
        step_bytes=parameters.bytes_per_step(batch) + round(batch * float(np.mean(contexts)) * per_token),
        prefill_seconds=tuple(prefill_seconds),
        prefill_flops=batch * shape.prefill_flops(prompt),
        prompt=prompt,
        bandwidth=bandwidth,
        compile_seconds=engine.compile_seconds,
        kernels=kernels,
    )


def _points(record: dict[str, Any]) -> list[Point]:
    given: list[dict[str, Any]] = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()} for entry in record["points"]
    ]
    return [Point(**entry) for entry in given]


def points(record: dict[str, Any]) -> dict[int, dict[str, float]]:
    """What `plots.scaling` draws."""
    return {
        point.batch: {
            "step": point.step.median,
            "limit": point.step_bytes / point.bandwidth,
            "tokens": point.tokens_per_second,
        }
        for point in _points(record)
    }


def table_of(record: dict[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Headings and lines of the table."""
    measured, rate = _points(record), record["limits"]["matrix_rate"]
    one = measured[0].step.median if measured else 1.0
    lines: list[tuple[str, ...]] = []
    for point in measured:
        achieved = point.step_bytes / point.step.median
        prefill = sorted(point.prefill_seconds)[len(point.prefill_seconds) // 2]
        lines.append(
            (
                str(point.batch),
                duration(point.step.median),
                f"{duration(point.step.p20)} to {duration(point.step.p80)}{' noisy' if point.step.noisy else ''}",
                f"{point.tokens_per_second:,.1f}",
                f"{point.step.median / one:.2f}",
                results.amount(point.step_bytes),
                f"{achieved / 1e9:,.3g}",
                f"{achieved / point.bandwidth:.0%}",
                f"{point.batch * point.prompt / prefill:,.0f}",
                f"{point.prefill_flops / prefill / rate:.0%}",
            )
        )
    return HEADINGS, lines


def _kernel_lines(point: Point) -> list[tuple[str, ...]]:
    whole = sum(seconds for _, _, seconds in point.kernels)
    return [
        (name[:60], duration(seconds), f"{seconds / whole:.0%}", str(calls)) for name, calls, seconds in point.kernels
    ]


def conclusion(record: dict[str, Any]) -> str:
    """Until which batch size throughput comes at nearly the same latency."""
    measured = _points(record)
    if not measured:
        return "nothing was measured"
    one = measured[0]
    free = [point for point in measured if point.step.median <= NEARLY * one.step.median]
    most = max(free, key=lambda point: point.batch)
    best = max(measured, key=lambda point: point.tokens_per_second)
    return (
        f"Up to {most.batch} sequences a step takes no more than {NEARLY:g} times that of {one.batch}: "
        f"{most.tokens_per_second / one.tokens_per_second:.1f} times the tokens. "
        f"Most tokens/s: {best.tokens_per_second:,.0f} with {best.batch} sequences."
    )
