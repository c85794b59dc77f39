"""x @ w, for a quantized and for a dense w: the definition, in plain XLA.

    y = x @ dequantize(w) + bias        result = activation(y), or activation(gate) * up with y = [gate, up]

The product has two forms, chosen by the number of rows of x. Many rows widen the weights and multiply, which XLA does
well. For few rows XLA on a CPU would spend most of the time in writing wide weights to memory. So few rows stream: 32
weights along `in` are a chain of multiply-adds over whole rows of codes, which XLA fuses with their conversion into one
pass over the stored bytes,

    partial[c, o] = sum_j x[32 c + j] * code[32 c + j, o]

and scales, zero points and minimums are applied to `partial`, once for every 32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.reference.bits import to_bits
from palladion.reference.quantization import QuantizedArray, decode_e2m1, dequantize, quantize_rows

CHUNK: Final = 32
"""Weights along `in` of one chain; whole packing blocks, and no more than the smallest common group."""

FEW_ROWS: Final = 4
"""Up to here streaming the weights once for each row is faster than widening them."""

ACCUMULATORS: Final = 4
"""Independent sums in a chain, so that one multiply-add need not wait for the one before."""


def quantized_matmul(
    x: jax.Array,
    w: QuantizedArray,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    gated: bool = False,
    quantize_x: str | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """Multiplies by a quantized weight; see `palladion.quantized_matmul` for the contract (inputs are valid here).

    Args:
      x: `[..., in]`, float.
      w: logically `[in, out]`.
      bias: `[out]` or None.
      activation: an elementwise function of float32, or None.
      gated: whether the first half of the channels, activated, multiplies the second.
      quantize_x: the dtype to which x is quantized first, with one scale per row, or None.
      out_dtype: dtype of the result; None means x's.

    Returns:
      `[..., out]`, or `[..., out / 2]` where gated.
    """
    wide, x_scale = x.astype(jnp.float32), None
    if quantize_x is not None:
        codes, x_scale = quantize_rows(x, quantize_x)
        wide = codes.astype(jnp.float32)
    group = w.scheme.group_size or CHUNK
    rows = wide.reshape(-1, w.in_features)
    if w.in_features % CHUNK or group % CHUNK:
        y = _dot(rows, dequantize(w))
    elif 1 <= len(rows) <= FEW_ROWS:
        y = jnp.stack([_stream_quantized(row, w) for row in rows])
    elif w.scheme.packed:
        y = _multiply_packed(rows, w)
    else:
        y = _dot(rows, dequantize(w))
    y = y.reshape(*x.shape[:-1], w.out_features)
    if x_scale is not None:
        y = y * x_scale[..., None]
    return _finish(y, bias, activation, gated, x.dtype if out_dtype is None else out_dtype)


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    gated: bool = False,
    out_dtype: Any = None,
) -> jax.Array:
    """Multiplies by a dense weight `[in, out]`, float32, bfloat16 or float16; the rest is as for `quantized_matmul`."""
    wide = x.astype(jnp.float32)
    rows = wide.reshape(-1, w.shape[0])
    if w.shape[0] % CHUNK == 0 and 1 <= len(rows) <= FEW_ROWS:
        y = jnp.stack([_stream_dense(row, w) for row in rows])
    else:
        y = _dot(rows, w.astype(jnp.float32))
    y = y.reshape(*x.shape[:-1], w.shape[1])
    return _finish(y, bias, activation, gated, x.dtype if out_dtype is None else out_dtype)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)


def _finish(
    y: jax.Array,
    bias: jax.Array | None,
    activation: Callable[[jax.Array], jax.Array] | None,
    gated: bool,
    out_dtype: Any,
) -> jax.Array:
    """Bias, activation and gate, on the float32 product."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    gate, up = jnp.split(y, 2, axis=-1) if gated else (y, None)
    if activation is not None:
        gate = activation(gate)
    return (gate if up is None else gate * up).astype(out_dtype)


class _Factors(NamedTuple):
    """What codes become weights with: scale * (code - zero) + minimum.

    Each is a number or float32 `[chunks, out]`; `[1, out]` where all chunks share it.
    """

    scale: jax.Array
    zero: jax.Array | int
    minimum: jax.Array | int


