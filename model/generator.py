"""Generates text: prompts in, streamed text out, and statistics against the memory-bandwidth limit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import jax
import numpy as np

from palladion.kernels.backend import BACKENDS
from palladion.kernels.devices import measured_bandwidth
from palladion.kernels.quantized_matmul import IMPLEMENTATIONS
from palladion.model.checkpoint import Checkpoint, load_checkpoint
from palladion.model.engine import Engine, EngineOptions, plan_chunks
from palladion.model.parameters import Parameters, without_float16_scales
from palladion.model.sampling import Sampling
from palladion.model.statistics import Statistics, peak_memory
from palladion.model.vocabulary import check_integer, check_text, token_ids
from palladion.reference import KVCache, Scheme
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import Order, order_of_platform

DEFAULT_MAX_LEN: Final = 2048
"""Room in the KV cache by default, in tokens per sequence, unless the model was trained for fewer."""

MAX_LEN_LIMIT: Final = 1 << 30
"""Maximum tokens per sequence in a KV cache: positions are 32-bit integers."""

Stop = Literal["stop token", "max_new_tokens", "cache full"]
"""Reasons for a generation to end."""

Prompt = str | Sequence[int]
"""A text, or its token ids."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Attributes:
      text: the generated text.
      tokens: the generated tokens, including a stop token at the end.
      prompt_tokens: number of tokens in the prompt.
      stopped_by: why the generation ended.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped_by: Stop


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
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}; accepted: None, {', '.join(BACKENDS)}")
        dtype = dtype or default_dtype()
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: got {dtype!r}; accepted: float32, bfloat16, float16")
        kv_dtype = kv_dtype or dtype
        jax.eval_shape(lambda: KVCache.dense(1, 1, 1, 1, kv_dtype))  # raises for a dtype that no cache has
        if max_len is None:
            max_len = min(checkpoint.config.max_positions, DEFAULT_MAX_LEN)
        max_len = check_integer(max_len, "max_len")
        if not 2 <= max_len <= MAX_LEN_LIMIT:
            raise ValueError(
                f"max_len: got {max_len}; accepted: at least 2, a token to read and one to write, and at most "
                f"{MAX_LEN_LIMIT}"
            )
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.options = EngineOptions(max_len, dtype, kv_dtype, backend, interpret)
        self._engines: dict[tuple[int, Any, bool], Engine] = {}  # by batch size, filters, whether stop tokens count

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        dtype: str | None = None,
        weights: Literal["keep", "dequantize"] = "keep",
        quantize: str | Scheme | None = None,
        progress: Callable[[str, float], None] | None = None,
        kv_dtype: str | None = None,
        max_len: int | None = None,
        backend: str | None = None,
        interpret: bool | None = None,
    ) -> Generator:
        """Loads a checkpoint in the form that suits the platform.

        Args:
          model: a .gguf file, a Hugging Face folder, or the name of a packaged model ("smollm2").
          dtype: dtype of activations and dense weights; None means float32 on a CPU, bfloat16 elsewhere.
          weights: "keep" keeps weights that a checkpoint has quantized, "dequantize" makes them dense.
          quantize: scheme to quantize the weights to instead, for example "int8" or "int4-g32".
          progress: called with the part just loaded and the fraction done.
          kv_dtype: as for `Generator`.
          max_len: as for `Generator`.
          backend: as for `Generator`.
          interpret: as for `Generator`.

        Raises:
          CheckpointError: the checkpoint is missing, damaged or unsupported.
          ValueError: an option is not among those accepted.
          ImportError: the packages of `palladion[models]` are not installed.
        """
        dtype = dtype or default_dtype()
        platform = target_platform()
        # A loop over stacked layers compiles in seconds and reads the weights without a copy. On a GPU, however, XLA
        # copies dense weights out of the stack for its matrix products.
        checkpoint = load_checkpoint(
            model,
            dtype=dtype,
            weights=weights,
            quantize=quantize,
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
        engine = self._engine(check_integer(batch, "batch"), _checked_sampling(sampling), stops=True)
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
        seed: int = 0,
        ignore_stop_tokens: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> tuple[list[Generation], Statistics]:
        """Continues one or several prompts, as one batch.

        Args:
          prompts: a text, or a list of texts and token lists of any lengths.
          max_new_tokens: maximum number of tokens to generate for each prompt.
          sampling: how tokens are chosen; None is greedy.
          seed: seed of random draws, a 64-bit integer (JAX uses its low 32 bits unless `jax_enable_x64` is set): the
            same seed, prompt and sampling give the same text, whatever else is in the batch.
          ignore_stop_tokens: whether generation continues after a stop token, as benchmarks need.
          on_text: called with a prompt's index and its next piece of text, as soon as the piece is complete.

        Returns:
          A `Generation` for each prompt, in order, and the `Statistics` of the run.

        Raises:
          ValueError: there is no prompt, one is empty or too long for the cache, max_new_tokens is below 1, or a value
            has the wrong type.
        """
        run = _Run(self, _as_batch(prompts), max_new_tokens, sampling, seed, ignore_stop_tokens)
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
        ignore_stop_tokens: bool = False,
    ) -> Iterator[str]:
        """Yields the continuation of one prompt piece by piece; arguments and errors are those of `generate`."""
        run = _Run(self, [prompt], max_new_tokens, sampling, seed, ignore_stop_tokens)
        return (text for _, text in run.pieces())

    def _engine(self, batch: int, sampling: Sampling, stops: bool) -> Engine:
        """Returns the engine for a batch size and a set of filters, made at its first use."""
        key = (batch, jax.tree.structure(sampling), stops)
        if key not in self._engines:
            stop_tokens = self.config.stop_tokens if stops else ()
            self._engines[key] = Engine(self.parameters, self.config, batch, sampling, self.options, stop_tokens)
        return self._engines[key]

    def _tokenize(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns the tokens of each prompt, checked."""
        if not prompts:
            raise ValueError("prompts: got none; give at least one")
        token_lists = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                token_lists.append(self.tokenizer.encode(check_text(prompt, f"prompts[{index}]")))
            else:
                token_lists.append(token_ids(prompt, f"prompts[{index}]: not text, so token ids"))
        for index, tokens in enumerate(token_lists):
            if not tokens:
                raise ValueError(f"prompts[{index}]: is empty; give at least one character or token")
            if len(tokens) >= self.options.max_len:
                raise ValueError(
                    f"prompts[{index}]: has {len(tokens)} tokens, the cache has room for {self.options.max_len} with "
                    f"the answer; shorten it or raise max_len (the model was trained for {self.config.max_positions})"
                )
            if outside := [t for t in tokens if not 0 <= t < self.config.vocab_size]:
                raise ValueError(f"prompts[{index}]: token {outside[0]} is not in 0 to {self.config.vocab_size - 1}")
        return token_lists


class _Run:
    """One call of `generate` or `stream`: arguments are checked when it is made, iterating over `pieces` runs it."""

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None,
        seed: int,
        ignore_stop_tokens: bool,
    ) -> None:
        self._generator = generator
        self._max_new_tokens = check_integer(max_new_tokens, "max_new_tokens")
        if self._max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}; accepted: at least 1")
        self._sampling = _checked_sampling(sampling)
        self._seed = check_seed(seed)
        self._prompts = generator._tokenize(prompts)
        self._engine = generator._engine(len(self._prompts), self._sampling, not ignore_stop_tokens)
        self._stop_tokens = () if ignore_stop_tokens else generator.config.stop_tokens
        self._tokens: list[list[int]] = [[] for _ in self._prompts]
        self._texts: list[list[str]] = [[] for _ in self._prompts]
        self._streams = [generator.tokenizer.stream(continuing=True) for _ in self._prompts]
        self._seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._steps = 0

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Runs the generation; yields the index of a prompt and its next piece of text."""
        engine, keys = self._engine, self._engine.keys(self._seed)
        seconds_before = engine.compile_seconds
        engine.compile(sorted(set(plan_chunks(max(map(len, self._prompts))))))
        self._seconds["compile"] = engine.compile_seconds - seconds_before
        start = time.perf_counter()
        state = engine.prefill(self._prompts, keys, self._sampling)
        first = np.asarray(state.tokens)
        self._seconds["prefill"] = time.perf_counter() - start
        yield from self._take(first[None])
        start, steps = time.perf_counter(), self._max_new_tokens - 1
        for out, newest in engine.decode_ahead(state, steps, keys, self._sampling, self._all_finished):
            state, tokens = newest, np.asarray(out)
            self._seconds["decode"] = time.perf_counter() - start
            self._steps += int((tokens >= 0).any(axis=1).sum())
            yield from self._take(tokens)
        engine.release(state)
        for index, stream in enumerate(self._streams):
            if text := stream.flush():
                self._texts[index].append(text)
                yield index, text

    def generations(self) -> list[Generation]:
        """Returns the generations so far."""
        return [
            Generation("".join(texts), tuple(tokens), len(prompt), self._stopped_by(index))
            for index, (texts, tokens, prompt) in enumerate(zip(self._texts, self._tokens, self._prompts, strict=True))
        ]

    def statistics(self) -> Statistics:
        """Returns the statistics of the finished run."""
        generator = self._generator
        sizes = [(len(prompt), len(tokens)) for prompt, tokens in zip(self._prompts, self._tokens, strict=True)]
        cache = self._engine.cache_like
        caches = cache if isinstance(cache, tuple) else (cache,)
        per_token = sum(layer_cache.bytes_per_token for layer_cache in caches)
        # Step s of a sequence reads the prompt's keys and values and those of s generated tokens.
        tokens_read = sum(prompt * (new - 1) + new * (new - 1) // 2 for prompt, new in sizes)
        return Statistics(
            sequences=len(sizes),
            prompt_tokens=sum(prompt for prompt, _ in sizes),
            generated_tokens=sum(new for _, new in sizes),
            decode_steps=self._steps,
            compile_seconds=self._seconds["compile"],
            prefill_seconds=self._seconds["prefill"],
            decode_seconds=self._seconds["decode"],
            weight_bytes=generator.parameters.bytes_per_step(len(sizes)),
            cache_bytes=tokens_read * per_token // max(self._steps, 1),
            memory_bandwidth=measured_bandwidth(),
            peak_memory=peak_memory(),
        )

    def _take(self, tokens: np.ndarray) -> Iterator[tuple[int, str]]:
        """Adds tokens `[steps, batch]`, -1 for none, to the generations; yields the text that they complete."""
        for index, row in enumerate(tokens.T.tolist()):
            new = [token for token in row if token >= 0]
            self._tokens[index] += new
            text = "".join(map(self._streams[index].push, new))
            if text:
                self._texts[index].append(text)
                yield index, text

    def _stopped_by(self, index: int) -> Stop:
        """Returns why a sequence ended; "max_new_tokens" while it continues."""
        tokens = self._tokens[index]
        if tokens and tokens[-1] in self._stop_tokens:
            return "stop token"
        # The newest token is not in the cache.
        full = len(self._prompts[index]) + len(tokens) - 1 >= self._generator.options.max_len
        return "cache full" if full else "max_new_tokens"

    def _all_finished(self) -> bool:
        return all(self._stopped_by(index) != "max_new_tokens" for index in range(len(self._prompts)))


def check_seed(seed: Any) -> int:
    """Returns `seed` as a Python integer; raises ValueError where it does not fit into 64 bits."""
    number = check_integer(seed, "seed")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"seed: got {number}; accepted: an integer from -2**63 to 2**63 - 1")
    return number


def _checked_sampling(sampling: Any) -> Sampling:
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        raise ValueError(
            f"sampling: got {type(sampling).__name__} {sampling!r:.60}; accepted: None, or a Sampling such as "
            "Sampling(temperature=0.8, top_p=0.95)"
        )
    return sampling


def _as_batch(prompts: Any) -> list[Any]:
    """Returns the prompts of a call as a list; raises ValueError for one list of token ids, which is ambiguous."""
    if isinstance(prompts, str):
        return [prompts]
    batch = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(batch, bytes | Mapping) or not isinstance(batch, Iterable):
        raise ValueError(
            f"prompts: got {type(prompts).__name__} {prompts!r:.60}; accepted: a text, or a list of texts and lists of "
            "token ids"
        )
    batch = list(batch)
    if any(isinstance(prompt, int) or getattr(prompt, "shape", None) == () for prompt in batch):
        raise ValueError(
            f"prompts: got {batch!r:.60}, a list of token ids, which is one prompt; accepted: a list of prompts, here "
            f"[{batch!r:.60}]"
        )
    return batch


def default_dtype() -> str:
    """Returns the default dtype of activations, the fastest on the platform."""
    return "float32" if target_platform() == "cpu" else "bfloat16"


def _order_for(backend: str | None) -> Order:
    """Returns the storage order that a backend's kernels read: the platform's, unless a kernel is named."""
    platforms = (row.platform for row in IMPLEMENTATIONS if row.name == backend and row.platform is not None)
    return order_of_platform(next(platforms, target_platform()))
