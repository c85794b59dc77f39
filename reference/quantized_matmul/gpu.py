"""Products with a quantized weight in few launches, for XLA on a GPU.

    one row      a reduction over the stored codes, which are decoded in registers
    more rows    a product of matrices that converts codes to the dtype of x as it reads them

Either way scales, zero points and minimums follow, for each group g of channel o:

    y[o] = sum_g scale[g, o] * (x_g . code[g, o]) + sum_g (minimum - scale * zero)[g, o] * sum(x_g)

Every code is exact in 16 bits, so tensor cores multiply narrow x. XLA fuses conversions of int8, int4 and (from sm_90
on) float8 into a product, but no other arithmetic, such as the unpacking of nibbles. A byte of the order "out_in" is
therefore read as two int4 numbers, and the columns of x are put in the order of the nibbles. An int4 number is signed:
it is the code less 8 if the highest bits of the nibbles are flipped, which costs a copy of the packed bytes.

A product for each group writes a float32 sum for each row and channel. Where these sums are more bytes than the weight
in the dtype of x, and where XLA cannot convert the codes, the weight is dequantized in the dtype of x. That is exact
where a channel has one scale; otherwise weights are rounded, relative to the largest scale of their channel.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from palladion.reference.quantization import QuantizedArray, decode_codes, dequantize
from palladion.reference.quantized_matmul import streaming
from palladion.reference.quantized_matmul.definition import dot, select_layer
from palladion.reference.quantized_matmul.factors import Factors, factors_of
from palladion.reference.scheme import INT4_ZERO, PACK_BLOCK

HALF: Final = PACK_BLOCK // 2
"""Bytes of a block of packed codes."""

HIGHEST_BITS: Final = 0x88
"""The highest bit of each nibble of a byte: flipping it turns a code into the signed number code - 8."""

MANY_ROWS: Final = 2**20
"""Rows that a symbolic number of them is taken for."""


def multiply(x: jax.Array, w: QuantizedArray, layer: jax.Array | None) -> jax.Array:
    """Returns x `[rows, in]`, of any float dtype, @ one layer of w: float32 `[rows, out]`."""
    chunks = streaming.divides_into_chunks(w)
    if chunks and not is_symbolic_dim(x.shape[0]) and x.shape[0] == 1:
        row = x[0].astype(jnp.float32)
        if w.order == "in_out":
            return streaming.stream_quantized(row, w, layer)[None]
        return _reduce(row, select_layer(w, layer))[None]
    w = select_layer(w, layer)
    converted = not w.scheme.packed or (w.scheme.format == "int4" and w.order == "out_in" and chunks)
    rows = MANY_ROWS if is_symbolic_dim(x.shape[0]) else x.shape[0]
    sums = 0 if w.scheme.group_size is None else 4 * rows * w.scheme.groups(w.in_features)
    if converted and sums <= x.dtype.itemsize * w.in_features:
        return _convert(x, w)
    return _dequantize(x, w)


def _reduce(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """Returns x `[in]` @ w by a reduction over codes in the order "out_in": `[out]`."""
    groups = w.scheme.groups(w.in_features)
    if w.scheme.packed:
        stored = w.values.reshape(w.out_features, groups, -1, HALF)
        low, high = (decode_codes(codes, w.scheme) for codes in (stored & 0xF, stored >> 4))
        halves = x.reshape(groups, -1, 2, HALF)
        products = halves[:, :, 0] * low + halves[:, :, 1] * high
    else:
        codes = w.values.reshape(w.out_features, groups, 1, -1)
        products = x.reshape(groups, 1, -1) * decode_codes(codes, w.scheme)
    sums = jnp.sum(products, axis=(2, 3)).T[:, None]
    return _apply(factors_of(w, w.scheme.implied_zero), x.reshape(1, groups, -1), sums)[0]


def _convert(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """Returns x `[rows, in]` @ w by a product for each group, which converts codes: `[rows, out]`."""
    groups = w.scheme.groups(w.in_features)
    numbers, factors = w.values, factors_of(w, INT4_ZERO if w.scheme.packed else 0)
    if w.scheme.packed:
        numbers = jax.lax.bitcast_convert_type(numbers ^ HIGHEST_BITS, jnp.int4).reshape(w.out_features, -1)
        x = x.reshape(x.shape[0], w.in_features // PACK_BLOCK, 2, HALF).swapaxes(2, 3)
    x = x.reshape(x.shape[0], groups, w.in_features // groups)
    numbers = numbers.astype(x.dtype)
    if w.order == "out_in":
        subscripts, numbers = "rgi,ogi->gro", numbers.reshape(w.out_features, groups, -1)
    else:
        subscripts, numbers = "rgi,gio->gro", numbers.reshape(groups, -1, w.out_features)
    sums = jnp.einsum(subscripts, x, numbers, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return _apply(factors, x, sums)


def _dequantize(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """Returns x `[rows, in]` @ w dequantized in the dtype of x: `[rows, out]`."""
    factors = factors_of(w)
    largest = jnp.max(jnp.abs(factors.scale), axis=0)
    relative = jnp.where(largest == 0, 0.0, factors.scale / largest)
    scales = relative if w.order == "in_out" else relative.T
    weights = dequantize(dataclasses.replace(w, scales=scales, minimums=None), x.dtype)
    groups = len(relative)
    x_groups = x.reshape(x.shape[0], groups, w.in_features // groups)
    return _apply(Factors(largest[None], 0, factors.minimum), x_groups, dot(x, weights)[None])


def _apply(factors: Factors, x: jax.Array, sums: jax.Array) -> jax.Array:
    """Returns the product `[rows, out]`.

    Args:
      factors: the factors of the codes.
      x: `[rows, groups, size]`.
      sums: float32 `[groups, rows, out]`, or `[1, rows, out]` with one scale for all groups: x times the codes.
    """
    scale, zero, minimum = factors
    y = jnp.sum(sums * scale[:, None], axis=0)
    if isinstance(zero, int) and zero == 0 and isinstance(minimum, int):
        return y
    return y + dot(jnp.sum(x.astype(jnp.float32), axis=2), minimum - scale * zero)
