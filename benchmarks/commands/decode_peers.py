r"""Decodes one sequence with Palladion, llama.cpp and transformers in turns, and compares their tokens per second.

  python -m palladion.benchmarks decode_peers --rounds=8 --tokens=96 --json=decode.json

All decoders read the same GGUF file; transformers, which has no 4-bit weights on a CPU, dequantizes it to float32 and
to bfloat16. Turns are short and repeated, so that a machine that is slow for a minute is slow for all decoders, and
ratios are medians over the rounds. A peer that is not installed is left out.
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

from palladion.benchmarks import text
from palladion.benchmarks.commands import PROGRAM
from palladion.benchmarks.commands.progress import report_progress
from palladion.benchmarks.measure import machine, records
from palladion.kernels.checks import check
from palladion.model.exit_status import INTERRUPTED
from palladion.model.generator import Generator
from palladion.model.locate import find_model

HELP: Final = "decodes with the model, llama.cpp and transformers in turns, and compares tokens/s"

HEADINGS: Final = ("decoder", "tokens/s", "worst to best", "palladion is faster by")

Turn = Callable[[], float]
"""A function that decodes once and returns tokens per second."""


WARMING_UP: Final = "0 rounds: these are the first turns, in which decoders warm up"
"""Text in place of the figures of a record without a complete round."""


@dataclasses.dataclass
class Decoder:
    """A decoder and its speed.

    Attributes:
      name: its name in the results.
      turn: decodes once.
      first: tokens per second of the first turn, which compiles, allocates and warms up.
      rates: tokens per second in every turn after it.
    """

    name: str
    turn: Turn
    first: float = 0.0
    rates: list[float] = dataclasses.field(default_factory=list)


def palladion(path: Path, prompt: str, tokens: int, quantize: str | None = None) -> Iterator[Decoder]:
    """Yields Palladion's generator on JAX's default device, with the file's weights or requantized ones."""
    generator = Generator.load(path, quantize=quantize)

    def turn() -> float:
        _, run = generator.generate([prompt], max_new_tokens=tokens + 1, ignore_stop_tokens=True)
        return run.decode_rate

    yield Decoder(f"palladion {quantize or 'gguf'}", turn)


def llama_cpp(path: Path, prompt: str, tokens: int) -> Iterator[Decoder]:
    """Yields llama-cpp-python, with a thread for each core."""
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
    """Yields Hugging Face transformers on torch in two dtypes, with a thread for each core."""
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

        # A run of one token takes as long as the prompt.
        return lambda: tokens / (seconds(tokens + 1) - seconds(1))

    for dtype in (torch.float32, torch.bfloat16):
        yield Decoder(f"transformers {str(dtype).removeprefix('torch.')}", decoder(dtype))


PEERS: Final = (llama_cpp, transformers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", default="smollm2", help="a .gguf file, or the packaged model 'smollm2'")
    parser.add_argument("--prompt", default="The capital of France is", help="what every decoder continues")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="tokens in a turn, after the first (96)")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="turns of each decoder (8)")
    parser.add_argument("--quantize", metavar="SCHEME", help="requantize our weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file")


def run(arguments: argparse.Namespace) -> int:
    """Runs the turns and prints the comparison; a peer that fails in its first turn is left out."""
    for name in ("tokens", "rounds"):
        check(getattr(arguments, name) >= 1, f"--{name}", getattr(arguments, name), "at least 1")
    warnings.simplefilter("ignore")
    if warning := machine.busy_warning():
        report_progress(f"warning: {warning}")
    path = find_model(arguments.model)
    record = {
        "model": path.name,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "provenance": machine.provenance(f"{PROGRAM} {shlex.join(arguments.command_line)}"),
        "limits": dataclasses.asdict(machine.limits()),
    }
    decoders: list[Decoder] = []
    status = 0
    try:
        for rounds in _rounds(path, arguments, decoders):
            record["tokens_per_second"] = {one.name: one.rates or [one.first] for one in decoders}
            record["rounds"] = f"{rounds} of {arguments.rounds} rounds" if rounds else WARMING_UP
            if arguments.json:  # after each turn that counts: the process may be ended
                records.write_record(arguments.json, record)
    except KeyboardInterrupt:
        report_progress("interrupted")
        status = INTERRUPTED
    if decoders:
        headings, lines = table_of(record)
        print(f"{text.table(headings, lines)}\n\n{record['rounds']}")
    return status


def _rounds(path: Path, arguments: argparse.Namespace, decoders: list[Decoder]) -> Iterator[int]:
    """Adds a decoder after the other, then runs rounds; yields the number of complete ones whenever there is more."""
    given = (path, arguments.prompt, arguments.tokens)
    for decoder in palladion(*given, arguments.quantize):
        decoder.first = decoder.turn()
        decoders.append(decoder)
        yield 0
    for make in PEERS:
        try:
            for decoder in make(*given):
                decoder.first = decoder.turn()
                decoders.append(decoder)
                yield 0
        except ImportError as error:
            report_progress(f"{make.__name__}: left out ({error})")
        except Exception as error:  # whatever a peer raises costs that peer alone
            report_progress(f"{make.__name__}: left out, it failed ({type(error).__name__}: {error})")
    for done in range(arguments.rounds):
        turns = [decoder.turn() for decoder in decoders]
        for decoder, rate in zip(decoders, turns, strict=True):
            decoder.rates.append(rate)
        yield done + 1


def table_of(record: dict[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Returns headings and lines of the table of a record that this command has written; Palladion is first in it."""
    rates: dict[str, list[float]] = record["tokens_per_second"]
    ours = next(iter(rates.values()))
    return HEADINGS, [
        (
            name,
            f"{statistics.median(turns):.1f}",
            f"{min(turns):.1f} to {max(turns):.1f}",
            f"{statistics.median(mine / theirs for mine, theirs in zip(ours, turns, strict=True)):.2f} x",
        )
        for name, turns in rates.items()
    ]
