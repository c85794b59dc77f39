"""The compiled half of generation: prefill and decode of one batch size, with the cache donated.

A prompt is read in chunks of a few fixed sizes, then tokens follow one by one, several to a dispatch. Prompts of
different lengths are aligned at their ends. No length, token, seed or sampling value compiles anything again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.devices import cpu_compiler_options, gpu_compiler_options
from palladion.kernels.tpu_layout import LANES, round_up
from palladion.model.config import ModelConfig
from palladion.model.parameters import Parameters
from palladion.model.sampling import Sampling, sample
from palladion.model.transformer import Cache, empty_cache, forward
from palladion.reference.bits import from_bits, held_in_loop, to_bits, view_bits

PREFILL_CHUNKS: Final = (128, 16)
"""Tokens that a prefill call reads, largest first: large ones for speed, small ones so that a short prompt is quick."""

STEPS_PER_DISPATCH: Final = 16
"""Decode steps that one dispatch runs at most: hides the dispatch, and is as long as a reader waits for text."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    Attributes:
      max_len: tokens that each sequence has room for.
      dtype: of the activations.
      kv_dtype: of the cache.
      backend: of the operations; None means the default of `palladion.using_backend`.
      interpret: whether kernels are interpreted.
    """

    max_len: int
    dtype: str
    kv_dtype: str
    backend: str | None = None
    interpret: bool | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What decode steps hand on.

    Attributes:
      cache: keys and values.
      tokens: int32 `[batch]`, chosen last and not yet in the cache.
      lengths: int32 `[batch]`, tokens in the cache.
      finished: bool `[batch]`: nothing more is generated for these.
    """

    cache: Cache
    tokens: jax.Array
    lengths: jax.Array
    finished: jax.Array


