"""x @ w, for a quantized and for a dense w: the definition, in plain XLA.

    y = rms_norm(x) @ dequantize(w) + bias        result = activation(y), or activation(gate) * up with y = [gate, up]
                                                  and the residual is added to that

The product has two forms, chosen by the number of rows of x. Many rows widen the weights and multiply. On a CPU that
goes by blocks of channels: a whole wide weight would be written to memory and read again, a block stays in the cache.
For one row, or a few, even that is more work than the product. So few rows stream: 32 weights along `in` are a chain of
multiply-adds over whole rows of codes, which XLA fuses with their conversion into one pass over the stored bytes,

    partial[c, o] = sum_j x[32 c + j] * code[32 c + j, o]

and scales, zero points and minimums are applied to `partial`, once for every 32 weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from palladion.reference.bits import from_bits, to_bits
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import QuantizedArray, decode_e2m1, dequantize, quantize_rows
from palladion.reference.rms_norm import rms_norm

Weight = TypeVar("Weight", jax.Array, QuantizedArray)

CHUNK: Final = 32
"""Weights along `in` of one chain; whole packing blocks, and no more than the smallest common group."""

PLACE_VALUE: Final = np.repeat(np.array([1, 16], np.float32), CHUNK // 2)
"""What the codes of a chunk are worth as they lie in their bytes: low nibbles first, then the high ones."""

FEW_ROWS: Final = 4
"""Up to here streaming a small weight once for each row is faster than widening it."""

BLOCK_BYTES: Final = 2 * 2**20
BLOCK_CHANNELS: Final = 128
"""Of a block of widened weights on a CPU: what its cache holds, in multiples of so many channels, one at least."""

MANY_CHUNKS: Final = 128
"""From here on XLA on a CPU breaks up a chain to which minimums are added: they are multiplied apart."""

NORM_EPS: Final = 1e-5
"""What is added to the mean square where nobody says otherwise."""

ACCUMULATORS: Final = 4
"""Independent sums in a chain, so that one multiply-add need not wait for the one before."""


def quantized_matmul(
    x: jax.Array,
    w: QuantizedArray,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    gated: bool = False,
    norm: jax.Array | None = None,
    norm_eps: float = NORM_EPS,
    residual: jax.Array | None = None,
    quantize_x: str | None = None,
    layer: jax.Array | None = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies by a quantized weight; see `palladion.quantized_matmul` for the contract (inputs are valid here).

    Args:
      x: `[..., in]`, float.
      w: logically `[in, out]`.
      bias: `[out]` or None.
      activation: an elementwise function of float32, or None.
      gated: whether the first half of the channels, activated, multiplies the second.
      norm: `[in]`, with which x is normalized first, or None.
      norm_eps: for that, added to the mean square.
      residual: `[..., out]`, or `[..., out / 2]` where gated, added to the result, or None.
      quantize_x: the dtype to which x is quantized first, with one scale per row, or None.
      layer: int32 scalar, which matrix of a w with a leading `[num_layers]` is meant, or None where it has none.
      out_dtype: dtype of the result; None means x's.
      batch_invariant: whether each row is multiplied by itself, as if there were no other.

    Returns:
      `[..., out]`, or `[..., out / 2]` where gated.
    """
    if batch_invariant:

        def multiply(row: tuple[jax.Array, jax.Array | None]) -> jax.Array:
            return quantized_matmul(
                row[0][None],
                w,
                bias=bias,
                activation=activation,
                gated=gated,
                norm=norm,
                norm_eps=norm_eps,
                residual=None if row[1] is None else row[1][None],
                quantize_x=quantize_x,
                layer=layer,
                out_dtype=out_dtype,
            )[0]

        residuals = None if residual is None else residual.reshape(-1, residual.shape[-1])
        by_row = jax.lax.map(multiply, (x.reshape(-1, w.in_features), residuals))
        return by_row.reshape(*x.shape[:-1], by_row.shape[-1])
    if norm is not None:
        x = rms_norm(x, norm, norm_eps)
    wide, x_scale = x.astype(jnp.float32), None
    if quantize_x is not None:
        codes, x_scale = quantize_rows(x, quantize_x)
        wide = codes.astype(jnp.float32)
    rows = wide.reshape(-1, w.in_features)
    in_chunks = w.in_features % CHUNK == 0 and (w.scheme.group_size or CHUNK) % CHUNK == 0
    if in_chunks and 1 <= len(rows) <= _few_rows(w):
        y = jnp.stack([_stream_quantized(row, w, layer) for row in rows])
    elif in_chunks and w.scheme.packed:
        y = _by_blocks(lambda part: _multiply_packed(rows, part), w, layer)
    else:
        y = _by_blocks(lambda part: _dot(rows, dequantize(part)), w, layer)
    y = y.reshape(*x.shape[:-1], w.out_features)
    if x_scale is not None:
        y = y * x_scale[..., None]
    return _finish(y, bias, activation, gated, residual, x.dtype if out_dtype is None else out_dtype)


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    gated: bool = False,
    norm: jax.Array | None = None,
    norm_eps: float = NORM_EPS,
    residual: jax.Array | None = None,
    layer: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """Multiplies by a dense weight `[in, out]` of any float dtype; the rest is as for `quantized_matmul`."""
    in_features, out_features = w.shape[-2:]
    if norm is not None:
        x = rms_norm(x, norm, norm_eps)
    rows = x.astype(jnp.float32).reshape(-1, in_features)
    if target_platform() != "cpu" and x.dtype == w.dtype != jnp.float32:
        # Products of two narrow floats are exact in float32, and matrix units add in float32: nothing need be widened.
        y = jnp.matmul(x.reshape(-1, in_features), _part(w, layer), preferred_element_type=jnp.float32)
    elif w.dtype == jnp.float32:
        y = _dot(rows, _part(w, layer))
    elif in_features % CHUNK == 0 and 1 <= len(rows) <= _few_rows(w):
        y = jnp.stack([_stream_dense(row, w, layer) for row in rows])
    else:
        y = _by_blocks(lambda part: _dot(rows, part.astype(jnp.float32)), w, layer)
    y = y.reshape(*x.shape[:-1], out_features)
    return _finish(y, bias, activation, gated, residual, x.dtype if out_dtype is None else out_dtype)


