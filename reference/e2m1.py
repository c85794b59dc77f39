"""The 4-bit floats of mxfp4: a sign, two bits of exponent, one of mantissa. Source: OCP MX specification 1.0."""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp

E2M1_LEVELS: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the 4-bit e2m1 floats, indexed by the low three bits of a code; bit 3 is the sign."""


def decode_e2m1(codes: jax.Array) -> jax.Array:
    """Converts e2m1 codes (integers 0 to 15) to float32: sign, two exponent bits, one mantissa bit, no infinities."""
    mantissa = (codes & 1).astype(jnp.float32)
    exponent = (codes >> 1) & 3
    # 2 ** (exponent - 1) for normal numbers, without computing a power: 1, 2 or 4.
    power = jnp.where(exponent == 3, 4.0, jnp.where(exponent == 2, 2.0, 1.0))
    magnitude = jnp.where(exponent == 0, 0.5 * mantissa, (1.0 + 0.5 * mantissa) * power)
    return jnp.where(codes & 8 != 0, -magnitude, magnitude)


def encode_e2m1(x: jax.Array) -> jax.Array:
    """Rounds to the nearest e2m1 number (ties to even, saturating at ±6) and returns its code in uint8."""
    magnitude = jnp.minimum(jnp.abs(x), E2M1_LEVELS[-1])
    # Below 2 numbers are 0.5 apart, below 4 they are 1 apart, above 2 apart.
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    rounded = jnp.round(magnitude / step) * step
    code = jnp.searchsorted(jnp.asarray(E2M1_LEVELS, x.dtype), rounded).astype(jnp.uint8)
    return code | jnp.where(jnp.signbit(x) & (code > 0), 8, 0).astype(jnp.uint8)
