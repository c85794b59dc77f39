r"""Calculates how many chips a model needs, and what they can do at best, from datasheets; nothing is measured.

  python -m palladion.benchmarks plan --model=llama3-70b --scheme=int8 --batch=32 --context=8192
  python -m palladion.benchmarks plan --model=llama3-8b --chips=v5e,h100 --users=200 --tokens-per-second=20

The number of chips is the smallest power of two at which weights and caches fit and each sequence is as fast as asked
for. A step takes the larger of its bytes over the bandwidth, scaled by --efficiency, and its arithmetic over the peak
rate, scaled by --mfu, of all chips together. Communication between chips is not counted, which flatters many small
ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Final

from palladion.benchmarks import text
from palladion.benchmarks.commands import options
from palladion.benchmarks.measure import model_shapes
from palladion.benchmarks.measure.model_shapes import ModelShape
from palladion.benchmarks.text import amount, duration
from palladion.kernels.checks import check
from palladion.kernels.devices import Chip, Gpu, gpus, tpu_chips

HELP: Final = "calculates how many chips a model needs, and their tokens/s at best, from datasheets"

USABLE: Final = 0.9
"""Usable share of a chip's memory; the rest is for programs, activations and fragmentation."""

MOST_CHIPS: Final = 256
"""Largest number of chips that is tried."""
"""Largest number of chips that is tried."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A model on some chips: memory, step time and throughput, calculated from datasheets.

    Attributes:
      chip: name of the chips.
      chips: number of chips.
      memory: bytes of weights and caches.
      room: usable bytes of memory.
      step_seconds: seconds of a decode step.
      bound: "memory" or "compute", whichever limits the step.
      first_token_seconds: seconds of the prefill of a prompt as long as the context.
      most_sequences: number of sequences that fit into the memory.
    """

    chip: str
    chips: int
    memory: float
    room: float
    step_seconds: float
    bound: str
    first_token_seconds: float
    most_sequences: int


