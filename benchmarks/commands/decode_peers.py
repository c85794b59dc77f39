r"""Decodes one sequence with Palladion, llama.cpp and transformers in turns, and compares their tokens per second.

  python -m palladion.benchmarks decode_peers --rounds=8 --tokens=96 --json=decode.json

All read the same GGUF file; transformers, which has no 4-bit weights on a CPU, decodes it to float32 and to bfloat16.
Turns are short and repeated: a machine that is slow for a minute is slow for all. The ratio of each round counts, not
the best of each. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.measure import bench, machine
from palladion.benchmarks.measure import records as results
from palladion.benchmarks.measure.bench import progress
from palladion.kernels.checks import check
from palladion.model.checkpoint import find_model
from palladion.model.generator import Generator

HELP: Final = "decodes with the model, llama.cpp and transformers in turns, and compares tokens/s"

HEADINGS: Final = ("decoder", "tokens/s", "worst to best", "palladion is faster by")

Turn = Callable[[], float]
"""Decodes once; returns tokens per second."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder and its speed.

    Attributes:
      name: what it is called in the results.
      turn: decodes once.
      rates: tokens per second of every turn.
    """

    name: str
    turn: Turn
    rates: list[float] = dataclasses.field(default_factory=list)


def palladion(path: Path, prompt: str, tokens: int, quantize: str | None = None) -> Iterator[Decoder]:
    """Ours, on whatever JAX finds; weights quantized anew, or as the file has them."""
    generator = Generator.load(path, quantize=quantize)

    def turn() -> float:
        _, run = generator.generate([prompt], max_new_tokens=tokens + 1, ignore_stop_tokens=True)
        return run.decode_rate

    yield Decoder(f"palladion {quantize or 'gguf'}", turn)


def llama_cpp(path: Path, prompt: str, tokens: int) -> Iterator[Decoder]:
    """llama-cpp-python, one thread for each core."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=2048, n_threads=os.cpu_count(), verbose=False)
    ids = model.tokenize(prompt.encode(), add_bos=False)

    def turn() -> float:
        model.reset()
        steps = model.generate(ids, temp=0.0, top_k=1)
        next(steps)
        start = time.perf_counter()
        for _ in range(tokens):
            next(steps)
        return tokens / (time.perf_counter() - start)

    yield Decoder("llama.cpp gguf", turn)


def transformers(path: Path, prompt: str, tokens: int) -> Iterator[Decoder]:
    """Hugging Face transformers on torch, one thread for each core."""
    import torch
    import transformers as library

    torch.set_num_threads(os.cpu_count() or 1)
    library.utils.logging.disable_progress_bar()
    tokenizer = library.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    inputs = tokenizer(prompt, return_tensors="pt")

    def decoder(dtype: Any) -> Turn:
        model = library.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)

        def seconds(count: int) -> float:
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            return time.perf_counter() - start

        # The prompt's share is what one token takes.
        return lambda: tokens / (seconds(tokens + 1) - seconds(1))

    for dtype in (torch.float32, torch.bfloat16):
        yield Decoder(f"transformers {str(dtype).removeprefix('torch.')}", decoder(dtype))


PEERS: Final = (llama_cpp, transformers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", default="smollm2", help="a .gguf file, or the packaged model 'smollm2'")
    parser.add_argument("--prompt", default="The capital of France is", help="what every decoder continues")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="of a turn, after the first (96)")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="turns of each decoder (8)")
    parser.add_argument("--quantize", metavar="SCHEME", help="our weights, instead of as the file has them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file")


def run(arguments: argparse.Namespace) -> int:
    """Runs the turns and prints the comparison; a decoder that fails is left out from there on."""
    for name in ("tokens", "rounds"):
        check(getattr(arguments, name) >= 1, f"--{name}", getattr(arguments, name), "at least 1")
    warnings.simplefilter("ignore")
    if warning := machine.warn_if_busy():
        progress(f"warning: {warning}")
    path = find_model(arguments.model)
    given = (path, arguments.prompt, arguments.tokens)
    decoders = list(palladion(*given, arguments.quantize))
    decoders[0].turn()  # compiles, allocates, warms up
    for make in PEERS:
        try:
            found = list(make(*given))
            for decoder in found:
                decoder.turn()
            decoders += found
        except ImportError as error:
            progress(f"{make.__name__}: left out ({error})")
        except Exception as error:  # whatever a peer raises costs that peer alone
            progress(f"{make.__name__}: left out, it failed ({type(error).__name__}: {error})")
    try:
        for _ in range(arguments.rounds):
            turns = [decoder.turn() for decoder in decoders]
            for decoder, rate in zip(decoders, turns, strict=True):
                decoder.rates.append(rate)
    except KeyboardInterrupt:
        progress(f"interrupted after {len(decoders[0].rates)} of {arguments.rounds} rounds")
    if not decoders[0].rates:
        return 1
    record = {
        "model": path.name,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "provenance": machine.provenance(f"python -m palladion.benchmarks {shlex.join(arguments.command_line)}"),
        "limits": dataclasses.asdict(bench.limits()),
        "tokens_per_second": {decoder.name: decoder.rates for decoder in decoders},
    }
    headings, lines = table_of(record)
    print(results.table(headings, lines))
    if arguments.json:
        results.write_record(arguments.json, record)
    return 0


def table_of(record: dict[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Headings and lines of the table of a record that this command has written; ours is its first decoder."""
    rates: dict[str, list[float]] = record["tokens_per_second"]
    ours = next(iter(rates.values()))
    return HEADINGS, [
        (
            name,
            f"{statistics.median(of):.1f}",
            f"{min(of):.1f} to {max(of):.1f}",
            f"{statistics.median(mine / theirs for mine, theirs in zip(ours, of, strict=True)):.2f} x",
        )
        for name, of in rates.items()
    ]
