"""From logits to the next token: greedy, or drawn at a temperature from what the filters leave."""

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
"""The smallest number that arithmetic keeps apart from 0: temperatures and probabilities are raised to it."""

LARGEST: Final = {"temperature": float(np.finfo(np.float32).max), "top_k": 2**31 - 1, "top_p": 1, "min_p": 1}
"""The largest values that differ from others; larger ones are lowered to them."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. A pytree: which filters are on is static, their values are not and never recompile.

    Filters apply in the order of the attributes, each to what the one before has left. Without a temperature they mean
    temperature 1; at temperature 0 they change nothing and are dropped. A value may also be a JAX scalar, traced or
    not, which is taken as it is; the caller keeps it in its range.

    Attributes:
      temperature: what logits are divided by; None without a filter, or 0, takes the likeliest token.
      top_k: keeps the k likeliest tokens (and those as likely as the last of them).
      top_p: keeps the likeliest tokens that together reach this probability (arXiv 1904.09751).
      min_p: keeps tokens at least this fraction as likely as the likeliest (arXiv 2407.01082).

    Raises:
      ValueError: a value outside its range, or of the wrong type.
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

    @classmethod
    def of(
        cls,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> Sampling:
        """Makes a Sampling, as the class itself does; see the attributes."""
        return cls(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    def as_arrays(self) -> Sampling:
        """The same with values as arrays, whose dtypes are those of the fields: new values never need a new program."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        dtypes = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in values}
        arrays: dict[str, Any] = {
            name: None if value is None else jnp.asarray(value, dtypes[name]) for name, value in values.items()
        }
        return Sampling(**arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """The values, for JAX."""
        return (self.temperature, self.top_k, self.top_p, self.min_p), None

    @classmethod
    def tree_unflatten(cls, _: None, values: tuple[Any, ...]) -> Sampling:
        """A Sampling of anything, unchecked: JAX puts tracers, shapes and markers of its own into trees."""
        sampling = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(sampling, field.name, value)
        return sampling


def _checked(name: str, value: Any, valid: Callable[[Any], bool], accepted: str) -> Any:
    """A value as a Python number, however it was written; None and JAX's scalars as they are."""
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
      keys: PRNG keys `[batch]`, one for each sequence, so that no sequence depends on the others beside it.
      sampling: how.

    Returns:
      int32 `[batch]`.
    """
    if sampling.temperature is None:
        return greedy(logits)
    # Less the largest first, which is then 0 however small the temperature: nothing overflows upwards.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = filtered(shifted / jnp.maximum(sampling.temperature, SMALLEST), sampling)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def greedy(logits: jax.Array) -> jax.Array:
    """The index of each row's largest logit, the first of equals; int32 `[batch]`."""
    # Two plain reductions: XLA's argmax carries value and index together, five times slower on a CPU.
    vocab = logits.shape[-1]
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.where(is_largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(index, axis=-1)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the logits of tokens that the filters drop to -inf; `[batch, vocab]`."""
    if sampling.top_k is not None:
        # A k beyond the vocabulary keeps all of it.
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
    """The largest float32 t `[batch, 1]` for which `is_enough(logits >= t)` holds.

    A bisection over the bits of t, exact after 32 halvings: each reads the logits once, where a sort of a whole
    vocabulary takes far longer.
    """
    lowest = jnp.full((logits.shape[0],), _order(jnp.float32(-jnp.inf)))
    highest = jnp.full((logits.shape[0],), _order(jnp.float32(jnp.inf)))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough at low; not known above high
        middle = low + (high - low) // 2 + (high - low) % 2
        enough = is_enough(logits >= _float(middle)[:, None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (lowest, highest))
    return _float(low)[:, None]


def _order(x: jax.Array) -> jax.Array:
    """float32 to uint32 that sorts the same way."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _float(order: jax.Array) -> jax.Array:
    """The inverse of `_order`."""
    bits = jnp.where(order >> 31 == 1, order & jnp.uint32((1 << 31) - 1), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