def _factors(w: QuantizedArray) -> _Factors:
    def of_chunks(groups: jax.Array) -> jax.Array:
        """`[groups, out]` to `[chunks, out]`."""
        repeats = 1 if groups.shape[0] == 1 else w.in_features // CHUNK // groups.shape[0]
        return jnp.repeat(groups.astype(jnp.float32), repeats, axis=0)

    zero = w.scheme.implied_zero if w.zeros is None else of_chunks(w.zeros)
    return _Factors(of_chunks(w.scales), zero, 0 if w.minimums is None else of_chunks(w.minimums))


def _multiply_packed(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """x `[rows, in]` @ w of packed codes: `[rows, out]`.

    The low and the high nibbles are one matrix each, with their own columns of x: interleaving them would cost XLA
    several times what unpacking does.
    """
    chunks = w.in_features // CHUNK
    stored = w.values.reshape(chunks, CHUNK // 2, w.out_features)
    halves = x.reshape(-1, chunks, 2, CHUNK // 2)
    scale, zero, minimum = (f if isinstance(f, int) else f[:, None] for f in _factors(w))
    product = jnp.zeros((), jnp.float32)
    for half, codes in enumerate((stored & 0xF, stored >> 4)):
        weights = (_number(codes, w.scheme.format) - zero) * scale + minimum
        product += _dot(halves[:, :, half].reshape(len(x), -1), weights.reshape(-1, w.out_features))
    return product


def _stream_quantized(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """x `[in]` @ w in one pass over the stored codes: `[out]`."""
    chunks = w.in_features // CHUNK
    x = x.reshape(chunks, CHUNK)
    stored = w.values.reshape(chunks, -1, w.out_features)
    scale, zero, minimum = _factors(w)
    partial = _chain(x, _packed_rows(stored, w.scheme.format) if w.scheme.packed else _rows(stored))
    total = jnp.sum(x, axis=1, keepdims=True)  # [chunks, 1]
    if not isinstance(zero, int) or zero:
        partial = partial - zero * total
    partial = partial * scale
    if not isinstance(minimum, int):
        partial = partial + minimum * total
    return _add_up(partial)


def _stream_dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """x `[in]` @ w in one pass over w: `[out]`."""
    chunks = w.shape[0] // CHUNK
    return _add_up(_chain(x.reshape(chunks, CHUNK), _rows(w.reshape(chunks, CHUNK, w.shape[1]))))


def _chain(x: jax.Array, rows: Iterator[tuple[int, jax.Array]]) -> jax.Array:
    """Multiplies rows by their activations and adds them up: `[chunks, out]`.

    Args:
      x: `[chunks, CHUNK]`.
      rows: places in a chunk, each with its numbers `[chunks, out]` in float32.
    """
    sums: list[jax.Array] = []
    for count, (place, numbers) in enumerate(rows):
        product = numbers * x[:, place, None]
        if count < ACCUMULATORS:
            sums.append(product)
        else:
            sums[count % ACCUMULATORS] += product
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def _rows(stored: jax.Array) -> Iterator[tuple[int, jax.Array]]:
    """Rows of `[chunks, CHUNK, out]`, one number in each element."""
    bits = to_bits(stored)
    for place in range(CHUNK):
        yield place, _number(bits[:, place], stored.dtype.name)


def _packed_rows(stored: jax.Array, kind: str) -> Iterator[tuple[int, jax.Array]]:
    """Rows of packed `[chunks, CHUNK / 2, out]`: those in the low nibbles, and those in the high ones."""
    for place in range(CHUNK // 2):
        yield place, _number(stored[:, place] & 0xF, kind)
        yield place + CHUNK // 2, _number(stored[:, place] >> 4, kind)


def _number(stored: jax.Array, kind: str) -> jax.Array:
    """Stored numbers, or their bits as unsigned integers, in float32: exact, but that a float8 NaN becomes a number."""
    if kind == "mxfp4":
        return decode_e2m1(stored)
    if not kind.startswith(("bfloat16", "float8")):
        return stored.astype(jnp.float32)
    if kind == "bfloat16":  # the upper half of a float32
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    if kind == "float8_e5m2":  # the upper half of a float16
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint16) << 8, jnp.float16).astype(jnp.float32)
    # e4m3: exponent and mantissa moved to where a float16 has them, whose exponents are biased by 8 more.
    bits = stored.astype(jnp.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256.0


def _add_up(partial: jax.Array) -> jax.Array:
    """The sum over chunks, `[chunks, out]` to `[out]`."""
    # A product with ones, because XLA on a CPU would fuse a sum into the chain, which is then no longer vectorized.
    return _dot(jnp.ones((1, partial.shape[0]), jnp.float32), partial)[0]
