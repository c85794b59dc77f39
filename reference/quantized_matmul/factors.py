"""The factors that turn the codes of a weight into weights: scale * (code - zero) + minimum."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from palladion.reference.quantization import QuantizedArray


class Factors(NamedTuple):
    """Factors of scale * (code - zero) + minimum, each a number or float32 `[groups, out]`."""

    scale: jax.Array
    zero: jax.Array | int
    minimum: jax.Array | int


def factors_of(w: QuantizedArray, subtracted: int = 0) -> Factors:
    """Returns the factors of the codes of w, from which a number has been subtracted."""

    def per_group(part: jax.Array) -> jax.Array:
        return (part if w.order == "in_out" else part.T).astype(jnp.float32)

    zero = w.scheme.implied_zero if w.zeros is None else per_group(w.zeros)
    return Factors(per_group(w.scales), zero - subtracted, 0 if w.minimums is None else per_group(w.minimums))
