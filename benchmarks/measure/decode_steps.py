"""Timing of whole decode steps of a model with random weights."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from palladion.benchmarks.measure import device_time
from palladion.benchmarks.measure.model_shapes import ModelShape
from palladion.benchmarks.measure.samples import Samples
from palladion.kernels.devices import measured_bandwidth
from palladion.kernels.integers import round_up
from palladion.model.engine import STEPS_PER_DISPATCH, Engine, EngineOptions
from palladion.model.parameters import Parameters
from palladion.model.sampling import Sampling

MOST_KERNELS: Final = 30
"""Kernels of a profile that are kept."""

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
      step_seconds: seconds of a decode step, in every sample.
      step_bytes: bytes that a step must read, averaged over the samples.
      prefill_seconds: seconds of reading the prompts, in every sample.
      prefill_flops: floating-point operations of reading all prompts.
      prompt: tokens of each prompt.
      bandwidth: measured memory bandwidth right after the steps, in bytes per second.
      compile_seconds: time spent on compiling.
      kernels: name, calls and seconds of the kernels that took longest in a dispatch; empty if it was not profiled.
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

    @classmethod
    def from_record(cls, entry: dict[str, Any]) -> BatchPoint:
        """Returns the point that `dataclasses.asdict` and JSON have made an entry of."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
        }
        return cls(**fields)

    @property
    def step(self) -> Samples:
        """Times of a decode step."""
        return Samples(self.step_seconds, STEPS_PER_DISPATCH)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all sequences together."""
        return self.batch / self.step.median


def cache_length(prompt: int, steps: int) -> int:
    """Returns the `max_len` that `measure_batch` needs: the prompt, the steps and two dispatches more."""
    return prompt + round_up(steps, STEPS_PER_DISPATCH) + 2 * STEPS_PER_DISPATCH


def measure_batch(
    parameters: Parameters,
    shape: ModelShape,
    options: EngineOptions,
    batch: int,
    prompt: int,
    steps: int,
    profile_folder: Path | None = None,
) -> BatchPoint:
    """Times the prefill of random prompts, and decode steps after it.

    Args:
      parameters: the model's weights.
      shape: the model's shapes.
      options: the engine's options; `cache_length` gives its max_len.
      batch: number of sequences.
      prompt: tokens of each prompt.
      steps: decode steps to time, rounded up to whole dispatches.
      profile_folder: keeps the trace of one more dispatch there; None makes none.
    """
    sampling = Sampling()
    engine = Engine(parameters, shape.config(options.max_len), batch, sampling, options, stop_tokens=())
    keys = engine.keys(0)
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
        events = device_time.trace(
            lambda: jax.block_until_ready(engine.decode(state, STEPS_PER_DISPATCH, keys, sampling)), profile_folder
        )
        times = device_time.total_by_kernel(events)
        kernels = tuple((one.name, int(one.calls), one.seconds) for one in times[:MOST_KERNELS])
    caches = engine.cache_like if isinstance(engine.cache_like, tuple) else (engine.cache_like,)
    token_bytes = sum(cache.bytes_per_token for cache in caches)
    return BatchPoint(
        batch=batch,
        step_seconds=tuple(seconds),
        step_bytes=parameters.bytes_per_step(batch) + round(batch * float(np.mean(contexts)) * token_bytes),
        prefill_seconds=tuple(prefill_seconds),
        prefill_flops=batch * shape.prefill_flops(prompt),
        prompt=prompt,
        bandwidth=bandwidth,
        compile_seconds=engine.compile_seconds,
        kernels=kernels,
    )
