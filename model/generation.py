"""One run of a generator: its options, checked; the tokens that it takes from the engine; and what comes of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import jax
import numpy as np

from palladion.kernels.devices import measured_bandwidth
from palladion.model.config import ModelConfig
from palladion.model.engine import Engine, Output, plan_chunks
from palladion.model.parameters import Parameters
from palladion.model.sampling import Logprobs, Sampling
from palladion.model.statistics import Statistics, peak_memory
from palladion.model.stop_strings import StopStrings, check_stop_strings
from palladion.model.tokenizer import Tokenizer
from palladion.model.vocabulary import check_integer, check_text, token_ids

MOST_LOGPROBS: Final = 100
"""Most tokens whose log probabilities may come with each token."""

Stop = Literal["stop token", "stop string", "max_new_tokens", "cache full"]
"""Reasons for a generation to end."""

Prompt = str | Sequence[int]
"""A text, or its token ids."""


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one token, under the model itself: before penalties, temperature and filters.

    Attributes:
      token: the token that was generated.
      logprob: its log probability.
      likeliest: the likeliest tokens there and their log probabilities, as many as were asked for.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Attributes:
      text: the generated text, without a stop string.
      tokens: the generated tokens, including a stop token, or those that complete a stop string, at the end.
      prompt_tokens: number of tokens in the prompt.
      stopped_by: why the generation ended.
      logprobs: log probabilities at each of `tokens`, or None where they were not asked for.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped_by: Stop
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of the tokens, by which samples can be ranked; needs `logprobs`."""
        if self.logprobs is None:
            raise ValueError("mean_logprob: log probabilities were not computed; pass logprobs=0 to generate")
        return sum(entry.logprob for entry in self.logprobs) / max(len(self.logprobs), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of `Generator.generate`, checked when they are made; `Generator.generate` describes them."""

    max_new_tokens: int = 256
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int | Sequence[int] = 0
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    ignore_stop_tokens: bool = False
    reuse_cache: bool = False

    def __post_init__(self) -> None:
        if check_integer(self.max_new_tokens, "max_new_tokens") < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}; accepted: at least 1")
        _check_sampling(self.sampling)
        object.__setattr__(self, "stop", check_stop_strings(self.stop))
        if self.logprobs is not None and not 0 <= check_integer(self.logprobs, "logprobs") <= MOST_LOGPROBS:
            raise ValueError(f"logprobs: got {self.logprobs}; accepted: None, or from 0 to {MOST_LOGPROBS}")
        if not _is_list(self.seed):
            check_seed(self.seed)

    def seeds(self, prompts: int) -> int | list[int]:
        """Returns the seed of every prompt, or one for all."""
        if not _is_list(self.seed):
            return check_seed(self.seed)
        seeds: Any = self.seed
        if len(seeds) != prompts:
            raise ValueError(f"seed: got {len(seeds)} of them for {prompts} prompts; give one for each, or one for all")
        return [check_seed(seed, f"seed[{index}]") for index, seed in enumerate(seeds)]


class Run:
    """One call of `generate` or `stream`: iterating over `pieces` runs it.

    Args:
      engine: compiled programs for this number of prompts.
      parameters: the weights.
      tokenizer: converts the tokens to text.
      prompts: tokens of each prompt, checked.
      options: how to generate.
      stop_tokens: ids after which a sequence is finished.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: Parameters,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        options: RunOptions,
        stop_tokens: tuple[int, ...],
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._prompts = prompts
        self._options = options
        self._stop_tokens = stop_tokens
        self._seeds = options.seeds(len(prompts))
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._texts: list[list[str]] = [[] for _ in prompts]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in prompts]
        self._streams = [tokenizer.stream(continuing=True) for _ in prompts]
        self._stops = [StopStrings(check_stop_strings(options.stop)) for _ in prompts]
        self._seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._steps = 0

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Runs the generation; yields the index of a prompt and its next piece of text."""
        engine, keys, sampling = self._engine, self._engine.keys(self._seeds), self._options.sampling
        seconds_before = engine.compile_seconds
        engine.compile(sorted(set(plan_chunks(max(map(len, self._prompts))))))
        self._seconds["compile"] = engine.compile_seconds - seconds_before
        start = time.perf_counter()
        state = engine.prefill(self._prompts, keys, sampling, reuse=self._options.reuse_cache)
        first = jax.tree.map(lambda leaf: np.asarray(leaf)[None], Output(state.tokens, state.logprobs))
        self._seconds["prefill"] = time.perf_counter() - start
        yield from self._take(first)
        start, steps = time.perf_counter(), self._options.max_new_tokens - 1
        for output, newest in engine.decode_ahead(state, steps, keys, sampling, self._all_finished):
            state, tokens = newest, np.asarray(output.tokens)
            self._seconds["decode"] = time.perf_counter() - start
            self._steps += int((tokens >= 0).any(axis=1).sum())
            yield from self._take(output)
        # The newest token is not in the cache, and a finished sequence writes it over the one before.
        pairs = zip(self._prompts, self._tokens, strict=True)
        engine.release(state, [[*prompt, *tokens][:-2] for prompt, tokens in pairs])
        for index, stream in enumerate(self._streams):
            if text := self._stops[index].push(stream.flush()) + self._stops[index].flush():
                self._texts[index].append(text)
                yield index, text

    def generations(self) -> list[Generation]:
        """Returns the generations so far."""
        return [
            Generation(
                "".join(self._texts[index]),
                tuple(self._tokens[index]),
                len(prompt),
                self._stopped_by(index),
                None if self._options.logprobs is None else tuple(self._logprobs[index]),
            )
            for index, prompt in enumerate(self._prompts)
        ]

    def statistics(self) -> Statistics:
        """Returns the statistics of the finished run."""
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
            weight_bytes=self._parameters.bytes_per_step(len(sizes)),
            cache_bytes=tokens_read * per_token // max(self._steps, 1),
            memory_bandwidth=measured_bandwidth(),
            peak_memory=peak_memory(),
        )

    def _take(self, output: Output) -> Iterator[tuple[int, str]]:
        """Adds the tokens of a dispatch to the generations; yields the text that they complete."""
        tokens, logprobs = jax.tree.map(np.asarray, output)
        for index, row in enumerate(tokens.T.tolist()):
            text = ""
            for step, token in enumerate(row):
                if token < 0 or self._stops[index].found:
                    break
                self._tokens[index].append(token)
                if logprobs is not None:
                    self._logprobs[index].append(_entry(token, logprobs, step, index))
                text += self._stops[index].push(self._streams[index].push(token))
            if text:
                self._texts[index].append(text)
                yield index, text

    def _stopped_by(self, index: int) -> Stop:
        """Returns why a sequence ended; "max_new_tokens" while it continues."""
        tokens = self._tokens[index]
        if self._stops[index].found:
            return "stop string"
        if tokens and tokens[-1] in self._stop_tokens:
            return "stop token"
        # The newest token is not in the cache.
        full = len(self._prompts[index]) + len(tokens) - 1 >= self._engine.max_len
        return "cache full" if full else "max_new_tokens"

    def _all_finished(self) -> bool:
        return all(self._stopped_by(index) != "max_new_tokens" for index in range(len(self._prompts)))


def _entry(token: int, logprobs: Logprobs, step: int, index: int) -> TokenLogprobs:
    """Returns the log probabilities of a sequence at one step of a dispatch."""
    likeliest = zip(logprobs.tokens[step, index].tolist(), logprobs.values[step, index].tolist(), strict=True)
    return TokenLogprobs(token, float(logprobs.chosen[step, index]), tuple(likeliest))


# ------------------------------------------------------------------------------------------------- checks of arguments


def check_seed(seed: Any, label: str = "seed") -> int:
    """Returns a seed as a Python integer; raises ValueError where it does not fit into 64 bits."""
    number = check_integer(seed, label)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{label}: got {number}; accepted: an integer from -2**63 to 2**63 - 1")
    return number


def _is_list(seed: Any) -> bool:
    return isinstance(seed, Sequence) and not isinstance(seed, str | bytes)


def _check_sampling(sampling: Any) -> None:
    if not isinstance(sampling, Sampling):
        raise ValueError(
            f"sampling: got {type(sampling).__name__} {sampling!r:.60}; accepted: None, or a Sampling such as "
            "Sampling(temperature=0.8, top_p=0.95)"
        )


def as_batch(prompts: Any) -> list[Any]:
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


def tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer, config: ModelConfig, max_len: int) -> list[list[int]]:
    """Returns the tokens of each prompt.

    Args:
      prompts: texts and token lists.
      tokenizer: the checkpoint's tokenizer.
      config: tells which tokens there are.
      max_len: tokens that the KV cache has room for.

    Raises:
      ValueError: there is no prompt, or one is empty, too long for the cache, or holds a token that there is not.
    """
    if not prompts:
        raise ValueError("prompts: got none; give at least one")
    token_lists = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            token_lists.append(tokenizer.encode(check_text(prompt, f"prompts[{index}]")))
        else:
            token_lists.append(token_ids(prompt, f"prompts[{index}]: not text, so token ids"))
    for index, tokens in enumerate(token_lists):
        if not tokens:
            raise ValueError(f"prompts[{index}]: is empty; give at least one character or token")
        if len(tokens) >= max_len:
            raise ValueError(
                f"prompts[{index}]: has {len(tokens)} tokens, the cache has room for {max_len} with the answer; "
                f"shorten it or raise max_len (the model was trained for {config.max_positions})"
            )
        if outside := [t for t in tokens if not 0 <= t < config.vocab_size]:
            raise ValueError(f"prompts[{index}]: token {outside[0]} is not in 0 to {config.vocab_size - 1}")
    return token_lists