def _block_channels(in_features: int, out_features: int) -> int:
    """Channels that are widened at a time: all of them, but on a CPU."""
    if target_platform() != "cpu":
        return out_features
    fitting = BLOCK_BYTES // (4 * max(in_features, 1)) // BLOCK_CHANNELS * BLOCK_CHANNELS
    return min(max(fitting, BLOCK_CHANNELS), out_features)


def _few_rows(w: Weight) -> int:
    """Rows up to which each of them streams the weight: fewer for a large one, which comes from memory every time."""
    in_features, out_features = w.shape[-2:]
    widened_bytes = 4 * in_features * out_features
    if target_platform() != "cpu" or widened_bytes <= 4 * BLOCK_BYTES:
        return FEW_ROWS
    return FEW_ROWS // 2 if isinstance(w, QuantizedArray) and w.scheme.packed else 1


def _by_blocks(multiply: Callable[[Weight], jax.Array], w: Weight, layer: jax.Array | None) -> jax.Array:
    """What `multiply` makes of blocks of channels, `[rows, channels]` each, side by side: `[rows, out]`."""
    out_features = w.shape[-1]
    block = _block_channels(w.shape[-2], out_features)
    if block == out_features:
        return multiply(_part(w, layer))
    whole = out_features // block * block
    products = jax.lax.map(lambda start: multiply(_part(w, layer, start, block)), jnp.arange(0, whole, block))
    y = jnp.moveaxis(products, 0, 1).reshape(products.shape[1], whole)  # of [blocks, rows, channels]
    if whole == out_features:
        return y
    return jnp.concatenate([y, multiply(_part(w, layer, jnp.int32(whole), out_features - whole))], axis=1)


