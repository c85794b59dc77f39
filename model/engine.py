"""The compiled half of generation: prefill and decode of one batch size, with the cache donated.

Prompts are prefilled in chunks of a few fixed sizes, aligned at their ends. Then tokens are decoded one by one, several
steps per dispatch. No length, token, seed or sampling value causes a recompilation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.devices import cpu_compiler_options
from palladion.kernels.integers import round_up
from palladion.kernels.tpu_layout import LANES
from palladion.model.config import ModelConfig
from palladion.model.parameters import Parameters
from palladion.model.sampling import (
    Logprobs,
    Sampling,
    TokenCounts,
    count_chosen,
    count_prompts,
    log_probabilities,
    sample,
)
from palladion.model.transformer import Cache, empty_cache, forward
from palladion.reference.bits import from_bits, held_in_loop, to_bits, view_bits
from palladion.reference.platforms import target_platform

PREFILL_CHUNKS: Final = (128, 16)
"""Tokens per prefill call, largest first: large chunks are fast per token, small ones keep short prompts quick."""

STEPS_PER_DISPATCH: Final = {"cpu": 16, "gpu": 8, "tpu": 16}
"""Most decode steps per dispatch: enough to hide the dispatch, few enough that streamed text does not stutter.

On a GPU a dispatch always runs all of them, finished or not; elsewhere it ends with the last sequence.
"""

ProgramKey = Literal["decode"] | tuple[Literal["prefill"], int]
"""A compiled program: decode, or prefill of a number of tokens."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Options that decide what is compiled for a model.

    Attributes:
      max_len: tokens that each sequence has room for.
      dtype: dtype of the activations.
      kv_dtype: dtype of the KV cache.
      backend: backend of the operations; None means the default of `palladion.using_backend`.
      interpret: whether kernels are interpreted.
      steps_per_dispatch: most decode steps per dispatch; None takes the platform's, in STEPS_PER_DISPATCH.
      logprobs: number of likeliest tokens whose log probabilities come with each token; None computes none.
    """

    max_len: int
    dtype: str
    kv_dtype: str
    backend: str | None = None
    interpret: bool | None = None
    steps_per_dispatch: int | None = None
    logprobs: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state that decode steps carry.

    Attributes:
      cache: keys and values.
      tokens: int32 `[batch]`, the newest tokens, not yet in the cache.
      lengths: int32 `[batch]`, tokens in the cache.
      finished: bool `[batch]`, sequences for which nothing more is generated.
      counts: tokens that the sequences have had, as far as penalties need them.
      logprobs: those of the newest tokens, or None.
    """

    cache: Cache
    tokens: jax.Array
    lengths: jax.Array
    finished: jax.Array
    counts: TokenCounts
    logprobs: Logprobs | None


class Output(NamedTuple):
    """The tokens of a dispatch.

    Attributes:
      tokens: int32 `[steps_per_dispatch, batch]`, -1 where a sequence was finished.
      logprobs: their log probabilities, `[steps_per_dispatch, ...]`, or None.
    """

    tokens: jax.Array
    logprobs: Logprobs | None


