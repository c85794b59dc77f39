"""Integer arithmetic of kernels agrees with Python's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from palladion.kernels.integers import divide, divide_with_remainder, divisors, round_up

NUMBERS = [0, 1, 2, 5, 7, 8, 127, 128, 129, 2**31 - 1]


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 8, 128, 2**30])
def test_quotients_and_remainders_are_those_of_python(divisor: int):
    traced = jnp.array(NUMBERS, jnp.int32)
    quotients, remainders = np.divmod(NUMBERS, divisor)
    assert [divide(n, divisor) for n in NUMBERS] == quotients.tolist()
    assert [divide_with_remainder(n, divisor) for n in NUMBERS] == [divmod(n, divisor) for n in NUMBERS]
    np.testing.assert_array_equal(divide(traced, divisor), quotients)
    for result, expected in zip(divide_with_remainder(traced, divisor), (quotients, remainders), strict=True):
        assert result.dtype == jnp.int32
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("divisor", [1, 3, 8])
def test_quotients_of_negative_numbers_are_not_positive(divisor: int):
    numbers = [-(2**31), -9, -8, -3, -1]
    assert (divide(jnp.array(numbers, jnp.int32), divisor) <= 0).all()
    assert all(divide(n, divisor) <= 0 for n in numbers)


def test_round_up_and_divisors():
    assert [round_up(n, 8) for n in (0, 1, 8, 9, 16)] == [0, 8, 8, 16, 16]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