class Engine:
    """Prefill and decode of a batch.

    Args:
      parameters: the weights.
      config: shapes and constants.
      batch: sequences.
      sampling: its filters, not their values, are what is compiled for.
      options: how the model is run.
      stop_tokens: ids after which a sequence is finished.

    Attributes:
      programs: what was compiled so far, by kind: "decode", or ("prefill", tokens).
      compile_seconds: spent on that.
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
        self.compile_seconds = 0.0
        self._forward = functools.partial(
            forward, config=config, dtype=options.dtype, backend=options.backend, interpret=options.interpret
        )
        self._stop_tokens = stop_tokens
        self.programs: dict[Any, Any] = {}
        self._idle_cache: Cache | None = None
        # What programs are compiled for.
        self._parameters_like = jax.eval_shape(lambda: parameters)
        room = round_up(options.max_len, LANES)  # in whole tiles, which is what kernels move
        self.cache_like: Cache = jax.eval_shape(
            lambda: empty_cache(parameters, config, batch, room, jnp.dtype(options.kv_dtype))
        )
        self._integers: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
        self._keys_like = jax.eval_shape(self.keys, 0)
        self._sampling_like = jax.eval_shape(sampling.as_arrays)
        # Programs take and return bits.
        self._parameters = view_bits(parameters)

    def keys(self, seed: int) -> jax.Array:
        """A PRNG key for each sequence; that of a sequence depends on the seed alone, not on its place in the batch."""
        return jnp.broadcast_to(jax.random.key(seed), (self.batch,))

    def compile(self, chunks: Sequence[int] = PREFILL_CHUNKS) -> None:
        """Compiles decode, and prefill for these chunk sizes, as far as that has not been done."""
        for chunk in chunks:
            self._prefill_program(chunk)
        self._decode_program()

    def prefill(self, prompts: Sequence[Sequence[int]], keys: jax.Array, sampling: Sampling) -> State:
        """Reads prompts and chooses the first token of each answer."""
        sampling = sampling.as_arrays()
        cache = self._take_cache()
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        plan = plan_chunks(int(lengths.max()))
        aligned = np.zeros((self.batch, sum(plan)), np.int32)
        for row, prompt in enumerate(prompts):
            aligned[row, sum(plan) - len(prompt) :] = prompt
        done = 0
        for chunk in plan:
            part = jnp.asarray(aligned[:, done : done + chunk])
            done += chunk
            held = jnp.asarray(np.maximum(lengths - (sum(plan) - done), 0))
            chosen, cache = self._prefill_program(chunk)(self._parameters, cache, part, held, keys, sampling)
        tokens, finished = chosen
        return State(cache, tokens, jnp.asarray(lengths), finished)

    def decode(self, state: State, steps: int, keys: jax.Array, sampling: Sampling) -> tuple[jax.Array, State]:
        """Generates up to `steps` tokens for each sequence, at most STEPS_PER_DISPATCH; `state` is donated.

        Returns:
          int32 `[STEPS_PER_DISPATCH, batch]`: the tokens, -1 where a sequence was finished; and the new state.
        """
        arguments = (jnp.int32(min(steps, STEPS_PER_DISPATCH)), keys, sampling.as_arrays())
        tokens, state = self._decode_program()(self._parameters, state, *arguments)
        return tokens, state

    def decode_ahead(
        self,
        state: State,
        steps: int,
        keys: jax.Array,
        sampling: Sampling,
        ended: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[jax.Array, State]]:
        """Generates dispatch by dispatch, each on its way before the last one's tokens are there: no device waits.

        Args:
          state: is donated.
          steps: for each sequence, of all dispatches together.
          keys: of the sequences.
          sampling: how tokens are chosen.
          ended: whether the tokens that were looked at so far end all sequences. Where those that were not do, the
            dispatch ahead finds that itself, and does nothing.

        Yields:
          The tokens of a dispatch, as `decode` returns them; and the newest state, which is that of the next dispatch.
        """
        arriving: jax.Array | None = None
        while True:
            ahead = None
            if steps > 0 and not ended():
                ahead, state = self.decode(state, steps, keys, sampling)
                steps -= STEPS_PER_DISPATCH
            if arriving is not None:
                yield arriving, state
            if ahead is None:
                return
            arriving = ahead

    def release(self, state: State) -> None:
        """Gives the cache back for the next run: what is in it lies past every length and is never read."""
        self._idle_cache = state.cache

    def _take_cache(self) -> Cache:
        # While a cache is in use it is nobody's: should a call fail, the next run makes a new one.
        cache, self._idle_cache = self._idle_cache, None
        if cache is not None:
            return cache
        like = jax.eval_shape(to_bits, self.cache_like)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def _choose(
        self, logits: jax.Array, lengths: jax.Array, keys: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, jax.Array]:
        """The next tokens, and whether nothing follows them: a stop token, or no room in the cache."""
        tokens = sample(logits, jax.vmap(jax.random.fold_in)(keys, lengths), sampling)
        stops = jnp.isin(tokens, jnp.array(self._stop_tokens, jnp.int32))
        return tokens, stops | (lengths >= self.max_len)

    def _prefill_program(self, chunk: int) -> Any:
        key = ("prefill", chunk)
        if key in self.programs:
            return self.programs[key]

        def prefill(
            parameters: Parameters,
            cache: Cache,
            tokens: jax.Array,
            lengths: jax.Array,
            keys: jax.Array,
            sampling: Sampling,
        ) -> tuple[tuple[jax.Array, jax.Array], Cache]:
            logits, cache = self._forward(parameters, tokens=tokens, lengths=lengths, cache=cache)
            return self._choose(logits, lengths, keys, sampling), cache

        tokens = jax.ShapeDtypeStruct((self.batch, chunk), jnp.int32)
        arguments = (tokens, self._integers, self._keys_like, self._sampling_like)
        return self._compiled(key, *self._jitted(prefill, self.cache_like, *arguments))

    def _decode_program(self) -> Any:
        if "decode" in self.programs:
            return self.programs["decode"]
        return self._compiled("decode", *self.decode_loop())

    def decode_loop(self) -> tuple[Any, tuple[Any, ...]]:
        """The loop over decode steps: jitted, not yet lowered, and what describes its arguments.

        `compile` compiles it for the device that is here; a tool may lower it for another.
        """

        def decode(
            parameters: Parameters, initial: State, steps: jax.Array, keys: jax.Array, sampling: Sampling
        ) -> tuple[jax.Array, State]:
            def goes_on(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
                step, state, _ = carry
                return (step < steps) & ~jnp.all(state.finished)

            def body(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
                (step, state_bits, out), weight_bits = held_in_loop((carry, to_bits(parameters)))
                state, weights = from_bits(state_bits, initial), from_bits(weight_bits, parameters)
                lengths = jnp.where(state.finished, state.lengths, state.lengths + 1)
                logits, cache = self._forward(weights, tokens=state.tokens[:, None], lengths=lengths, cache=state.cache)
                tokens, is_last = self._choose(logits, lengths, keys, sampling)
                out = out.at[step].set(jnp.where(state.finished, -1, tokens))
                return step + 1, to_bits(State(cache, tokens, lengths, state.finished | is_last)), out

            out = jnp.full((STEPS_PER_DISPATCH, self.batch), -1, jnp.int32)
            _, bits, out = jax.lax.while_loop(goes_on, body, (jnp.int32(0), to_bits(initial), out))
            return out, from_bits(bits, initial)

        finished: Any = jax.ShapeDtypeStruct((self.batch,), jnp.bool)
        state = State(self.cache_like, self._integers, self._integers, finished)
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        return self._jitted(decode, state, steps, self._keys_like, self._sampling_like)

    def _jitted(self, function: Callable[..., tuple[Any, Any]], donated: Any, *arguments: Any) -> tuple[Any, Any]:
        """`function(parameters, donated, …) -> (result, donated)`, jitted over bits, and what its arguments are."""

        def on_bits(parameters: Parameters, donated_bits: Any, *arguments: Any) -> tuple[Any, Any]:
            result, updated = function(
                from_bits(parameters, self._parameters_like), from_bits(donated_bits, donated), *arguments
            )
            return result, to_bits(updated)

        options = cpu_compiler_options() | gpu_compiler_options()
        jitted = jax.jit(on_bits, donate_argnums=1, compiler_options=options)
        return jitted, (self._parameters, jax.eval_shape(to_bits, donated), *arguments)

    def _compiled(self, key: Any, jitted: Any, arguments: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        self.programs[key] = jitted.lower(*arguments).compile()
        self.compile_seconds += time.perf_counter() - start
        return self.programs[key]


def plan_chunks(tokens: int) -> list[int]:
    """Chunk sizes that hold that many tokens, as few calls as PREFILL_CHUNKS allows with little padding."""
    large, small = PREFILL_CHUNKS
    count, rest = divmod(tokens, large)
    return [large] * count + [small] * -(-rest // small)
