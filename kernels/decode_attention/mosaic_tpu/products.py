"""The two products of attention on a TPU's MXU: queries with keys, weights with values.

The MXU is loaded with keys or values, a register at a time; that is what limits decoding once memory does not, and it
takes as long as its operand is wide. One-byte caches are therefore multiplied as they are stored where the chip can:

    "floats"    floats in the queries' dtype, which holds one-byte numbers exactly; any chip, any cache
    "stored"    float8 as it is stored, with bfloat16
    "rebiased"  float8_e4m3fn where the chip has only float8_e4m3b11fnuz: the same bits are 1/16 of the number there.
                Only -0 differs, which is repaired, and NaN, which becomes a number: its scale is NaN then
    "words"     int8 as bfloat16, where the chip has no conversion: words of four are unpacked, 2**24 times too large
    "integers"  int8 as it is stored, with the other operand in fixed point: x = factor * sum_i 128^i piece_i. Its int8
                pieces are further rows, which cost nothing while they are few; sums of products are exact in int32
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from palladion.kernels.devices import Chip
from palladion.kernels.tpu_layout import LANES
from palladion.kernels.types import Ref

REBIASED: Final = "float8_e4m3b11fnuz"
"""The format that stands in for float8_e4m3fn on chips without it."""

OPERANDS: Final = {
    "floats": (),
    "stored": ("float8_e4m3fn", "float8_e5m2"),
    "rebiased": ("float8_e4m3fn",),
    "words": ("int8",),
    "integers": ("int8",),
}
"""The ways to multiply keys and values, and the caches that each is for; floats are for all."""

FACTOR: Final = {"rebiased": 16.0, "words": 2.0**-24}
"""Factor that turns operands into the numbers of the cache, where they differ."""

MAX_PIECE_ROWS: Final = 96
"""Most rows that cost nothing beside loading keys or values into the MXU."""

QUERY_PIECES: Final = 3
"""Pieces of a query, 21 bits below its largest number: logits as exact as in float32."""

WEIGHT_PIECES: Final = 2
"""Pieces of a weight, 14 bits below the largest one; bfloat16 has 8 below each."""


def multiply(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Multiplies matrices, batched over the first axis: the last axis of a with `axis` of b; in float32 or int32."""
    # By default a TPU rounds float32 operands to bfloat16.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    accumulator = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    dimensions = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=accumulator)


def float_dtype(q_dtype: DTypeLike, kv_dtype: Any) -> Any:
    """Returns the dtype of "floats": that of the queries, or float32 where the cache has another float dtype."""
    narrower = jnp.dtype(kv_dtype).itemsize == 1 or q_dtype == kv_dtype
    return q_dtype if narrower else jnp.float32


def operands_for(q_dtype: str, kv_dtype: str, rows: int, chip: Chip) -> str:
    """Returns the fastest of `OPERANDS` that a chip has for these dtypes and number of query rows."""
    native = chip.one_byte_operands
    if q_dtype != "bfloat16":
        return "floats"
    if kv_dtype == "int8" and not native:
        return "words"
    if kv_dtype == "int8":
        return "integers" if kv_dtype in native and QUERY_PIECES * rows <= MAX_PIECE_ROWS else "floats"
    if kv_dtype == "float8_e4m3fn" and REBIASED in native:
        return "rebiased"
    return "stored" if kv_dtype in native else "floats"


def as_operand(x: jax.Array, q_dtype: DTypeLike, operands: str) -> jax.Array:
    """Returns keys or values as operands, which are the numbers of the cache divided by `FACTOR`."""
    if operands == "floats":
        return x.astype(float_dtype(q_dtype, x.dtype))
    if operands != "rebiased":
        return x
    # -0 would be NaN in the other format and becomes 0: each byte keeps its sign bit only where another bit is set.
    words = pltpu.bitcast(x, jnp.int32)
    magnitude = jnp.int32(0x7F7F7F7F)
    sign = ((words & magnitude) + magnitude) | magnitude
    return pltpu.bitcast(words & sign, jnp.dtype(REBIASED))


def from_words(x: jax.Array, scratch: Ref) -> jax.Array:
    """Converts int8 numbers `[heads, n, m]` to bfloat16, 2**24 times too large.

    The upper half of a float32 with eight significant bits is the same number in bfloat16, and two halves make a word.

    Args:
      x: the numbers; four neighbours along n share a word.
      scratch: int32 memory `[m / 128, heads, n / 2, 128]`. Each word of x becomes two words, in rows that are two
        apart; stores with a stride need rows of 128 lanes.
    """
    highest_byte = jnp.int32(-(2**24))
    columns = []
    for column in range(scratch.shape[0]):
        words = pltpu.bitcast(x[..., column * LANES : (column + 1) * LANES], jnp.int32)
        bytes_ = (words << 24, (words << 16) & highest_byte, (words << 8) & highest_byte, words & highest_byte)
        first, second, third, fourth = (
            jax.lax.bitcast_convert_type(byte.astype(jnp.float32), jnp.int32) for byte in bytes_
        )
        rows, pairs = words.shape[1], scratch.at[column]
        pairs[:, pl.ds(0, rows, stride=2)] = jax.lax.shift_right_logical(first, 16) | second
        pairs[:, pl.ds(1, rows, stride=2)] = jax.lax.shift_right_logical(third, 16) | fourth
        columns.append(pltpu.bitcast(pairs[...], jnp.bfloat16))
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=2)


def split(x: jax.Array, bound: jax.Array, pieces: int) -> tuple[jax.Array, jax.Array]:
    """Splits float32 numbers into int8 pieces of 7 bits, in fixed point.

    Args:
      x: float32 `[n, rows, m]`.
      bound: `[n, rows, 1]`, at least the largest magnitude of each row.
      pieces: number of pieces.

    Returns:
      int8 `[n, pieces * rows, m]`, the highest pieces first, and the factor `[n, rows, 1]` that `join` takes.
    """
    steps = 127.0 * 128 ** (pieces - 1)
    rest = jnp.round(x * jnp.where(bound == 0.0, 0.0, steps / bound))
    piece_rows = []
    for power in range(pieces - 1, -1, -1):
        piece = jnp.round(rest * (1 / 128**power))
        rest = rest - piece * 128**power
        piece_rows.append(piece)
    # A TPU converts float32 to int8 by way of int32.
    return jnp.concatenate(piece_rows, axis=1).astype(jnp.int32).astype(jnp.int8), bound * (1 / steps)


def join(products: jax.Array, factor: jax.Array) -> jax.Array:
    """Adds up the int32 products of pieces, `[n, pieces * rows, m]`, to float32 products `[n, rows, m]`."""
    rows = factor.shape[1]
    total = products[:, :rows].astype(jnp.float32)
    for start in range(rows, products.shape[1], rows):
        total = total * 128.0 + products[:, start : start + rows].astype(jnp.float32)
    return total * factor
