"""Options that commands share: the model and how it is run, and how tokens are chosen."""

from __future__ import annotations

import argparse
from typing import Any

import jax

from palladion.kernels.backend import BACKENDS
from palladion.model.checkpoint import DTYPES
from palladion.model.checkpoint_reader import CheckpointReader
from palladion.model.commands.progress import Progress
from palladion.model.generator import Generator
from palladion.model.sampling import Sampling
from palladion.model.tokenizer import Tokenizer

MODEL_HELP = (
    "a .gguf file, a Hugging Face folder, owner/name on the Hugging Face hub, or the packaged model 'smollm2', which "
    "is the default"
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a model and how it is run."""
    group = parser.add_argument_group("the model, and how it is run")
    group.add_argument("--model", default="smollm2", help=MODEL_HELP)
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="implementation of the operations (auto)")
    group.add_argument(
        "--interpret",
        action="store_true",
        default=None,
        help="interpret kernels: slow, on any platform; the default only with --backend=pallas on a CPU",
    )
    group.add_argument(
        "--weights",
        choices=("keep", "dequantize"),
        default="keep",
        help="keep the weights of a quantized checkpoint as they are, or dequantize them (keep)",
    )
    group.add_argument(
        "--quantize",
        metavar="SCHEME",
        help="quantize weights while loading: int8, int4-g32, int4-g128-zeros, float8_e4m3fn, mxfp4, …",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of activations and dense weights (float32 on a CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--kv-dtype",
        help="dtype of the KV cache: one of --dtype's, int8, float8_e4m3fn or float8_e5m2 (that of --dtype)",
    )
    group.add_argument(
        "--max-len",
        type=int,
        metavar="N",
        help="room in the KV cache, in tokens per sequence, prompt and answer together (2048 at most)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose tokens and end a generation."""
    group = parser.add_argument_group("how tokens are chosen: the likeliest ones by default")
    group.add_argument("--temperature", type=float, metavar="X", help="sample at this temperature")
    group.add_argument("--top-k", type=int, metavar="N", help="sample only from the N likeliest tokens")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="sample only from the likeliest tokens that together reach this probability",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="X",
        help="sample only from tokens at least this fraction as likely as the likeliest",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="discourage tokens of the prompt and the text so far; 1.1 to 1.3 ends loops, 1 changes nothing",
    )
    group.add_argument(
        "--presence-penalty", type=float, metavar="X", help="subtracted from the logits of tokens generated so far"
    )
    group.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="subtracted once for each time that a token was generated"
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="TOKEN=BIAS",
        help="added to a token's logit; TOKEN is an id, or a text that is one token; repeat it for more",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random draws (0)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to generate")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeat it for more"
    )


def load(arguments: argparse.Namespace, reader: CheckpointReader, progress: Progress, batch: int) -> Generator:
    """Loads the model that the options describe, with room for a number of prompts, and says what became of weights."""
    generator = Generator.load(
        reader,
        dtype=arguments.dtype,
        weights=arguments.weights,
        quantize=arguments.quantize,
        kv_dtype=arguments.kv_dtype,
        max_len=arguments.max_len,
        backend=arguments.backend,
        interpret=arguments.interpret,
        batch=batch,
        progress=progress.loading,
    )
    progress.say(generator.checkpoint.summary)
    return generator


def compiling(arguments: argparse.Namespace) -> str:
    """Returns the line that is shown while a model is compiled."""
    return f"compiling for {jax.devices()[0].device_kind}, backend {arguments.backend} …"


def sampling(arguments: argparse.Namespace, tokenizer: Tokenizer | None = None) -> Sampling:
    """Returns the sampling that the options describe, biases only with a tokenizer, which finds their tokens.

    Raises:
      ValueError: a value is out of range, or a bias has no token.
    """
    values: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
    }
    bias = None if tokenizer is None else dict(_bias(text, tokenizer) for text in arguments.logit_bias)
    return Sampling(**values, logit_bias=bias)


def _bias(text: str, tokenizer: Tokenizer) -> tuple[int, float]:
    """Returns the token and the number of a --logit-bias option."""
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError as error:
        raise ValueError(f"--logit-bias: got {text!r}; accepted: TOKEN=BIAS, such as 42=-3.5 or ' the'=-1") from error
    if name.isdecimal():
        return int(name), value
    tokens = tokenizer.encode(name, add_bos=False) if name else []
    if len(tokens) != 1:
        raise ValueError(
            f"--logit-bias: {name!r} is {len(tokens)} tokens: {tokens}; accepted: an id, or a text that is one token"
        )
    return tokens[0], value
