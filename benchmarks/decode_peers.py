r"""Decodes one sequence with Palladion, llama.cpp and transformers in turns, and compares their tokens per second.

  python -m palladion.benchmarks.decode_peers --rounds=8 --tokens=96

All read the same GGUF file; transformers, which has no 4-bit weights on a CPU, decodes it to float32 and to bfloat16.
Turns are short and repeated: a machine that is slow for a minute is slow for all. The ratio of each round counts, not
the best of each. A peer that is not installed is left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from palladion.kernels.devices import measured_bandwidth
from palladion.model.checkpoint import find_model
from palladion.model.generator import Generator

MODEL = flags.DEFINE_string("model", "smollm2", "A .gguf file, or the packaged model 'smollm2'.")
PROMPT = flags.DEFINE_string("prompt", "The capital of France is", "What every decoder continues.")
TOKENS = flags.DEFINE_integer("tokens", 96, "Tokens of a turn, after the first.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 8, "Turns of each decoder.", lower_bound=1)
QUANTIZE = flags.DEFINE_string(
    "quantize", None, "Quantize Palladion's weights to this scheme instead of the file's own."
)
RESULTS = flags.DEFINE_string("results", None, "Also write every sample to this JSON file.")

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


def palladion(path: Path, prompt: str, tokens: int) -> Iterator[Decoder]:
    """Ours, on whatever JAX finds."""
    generator = Generator.load(path, quantize=QUANTIZE.value)

    def turn() -> float:
        _, run = generator.generate([prompt], max_new_tokens=tokens + 1, ignore_stop_tokens=True)
        return run.decode_rate

    yield Decoder(f"palladion {QUANTIZE.value or 'gguf'}", turn)


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


def main(arguments: Sequence[str]) -> None:
    """Runs the turns and prints the comparison."""
    del arguments
    warnings.simplefilter("ignore")
    path = find_model(MODEL.value)
    decoders: list[Decoder] = []
    for make in (palladion, llama_cpp, transformers):
        try:
            decoders += make(path, PROMPT.value, TOKENS.value)
        except ImportError as error:
            print(f"{make.__name__}: left out ({error})")
    for decoder in decoders:
        decoder.turn()  # compiles, allocates, warms up
    for _ in range(ROUNDS.value):
        for decoder in decoders:
            decoder.rates.append(decoder.turn())
    ours = decoders[0].rates
    print(f"{'':24s} {'tokens/s':>10s} {'best':>8s} {'worst':>8s}   palladion is faster by")
    for decoder in decoders:
        ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, decoder.rates, strict=True))
        rates = (statistics.median(decoder.rates), max(decoder.rates), min(decoder.rates))
        print(f"{decoder.name:24s} {rates[0]:10.1f} {rates[1]:8.1f} {rates[2]:8.1f}   {ratio:.2f} x")
    print(f"memory bandwidth of this machine: {measured_bandwidth() / 1e9:.1f} GB/s")
    if RESULTS.value:
        Path(RESULTS.value).write_text(json.dumps(_record(path, decoders), indent=1) + "\n")


def _record(path: Path, decoders: list[Decoder]) -> dict[str, Any]:
    versions = {}
    for package in ("jax", "llama-cpp-python", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "benchmark": "decode_peers",
        "model": path.name,
        "prompt": PROMPT.value,
        "tokens": TOKENS.value,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "memory_bandwidth": measured_bandwidth(),
        "versions": versions,
        "tokens_per_second": {decoder.name: decoder.rates for decoder in decoders},
    }


if __name__ == "__main__":
    app.run(main)
