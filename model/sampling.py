"""From logits to the next token: greedy, or drawn at a temperature from what the filters leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. A pytree: which filters are on is static, their values are not and never recompile.

    Filters apply in the order of the attributes, each to what the one before has left.

    Attributes:
      temperature: what logits are divided by; None or 0 takes the likeliest token, and no filter matters.
      top_k: keeps the k likeliest tokens (and those as likely as the last of them).
      top_p: keeps the likeliest tokens that together reach this probability (arXiv 1904.09751).
      min_p: keeps tokens at least this fraction as likely as the likeliest (arXiv 2407.01082).

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @classmethod
    def of(
        cls,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> Sampling:
        """Checks the values; see the attributes. Filters without a temperature mean temperature 1."""
        for name, value, valid, accepted in (
            ("temperature", temperature, temperature is None or temperature >= 0, "0 (greedy) or above"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
            ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "0 to 1"),
        ):
            if not valid:
                raise ValueError(f"Sampling.{name}: got {value}; accepted: {accepted}, or None")
        filtered = not (top_k is top_p is min_p is None)
        if temperature == 0 or (temperature is None and not filtered):
            return cls()
        temperature = 1.0 if temperature is None else temperature
        return cls(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


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
    logits = filtered(logits / sampling.temperature, sampling)
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
        # The sum of all probabilities may round to less than 1.
        enough = jnp.minimum(sampling.top_p, jnp.sum(probabilities, axis=-1))
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
