"""Integer arithmetic that kernels and the code that sets them up share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def divisors(n: int) -> list[int]:
    """Returns the divisors of n in ascending order."""
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]


def divide(n: Any, divisor: int) -> Any:
    """Returns `n // divisor` of a Python integer or a traced int32 array, with a shift for powers of two.

    A traced n that is negative gives a result of at most 0, which need not be the rounded quotient.
    """
    if isinstance(n, int):
        return n // divisor
    if divisor & (divisor - 1) == 0:
        return jax.lax.shift_right_arithmetic(n, jnp.full_like(n, divisor.bit_length() - 1))
    return jax.lax.div(n, jnp.full_like(n, divisor))


def divide_with_remainder(n: Any, divisor: int) -> tuple[Any, Any]:
    """Returns quotient and remainder of numbers that are not negative, with a shift and a mask for powers of two."""
    if isinstance(n, int):
        return divmod(n, divisor)
    if divisor & (divisor - 1) == 0:
        return jax.lax.shift_right_logical(n, jnp.full_like(n, divisor.bit_length() - 1)), n & (divisor - 1)
    return jax.lax.div(n, jnp.full_like(n, divisor)), jax.lax.rem(n, jnp.full_like(n, divisor))
