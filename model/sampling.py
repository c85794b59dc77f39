"""Sampling: chooses the next token from the logits, greedily or at random among those that the filters keep.

Penalties and biases change the logits first, so that they act on a greedy choice too.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST: Final = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: temperatures and probabilities are raised to it, as smaller ones may flush to 0."""

LARGEST: Final = {"temperature": float(np.finfo(np.float32).max), "top_k": 2**31 - 1}
"""The largest values that make a difference; larger ones are lowered to them."""

LARGEST_PENALTY: Final = 1e6
"""Bound of penalties and biases, far beyond any logit: sums of them stay finite."""

ACCEPTED_BIAS: Final = f"from {-LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}"
"""Description of penalties and biases, for errors."""

NEUTRAL: Final = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Values of the penalties that change nothing; they count as None, so that nothing is computed for them."""

BIAS_ROOM: Final = 16
"""Biases are padded to a multiple of this number of tokens, so that few numbers of them compile anew."""

NO_TOKEN: Final = 2**31 - 1
"""The token that pads biases: no vocabulary has it."""


class LogitBias(NamedTuple):
    """Biases as arrays.

    Attributes:
      tokens: int32 `[n]`, padded with `NO_TOKEN`.
      values: float32 `[n]`, added to the logits of these tokens.
    """

    tokens: jax.Array
    values: jax.Array


class TokenCounts(NamedTuple):
    """Tokens that each sequence has had so far, as far as the penalties that are set need it.

    Attributes:
      prompt: bool `[batch, vocab]`, tokens in the prompt; None without a repetition penalty.
      generated: int32 `[batch, vocab]`, how often each token was generated; None without any penalty.
    """

    prompt: jax.Array | None = None
    generated: jax.Array | None = None


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters, as a pytree: which filters are set is static, their values never cause a recompilation.

    Filters apply in the order of the attributes, each to the tokens that the previous one kept. Filters without a
    temperature imply temperature 1; at temperature 0 they have no effect and are dropped. Penalties and biases apply
    before the temperature, and to a greedy choice too. A value may also be a JAX scalar, traced or not: it is not
    checked, and the caller keeps it in range.

    Attributes:
      temperature: divisor of the logits. 0, or None without filters, chooses the likeliest token.
      top_k: keeps the k likeliest tokens, and those that tie with the last of them.
      top_p: keeps the likeliest tokens that together reach this probability (arXiv 1904.09751).
      min_p: keeps tokens at least this fraction as likely as the likeliest (arXiv 2407.01082).
      repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the prompt or the text
        generated so far has (arXiv 1909.05858); above 1 it discourages them.
      presence_penalty: subtracted from the logits of tokens generated so far.
      frequency_penalty: subtracted from a token's logit once for each time that it was generated.
      logit_bias: biases by token id, added to their logits; -1e6 excludes a token.

    Raises:
      ValueError: a value is out of range or has the wrong type.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | LogitBias | None = None

    def __post_init__(self) -> None:
        values = {
            "temperature": _checked("temperature", self.temperature, lambda x: x >= 0, "0 (greedy) or above, finite"),
            "top_k": _checked("top_k", self.top_k, lambda x: x >= 1 and x == int(x), "a whole number, at least 1"),
            "top_p": _checked("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0, at most 1"),
            "min_p": _checked("min_p", self.min_p, lambda x: 0 <= x <= 1, "0 to 1"),
        }
        if isinstance(values["temperature"], float) and values["temperature"] == 0:
            values = dict.fromkeys(values)
        elif values["temperature"] is None and any(value is not None for value in values.values()):
            values["temperature"] = 1.0
        for name, value in (values | self._checked_penalties()).items():
            object.__setattr__(self, name, value)

    def _checked_penalties(self) -> dict[str, Any]:
        """Returns the penalties and biases, checked; None for those that change nothing."""
        values = {
            name: _checked(name, getattr(self, name), lambda x: abs(x) <= LARGEST_PENALTY, ACCEPTED_BIAS)
            for name in ("presence_penalty", "frequency_penalty")
        }
        values["repetition_penalty"] = _checked(
            "repetition_penalty", self.repetition_penalty, lambda x: 0 < x <= LARGEST_PENALTY, "above 0, at most 1e+06"
        )
        for name, value in values.items():
            if isinstance(value, float) and value == NEUTRAL[name]:
                values[name] = None
        return values | {"logit_bias": _checked_bias(self.logit_bias)}

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty is set, so that the tokens of each sequence must be counted."""
        return any(getattr(self, name) is not None for name in NEUTRAL)

    def as_arrays(self) -> Sampling:
        """Returns a copy with the values as arrays of fixed dtypes, so that new values reuse the compiled program."""
        arrays: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, LogitBias):
                arrays[field.name] = value
            elif field.name == "logit_bias":
                arrays[field.name] = _bias_arrays(value)
            else:
                arrays[field.name] = jnp.asarray(value, jnp.int32 if field.name == "top_k" else jnp.float32)
        return Sampling(**arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Returns the values as children, for JAX."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)), None

    @classmethod
    def tree_unflatten(cls, _: None, values: tuple[Any, ...]) -> Sampling:
        """Returns a Sampling without checks: JAX puts tracers, shapes and its own markers into pytrees."""
        sampling = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(sampling, field.name, value)
        return sampling


def _checked(name: str, value: Any, valid: Callable[[Any], bool], accepted: str) -> Any:
    """Returns a value as a Python number; None and JAX scalars unchanged."""
    if value is None or (isinstance(value, jax.Array) and value.shape == ()):
        return value
    number = value.item() if isinstance(value, np.generic | np.ndarray) and value.shape == () else value
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    is_finite = is_number and (isinstance(number, numbers.Rational) or math.isfinite(number))
    if not is_finite or not valid(number):
        raise ValueError(f"Sampling.{name}: got {value!r}; accepted: {accepted}, or None")
    number = min(number, LARGEST.get(name, number))
    return int(number) if name == "top_k" else float(number)


def _checked_bias(bias: Any) -> Any:
    """Returns biases with Python numbers, by token in ascending order; None for none, and arrays unchanged."""
    if bias is None or isinstance(bias, LogitBias):
        return bias
    accepted = "a dictionary of token ids and numbers, such as {42: -3.5}"
    if not isinstance(bias, Mapping):
        raise ValueError(f"Sampling.logit_bias: got {type(bias).__name__} {bias!r:.60}; accepted: {accepted}, or None")
    checked = {}
    for token, value in bias.items():
        if not isinstance(token, int | np.integer) or isinstance(token, bool) or not 0 <= token < NO_TOKEN:
            raise ValueError(f"Sampling.logit_bias: got {token!r:.60} as a token id; accepted: {accepted}")
        checked[int(token)] = _checked("logit_bias", value, lambda x: abs(x) <= LARGEST_PENALTY, ACCEPTED_BIAS)
    return dict(sorted(checked.items())) or None


def _bias_arrays(bias: Mapping[int, float]) -> LogitBias:
    room = -len(bias) % BIAS_ROOM
    return LogitBias(
        jnp.asarray([*bias, *[NO_TOKEN] * room], jnp.int32), jnp.asarray([*bias.values(), *[0.0] * room], jnp.float32)
    )


def count_prompts(prompts: Sequence[Sequence[int]], vocab: int, sampling: Sampling) -> TokenCounts:
    """Returns the counts with which generation begins: those of the prompts' tokens.

    Args:
      prompts: tokens of each prompt.
      vocab: number of tokens that there are.
      sampling: decides what is counted.
    """
    if not sampling.counts_tokens:
        return TokenCounts()
    shape = (len(prompts), vocab)
    generated = jnp.zeros(shape, jnp.int32)
    if sampling.repetition_penalty is None:
        return TokenCounts(generated=generated)
    present = np.zeros(shape, bool)
    for row, prompt in zip(present, prompts, strict=True):
        row[np.asarray(prompt, np.int32)] = True
    return TokenCounts(jnp.asarray(present), generated)


def count_chosen(counts: TokenCounts, tokens: jax.Array, active: jax.Array) -> TokenCounts:
    """Counts the newest tokens `[batch]` of the sequences that are active, bool `[batch]`."""
    if counts.generated is None:
        return counts
    rows = jnp.arange(len(tokens))
    return counts._replace(generated=counts.generated.at[rows, tokens].add(active.astype(jnp.int32)))


def penalized(logits: jax.Array, sampling: Sampling, counts: TokenCounts) -> jax.Array:
    """Returns the logits float32 `[batch, vocab]` with penalties and biases applied; those not set cost nothing."""
    if sampling.counts_tokens and counts.generated is None:
        raise ValueError("sample: counts: got none; penalties need those of `count_prompts`")
    prompt: Any = counts.prompt
    generated: Any = counts.generated
    penalty = sampling.repetition_penalty
    if penalty is not None:
        seen = prompt | (generated > 0)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.presence_penalty is not None:
        logits = logits - jnp.where(generated > 0, sampling.presence_penalty, 0.0)
    if sampling.frequency_penalty is not None:
        logits = logits - sampling.frequency_penalty * generated.astype(jnp.float32)
    if sampling.logit_bias is not None:
        bias = sampling.logit_bias
        tokens, values = bias if isinstance(bias, LogitBias) else _bias_arrays(bias)
        logits = logits.at[:, tokens].add(values[None], mode="drop")
    return logits


class Logprobs(NamedTuple):
    """Log probabilities of the newest tokens under the model itself, before penalties, temperature and filters.

    Attributes:
      chosen: float32 `[batch]`, of the tokens that were chosen.
      tokens: int32 `[batch, n]`, the n likeliest tokens, likeliest first.
      values: float32 `[batch, n]`, their log probabilities.
    """

    chosen: jax.Array
    tokens: jax.Array
    values: jax.Array


def log_probabilities(logits: jax.Array, tokens: jax.Array, likeliest: int) -> Logprobs:
    """Returns the log probabilities of the chosen tokens `[batch]` and of a number of the likeliest ones."""
    normalized = jax.nn.log_softmax(logits, axis=-1)
    values, indices = jax.lax.top_k(normalized, likeliest)
    return Logprobs(jnp.take_along_axis(normalized, tokens[:, None], axis=-1)[:, 0], indices, values)


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling, counts: TokenCounts | None = None) -> jax.Array:
    """Chooses a token for every sequence.

    Args:
      logits: float32 `[batch, vocab]`.
      keys: PRNG keys `[batch]`, one per sequence, so that no sequence depends on the others in the batch.
      sampling: temperature, filters, penalties and biases.
      counts: tokens of each sequence so far, which penalties need.

    Returns:
      int32 `[batch]`.
    """
    logits = penalized(logits, sampling, counts or TokenCounts())
    if sampling.temperature is None:
        return greedy(logits)
    # The largest logit is subtracted first, so that it is 0 at any temperature and nothing overflows.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = filtered(shifted / jnp.maximum(sampling.temperature, SMALLEST), sampling)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def greedy(logits: jax.Array) -> jax.Array:
    """Returns the index of each row's largest logit, the first among equals; int32 `[batch]`."""
    # Two plain reductions: XLA's argmax reduces value and index together, five times slower on a CPU.
    vocab = logits.shape[-1]
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.where(is_largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(index, axis=-1)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits `[batch, vocab]`, -inf for tokens that the filters drop."""
    if sampling.top_k is not None:
        # A k larger than the vocabulary keeps every token.
        k = jnp.minimum(sampling.top_k, logits.shape[-1])
        threshold = _largest_threshold(logits, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= k)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        # The sum of all probabilities may round to less than 1, and a tiny top_p to 0.
        enough = jnp.clip(sampling.top_p, SMALLEST, jnp.sum(probabilities, axis=-1))
        threshold = _largest_threshold(
            logits, lambda kept: jnp.sum(jnp.where(kept, probabilities, 0.0), axis=-1) >= enough
        )
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if sampling.min_p is not None:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return logits


def _largest_threshold(logits: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the largest float32 threshold t `[batch, 1]` for which `is_enough(logits >= t)` holds.

    Bisects the bits of t, exact after 32 steps. Each step reads the logits once; sorting a whole vocabulary takes far
    longer.
    """
    lowest = jnp.full((logits.shape[0],), _sort_key(jnp.float32(-jnp.inf)))
    highest = jnp.full((logits.shape[0],), _sort_key(jnp.float32(jnp.inf)))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the keys of thresholds: low keeps enough, anything above high does not
        middle = low + (high - low) // 2 + (high - low) % 2
        enough = is_enough(logits >= _from_sort_key(middle)[:, None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (lowest, highest))
    return _from_sort_key(low)[:, None]


def _sort_key(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 that sort in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_sort_key(key: jax.Array) -> jax.Array:
    """Inverts `_sort_key`."""
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
