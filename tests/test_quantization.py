"""Quantized arrays: codes, packing, scales and dequantizing."""

from __future__ import annotations

from typing import Any

import gguf
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from palladion import QuantizedArray, Scheme, dequantize, quantize
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.reference import oracle
from palladion.reference.e2m1 import E2M1_LEVELS, decode_e2m1, encode_e2m1
from palladion.reference.quantization import ORDERS, pack_nibbles, quantize_rows, unpack_nibbles
from palladion.reference.scheme import nearest_code

SCHEMES = [
    "int8",
    "int8-g32",
    "int8-g64-zeros",
    "int8-minimums",
    "int4",
    "int4-g16",
    "int4-g32",
    "int4-g128",
    "int4-g32-zeros",
    "int4-g32-minimums",
    "float8_e4m3fn",
    "float8_e5m2-g32",
    "mxfp4",
]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_is_the_oracles(scheme: str):
    w = quantize(normal(256, 48), scheme)
    exact = oracle.dequantize(w)
    # One product and at most one sum, in float32.
    np.testing.assert_allclose(dequantize(w), exact, rtol=3e-7, atol=3e-7 * np.abs(exact).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_storage_orders_hold_the_same_weights(scheme: str):
    weights = normal(3, 256, 48)
    w = quantize(weights, scheme, order="in_out")
    swapped = quantize(weights, scheme, order="out_in")
    assert swapped.order == "out_in"
    assert (swapped.shape, swapped.nbytes, swapped.values.shape[1]) == (w.shape, w.nbytes, 48)
    assert jax.tree.all(jax.tree.map(np.array_equal, w.with_order("out_in"), swapped))
    assert swapped.with_order("in_out").order == "in_out"
    np.testing.assert_array_equal(dequantize(swapped), dequantize(w))
    exact = [oracle.dequantize(quantize(weights[0], scheme, order=order)) for order in ORDERS]
    np.testing.assert_array_equal(*exact)


def test_the_order_of_quantize_is_the_platforms():
    with gpu_compiler.tracing_for(90):
        assert jax.eval_shape(lambda: quantize(jnp.ones((64, 8)), "int8")).order == "out_in"
    assert quantize(normal(64, 8), "int8").order == "in_out"


def largest_error(scheme: Scheme, w: QuantizedArray, exact: np.ndarray) -> np.ndarray:
    """Returns the largest error of each weight: half the distance of two codes."""
    groups = w.scales.shape[0]
    scales = np.repeat(np.asarray(w.scales, np.float64), exact.shape[0] // groups, axis=0)
    if scheme.format in ("int8", "int4"):
        # Rounding the zero point moves the range by up to half a code.
        return scales * (1.0 if scheme.offset == "zeros" else 0.5)
    if scheme.format == "mxfp4":
        # Up to 8 saturates at 6 where the largest weight of a group is just below the next power of two.
        return np.maximum(np.abs(exact) / 4, scales * 0.25)
    info = ml_dtypes.finfo(scheme.format)
    return np.maximum(np.abs(exact) * float(info.eps) / 2, scales * float(info.smallest_subnormal) / 2)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    scheme=st.sampled_from(SCHEMES),
    blocks=st.integers(1, 3),
    out_features=st.integers(1, 9),
    magnitude=st.sampled_from([1e-6, 1.0, 3e4]),
    seed=st.integers(0, 2**16),
)
def test_every_weight_comes_back_within_half_a_code(
    scheme: str, blocks: int, out_features: int, magnitude: float, seed: int
):
    weights = magnitude * normal(128 * blocks, out_features, seed=seed)
    w = quantize(weights, scheme)
    exact = np.asarray(weights, np.float64)
    error = np.abs(np.asarray(dequantize(w), np.float64) - exact)
    assert (error <= largest_error(Scheme.parse(scheme), w, exact) * 1.001 + 1e-6 * magnitude).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme: str):
    weights = normal(128, 6).at[:, 2].set(0.0)
    back = np.asarray(dequantize(quantize(weights, scheme)))
    assert np.isfinite(back).all()
    assert (back[:, 2] == 0).all()


def test_codes_are_packed_as_in_gguf():
    codes = jax.random.randint(jax.random.key(0), (64, 5), 0, 16)
    packed = np.asarray(pack_nibbles(codes))
    assert packed.shape == (32, 5)
    for block in range(2):
        for j in range(16):
            np.testing.assert_array_equal(packed[16 * block + j] & 15, codes[32 * block + j])
            np.testing.assert_array_equal(packed[16 * block + j] >> 4, codes[32 * block + j + 16])
    np.testing.assert_array_equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize(
    ("kind", "scheme"), [("Q4_0", "int4-g32"), ("Q4_1", "int4-g32-minimums"), ("Q8_0", "int8-g32"), ("MXFP4", "mxfp4")]
)
def test_ggufs_blocks_mean_the_same(kind: str, scheme: str):
    """Blocks made by the gguf package, parsed here by hand, dequantize to what the package computes."""
    rows = np.asarray(normal(3, 96), np.float32)
    stored = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]).reshape(3, 3, -1)
    expected = gguf.quants.dequantize(stored.reshape(3, -1), gguf.GGMLQuantizationType[kind])
    parsed = Scheme.parse(scheme)
    head = {"Q4_1": 4, "MXFP4": 1}.get(kind, 2)
    header = np.ascontiguousarray(stored[..., :head])
    codes = stored[..., head:].reshape(3, -1).view(np.int8 if kind == "Q8_0" else np.uint8).T
    minimums = None
    if kind == "MXFP4":
        # GGUF's scale is for doubled e2m1 numbers, so the scale of this format is half as large.
        scales = header.view(ml_dtypes.float8_e8m0fnu)[..., 0].T
    else:
        factors = header.view(np.float16)
        scales = factors[..., 0].T
        minimums = jnp.asarray(factors[..., 1].T) if kind == "Q4_1" else None
    w = QuantizedArray(jnp.asarray(codes), jnp.asarray(scales), None, minimums, parsed)
    np.testing.assert_allclose(np.asarray(dequantize(w)).T, expected, rtol=1e-6)


