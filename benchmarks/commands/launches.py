r"""Lists what a decode step launches on a GPU that need not be there: XLA compiles the whole loop for it.

  python -m palladion.benchmarks launches --model=llama3-8b --scheme=int8
  python -m palladion.benchmarks launches --model=llama3-8b --scheme=bfloat16 --batch=16 --archs=sm_80,sm_90

A step is hundreds of launches, one after the other, and each of them takes its time before a byte is read. So their
number bounds what a step can reach. Nothing is run: the bound is calculated, of the bytes that a step must read at the
bandwidth of the datasheet, and of launches at 1.3 µs, what they take in a CUDA graph on an H100 (Hazy Research, "Look
Ma, No Bubbles!", 2025). What kernels take to start and to end comes on top.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Final

import jax

from palladion.benchmarks.commands import options as workloads
from palladion.benchmarks.measure import model_shapes as models
from palladion.benchmarks.measure import records as results
from palladion.benchmarks.measure.model_shapes import ModelShape
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.benchmarks.measure.records import amount, duration
from palladion.benchmarks.static.examiner import architectures
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.kernels.backend import BACKENDS
from palladion.kernels.checks import check
from palladion.model.engine import Engine, EngineOptions
from palladion.model.sampling import Sampling

HELP: Final = "lists what a decode step launches on a GPU, by XLA's own compiler; needs no GPU"

LAUNCH_SECONDS: Final = 1.3e-6
"""Of one launch after another in a CUDA graph."""

NUMBER: Final = re.compile(r"(?<=fusion)_\d+$|__\d+$")
"""By which XLA tells kernels of the same name apart."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step as it is compiled for a GPU.

    Attributes:
      launches: of a step, in their order.
      step_bytes: that it must read.
      bandwidth: of the GPU, bytes per second.
      temporary_bytes: of memory beside weights and cache.
    """

    launches: tuple[gpu_program.Launch, ...]
    step_bytes: int
    bandwidth: float
    temporary_bytes: int

    @property
    def bound(self) -> float:
        """The share of the bandwidth that it reaches at most, with so many launches."""
        reads = self.step_bytes / self.bandwidth
        return reads / (reads + LAUNCH_SECONDS * len(self.launches))


def step_of(
    shape: ModelShape,
    *,
    scheme: str,
    batch: int,
    context: int,
    arch: int,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    backend: str | None = "pallas",
) -> Step:
    """Compiles the decode loop of a model for a GPU.

    Args:
      shape: of the model.
      scheme: of weights, as `quantize` takes it, or a float dtype.
      batch: sequences.
      context: tokens of each, as many as the cache holds.
      arch: one of `gpu_compiler.ARCHITECTURES`.
      dtype: of activations.
      kv_dtype: of the cache; None means that of activations.
      backend: of the operations.
    """
    kv_dtype = kv_dtype or dtype
    options = EngineOptions(max_len=context, dtype=dtype, kv_dtype=kv_dtype, backend=backend)
    with gpu_compiler.tracing_for(arch):
        parameters = jax.eval_shape(lambda: random_parameters(shape, scheme, dtype=dtype, max_positions=context))
        engine = Engine(parameters, shape.config(context), batch, Sampling(), options, stop_tokens=())
        loop, arguments = engine.decode_loop()
    program = gpu_program.compile_program(loop, *arguments, arch=arch)
    cache_bytes = batch * context * shape.cache_bytes_per_token(kv_dtype, context)
    return Step(
        launches=tuple(launch for launch in program.launches if launch.loops),
        step_bytes=shape.step_weight_bytes(scheme, batch) + round(cache_bytes),
        bandwidth=gpu_compiler.gpu_of(arch).hbm_bytes_per_second or 0.0,
        temporary_bytes=program.temporary_bytes,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    accepted = ", ".join(architectures())
    parser.add_argument("--model", default="llama3-8b", metavar="NAME", help=", ".join(models.models()))
    parser.add_argument("--scheme", default="int8", help="of weights: int8, int4-g32, … or a float dtype (int8)")
    parser.add_argument("--dtype", default="bfloat16", help="of activations (bfloat16)")
    parser.add_argument("--kv-dtype", help="of the cache (that of activations)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of each (8192)")
    parser.add_argument("--archs", type=workloads.names, default=("sm_90",), metavar="NAMES", help=accepted)
    parser.add_argument("--backend", default="pallas", help="of the operations (pallas)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every launch to this file")


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of launches for each architecture."""
    shape = models.model(arguments.model)
    known = architectures()
    for name in arguments.archs:
        check(name in known, "--archs", name, ", ".join(known))
    for name in ("batch", "context"):
        check(getattr(arguments, name) >= 1, f"--{name}", getattr(arguments, name), "at least 1")
    check(arguments.backend in BACKENDS, "--backend", arguments.backend, ", ".join(BACKENDS))
    if not gpu_program.installed():
        raise ImportError("jax-cuda12-plugin is not installed, XLA's compiler for GPUs: pip install jax-cuda12-plugin")
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a GPU, even where there is one
    records: list[dict[str, Any]] = []
    for name in arguments.archs:
        step = step_of(
            shape,
            scheme=arguments.scheme,
            batch=arguments.batch,
            context=arguments.context,
            arch=known[name],
            dtype=arguments.dtype,
            kv_dtype=arguments.kv_dtype,
            backend=arguments.backend,
        )
        records.append({"arch": name, "jax": jax.__version__, "bound": step.bound, **dataclasses.asdict(step)})
        device = gpu_compiler.ARCHITECTURES[known[name]]
        sequences = f"{arguments.batch} x {arguments.context:,} tokens"
        print(f"{shape.name}, {arguments.scheme} weights, {sequences}, {device} ({name}), jax {jax.__version__}\n")
        print(results.table(("launch", "times", "grid", "threads", "shared memory"), _lines(step)))
        print(f"\n{conclusion(step, shape.num_layers)}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def conclusion(step: Step, num_layers: int) -> str:
    """What the launches of a step come to."""
    count = len(step.launches)
    return (
        f"{count} launches a step, {count / num_layers:.1f} for each of {num_layers} layers; "
        f"{amount(step.temporary_bytes)} beside weights and cache.\n"
        f"{amount(step.step_bytes)} take {duration(step.step_bytes / step.bandwidth)} at "
        f"{step.bandwidth / 1e12:g} TB/s, launches {duration(LAUNCH_SECONDS * count)}: "
        f"{step.bound:.0%} of the bandwidth at most."
    )


def _lines(step: Step) -> list[tuple[str, ...]]:
    def axes(given: tuple[int, ...] | None) -> str:
        return "" if given is None else " x ".join(str(size) for size in given if size > 1) or "1"

    counted = collections.Counter(
        (
            NUMBER.sub("", launch.name),
            axes(launch.grid),
            axes(launch.threads),
            amount(launch.shared) if launch.shared else "",
        )
        for launch in step.launches
    )
    return [(name, str(times), *sizes) for (name, *sizes), times in counted.items()]
