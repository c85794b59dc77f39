"""Sampling: chooses the next token from the logits, greedily or at random among those that the filters keep."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST: Final = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: temperatures and probabilities are raised to it, as smaller ones may flush to 0."""

LARGEST: Final = {"temperature": float(np.finfo(np.float32).max), "top_k": 2**31 - 1, "top_p": 1, "min_p": 1}
"""The largest values that make a difference; larger ones are lowered to them."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters, as a pytree: which filters are set is static, their values never cause a recompilation.

    Filters apply in the order of the attributes, each to the tokens that the previous one kept. Filters without a
    temperature imply temperature 1; at temperature 0 they have no effect and are dropped. A value may also be a JAX
    scalar, traced or not: it is not checked, and the caller keeps it in range.

    Attributes:
      temperature: divisor of the logits. 0, or None without filters, chooses the likeliest token.
      top_k: keeps the k likeliest tokens, and those that tie with the last of them.
      top_p: keeps the likeliest tokens that together reach this probability (arXiv 1904.09751).
      min_p: keeps tokens at least this fraction as likely as the likeliest (arXiv 2407.01082).

    Raises:
      ValueError: a value is out of range or has the wrong type.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

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
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def as_arrays(self) -> Sampling:
        """Returns a copy with the values as arrays of fixed dtypes, so that new values reuse the compiled program."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        dtypes = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in values}
        arrays: dict[str, Any] = {
            name: None if value is None else jnp.asarray(value, dtypes[name]) for name, value in values.items()
        }
        return Sampling(**arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Returns the values as children, for JAX."""
        return (self.temperature, self.top_k, self.top_p, self.min_p), None

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
    number = min(number, LARGEST[name])
    return int(number) if name == "top_k" else float(number)


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses a token for every sequence.

    Args:
      logits: float32 `[batch, vocab]`.
      keys: PRNG keys `[batch]`, one per sequence, so that no sequence depends on the others in the batch.
      sampling: temperature and filters.

    Returns:
      int32 `[batch]`.
    """
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
