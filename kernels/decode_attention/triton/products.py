"""The two products of attention on a GPU's tensor cores: queries with keys, weights with values.

Tensor cores multiply 16-bit floats, or int8 between integers, and add up in float32 or int32. Float caches meet queries
of their own dtype. The codes of a one-byte cache are turned into operands with as few instructions as there are:

  int8 keys      none: queries become integers, in three pieces of 7 bits below the largest number of their row
  float8 keys    to float16, half an instruction a code; queries too, their rows divided by a power of two
  values         to bfloat16, exactly; weights too, whose range float16 does not have once scales are folded into them
                 (in two pieces for float16 queries, which are to lose no more than float16 would)

Whatever is float32, or of two dtypes, is multiplied in float32, without tensor cores. Nothing here knows of a backend.
"""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.decode_attention.problem import Problem

PIECES: Final = 3
"""Of 7 bits: 21 bits below the largest number of a row, as exact as sums in float32 are."""

STEP: Final = 128
"""Between a piece and the next one."""

LARGEST: Final = 127.0


def uses_tensor_cores(problem: Problem) -> bool:
    """Whether 16-bit queries meet a cache of the same dtype or of codes."""
    p = problem
    return p.q_dtype != "float32" and (p.has_scales or p.q_dtype == p.kv_dtype)


class Queries(NamedTuple):
    """Queries as operands.

    Attributes:
      operands: for each part of head_dim the pieces `[rows, width]`: one, or `PIECES` of int8.
      unit: what products are to be multiplied by, `[rows]`, or None.
    """

    operands: tuple[tuple[jax.Array, ...], ...]
    unit: jax.Array | None


def queries_of(problem: Problem, parts: list[jax.Array], *, integers: bool) -> Queries:
    """Prepares queries, `[rows, width]` for each part of head_dim, for keys of the cache's dtype.

    Args:
      problem: what is computed.
      parts: the queries.
      integers: whether an int8 cache is multiplied between integers.
    """
    if not uses_tensor_cores(problem):
        return Queries(tuple((x.astype(jnp.float32),) for x in parts), None)
    is_int8 = problem.kv_dtype == "int8"
    if not problem.has_scales or (is_int8 and not integers):
        return Queries(tuple((x,) for x in parts), None)
    if not is_int8 and problem.q_dtype == "float16":
        return Queries(tuple((x,) for x in parts), None)
    wide = [x.astype(jnp.float32) for x in parts]
    # Of bits, whose order is that of magnitudes, with NaN behind infinity: a GPU's maximum of floats leaves NaN out.
    bits = [jnp.max(jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32), axis=1) for x in wide]
    largest = jax.lax.bitcast_convert_type(functools.reduce(jnp.maximum, bits), jnp.float32)
    largest = jnp.where(largest == 0.0, 1.0, largest)
    if is_int8:
        factor = (LARGEST / largest)[:, None]
        pieces = tuple(_pieces(x * factor) for x in wide)
        return Queries(pieces, largest * (1 / (LARGEST * STEP ** (PIECES - 1))))
    # The power of two in front of the largest number: nothing is rounded but what is 2^14 times smaller than that.
    power = jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    unit = jax.lax.bitcast_convert_type(jnp.maximum(power, 0x00800000), jnp.float32)  # a normal number
    return Queries(tuple(((x / unit[:, None]).astype(jnp.float16),) for x in wide), unit)


def _pieces(x: jax.Array) -> tuple[jax.Array, ...]:
    """Numbers of up to 127 as int8 pieces, the first one the nearest integers, each next one the rest of a `STEP`th."""
    found = []
    for _ in range(PIECES):
        whole = jnp.floor(x + 0.5)
        found.append(whole.astype(jnp.int8))
        x = (x - whole) * STEP
    return tuple(found)


def multiply_keys(queries: Queries, keys: list[jax.Array]) -> jax.Array:
    """Products of queries and keys, `[tokens, width]` operands for each part: float32 `[rows, tokens]`."""
    sums = [_dot(piece, keys[0], 1) for piece in queries.operands[0]]
    for pieces, key in zip(queries.operands[1:], keys[1:], strict=True):
        sums = [so_far + _dot(piece, key, 1) for so_far, piece in zip(sums, pieces, strict=True)]
    products = sums[0]
    if len(sums) > 1:
        high, middle, low = sums
        products = (high * STEP + middle).astype(jnp.float32) * float(STEP) + low.astype(jnp.float32)
    return products if queries.unit is None else products * queries.unit[:, None]


def weights_of(problem: Problem, weights: jax.Array, v_scale: jax.Array | None) -> tuple[jax.Array, ...]:
    """Weights `[rows, tokens]` as operands; the scales of values, `[tokens]`, are folded into them."""
    if v_scale is not None:
        weights = weights * v_scale[None, :]
    if not uses_tensor_cores(problem):
        return (weights,)
    if not problem.has_scales:
        return (weights.astype(problem.kv_dtype),)
    first = weights.astype(jnp.bfloat16)
    if problem.q_dtype == "bfloat16":
        return (first,)
    return first, (weights - first.astype(jnp.float32)).astype(jnp.bfloat16)


def multiply_values(weights: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
    """Products of weights and values, `[tokens, width]` operands: float32 `[rows, width]`."""
    sums = _dot(weights[0], values, 0)
    for piece in weights[1:]:
        sums = sums + _dot(piece, values, 0)
    return sums


def operand(codes: jax.Array, dtype: Any) -> jax.Array:
    """What is stored in the cache as an operand of a dtype, exactly."""
    if codes.dtype not in (jnp.int8, jnp.dtype(dtype)) and dtype == jnp.bfloat16:
        # Hardware takes float8 to float16 and on to float32, but not to bfloat16.
        codes = codes.astype(jnp.float32)
    return codes.astype(dtype)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Product of matrices, the last axis of a against an axis of b; sums in int32 or float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=sums)
