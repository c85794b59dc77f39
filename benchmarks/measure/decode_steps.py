"""Timing of whole decode steps of a model with random weights."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure import device_time
from palladion.benchmarks.measure.model_shapes import ModelShape
from palladion.benchmarks.measure.parallel import side_by_side
from palladion.benchmarks.measure.samples import Samples
from palladion.kernels.devices import measured_bandwidth
from palladion.kernels.integers import round_up
from palladion.model.engine import Engine, EngineOptions, plan_chunks
from palladion.model.parameters import Parameters
from palladion.model.sampling import Sampling
from palladion.reference.platforms import target_platform

MOST_KERNELS: Final = 30
"""Kernels of a trace that are kept."""

TRACED_DISPATCHES: Final = 3
"""Dispatches that are traced: the time between two of them counts."""

PREFILLS: Final = 3
"""Times that the prompts are read; the first compiles and is not timed."""

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
"""A model that is only good for trying the command."""


@dataclasses.dataclass(frozen=True)
class BatchPoint:
    """A batch size, measured.

    Attributes:
      batch: number of sequences.
      step_seconds: seconds of a decode step, one entry for each run of dispatches.
      step_bytes: bytes that a step must read, averaged over a run.
      prefill_seconds: seconds of reading the prompts, in every sample.
      prefill_flops: floating-point operations of reading all prompts.
      prompt: tokens of each prompt.
      bandwidth: measured memory bandwidth right after the steps, in bytes per second.
      compile_seconds: time spent on compiling.
      kernels: name, launches and seconds in a step of the kernels that take longest; empty if nothing was traced.
      steps: decode steps of a run.
      busy_seconds: seconds of a step in which a kernel ran, from a trace; None if the profiler shows no device.
      launch_gap_seconds: seconds of a traced step between kernels that follow each other.
      wait_seconds: seconds of a traced step in longer gaps, in which the device waits for the host.
      waits: number of these longer gaps in a step.
    """

    batch: int
    step_seconds: tuple[float, ...]
    step_bytes: int
    prefill_seconds: tuple[float, ...]
    prefill_flops: int
    prompt: int
    bandwidth: float
    compile_seconds: float
    kernels: tuple[tuple[str, float, float], ...] = ()
    steps: int = 1
    busy_seconds: float | None = None
    launch_gap_seconds: float = 0.0
    wait_seconds: float = 0.0
    waits: float = 0.0

    @classmethod
    def from_record(cls, entry: dict[str, Any]) -> BatchPoint:
        """Returns the point that `dataclasses.asdict` and JSON have made an entry of."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
        }
        if "steps" not in entry:
            fields.pop("kernels", None)  # older files have those of a dispatch
        return cls(**fields)

    @property
    def step(self) -> Samples:
        """Times of a decode step."""
        return Samples(self.step_seconds, self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all sequences together."""
        return self.batch / self.step.median

    @property
    def idle_seconds(self) -> float | None:
        """Seconds of a step in which no kernel ran: the step by wall clock, without the kernels of a trace.

        Under the profiler XLA launches kernel by kernel, not a graph of them, so the gaps of a trace are other ones.
        """
        return None if self.busy_seconds is None else max(self.step.median - self.busy_seconds, 0.0)


def cache_length(prompt: int, steps: int, steps_per_dispatch: int) -> int:
    """Returns the `max_len` that `measure_batch` needs: the prompt, a dispatch that warms up, and the longest run."""
    return (
        prompt + steps_per_dispatch + max(round_up(steps, steps_per_dispatch), TRACED_DISPATCHES * steps_per_dispatch)
    )


def engines(
    parameters: Parameters, shape: ModelShape, options: EngineOptions, batches: Sequence[int], prompt: int
) -> list[Engine]:
    """Returns an engine for each batch size. On an accelerator their programs are compiled, on all cores.

    Args:
      parameters: the model's weights.
      shape: the model's shapes.
      options: the engines' options; `cache_length` gives their max_len.
      batches: numbers of sequences.
      prompt: tokens of each prompt.
    """
    config = shape.config(options.max_len)
    made = [Engine(parameters, config, batch, Sampling(), options, stop_tokens=()) for batch in batches]
    if target_platform() != "cpu":
        chunks = sorted(set(plan_chunks(prompt)))
        for outcome in side_by_side([functools.partial(engine.compile, chunks) for engine in made]):
            if isinstance(outcome, Exception):
                raise outcome
    return made


def measure_batch(
    engine: Engine,
    shape: ModelShape,
    parameters: Parameters,
    prompt: int,
    *,
    steps: int,
    runs: int,
    profile_folder: Path | None = None,
) -> BatchPoint:
    """Times the prefill of random prompts, and runs of decode steps after it.

    Dispatches are kept ahead of the device, so that only a run of them has a time, and not a single one.

    Args:
      engine: one of `engines`.
      shape: the model's shapes.
      parameters: the model's weights.
      prompt: tokens of each prompt.
      steps: decode steps of a run, rounded up to whole dispatches.
      runs: number of runs, all from the same lengths on.
      profile_folder: keeps the trace there; None keeps none.
    """
    sampling, batch, keys = Sampling(), engine.batch, engine.keys(0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, shape.vocab_size, prompt).tolist() for _ in range(batch)]
    prefill_seconds: list[float] = []
    for number in range(PREFILLS):
        start = time.perf_counter()
        state = jax.block_until_ready(engine.prefill(prompts, keys, sampling))
        if number:
            prefill_seconds.append(time.perf_counter() - start)
        if number < PREFILLS - 1:
            engine.release(state)
    dispatch = engine.steps_per_dispatch
    # The first dispatch compiles, and warms up.
    _, state = jax.block_until_ready(engine.decode(state, dispatch, keys, sampling))
    lengths = np.asarray(state.lengths)

    def run(count: int) -> None:
        nonlocal state
        state = dataclasses.replace(state, lengths=jnp.asarray(lengths))
        for output, newest in engine.decode_ahead(state, count, keys, sampling):
            np.asarray(output.tokens)  # as a reader does
            state = newest

    steps, seconds = round_up(steps, dispatch), []
    for _ in range(runs):
        start = time.perf_counter()
        run(steps)
        seconds.append((time.perf_counter() - start) / steps)
    measured_bandwidth.cache_clear()
    caches = engine.cache_like if isinstance(engine.cache_like, tuple) else (engine.cache_like,)
    context = int(lengths[0]) + (steps + 1) / 2
    token_bytes = shape.cache_bytes_per_token(caches[0].k.dtype.name, context)
    point = BatchPoint(
        batch=batch,
        step_seconds=tuple(seconds),
        step_bytes=parameters.bytes_per_step(batch) + round(batch * context * token_bytes),
        prefill_seconds=tuple(prefill_seconds),
        prefill_flops=batch * shape.prefill_flops(prompt),
        prompt=prompt,
        bandwidth=measured_bandwidth(),
        compile_seconds=engine.compile_seconds,
        steps=steps,
    )
    if target_platform() == "cpu" and profile_folder is None:
        return point
    traced = TRACED_DISPATCHES * dispatch
    return with_trace(point, device_time.trace(lambda: run(traced), profile_folder), traced)


def with_trace(point: BatchPoint, events: Sequence[device_time.Event], steps: int) -> BatchPoint:
    """Returns the point with what a trace of that many steps tells; as it was if the trace shows no device."""
    if not events:
        return point
    kernels = device_time.total_by_kernel(events)[:MOST_KERNELS]
    point = dataclasses.replace(
        point, kernels=tuple((one.name, one.calls / steps, one.seconds / steps) for one in kernels)
    )
    if target_platform() != "gpu":
        return point  # a TPU lists a loop as one operation, gaps and all
    idle = device_time.Idle.of(events)
    return dataclasses.replace(
        point,
        busy_seconds=(idle.seconds - idle.short_gaps - idle.long_gaps) / steps,
        launch_gap_seconds=idle.short_gaps / steps,
        wait_seconds=idle.long_gaps / steps,
        waits=idle.waits / steps,
    )
