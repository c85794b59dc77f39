"""How queries meet keys, and weights meet values, in a TPU's matrix unit, which takes the cache a register at a time.

Filling it is what limits decoding once memory does not, and takes as long as its operand is wide. One-byte caches are
therefore multiplied as they are stored where the chip can:

    "floats"    as floats of the queries' dtype, which holds one-byte numbers exactly; any chip, any cache
    "stored"    float8 as it is stored, against bfloat16
    "rebiased"  float8_e4m3fn, where the chip has only float8_e4m3b11fnuz: the same bits are 1/16 of the number there.
                What differs is -0, which is repaired, and NaN, which becomes a number: the scale beside it is NaN then
    "words"     int8 as bfloat16, where the chip has no conversion: words of four are taken apart, 2**24 times too large
    "integers"  int8 as it is stored, against the other operand in fixed point: x = factor * sum_i 128^i piece_i, with
                int8 pieces as further rows, which cost nothing while they are few. Sums of products are exact in int32
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.devices import Chip
from palladion.kernels.tpu_layout import LANES

REBIASED: Final = "float8_e4m3b11fnuz"

OPERANDS: Final = {
    "floats": (),
    "stored": ("float8_e4m3fn", "float8_e5m2"),
    "rebiased": ("float8_e4m3fn",),
    "words": ("int8",),
    "integers": ("int8",),
}
"""How keys and values can be multiplied, and in what caches; floats are for all."""

FACTOR: Final = {"rebiased": 16.0, "words": 2.0**-24}
"""What operands are multiplied by to be the numbers of the cache, where they are not."""

MAX_PIECE_ROWS: Final = 96
"""Up to here further rows cost nothing beside filling the matrix unit."""

QUERY_PIECES: Final = 3
"""21 bits below the largest number of a query: logits as good as float32 has them."""

WEIGHT_PIECES: Final = 2
"""14 bits below the largest weight, where bfloat16 has 8 below each."""


def multiply(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Products of matrices in float32, or int32 of integers, pack by pack: the last axis of a against an axis of b."""
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    accumulator = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    dimensions = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=accumulator)


def float_dtype(q_dtype: Any, kv_dtype: Any) -> Any:
    """In what "floats" are multiplied: that of the queries, or float32 where the cache has another float dtype."""
    narrower = jnp.dtype(kv_dtype).itemsize == 1 or q_dtype == kv_dtype
    return q_dtype if narrower else jnp.float32


def operands_for(q_dtype: str, kv_dtype: str, rows: int, chip: Chip) -> str:
    """The fastest of `OPERANDS` that a chip has for these dtypes and that many rows of queries."""
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


def as_operand(x: jax.Array, q_dtype: Any, operands: str) -> jax.Array:
    """Keys or values as they are multiplied, but for `FACTOR`."""
    if operands == "floats":
        return x.astype(float_dtype(q_dtype, x.dtype))
    if operands != "rebiased":
        return x
    # -0, which is NaN in the other format, becomes 0: in each byte, the sign stays where any other bit is set.
    words = pltpu.bitcast(x, jnp.int32)
    others = jnp.int32(0x7F7F7F7F)
    sign = ((words & others) + others) | others
    return pltpu.bitcast(words & sign, jnp.dtype(REBIASED))


def from_words(x: jax.Array, room: Any) -> jax.Array:
    """int8 numbers `[heads, n, m]` as bfloat16, 2**24 times too large.

    A float32 of eight significant bits is a bfloat16 in its upper half, so that two of them make a word.

    Args:
      x: the numbers; four of them along n are a word.
      room: int32 memory `[m / 128, heads, n / 2, 128]`, for rows with strides in between need 128 lanes: of one word in
        two made of each, the first ones belong to the even rows.
    """
    highest = jnp.int32(-(2**24))
    found = []
    for column in range(room.shape[0]):
        words = pltpu.bitcast(x[..., column * LANES : (column + 1) * LANES], jnp.int32)
        taken = (words << 24, (words << 16) & highest, (words << 8) & highest, words & highest)
        first, second, third, fourth = (
            jax.lax.bitcast_convert_type(number.astype(jnp.float32), jnp.int32) for number in taken
        )
        rows, of_column = words.shape[1], room.at[column]
        of_column[:, pl.ds(0, rows, stride=2)] = jax.lax.shift_right_logical(first, 16) | second
        of_column[:, pl.ds(1, rows, stride=2)] = jax.lax.shift_right_logical(third, 16) | fourth
        found.append(pltpu.bitcast(of_column[...], jnp.bfloat16))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=2)


def split(x: jax.Array, bound: jax.Array, pieces: int) -> tuple[jax.Array, jax.Array]:
    """Numbers in fixed point.

    Args:
      x: `[packs, rows, n]` float32.
      bound: `[packs, rows, 1]`, at least the largest of each row.
      pieces: of 7 bits each.

    Returns:
      int8 `[packs, pieces * rows, n]`, and the factor `[packs, rows, 1]` that `join` takes.
    """
    steps = 127.0 * 128 ** (pieces - 1)
    left = jnp.round(x * jnp.where(bound == 0.0, 0.0, steps / bound))
    found = []
    for place in range(pieces - 1, -1, -1):
        piece = jnp.round(left * (1 / 128**place))
        left = left - piece * 128**place
        found.append(piece)
    # A TPU converts float32 to int8 by way of int32.
    return jnp.concatenate(found, axis=1).astype(jnp.int32).astype(jnp.int8), bound * (1 / steps)


def join(products: jax.Array, factor: jax.Array) -> jax.Array:
    """What products of pieces `[packs, pieces * rows, m]` in int32 amount to: `[packs, rows, m]` in float32."""
    rows = factor.shape[1]
    total = products[:, :rows].astype(jnp.float32)
    for start in range(rows, products.shape[1], rows):
        total = total * 128.0 + products[:, start : start + rows].astype(jnp.float32)
    return total * factor