def test_e2m1_numbers():
    levels = np.array([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)], np.float32)
    np.testing.assert_array_equal(decode_e2m1(jnp.arange(16)), levels)
    expected = np.arange(16)
    expected[8] = 0  # zero has one code
    np.testing.assert_array_equal(encode_e2m1(jnp.asarray(levels)), expected)
    # Ties go to the even code, and numbers beyond the largest saturate.
    x = jnp.array([0.25, 0.75, 2.5, 3.5, 5.0, 7.0, -100.0])
    np.testing.assert_array_equal(decode_e2m1(encode_e2m1(x)), [0.0, 1.0, 2.0, 4.0, 4.0, 6.0, -6.0])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_rows(dtype: str):
    x = normal(4, 32).at[1].set(0.0)
    codes, scales = quantize_rows(x, dtype)
    assert codes.dtype == dtype
    assert scales.shape == (4,)
    assert scales[1] == 0
    back = np.asarray(codes, np.float32) * np.asarray(scales)[:, None]
    step = {"int8": 1 / 127, "float8_e4m3fn": 1 / 8, "float8_e5m2": 1 / 4}[dtype]
    assert (np.abs(back - x) <= 0.51 * step * np.abs(x).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_codes_are_rounded_before_they_are_converted(dtype: str):
    """Where XLA leaves out the conversion to an 8-bit float and back, the codes must be rounded nevertheless."""
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    numbers = np.sort(np.unique(codes[np.isfinite(codes)].astype(np.float32)))
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])
    found = np.asarray(nearest_code(jnp.asarray(x), Scheme(dtype)))
    np.testing.assert_array_equal(found, x.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_are_parsed_back(scheme: str):
    assert str(Scheme.parse(scheme)) == scheme
    assert Scheme.parse(Scheme.parse(scheme)) == Scheme.parse(scheme)


def test_aliases():
    assert Scheme.parse("fp8") == Scheme.parse("float8") == Scheme("float8_e4m3fn")
    assert Scheme("mxfp4").group_size == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme.parse("int3"), "scheme: got 'int3'; a scheme is FORMAT"),
        (lambda: Scheme.parse("int4-32"), "scheme: got 'int4-32'"),
        (lambda: Scheme("int2"), "Scheme.format: got 'int2'; known formats: int8, int4"),  # type: ignore[arg-type]
        (lambda: Scheme("int4", 32, "bias"), "Scheme.offset: got 'bias'; accepted"),  # type: ignore[arg-type]
        (lambda: Scheme("mxfp4", 32, "zeros"), "Scheme.offset: mxfp4 is symmetric"),
        (lambda: Scheme("mxfp4", 64), "mxfp4 has groups of 32, got 64"),
        (lambda: Scheme("int4", 24), "Scheme.group_size: got 24; accepted: None or a positive multiple of 16"),
        (lambda: quantize(jnp.ones((64, 8)), "int8", order="out"), "order: got 'out'; accepted: 'in_out', 'out_in'"),
        (lambda: quantize(jnp.ones(4), "int8"), r"weight must be \[\.\.\., in, out\], got shape \(4,\)"),
        (lambda: quantize(jnp.ones((96, 4)), "int4-g64"), "in = 96 is not a multiple of group_size; .*: \\[32, 16\\]"),
        (lambda: quantize(jnp.ones((40, 4)), "int4"), "packed in blocks of 32, got in = 40; pad `in` or use int8"),
        (lambda: quantize(jnp.ones((64, 4)), "mxfp4").with_scale_dtype("float32"), "scales of mxfp4 are powers of two"),
    ],
)
def test_errors(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_are_pytrees():
    w = quantize(normal(3, 64, 8), "int4-g32-minimums", scale_dtype=jnp.bfloat16)
    assert w.shape == (3, 64, 8)
    assert w.nbytes == 3 * (32 * 8 + 2 * 2 * 8 * 2) == sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    one_by_one = jnp.stack([dequantize(jax.tree.map(lambda part: part[i], w)) for i in range(3)])  # noqa: B023
    np.testing.assert_array_equal(jax.jit(jax.vmap(dequantize))(w), one_by_one)
    np.testing.assert_array_equal(jax.lax.scan(lambda _, part: (None, dequantize(part)), None, w)[1], one_by_one)
    np.testing.assert_array_equal(dequantize(w), one_by_one)
    assert w.with_scale_dtype("float32").minimums.dtype == jnp.float32  # type: ignore[union-attr]