class Engine:
    """Compiled prefill and decode of one batch size.

    Args:
      parameters: the weights.
      config: shapes and constants of the model.
      batch: number of sequences.
      sampling: decides which filters are compiled; their values are arguments.
      options: how the model is run.
      stop_tokens: ids after which a sequence is finished.

    Attributes:
      batch: number of sequences.
      max_len: tokens that each sequence has room for.
      steps_per_dispatch: most decode steps per dispatch.
      cache_like: shapes and dtypes of the KV cache.
      programs: compiled programs by key.
      compile_seconds: time spent compiling them.
    """

    def __init__(
        self,
        parameters: Parameters,
        config: ModelConfig,
        batch: int,
        sampling: Sampling,
        options: EngineOptions,
        stop_tokens: tuple[int, ...],
    ) -> None:
        self.batch = batch
        self.max_len = options.max_len
        self.steps_per_dispatch = options.steps_per_dispatch or STEPS_PER_DISPATCH[target_platform()]
        self.compile_seconds = 0.0
        self._forward = functools.partial(
            forward, config=config, dtype=options.dtype, backend=options.backend, interpret=options.interpret
        )
        self._stop_tokens = stop_tokens
        self._logprobs = options.logprobs
        self._vocab_size = config.vocab_size
        self.programs: dict[ProgramKey, jax.stages.Compiled] = {}
        self._idle_cache: Cache | None = None
        self._idle_tokens: list[list[int]] = []
        # Shapes and dtypes of the programs' arguments.
        self._parameters_like = jax.eval_shape(lambda: parameters)
        room = round_up(options.max_len, LANES)  # kernels move whole tiles
        self.cache_like: Cache = jax.eval_shape(
            lambda: empty_cache(parameters, config, batch, room, jnp.dtype(options.kv_dtype))
        )
        self._integers: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
        self._logprobs_like: Logprobs | None = None
        if options.logprobs is not None:
            logits = jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32)
            likeliest = functools.partial(log_probabilities, likeliest=options.logprobs)
            self._logprobs_like = jax.eval_shape(likeliest, logits, self._integers)
        self._keys_like = jax.eval_shape(self.keys, 0)
        self._sampling_like = jax.eval_shape(sampling.as_arrays)
        self._counts_like: TokenCounts = jax.eval_shape(
            lambda: count_prompts([[]] * batch, config.vocab_size, sampling)
        )
        # Programs take and return narrow floats as bits; see `reference/bits.py`.
        self._parameters = view_bits(parameters)

    def keys(self, seeds: int | Sequence[int]) -> jax.Array:
        """Returns a PRNG key per sequence, of its own seed or of one for all; places in the batch do not matter."""
        if not isinstance(seeds, Sequence):
            return jnp.broadcast_to(jax.random.key(seeds), (self.batch,))
        return jnp.stack([jax.random.key(seed) for seed in seeds])

    def compile(self, chunks: Sequence[int] = PREFILL_CHUNKS) -> None:
        """Compiles decode, and prefill for these chunk sizes, unless they are compiled already."""
        for chunk in chunks:
            self._prefill_program(chunk)
        self._decode_program()

    def prefill(
        self, prompts: Sequence[Sequence[int]], keys: jax.Array, sampling: Sampling, *, reuse: bool = False
    ) -> State:
        """Prefills the prompts and chooses the first token of each answer.

        Args:
          prompts: tokens of each prompt.
          keys: PRNG keys of the sequences.
          sampling: how tokens are chosen.
          reuse: whether keys and values that `release` left are kept, as far as every prompt begins with their tokens.
        """
        cache, held = self._take_cache()
        counts = count_prompts(prompts, self._vocab_size, sampling)
        sampling = sampling.as_arrays()
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        plan = plan_chunks(int(lengths.max()) - (common_prefix(prompts, held) if reuse else 0))
        total = sum(plan)
        aligned = np.zeros((self.batch, total), np.int32)
        for row, prompt in enumerate(prompts):
            newest = prompt[-total:]
            aligned[row, total - len(newest) :] = newest
        end = 0
        for chunk in plan:
            chunk_tokens = jnp.asarray(aligned[:, end : end + chunk])
            end += chunk
            cached = jnp.asarray(np.maximum(lengths - (total - end), 0))
            program = self._prefill_program(chunk)
            chosen, cache = program(self._parameters, cache, chunk_tokens, cached, keys, sampling, counts)
        tokens, finished, *rest = chosen
        return State(cache, tokens, jnp.asarray(lengths), finished, *rest)

    def decode(self, state: State, steps: int, keys: jax.Array, sampling: Sampling) -> tuple[Output, State]:
        """Generates up to `steps` tokens for each sequence, at most `steps_per_dispatch`; `state` is donated."""
        arguments = (jnp.int32(min(steps, self.steps_per_dispatch)), keys, sampling.as_arrays())
        output, state = self._decode_program()(self._parameters, state, *arguments)
        return output, state

    def decode_ahead(
        self,
        state: State,
        steps: int,
        keys: jax.Array,
        sampling: Sampling,
        ended: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[Output, State]]:
        """Generates dispatch by dispatch, one dispatch ahead of the reader, so that the device never waits.

        Args:
          state: the state after prefill; it is donated.
          steps: decode steps, all dispatches together.
          keys: PRNG keys of the sequences.
          sampling: how tokens are chosen.
          ended: whether the tokens yielded so far finish every sequence. If only the pending dispatch finishes them,
            the one after it is launched anyway, and generates nothing.

        Yields:
          The tokens of a dispatch, and the newest state, that after the pending dispatch.
        """
        pending: Output | None = None
        while True:
            launched = None
            if steps > 0 and not ended():
                launched, state = self.decode(state, steps, keys, sampling)
                steps -= self.steps_per_dispatch
            if pending is not None:
                yield pending, state
            if launched is None:
                return
            pending = launched

    def release(self, state: State, tokens: Sequence[Sequence[int]] = ()) -> None:
        """Returns the cache for the next run to reuse; `tokens` of each sequence are those whose keys it holds."""
        self._idle_cache, self._idle_tokens = state.cache, [list(row) for row in tokens]

    def _take_cache(self) -> tuple[Cache, list[list[int]]]:
        """Returns a cache and the tokens in it."""
        # A cache in use is not kept here: if a call fails, the next run allocates a new one.
        cache, self._idle_cache = self._idle_cache, None
        if cache is not None:
            return cache, self._idle_tokens
        like = jax.eval_shape(to_bits, self.cache_like)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), []

    def _choose(
        self, logits: jax.Array, lengths: jax.Array, keys: jax.Array, sampling: Sampling, counts: TokenCounts
    ) -> tuple[jax.Array, jax.Array, Logprobs | None]:
        """Returns the next tokens, whether each sequence ends there (a stop token, or a full cache), and logprobs."""
        tokens = sample(logits, jax.vmap(jax.random.fold_in)(keys, lengths), sampling, counts)
        stops = jnp.isin(tokens, jnp.array(self._stop_tokens, jnp.int32))
        logprobs = None if self._logprobs is None else log_probabilities(logits, tokens, self._logprobs)
        return tokens, stops | (lengths >= self.max_len), logprobs

    def _prefill_program(self, chunk: int) -> jax.stages.Compiled:
        key: ProgramKey = ("prefill", chunk)
        if key in self.programs:
            return self.programs[key]

        def prefill(
            parameters: Parameters,
            cache: Cache,
            tokens: jax.Array,
            lengths: jax.Array,
            keys: jax.Array,
            sampling: Sampling,
            counts: TokenCounts,
        ) -> tuple[tuple[jax.Array, jax.Array, TokenCounts, Logprobs | None], Cache]:
            logits, cache = self._forward(parameters, tokens=tokens, lengths=lengths, cache=cache)
            chosen, finished, logprobs = self._choose(logits, lengths, keys, sampling, counts)
            counts = count_chosen(counts, chosen, jnp.ones_like(finished))
            return (chosen, finished, counts, logprobs), cache

        tokens = jax.ShapeDtypeStruct((self.batch, chunk), jnp.int32)
        arguments = (tokens, self._integers, self._keys_like, self._sampling_like, self._counts_like)
        return self._compiled(key, *self._jitted(prefill, self.cache_like, *arguments))

    def _decode_program(self) -> jax.stages.Compiled:
        if "decode" in self.programs:
            return self.programs["decode"]
        return self._compiled("decode", *self.decode_loop())

    def decode_loop(self) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
        """Returns the jitted loop over decode steps, not yet lowered, and the shapes and dtypes of its arguments.

        `compile` compiles it for the local device; a tool may lower it for another one.
        """

        def decode(
            parameters: Parameters, initial: State, steps: jax.Array, keys: jax.Array, sampling: Sampling
        ) -> tuple[Output, State]:
            def unfinished(carry: tuple[jax.Array, State, Output]) -> jax.Array:
                step, state, _ = carry
                if target_platform() == "gpu":
                    # XLA knows the number of steps, and launches one after the other. Any other condition the host
                    # reads back after each step, while the device waits for the next launch.
                    return step < self.steps_per_dispatch
                return (step < steps) & ~jnp.all(state.finished)

            def body(carry: tuple[jax.Array, State, Output]) -> tuple[jax.Array, State, Output]:
                (step, state_bits, out), weight_bits = held_in_loop((carry, to_bits(parameters)))
                state, weights = from_bits(state_bits, initial), from_bits(weight_bits, parameters)
                # A step that does not count writes to the cache what the next one that counts writes again.
                active = ~state.finished & (step < steps)
                lengths = jnp.where(state.finished, state.lengths, state.lengths + 1)
                logits, cache = self._forward(weights, tokens=state.tokens[:, None], lengths=lengths, cache=state.cache)
                tokens, is_last, logprobs = self._choose(logits, lengths, keys, sampling, state.counts)
                newest = Output(jnp.where(active, tokens, -1), logprobs)
                out = jax.tree.map(lambda rows, row: rows.at[step].set(row), out, newest)
                new = State(
                    cache,
                    jnp.where(active, tokens, state.tokens),
                    jnp.where(active, lengths, state.lengths),
                    state.finished | (active & is_last),
                    count_chosen(state.counts, tokens, active),
                    logprobs,
                )
                return step + 1, to_bits(new), out

            # Steps that are not run leave -1.
            out = jax.tree.map(
                lambda row: jnp.full((self.steps_per_dispatch, *row.shape), -1, row.dtype),
                Output(initial.tokens, initial.logprobs),
            )
            _, bits, out = jax.lax.while_loop(unfinished, body, (jnp.int32(0), to_bits(initial), out))
            return out, from_bits(bits, initial)

        finished: Any = jax.ShapeDtypeStruct((self.batch,), jnp.bool)
        state = State(self.cache_like, self._integers, self._integers, finished, self._counts_like, self._logprobs_like)
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        return self._jitted(decode, state, steps, self._keys_like, self._sampling_like)

    def _jitted(
        self, function: Callable[..., tuple[Any, Any]], donated: Any, *arguments: Any
    ) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
        """Jits `function(parameters, donated, …) -> (result, donated)` over bits; returns it and its arguments."""

        def on_bits(parameters: Parameters, donated_bits: Any, *arguments: Any) -> tuple[Any, Any]:
            result, updated = function(
                from_bits(parameters, self._parameters_like), from_bits(donated_bits, donated), *arguments
            )
            return result, to_bits(updated)

        # On a GPU XLA's defaults make one CUDA graph of the kernels of a step.
        jitted = jax.jit(on_bits, donate_argnums=1, compiler_options=cpu_compiler_options())
        return jitted, (self._parameters, jax.eval_shape(to_bits, donated), *arguments)

    def _compiled(self, key: ProgramKey, jitted: jax.stages.Wrapped, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        start = time.perf_counter()
        self.programs[key] = jitted.lower(*arguments).compile()
        self.compile_seconds += time.perf_counter() - start
        return self.programs[key]


def plan_chunks(tokens: int) -> list[int]:
    """Returns chunk sizes that hold a number of tokens: as many large chunks as fit, then small ones."""
    large, small = PREFILL_CHUNKS
    count, rest = divmod(tokens, large)
    return [large] * count + [small] * math.ceil(rest / small)


def common_prefix(prompts: Sequence[Sequence[int]], held: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens every prompt shares with those that the cache holds, at most all but its last one."""
    if not held:
        return 0
    return min(
        next(
            (index for index, (token, other) in enumerate(zip(prompt, row, strict=False)) if token != other),
            min(len(prompt) - 1, len(row)),
        )
        for prompt, row in zip(prompts, held, strict=True)
    )