def _part(w: Weight, layer: jax.Array | None, start: jax.Array | None = None, channels: int | None = None) -> Weight:
    """The weight of one layer, where there are several, and of it so many channels, or all."""
    if layer is None and start is None:
        return w

    def slice_off(part: jax.Array) -> jax.Array:
        # One slice of both axes: that of a layer alone would be copied before channels are sliced off it.
        stack = to_bits(part if layer is not None else part[None])
        starts = (0 if layer is None else layer, 0, 0 if start is None else start)
        sizes = (1, stack.shape[1], stack.shape[2] if channels is None else channels)
        return jax.lax.dynamic_slice(stack, [jnp.asarray(at, jnp.int32) for at in starts], sizes)[0]

    return from_bits(jax.tree.map(slice_off, w), w)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)


def _finish(
    y: jax.Array,
    bias: jax.Array | None,
    activation: Callable[[jax.Array], jax.Array] | None,
    gated: bool,
    residual: jax.Array | None,
    out_dtype: Any,
) -> jax.Array:
    """Bias, activation, gate and residual, on the float32 product."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    gate, up = jnp.split(y, 2, axis=-1) if gated else (y, None)
    if activation is not None:
        gate = activation(gate)
    result = gate if up is None else gate * up
    return (result if residual is None else residual.astype(jnp.float32) + result).astype(out_dtype)


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
        repeats = 1 if w.scheme.group_size is None else w.scheme.group_size // CHUNK
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


def _stream_quantized(x: jax.Array, w: QuantizedArray, layer: jax.Array | None) -> jax.Array:
    """x `[in]` @ w in one pass over the stored codes: `[out]`."""
    x = x.reshape(-1, CHUNK)  # [chunks, CHUNK]
    scale, zero, minimum = _factors(_part(dataclasses.replace(w, values=w.scales), layer))
    rows = _packed_rows(w.values, layer, w.scheme.format) if w.scheme.packed else _rows(w.values, layer)
    partial = _chain(x / PLACE_VALUE[None] if w.scheme.format == "int4" else x, rows)
    total = jnp.sum(x, axis=1, keepdims=True)  # [chunks, 1]
    if not isinstance(zero, int) or zero:
        partial = partial - zero * total
    partial = partial * scale
    if isinstance(minimum, int):
        return _add_up(partial)
    if len(x) < MANY_CHUNKS:
        return _add_up(partial + minimum * total)
    return _add_up(partial) + _dot(total.T, minimum)[0]


def _stream_dense(x: jax.Array, w: jax.Array, layer: jax.Array | None) -> jax.Array:
    """x `[in]` @ w in one pass over w: `[out]`."""
    return _add_up(_chain(x.reshape(-1, CHUNK), _rows(w, layer)))


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


def _rows(w: jax.Array, layer: jax.Array | None) -> Iterator[tuple[int, jax.Array]]:
    """Rows of a weight `[in, out]` with one number in each element: place in a chunk, and `[chunks, out]` float32."""
    bits = to_bits(w)
    for place in range(CHUNK):
        yield place, _number(_stored_row(bits, layer, place, CHUNK), w.dtype.name)


def _packed_rows(w: jax.Array, layer: jax.Array | None, kind: str) -> Iterator[tuple[int, jax.Array]]:
    """Rows of a packed weight `[in / 2, out]`: those in the low nibbles, and those in the high ones."""
    half = CHUNK // 2
    for place in range(half):
        stored = _stored_row(w, layer, place, half)
        yield place, _number(stored & 0xF, kind)
        # An integer's high nibble stays where it is, worth 16 times as much: processors do not shift bytes.
        yield place + half, _number(stored & 0xF0 if kind == "int4" else stored >> 4, kind)


def _stored_row(w: jax.Array, layer: jax.Array | None, place: int, chunk: int) -> jax.Array:
    """Row `place` of every chunk of stored rows: `[chunks, out]`."""
    # Sliced row by row out of all layers: a slice that only rows are taken from is not fused with them but copied.
    layers = w[None] if layer is None else w
    view = layers.reshape(layers.shape[0], -1, chunk, layers.shape[2])
    sizes = (1, view.shape[1], 1, view.shape[3])
    start = [jnp.asarray(index, jnp.int32) for index in (0 if layer is None else layer, 0, place, 0)]
    return jax.lax.dynamic_slice(view, start, sizes)[0, :, 0]


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
