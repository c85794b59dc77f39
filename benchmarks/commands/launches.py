r"""Lists what a decode step launches on a GPU that need not be there, by XLA's own compiler.

  python -m palladion.benchmarks launches --model=llama3-8b --scheme=int8
  python -m palladion.benchmarks launches --model=llama3-8b --scheme=bfloat16 --batch=16 --archs=sm_80,sm_90

A step is hundreds of launches, one after the other, and each takes time before it reads a byte: their number bounds
what a step can reach. Nothing is run. The bound is calculated from the bytes that a step must read, at the datasheet's
bandwidth, and from 1.3 µs for each launch, as in a CUDA graph on an H100 (Hazy Research, "Look Ma, No Bubbles!", 2025).
The ramp-up and the tail of each kernel come on top.
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

from palladion.benchmarks import text
from palladion.benchmarks.commands import options
from palladion.benchmarks.measure import model_shapes
from palladion.benchmarks.measure.model_shapes import ModelShape
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.benchmarks.static.examiner import architectures
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.text import amount, duration
from palladion.kernels.backend import BACKENDS
from palladion.kernels.checks import check
from palladion.model.engine import Engine, EngineOptions
from palladion.model.sampling import Sampling

HELP: Final = "lists what a decode step launches on a GPU, by XLA's own compiler; needs no GPU"

LAUNCH_SECONDS: Final = 1.3e-6
"""Time of a launch after another one in a CUDA graph."""

NUMBER: Final = re.compile(r"(?<=fusion)_\d+$|__\d+$")
"""The number by which XLA tells kernels of the same name apart."""


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """A decode step, compiled for a GPU.

    Attributes:
      launches: launches of a step, in order.
      step_bytes: bytes that a step must read.
      bandwidth: the GPU's memory bandwidth, in bytes per second.
      temporary_bytes: memory beside weights and cache.
    """

    launches: tuple[gpu_program.Launch, ...]
    step_bytes: int
    bandwidth: float
    temporary_bytes: int

    @property
    def bound(self) -> float:
        """Share of the bandwidth that the step can reach at most, with so many launches."""
        reads = self.step_bytes / self.bandwidth
        return reads / (reads + LAUNCH_SECONDS * len(self.launches))


def compile_step(
    shape: ModelShape,
    *,
    scheme: str,
    batch: int,
    context: int,
    arch: int,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    backend: str | None = "pallas",
) -> DecodeStep:
    """Compiles the decode loop of a model for a GPU.

    Args:
      shape: the model's shapes.
      scheme: scheme of the weights for `quantize`, or a float dtype.
      batch: number of sequences.
      context: tokens of each sequence, and length of the cache.
      arch: one of `static.gpu.compiler.ARCHITECTURES`.
      dtype: dtype of activations.
      kv_dtype: dtype of the cache; None means that of activations.
      backend: backend of the operations.
    """
    kv_dtype = kv_dtype or dtype
    engine_options = EngineOptions(max_len=context, dtype=dtype, kv_dtype=kv_dtype, backend=backend)
    with gpu_compiler.tracing_for(arch):
        parameters = jax.eval_shape(lambda: random_parameters(shape, scheme, dtype=dtype, max_positions=context))
        engine = Engine(parameters, shape.config(context), batch, Sampling(), engine_options, stop_tokens=())
        loop, arguments = engine.decode_loop()
    program = gpu_program.compile_program(loop, *arguments, arch=arch)
    cache_bytes = batch * context * shape.cache_bytes_per_token(kv_dtype, context)
    return DecodeStep(
        launches=tuple(launch for launch in program.launches if launch.loops),
        step_bytes=shape.step_weight_bytes(scheme, batch) + round(cache_bytes),
        bandwidth=gpu_compiler.gpu_of(arch).hbm_bytes_per_second or 0.0,
        temporary_bytes=program.temporary_bytes,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    accepted = ", ".join(architectures())
    parser.add_argument("--model", default="llama3-8b", metavar="NAME", help=", ".join(model_shapes.models()))
    parser.add_argument("--scheme", default="int8", help="of weights: int8, int4-g32, … or a float dtype (int8)")
    parser.add_argument("--dtype", default="bfloat16", help="of activations (bfloat16)")
    parser.add_argument("--kv-dtype", help="of the cache (that of activations)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of each (8192)")
    parser.add_argument("--archs", type=options.names, default=("sm_90",), metavar="NAMES", help=accepted)
    parser.add_argument("--backend", default="pallas", help="of the operations (pallas)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every launch to this file")


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of launches for each architecture."""
    shape = model_shapes.model(arguments.model)
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
        step = compile_step(
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
        print(text.table(("launch", "times", "grid", "threads", "shared memory"), _lines(step)))
        print(f"\n{conclusion(step, shape.num_layers)}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def conclusion(step: DecodeStep, num_layers: int) -> str:
    """Says how many launches a step has, and what they cost."""
    count = len(step.launches)
    return (
        f"{count} launches a step, {count / num_layers:.1f} for each of {num_layers} layers; "
        f"{amount(step.temporary_bytes)} beside weights and cache.\n"
        f"{amount(step.step_bytes)} take {duration(step.step_bytes / step.bandwidth)} at "
        f"{step.bandwidth / 1e12:g} TB/s, launches {duration(LAUNCH_SECONDS * count)}: "
        f"{step.bound:.0%} of the bandwidth at most."
    )


def _lines(step: DecodeStep) -> list[tuple[str, ...]]:
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
