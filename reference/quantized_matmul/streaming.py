"""Products that read a weight in chunks of 32 rows, as it is stored, and never hold it dequantized and unpacked.

For one row of x, or a few, dequantizing a weight is more work than the product. So few rows stream: the weights of a
chunk are a chain of multiply-adds over whole rows of codes, which XLA fuses with their conversion into one pass over
the stored bytes,

    partial[c, o] = sum_j x[32 c + j] * code[32 c + j, o]

and scales, zero points and minimums are applied to `partial`, once for every 32 weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.reference.bits import to_bits
from palladion.reference.e2m1 import decode_e2m1
from palladion.reference.quantization import QuantizedArray
from palladion.reference.quantized_matmul.definition import dot, select_layer
from palladion.reference.quantized_matmul.factors import Factors, factors_of

CHUNK: Final = 32
"""Weights along `in` of one chunk: a whole packing block, and no more than the smallest common group."""

PLACE_VALUE: Final = np.repeat(np.array([1, 16], np.float32), CHUNK // 2)
"""Factor of each int4 code of a chunk where high nibbles are not shifted down: low nibbles first, then high ones."""

MANY_CHUNKS: Final = 128
"""Chunks from which on minimums get a product of their own: XLA on a CPU breaks up a longer chain they are added to."""

ACCUMULATORS: Final = 4
"""Independent sums in a chain, so that a multiply-add need not wait for the one before."""


def divides_into_chunks(w: QuantizedArray) -> bool:
    """Returns whether chunks fill the weight and no chunk has two groups."""
    return w.in_features % CHUNK == 0 and (w.scheme.group_size or CHUNK) % CHUNK == 0


def stream_quantized(x: jax.Array, w: QuantizedArray, layer: jax.Array | None) -> jax.Array:
    """Returns x `[in]` @ w in one pass over the stored codes: `[out]`."""
    x = x.reshape(-1, CHUNK)  # [chunks, CHUNK]
    scale, zero, minimum = _factors(select_layer(dataclasses.replace(w, values=w.scales), layer))
    rows = _packed_rows(w.values, layer, w.scheme.format) if w.scheme.packed else _rows(w.values, layer)
    partial = _multiply_add(x / PLACE_VALUE[None] if w.scheme.format == "int4" else x, rows)
    total = jnp.sum(x, axis=1, keepdims=True)  # [chunks, 1]
    if not isinstance(zero, int) or zero:
        partial = partial - zero * total
    partial = partial * scale
    if isinstance(minimum, int):
        return _sum_chunks(partial)
    if len(x) < MANY_CHUNKS:
        return _sum_chunks(partial + minimum * total)
    return _sum_chunks(partial) + dot(total.T, minimum)[0]


def stream_dense(x: jax.Array, w: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Returns x `[in]` @ w in one pass over w: `[out]`."""
    return _sum_chunks(_multiply_add(x.reshape(-1, CHUNK), _rows(w, layer)))


def multiply_nibbles(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """Returns x `[rows, in]` @ w of packed codes, `[rows, out]`.

    The low and the high nibbles are one matrix each, with their own columns of x: interleaving them would cost XLA
    several times what unpacking does.
    """
    chunks = w.in_features // CHUNK
    stored = w.values.reshape(chunks, CHUNK // 2, w.out_features)
    halves = x.reshape(-1, chunks, 2, CHUNK // 2)
    scale, zero, minimum = (f if isinstance(f, int) else f[:, None] for f in _factors(w))
    product = jnp.zeros((), jnp.float32)
    for half, codes in enumerate((stored & 0xF, stored >> 4)):
        weights = (_decode(codes, w.scheme.format) - zero) * scale + minimum
        product += dot(halves[:, :, half].reshape(x.shape[0], -1), weights.reshape(-1, w.out_features))
    return product


def _factors(w: QuantizedArray) -> Factors:
    """Returns the factors, each `[chunks, out]`, or `[1, out]` where all chunks share it; codes of `w` are not used."""
    chunks_per_group = 1 if w.scheme.group_size is None else w.scheme.group_size // CHUNK

    def per_chunk(factor: Any) -> Any:
        return factor if isinstance(factor, int) else jnp.repeat(factor, chunks_per_group, axis=0)

    scale, zero, minimum = factors_of(w)
    return Factors(per_chunk(scale), per_chunk(zero), per_chunk(minimum))


def _multiply_add(x: jax.Array, rows: Iterator[tuple[int, jax.Array]]) -> jax.Array:
    """Multiplies the rows of each chunk by their activations and adds them up: `[chunks, out]`.

    Args:
      x: `[chunks, CHUNK]`.
      rows: positions in a chunk, each with its weights `[chunks, out]` in float32.
    """
    sums: list[jax.Array] = []
    for count, (position, weights) in enumerate(rows):
        product = weights * x[:, position, None]
        if count < ACCUMULATORS:
            sums.append(product)
        else:
            sums[count % ACCUMULATORS] += product
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def _rows(w: jax.Array, layer: jax.Array | None) -> Iterator[tuple[int, jax.Array]]:
    """Yields each position in a chunk and the rows there, `[chunks, out]` in float32, of an unpacked weight."""
    bits = to_bits(w)
    for position in range(CHUNK):
        yield position, _decode(_stored_row(bits, layer, position, CHUNK), w.dtype.name)


def _packed_rows(w: jax.Array, layer: jax.Array | None, code_format: str) -> Iterator[tuple[int, jax.Array]]:
    """Yields the same for a packed weight `[in / 2, out]`: the rows in low nibbles and those in high ones."""
    half = CHUNK // 2
    for position in range(half):
        stored = _stored_row(w, layer, position, half)
        yield position, _decode(stored & 0xF, code_format)
        # The high nibble of an integer stays where it is, worth 16 times as much: processors do not shift bytes.
        yield position + half, _decode(stored & 0xF0 if code_format == "int4" else stored >> 4, code_format)


def _stored_row(w: jax.Array, layer: jax.Array | None, position: int, chunk: int) -> jax.Array:
    """Returns the row at `position` of every chunk of stored rows: `[chunks, out]`."""
    # Sliced row by row from all layers: XLA copies a slice from which rows are sliced again instead of fusing it.
    layers = w[None] if layer is None else w
    view = layers.reshape(layers.shape[0], -1, chunk, layers.shape[2])
    sizes = (1, view.shape[1], 1, view.shape[3])
    start = [jnp.asarray(index, jnp.int32) for index in (0 if layer is None else layer, 0, position, 0)]
    return jax.lax.dynamic_slice(view, start, sizes)[0, :, 0]


def _decode(stored: jax.Array, code_format: str) -> jax.Array:
    """Converts codes, or floats as unsigned integers of their bits, to float32: exact, except that NaN is lost."""
    if code_format == "mxfp4":
        return decode_e2m1(stored)
    if not code_format.startswith(("bfloat16", "float8")) or jnp.issubdtype(stored.dtype, jnp.floating):
        return stored.astype(jnp.float32)
    if code_format == "bfloat16":  # the upper half of a float32
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    if code_format == "float8_e5m2":  # the upper half of a float16
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint16) << 8, jnp.float16).astype(jnp.float32)
    # e4m3: exponent and mantissa moved to where a float16 has them, whose exponents are biased by 8 more.
    bits = stored.astype(jnp.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256.0


def _sum_chunks(partial: jax.Array) -> jax.Array:
    """Returns the sum over chunks, `[chunks, out]` to `[out]`."""
    # A product with ones, because XLA on a CPU would fuse a sum into the chain, which is then no longer vectorized.
    return dot(jnp.ones((1, partial.shape[0]), jnp.float32), partial)[0]
