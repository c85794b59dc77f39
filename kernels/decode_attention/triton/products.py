"""The two products of attention on a GPU's tensor cores: queries with keys, weights with values.

Tensor cores multiply 16-bit floats, or int8 with int8, and accumulate in float32 or int32. Float caches meet queries of
their own dtype. The codes of a one-byte cache are converted to operands in as few instructions as possible:

  int8 keys      none: queries become integers, in three pieces of 7 bits below the largest number of their row
  other codes    to float16, which holds them all: half an instruction for a float8 code, 1.25 for an int8 code. So do
                 queries, each row divided by a power of two, and weights, which the online softmax keeps up to 1

float32, and mixed dtypes, are multiplied in float32 without tensor cores. Everything is plain `jax.numpy`, except the
conversion of int8 codes.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from palladion.kernels.decode_attention.problem import Problem

PIECES: Final = 3
"""Pieces of a query, of 7 bits each: 21 bits below the largest number of a row, as exact as sums in float32."""

STEP: Final = 128
"""Factor between a piece and the next one."""

LARGEST: Final = 127.0
"""Largest magnitude of a piece."""

INT8_TO_FLOAT16: Final = """{
    .reg .b32 word, bias;
    xor.b32 word, $2, 0x80808080;
    mov.b32 bias, 0x64806480;
    prmt.b32 $0, word, 0x64646464, 0x4140;
    prmt.b32 $1, word, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, bias;
    sub.f16x2 $1, $1, bias;
}"""
"""PTX that converts four codes c, exactly: 0x64 above the byte c + 128 is the float16 1024 + c + 128, less 1152."""


def uses_tensor_cores(problem: Problem) -> bool:
    """Returns whether tensor cores are used: 16-bit queries and a cache of the same dtype or of codes."""
    p = problem
    return p.q_dtype != "float32" and (p.has_scales or p.q_dtype == p.kv_dtype)


class Queries(NamedTuple):
    """Queries as operands.

    Attributes:
      operands: for each tile of head_dim its pieces `[rows, width]`: one, or `PIECES` of int8.
      unit: factor of the products, `[rows]`, or None.
    """

    operands: tuple[tuple[jax.Array, ...], ...]
    unit: jax.Array | None


def prepare_queries(problem: Problem, tiles: list[jax.Array], *, integers: bool) -> Queries:
    """Converts queries to operands that go with keys of the cache's dtype.

    Args:
      problem: the call.
      tiles: the queries, `[rows, width]` for each tile of head_dim.
      integers: whether an int8 cache is multiplied as integers.
    """
    if not uses_tensor_cores(problem):
        return Queries(tuple((x.astype(jnp.float32),) for x in tiles), None)
    as_integers = problem.kv_dtype == "int8" and integers
    if not problem.has_scales or (problem.q_dtype == "float16" and not as_integers):
        return Queries(tuple((x,) for x in tiles), None)
    wide = [x.astype(jnp.float32) for x in tiles]
    # A GPU's maximum of floats ignores NaN. Bits of magnitudes have the same order, with NaN above infinity.
    bits = [jnp.max(jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32), axis=1) for x in wide]
    largest = jax.lax.bitcast_convert_type(functools.reduce(jnp.maximum, bits), jnp.float32)
    largest = jnp.where(largest == 0.0, 1.0, largest)
    if as_integers:
        factor = (LARGEST / largest)[:, None]
        pieces = tuple(_pieces(x * factor) for x in wide)
        return Queries(pieces, largest * (1 / (LARGEST * STEP ** (PIECES - 1))))
    # Rows are divided by the power of two of their largest number: only numbers 2^14 times smaller are rounded.
    power = jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    unit = jax.lax.bitcast_convert_type(jnp.maximum(power, 0x00800000), jnp.float32)  # a normal number
    return Queries(tuple(((x / unit[:, None]).astype(jnp.float16),) for x in wide), unit)


def _pieces(x: jax.Array) -> tuple[jax.Array, ...]:
    """Splits numbers of up to 127 into int8 pieces: the nearest integers, then the remainders in `STEP`ths."""
    pieces = []
    for _ in range(PIECES):
        whole = jnp.floor(x + 0.5)
        pieces.append(whole.astype(jnp.int8))
        x = (x - whole) * STEP
    return tuple(pieces)


def multiply_keys(queries: Queries, keys: list[jax.Array]) -> jax.Array:
    """Multiplies queries with keys, `[tokens, width]` for each tile of head_dim; float32 `[rows, tokens]`."""
    sums = [_dot(piece, keys[0], 1) for piece in queries.operands[0]]
    for pieces, key in zip(queries.operands[1:], keys[1:], strict=True):
        sums = [so_far + _dot(piece, key, 1) for so_far, piece in zip(sums, pieces, strict=True)]
    products = sums[0]
    if len(sums) > 1:
        high, middle, low = sums
        products = (high * STEP + middle).astype(jnp.float32) * float(STEP) + low.astype(jnp.float32)
    return products if queries.unit is None else products * queries.unit[:, None]


def prepare_weights(problem: Problem, weights: jax.Array, v_scale: jax.Array | None) -> jax.Array:
    """Converts weights `[rows, tokens]` to an operand, with the scales of values, `[tokens]`, folded into them."""
    if v_scale is not None:
        weights = weights * v_scale[None, :]
    if not uses_tensor_cores(problem):
        return weights
    return weights.astype(jnp.float16 if problem.has_scales else problem.kv_dtype)


def multiply_values(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Multiplies weights with values, `[tokens, width]`; float32 `[rows, width]`."""
    return _dot(weights, values, 0)


def to_operand(codes: jax.Array, dtype: DTypeLike, *, native: bool) -> jax.Array:
    """Converts what the cache stores to an operand of a dtype, exactly.

    Args:
      codes: what was loaded.
      dtype: of the operand.
      native: whether the kernel is compiled for an NVIDIA GPU, not interpreted.
    """
    if native and codes.dtype == jnp.int8 and dtype == jnp.float16:
        (numbers,) = plgpu.elementwise_inline_asm(
            INT8_TO_FLOAT16,
            args=[codes],
            constraints="=&r,=&r,r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, dtype)],
        )
        return numbers
    return codes.astype(dtype)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Multiplies matrices, the last axis of a with `axis` of b; accumulates in int32 or float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=sums)
