"""Generates text: prompts in, streamed text out, and statistics against the memory-bandwidth limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import jax

from palladion.kernels.backend import BACKENDS
from palladion.kernels.quantized_matmul import IMPLEMENTATIONS
from palladion.model.checkpoint import DTYPES, Checkpoint, load_checkpoint, open_checkpoint
from palladion.model.checkpoint_reader import CheckpointReader
from palladion.model.config import ModelConfig
from palladion.model.engine import Engine, EngineOptions
from palladion.model.generation import Generation, Prompt, Run, RunOptions, as_batch, tokenize
from palladion.model.memory import cache_bytes, check_room, least_weight_bytes
from palladion.model.parameters import Parameters, without_float16_scales
from palladion.model.sampling import Sampling
from palladion.model.statistics import Statistics
from palladion.model.vocabulary import check_integer
from palladion.reference import KVCache, Scheme
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import Order, order_of_platform

DEFAULT_MAX_LEN: Final = 2048
"""Room in the KV cache by default, in tokens per sequence, unless the model was trained for fewer."""

MAX_LEN_LIMIT: Final = 1 << 30
"""Maximum tokens per sequence in a KV cache: positions are 32-bit integers."""


class Generator:
    """A model that generates text.

    Args:
      checkpoint: returned by `load_checkpoint`.
      dtype: dtype of activations: "float32", "bfloat16" or "float16"; None means float32 on a CPU, bfloat16 elsewhere.
      kv_dtype: dtype of the KV cache, also "int8", "float8_e4m3fn" or "float8_e5m2"; None means `dtype`.
      max_len: tokens that each sequence has room for, prompt and answer together; None means 2048, or the model's
        trained context length if that is less.
      backend: backend of the operations, one of `palladion.BACKENDS`.
      interpret: whether kernels are interpreted; None interprets where backend="pallas" runs on a CPU.

    Raises:
      ValueError: an argument is not among those accepted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        kv_dtype: str | None = None,
        max_len: int | None = None,
        backend: str | None = None,
        interpret: bool | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.options = engine_options(checkpoint.config, dtype, kv_dtype, max_len, backend, interpret)
        self._engines: dict[Any, Engine] = {}  # by what `_engine` is given, without values

    @classmethod
    def load(
        cls,
        model: str | Path | CheckpointReader,
        *,
        dtype: str | None = None,
        weights: Literal["keep", "dequantize"] = "keep",
        quantize: str | Scheme | None = None,
        progress: Callable[[str, float], None] | None = None,
        kv_dtype: str | None = None,
        max_len: int | None = None,
        backend: str | None = None,
        interpret: bool | None = None,
        batch: int = 1,
    ) -> Generator:
        """Loads a checkpoint in the form that suits the platform; first checks every option, and that it has room.

        Args:
          model: a .gguf file, a Hugging Face folder, the name of a packaged model ("smollm2"), owner/name as on the
            Hugging Face hub, or what `open_checkpoint` returned.
          dtype: dtype of activations and dense weights; None means float32 on a CPU, bfloat16 elsewhere.
          weights: "keep" keeps weights that a checkpoint has quantized, "dequantize" makes them dense.
          quantize: scheme to quantize the weights to instead, for example "int8" or "int4-g32".
          progress: called with the part just loaded and the fraction done.
          kv_dtype: as for `Generator`.
          max_len: as for `Generator`.
          backend: as for `Generator`.
          interpret: as for `Generator`.
          batch: number of prompts whose keys and values must have room in memory.

        Raises:
          CheckpointError: the checkpoint is missing, damaged or unsupported.
          ValueError: an option is not among those accepted, or weights and KV cache are larger than the free memory.
          ImportError: the packages of `palladion[models]` are not installed.
        """
        reader = open_checkpoint(model) if isinstance(model, str | Path) else model
        options = engine_options(reader.config, dtype, kv_dtype, max_len, backend, interpret)
        scheme = None if quantize is None else Scheme.parse(quantize)
        check_room(
            least_weight_bytes(reader, options.dtype, scheme, weights == "keep"),
            cache_bytes(reader.config, batch, options.max_len, options.kv_dtype),
            batch,
            options.max_len,
        )
        platform = target_platform()
        # A loop over stacked layers compiles in seconds and reads the weights without a copy. On a GPU, however, XLA
        # copies dense weights out of the stack for its matrix products.
        checkpoint = load_checkpoint(
            reader,
            dtype=options.dtype,
            weights=weights,
            quantize=scheme,
            stack=platform != "gpu",
            order=_order_for(backend),
            progress=progress,
        )
        if platform == "tpu":
            parameters = without_float16_scales(checkpoint.parameters)
            checkpoint = dataclasses.replace(checkpoint, parameters=parameters)
        return cls(checkpoint, dtype=dtype, kv_dtype=kv_dtype, max_len=max_len, backend=backend, interpret=interpret)

    @property
    def parameters(self) -> Parameters:
        """The weights."""
        return self.checkpoint.parameters

    def compile(self, batch: int = 1, sampling: Sampling | None = None) -> float:
        """Compiles the programs that `generate` needs for a number of prompts; returns the seconds it took."""
        engine = self._engine(check_integer(batch, "batch"), run_options(sampling=sampling))
        before = engine.compile_seconds
        engine.compile()
        return engine.compile_seconds - before

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders a conversation as a prompt for `generate`; see `Tokenizer.render_chat`."""
        return self.tokenizer.render_chat(messages)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        ignore_stop_tokens: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> tuple[list[Generation], Statistics]:
        """Continues one or several prompts, as one batch.

        Args:
          prompts: a text, or a list of texts and token lists of any lengths.
          max_new_tokens: maximum number of tokens to generate for each prompt.
          sampling: how tokens are chosen; None is greedy.
          seed: seed of random draws, a 64-bit integer (JAX uses its low 32 bits unless `jax_enable_x64` is set), or
            one for each prompt: the same seed, prompt and sampling give the same text, whatever else is in the batch.
          stop: texts at which a generation ends; neither they nor a part of them is in the text.
          logprobs: number of likeliest tokens whose log probabilities come with each token, beside its own; None
            computes none.
          ignore_stop_tokens: whether generation continues after a stop token, as benchmarks need.
          on_text: called with a prompt's index and its next piece of text, as soon as the piece is complete.

        Returns:
          A `Generation` for each prompt, in order, and the `Statistics` of the run.

        Raises:
          ValueError: there is no prompt, one is empty or too long for the cache, max_new_tokens is below 1, or a value
            is out of range or has the wrong type.
        """
        run = self.run(prompts, run_options(max_new_tokens, sampling, seed, stop, ignore_stop_tokens, logprobs))
        for index, text in run.pieces():
            if on_text is not None:
                on_text(index, text)
        return run.generations(), run.statistics()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_stop_tokens: bool = False,
    ) -> Iterator[str]:
        """Yields the continuation of one prompt piece by piece; arguments and errors are those of `generate`."""
        options = run_options(max_new_tokens, sampling, seed, stop, ignore_stop_tokens)
        return (text for _, text in self.run([prompt], options).pieces())

    def run(self, prompts: str | Sequence[Prompt], options: RunOptions) -> Run:
        """Returns a run that is checked and not yet begun; `generate` and `stream` are made of it."""
        tokens = tokenize(as_batch(prompts), self.tokenizer, self.config, self.options.max_len)
        bias = options.sampling.logit_bias
        if isinstance(bias, Mapping) and (outside := [token for token in bias if token >= self.config.vocab_size]):
            raise ValueError(
                f"Sampling.logit_bias: got {outside[0]} as a token id; accepted: 0 to {self.config.vocab_size - 1}"
            )
        stop_tokens = () if options.ignore_stop_tokens else self.config.stop_tokens
        return Run(self._engine(len(tokens), options), self.parameters, self.tokenizer, tokens, options, stop_tokens)

    def _engine(self, batch: int, options: RunOptions) -> Engine:
        """Returns the engine for a batch size and options, made at its first use; values of filters do not matter."""
        like = jax.eval_shape(options.sampling.as_arrays)
        leaves, structure = jax.tree.flatten(like)
        key = (batch, structure, *(leaf.shape for leaf in leaves), options.logprobs, options.ignore_stop_tokens)
        if key not in self._engines:
            stop_tokens = () if options.ignore_stop_tokens else self.config.stop_tokens
            engine_options = dataclasses.replace(self.options, logprobs=options.logprobs)
            self._engines[key] = Engine(
                self.parameters, self.config, batch, options.sampling, engine_options, stop_tokens
            )
        return self._engines[key]


def run_options(
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    ignore_stop_tokens: bool = False,
    logprobs: int | None = None,
) -> RunOptions:
    """Returns the options of a run, checked; see `Generator.generate`."""
    return RunOptions(
        max_new_tokens=max_new_tokens,
        sampling=Sampling() if sampling is None else sampling,
        seed=seed,
        stop=stop,
        logprobs=logprobs,
        ignore_stop_tokens=ignore_stop_tokens,
    )


def engine_options(
    config: ModelConfig,
    dtype: str | None,
    kv_dtype: str | None,
    max_len: int | None,
    backend: str | None,
    interpret: bool | None,
) -> EngineOptions:
    """Returns the options of a generator's engines, checked, with defaults filled in; see `Generator`."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; accepted: None, {', '.join(BACKENDS)}")
    dtype = dtype or default_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; accepted: {', '.join(DTYPES)}")
    kv_dtype = kv_dtype or dtype
    jax.eval_shape(lambda: KVCache.dense(1, 1, 1, 1, kv_dtype))  # raises for a dtype that no cache has
    max_len = check_integer(min(config.max_positions, DEFAULT_MAX_LEN) if max_len is None else max_len, "max_len")
    if not 2 <= max_len <= MAX_LEN_LIMIT:
        raise ValueError(
            f"max_len: got {max_len}; accepted: at least 2, a token to read and one to write, and at most "
            f"{MAX_LEN_LIMIT}"
        )
    return EngineOptions(max_len, dtype, kv_dtype, backend, interpret)


def default_dtype() -> str:
    """Returns the default dtype of activations, the fastest on the platform."""
    return "float32" if target_platform() == "cpu" else "bfloat16"


def _order_for(backend: str | None) -> Order:
    """Returns the storage order that a backend's kernels read: the platform's, unless a kernel is named."""
    platforms = (row.platform for row in IMPLEMENTATIONS if row.name == backend and row.platform is not None)
    return order_of_platform(next(platforms, target_platform()))