def forecast(
    shape: ModelShape,
    chip: Chip | Gpu,
    *,
    scheme: str,
    kv_dtype: str,
    batch: int,
    context: int,
    efficiency: float = 0.8,
    mfu: float = 0.5,
    chips: int | None = None,
) -> Forecast | None:
    """Calculates what the fewest chips that hold a model can do; returns None if `MOST_CHIPS` are too few.

    Args:
      shape: the model's shapes.
      chip: the kind of chip.
      scheme: scheme of the weights, or a float dtype.
      kv_dtype: dtype of the cache.
      batch: number of sequences.
      context: tokens of each sequence.
      efficiency: share of the bandwidth that a step reaches.
      mfu: share of the peak rate that a prefill reaches.
      chips: number of chips, instead of the fewest.

    Raises:
      ValueError: the chip's memory, bandwidth or peak rate is not known.
    """
    known = (chip.hbm_bytes, chip.hbm_bytes_per_second, chip.bf16_flops_per_second)
    check(None not in known, "chip", chip.name, "one whose memory, bandwidth and peak rate are known")
    capacity, bandwidth, peak = (float(figure or 0) for figure in known)
    weights = shape.stored_bytes(scheme)
    # A dense cache has room for the whole context, even in layers with a window.
    sequence_bytes = context * shape.cache_bytes_per_token(kv_dtype)
    memory = weights + batch * sequence_bytes
    counts = [1 << n for n in range(MOST_CHIPS.bit_length()) if 1 << n <= MOST_CHIPS]
    count = chips or next((n for n in counts if n * capacity * USABLE >= memory), None)
    if count is None:
        return None
    read = shape.step_weight_bytes(scheme, batch) + batch * context * shape.cache_bytes_per_token(kv_dtype, context)
    reads = read / (count * bandwidth * efficiency)
    computes = 2 * batch * shape.active_parameters() / (count * peak * mfu)
    return Forecast(
        chip=chip.name,
        chips=count,
        memory=memory,
        room=count * capacity * USABLE,
        step_seconds=max(reads, computes),
        bound="memory" if reads >= computes else "compute",
        first_token_seconds=max(shape.prefill_flops(context) / (count * peak * mfu), reads),
        most_sequences=max(0, int((count * capacity * USABLE - weights) // sequence_bytes)),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", default="llama3-8b", metavar="NAME", help=", ".join(model_shapes.models()))
    parser.add_argument("--chips", type=options.names, metavar="NAMES", help=f"{', '.join((*tpu_chips(), *gpus()))}")
    parser.add_argument("--count", type=int, metavar="N", help="number of chips, instead of the fewest")
    parser.add_argument("--scheme", default="int8", help="of weights: int8, int4-g32, … or a float dtype (int8)")
    parser.add_argument("--kv-dtype", default="bfloat16", help="of the cache (bfloat16)")
    parser.add_argument("--batch", "--users", type=int, default=1, metavar="N", help="sequences at a time (1)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of each (8192)")
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help="wanted for each sequence")
    parser.add_argument("--efficiency", type=float, default=0.8, metavar="SHARE", help="of the bandwidth (0.8)")
    parser.add_argument("--mfu", type=float, default=0.5, metavar="SHARE", help="of the peak rate, in prompts (0.5)")


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of what each kind of chip can do."""
    shape = model_shapes.model(arguments.model)
    known: dict[str, Chip | Gpu] = {**tpu_chips(), **gpus()}
    names = arguments.chips or ("v5e", "v5p", "v6e", "v7x", "a100", "h100", "h200", "b200")
    for name in names:
        check(name in known, "--chips", name, ", ".join(known))
    for name in ("batch", "context"):
        check(getattr(arguments, name) >= 1, f"--{name}", getattr(arguments, name), "at least 1")
    for name in ("efficiency", "mfu"):
        check(0 < getattr(arguments, name) <= 1, f"--{name}", getattr(arguments, name), "more than 0, up to 1")
    check(arguments.count is None or arguments.count >= 1, "--count", arguments.count, "at least 1")
    lines = []
    for name in names:
        found = _fewest_chips(shape, known[name], arguments)
        lines.append(_line(name, found, arguments.batch))
    print(
        f"{shape.name} in {arguments.scheme}: {shape.parameters() / 1e9:.2f} billion weights, "
        f"{amount(shape.stored_bytes(arguments.scheme))}; a token of context takes "
        f"{amount(shape.cache_bytes_per_token(arguments.kv_dtype))} in {arguments.kv_dtype}; "
        f"{arguments.batch} sequences of {arguments.context:,} tokens\n"
    )
    headings = ("chip", "chips", "memory", "of", "step", "bound by", "tokens/s each", "all", "first token", "room for")
    print(text.table(headings, lines))
    print(
        f"\nCalculated from datasheets, at {arguments.efficiency:.0%} of the bandwidth and {arguments.mfu:.0%} of the "
        "peak rate; communication between chips is not counted."
    )
    return 0


def _fewest_chips(shape: ModelShape, chip: Chip | Gpu, arguments: argparse.Namespace) -> Forecast | None:
    """Calculates for the fewest chips that hold the model and are as fast as asked for."""

    def forecast_with(count: int | None) -> Forecast | None:
        return forecast(
            shape,
            chip,
            scheme=arguments.scheme,
            kv_dtype=arguments.kv_dtype,
            batch=arguments.batch,
            context=arguments.context,
            efficiency=arguments.efficiency,
            mfu=arguments.mfu,
            chips=count,
        )

    found = forecast_with(arguments.count)
    wanted = arguments.tokens_per_second
    while found is not None and wanted and 1 / found.step_seconds < wanted and arguments.count is None:
        found = forecast_with(2 * found.chips) if 2 * found.chips <= MOST_CHIPS else None
    return found


def _line(name: str, found: Forecast | None, batch: int) -> tuple[str, ...]:
    if found is None:
        return (name, "-", f"more than {MOST_CHIPS} of them", *[""] * 7)
    return (
        name,
        str(found.chips),
        amount(found.memory),
        amount(found.room),
        duration(found.step_seconds),
        found.bound,
        f"{1 / found.step_seconds:,.1f}",
        f"{batch / found.step_seconds:,.0f}",
        duration(found.first_token_seconds),
        f"{found.most_sequences:,}",
    )
