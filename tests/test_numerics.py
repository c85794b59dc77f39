"""Numerical guarantees: bad input, error bounds, determinism, and independence of the rest of a batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICKLY
from product_oracle import ORDER_OF

from palladion import KVCache, append_kv, decode_attention, dequantize, merge_partials, quantize, quantized_matmul
from palladion.kernels import append_kv as append_kv_operation
from palladion.kernels import decode_attention as decode_attention_operation
from palladion.kernels import quantized_matmul as quantized_matmul_operation
from palladion.reference import oracle
from palladion.reference.quantization import quantize_rows
from palladion.reference.scheme import Scheme

SCHEMES = ["int8", "int8-g32-zeros", "int4-g32", "int4-g32-zeros", "int4-g64-minimums", "float8_e4m3fn-g32", "mxfp4"]
METHODS = [*((scheme, "absmax") for scheme in SCHEMES), ("int4-g32", "mse"), ("mxfp4", "mse"), ("int4-minimums", "hqq")]
BAD = [np.nan, np.inf, -np.inf]
UNIT_ROUNDOFF = 2.0**-24


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def outlying(seed: int) -> jax.Array:
    """Returns weights `[256, 24]` with outliers, such as real models have."""
    return jnp.asarray(np.random.default_rng(seed).standard_t(4, (256, 24)), jnp.float32)


def implementations(operation: Any) -> list[str]:
    """Returns the backends of an operation; mosaic_gpu has tests of its own."""
    return [row.name for row in operation.IMPLEMENTATIONS if row.name != "mosaic_gpu"]


MATMUL = implementations(quantized_matmul_operation)
ATTENTION = implementations(decode_attention_operation)

# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("scheme", "method"), METHODS)
def test_a_group_with_a_bad_weight_is_nan_and_the_others_are_as_before(scheme: str, method: Any):
    weight = normal(128, 2)
    clean = np.asarray(dequantize(quantize(weight, scheme, method=method)))
    size = Scheme.parse(scheme).group_size or 128
    for bad in BAD:
        back = np.array(dequantize(quantize(weight.at[size // 2, 1].set(bad), scheme, method=method)))
        assert np.isnan(back[:size, 1]).all()
        back[:size, 1] = clean[:size, 1]
        np.testing.assert_array_equal(back, clean)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_subnormal_weights_count_as_zero(scheme: str):
    tiny = float(jnp.finfo(jnp.float32).tiny)
    weight = jnp.full((128, 2), tiny / 4).at[:, 1].set(normal(128)).at[3, 1].set(-tiny / 4)
    w = quantize(weight, scheme)
    back = np.asarray(dequantize(w))
    assert (back[:, 0] == 0).all()
    np.testing.assert_array_equal(back[:, 1], dequantize(quantize(weight.at[3, 1].set(0.0), scheme))[:, 1])


@pytest.mark.parametrize("scheme", ["int8", "int4-g32-zeros", "int4-g32-minimums", "float8_e5m2"])
def test_scales_too_large_for_their_dtype_give_nan_and_too_small_ones_zeros(scheme: str):
    weight = normal(64, 3) * jnp.array([1e12, 1.0, 1e-9])
    back = np.asarray(dequantize(quantize(weight, scheme, scale_dtype=jnp.float16)))
    assert np.isnan(back[:, 0]).all()
    assert np.isfinite(back[:, 1]).all()
    # The smallest float16 is 6e-8: scales and minimums below half of it become 0.
    assert (back[:, 2] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [1.0, -0.3, 3e38, -1e-30])
def test_groups_of_equal_weights_are_restored(scheme: str, value: float):
    back = np.asarray(dequantize(quantize(jnp.full((128, 2), value), scheme)), np.float64)
    # The scale of mxfp4 is a power of two, so its codes have to represent the rest of the value.
    bound = 0.25 if scheme == "mxfp4" else 4 * UNIT_ROUNDOFF
    np.testing.assert_allclose(back, np.float32(value), rtol=bound)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_a_row_with_a_bad_number_has_scale_nan_and_codes_of_zero(dtype: str):
    x = normal(6, 64)
    clean_codes, clean_scales = quantize_rows(x, dtype)
    bad = x.at[1, 5].set(jnp.nan).at[2, 0].set(jnp.inf).at[3, 63].set(-jnp.inf).at[4].set(1e-39)
    codes, scales = (np.array(part) for part in quantize_rows(bad, dtype))
    assert np.isnan(scales[1:4]).all()
    assert scales[4] == 0
    assert (codes[1:5].astype(np.float32) == 0).all()
    for row in (0, 5):
        np.testing.assert_array_equal(codes[row], clean_codes[row])
        assert scales[row] == clean_scales[row]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_append_kv_stores_bad_tokens_in_the_same_way(dtype: str):
    """Every implementation stores the same codes, scales and NaN."""
    k = normal(2, 3, 2, 64).at[0, 0, 0, 1].set(jnp.nan).at[0, 1, 1, 2].set(jnp.inf).at[1, 2].set(1e-40)
    v = -k.at[1, 0, 0].set(3.4e38)
    lengths = jnp.array([5, 130], jnp.int32)
    found = []
    for name in implementations(append_kv_operation):
        cache = KVCache.dense(2, 2, 256, 64, dtype)
        interpret = None if name == "xla" else True
        write = functools.partial(append_kv, backend=name, interpret=interpret)
        found.append(jax.tree.leaves(jax.jit(write, compiler_options=QUICKLY)(cache, k, v, lengths)))
    for parts in zip(*found, strict=True):
        for part in parts[1:]:
            # NaN in float8 compares equal only after conversion to float32.
            np.testing.assert_array_equal(part.astype(jnp.float32), parts[0].astype(jnp.float32))
    assert np.isnan(np.asarray(found[0][2 if dtype != "bfloat16" else 0], np.float32)).any()


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "mxfp4"])
@pytest.mark.parametrize(("backend", "rows"), [("xla", 3), *((name, 6) for name in MATMUL)])
def test_quantized_matmul_keeps_bad_numbers_in_their_row_and_their_channel(backend: str, rows: int, scheme: str):
    dtype = jnp.float32 if scheme == "int4-g32" else jnp.bfloat16
    x, weight = normal(rows, 128, seed=1, dtype=dtype), normal(128, 256)
    multiply, order = _multiplication(backend), ORDER_OF[backend]
    clean = np.asarray(multiply(x, quantize(weight, scheme, order=order)), np.float32)
    w = quantize(weight.at[70, 7].set(jnp.nan), scheme, order=order)
    found = np.array(multiply(x.at[1, 3].set(jnp.nan).at[2, 127].set(jnp.inf), w), np.float32)
    assert np.isnan(found[1]).all()
    assert not np.isfinite(found[2]).any()
    assert np.isnan(found[:, 7]).all()
    found[1:3], found[:, 7] = clean[1:3], clean[:, 7]
    np.testing.assert_array_equal(found, clean)


@functools.cache
def _attention(backend: str) -> Any:
    interpret = None if backend == "xla" else True
    call = functools.partial(decode_attention, return_lse=True, backend=backend, interpret=interpret)
    return jax.jit(call, compiler_options=QUICKLY)


@functools.cache
def _multiplication(backend: str) -> Any:
    interpret = None if backend == "xla" else True
    call = functools.partial(quantized_matmul, backend=backend, interpret=interpret)
    return jax.jit(call, compiler_options=QUICKLY)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("backend", ATTENTION)
def test_decode_attention_keeps_bad_numbers_in_their_sequence(backend: str, dtype: str):
    q_dtype = "bfloat16" if dtype == "int8" else dtype
    q, k, v = normal(3, 4, 64, dtype=q_dtype), normal(3, 2, 256, 64, seed=1), normal(3, 2, 256, 64, seed=2)
    lengths = jnp.array([200, 70, 129], jnp.int32)
    attend = _attention(backend)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        scales = {}
        if dtype == "int8":
            (k, scales["k_scale"]), (v, scales["v_scale"]) = quantize_rows(k, dtype), quantize_rows(v, dtype)
        out, lse = attend(q, k.astype(dtype), v.astype(dtype), lengths, **scales)
        return np.array(out, np.float32), np.array(lse)

    clean_out, clean_lse = run(q, k, v)
    for bad in (np.nan, np.inf):
        out, lse = run(q.at[1, 2, 5].set(bad), k, v)
        # With few keys an infinite query may have only logits of -inf, as if no key were visible; 70 keys are too many.
        assert np.isnan(out[1, 2]).all()
        assert np.isnan(lse[1, 2])
        out[1, 2], lse[1, 2] = clean_out[1, 2], clean_lse[1, 2]
        np.testing.assert_array_equal(out, clean_out)
        np.testing.assert_array_equal(lse, clean_lse)

        out, lse = run(q, k, v.at[2, 1, 128, 9].set(bad))
        affected = slice(None) if dtype == "int8" else 9
        assert not np.isfinite(out[2, 2:, affected]).any()
        np.testing.assert_array_equal(out[:2], clean_out[:2])
        if (backend, dtype) == ("triton", "int8"):
            # The scale of a value is a part of the shift of its head's softmax, and moves the rounding of the lse.
            np.testing.assert_allclose(lse[2, 2:], clean_lse[2, 2:], rtol=2**-19)
            lse[2, 2:] = clean_lse[2, 2:]
        np.testing.assert_array_equal(lse, clean_lse)

    out, lse = run(q, k.at[0, 1, 10, 3].set(jnp.nan), v)
    assert np.isnan(out[0, 2:]).all()
    assert np.isnan(lse[0, 2:]).all()
    # NaN may spread to heads that are multiplied together, because the output projection mixes heads anyway, but never
    # to other sequences.
    others = out[0, :2]
    np.testing.assert_array_equal(others[~np.isnan(others)], clean_out[0, :2][~np.isnan(others)])
    np.testing.assert_array_equal(out[1:], clean_out[1:])
    np.testing.assert_array_equal(lse[1:], clean_lse[1:])


# --------------------------------------------------------------------------------------------------------- quantizers


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-g64-zeros", "mxfp4"])
def test_mse_is_never_worse_than_absmax(scheme: str):
    weight = outlying(0)
    groups = Scheme.parse(scheme).groups(256)

    def error(method: Any, **options: Any) -> np.ndarray:
        back = dequantize(quantize(weight, scheme, method=method, **options))
        deviation = (np.asarray(back, np.float64) - weight).reshape(groups, -1, 24)
        return (deviation**2).sum(axis=1)

    absmax, least = error("absmax"), error("mse")
    assert (least <= absmax * (1 + 1e-5)).all()
    # 8-bit codes are fine enough for outliers; 4-bit codes gain, the more the larger the group is.
    if scheme != "int8":
        assert least.sum() < absmax.sum() * (0.9 if scheme == "int4" else 1)


def test_importance_lowers_the_error_of_the_product():
    generator = np.random.default_rng(0)
    weight = jnp.asarray(generator.standard_t(4, (256, 32)), jnp.float32)
    spread = np.exp(generator.standard_normal(256))  # some activations are large at all times
    x, other = (jnp.asarray(generator.standard_normal((512, 256)) * spread, jnp.float32) for _ in range(2))
    importance = jnp.mean(x * x, axis=0)

    def error(**options: Any) -> float:
        back = dequantize(quantize(weight, "int4-g64", **options))
        return float(jnp.linalg.norm(other @ back - other @ weight))

    assert error(method="mse", importance=importance) < 0.97 * error(method="mse") < error(method="absmax")


def test_hqq_lowers_the_error_in_its_norm():
    weight = outlying(1)

    def error(method: Any) -> float:
        w = quantize(weight, "int4-g64-minimums", method=method)
        scales = np.repeat(w.scales, 64, axis=0)
        return float((np.abs((dequantize(w) - weight) / scales) ** 0.7).sum())

    assert error("hqq") < error("absmax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method: got 'best'; accepted: absmax, mse, hqq"),
        ({"method": "hqq"}, "method 'hqq' moves minimums, int4-g32 has none"),
        ({"importance": jnp.ones(64)}, "method 'absmax' has no use for it"),
        ({"method": "mse", "importance": jnp.ones(8)}, r"got shape \(8,\); accepted: \(64,\)"),
    ],
)
def test_errors(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((64, 8)), "int4-g32", **options)


# ------------------------------------------------------------------------------------------------------- error bounds


def gamma(operations: float) -> float:
    """Returns the relative error bound of so many roundings to float32 (Higham, Accuracy and Stability, lemma 3.1)."""
    return operations * UNIT_ROUNDOFF / (1 - operations * UNIT_ROUNDOFF)


def arithmetic_of_matmul(x: np.ndarray, w: Any) -> np.ndarray:
    """Returns the error bound of quantized_matmul before its result is rounded; docs/numerics.md derives it."""
    magnitudes = dataclasses.replace(
        w, scales=jnp.abs(w.scales), minimums=None if w.minimums is None else jnp.abs(w.minimums)
    )
    # |code - zero| <= |code| + |zero|: an implementation may scale and sum the two separately.
    codes = np.abs(oracle.dequantize(dataclasses.replace(magnitudes, zeros=None, minimums=None)))
    apart = codes + 2 * np.abs(oracle.dequantize(dataclasses.replace(w, values=jnp.zeros_like(w.values))))
    return gamma(w.in_features + 8) * (np.abs(x) @ apart)


def bound_of_matmul(x: np.ndarray, w: Any, out_dtype: Any) -> np.ndarray:
    """Returns the error bound of quantized_matmul, the rounding of its result included."""
    exact, arithmetic = x @ oracle.dequantize(w), arithmetic_of_matmul(x, w)
    return arithmetic + 0.5 * float(jnp.finfo(out_dtype).eps) * (np.abs(exact) + arithmetic)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    case=st.sampled_from(
        [
            ("int8", 2, "bfloat16"),
            ("int4-g32", 8, "float32"),
            ("int4-g64-minimums", 2, "float32"),
            ("int8-g32-zeros", 8, "bfloat16"),
            ("mxfp4", 8, "float32"),
        ]
    ),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_quantized_matmul_is_within_its_bound(case: tuple[str, int, str], spread: float, seed: int):
    """The reference keeps its bound at any magnitudes; kernels are held to twice its error by their own tests."""
    scheme, rows, dtype = case
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((256, 24)) * np.exp(spread * generator.standard_normal((256, 24)))
    x = generator.standard_normal((rows, 256)) * np.exp(spread * generator.standard_normal((rows, 256)))
    x, w = jnp.asarray(x, dtype), quantize(jnp.asarray(weight, jnp.float32), scheme)
    wide = oracle.to_float64(x)
    error = np.abs(oracle.to_float64(_multiplication("xla")(x, w)) - wide @ oracle.dequantize(w))
    assert (error <= bound_of_matmul(wide, w, dtype)).all()


def bound_of_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: int) -> tuple[float, np.ndarray]:
    """Returns the error bounds of the lse and the float32 outputs of one query and head; see docs/numerics.md."""
    head_dim, blocks = len(q), -(-length // 128)
    keys, values = k[:length], v[:length]
    logits = keys @ q * head_dim**-0.5
    largest = (np.abs(keys) @ np.abs(q)).max() * head_dim**-0.5
    of_logits = gamma(head_dim + 4) * largest
    of_weights = of_logits + (blocks + 1) * (np.ptp(logits) + 4) * UNIT_ROUNDOFF
    of_sums = gamma(length + 2 * blocks + 4)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    relative = np.expm1(2 * of_weights) + 2 * of_sums
    lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return of_weights + of_sums + 4 * UNIT_ROUNDOFF * (1 + abs(lse)), relative * (weights @ np.abs(values))


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    length=st.integers(1, 300),
    magnitude=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**16),
    split=st.booleans(),
)
def test_decode_attention_and_its_merge_are_within_their_bound(length: int, magnitude: float, seed: int, split: bool):
    """Attention over the whole cache is within its bound, and so is each of two parts that are merged."""
    q = magnitude * normal(1, 2, 64, seed=seed)
    k, v = normal(1, 1, 300, 64, seed=seed + 1), normal(1, 1, 300, 64, seed=seed + 2)
    if split:
        first = jnp.array([min(length, 150)], jnp.int32)
        parts = [
            _attention("xla")(q, k[:, :, part], v[:, :, part], lengths)
            for part, lengths in ((slice(150), first), (slice(150, None), jnp.array([length], jnp.int32) - first))
        ]
        out, lse = merge_partials(*(jnp.stack(both) for both in zip(*parts, strict=True)))
    else:
        out, lse = _attention("xla")(q, k, v, jnp.array([length], jnp.int32))
    exact_out, exact_lse = oracle.decode_attention(q, k, v, [length])
    for head in range(2):
        of_lse, of_out = bound_of_attention(
            *(oracle.to_float64(part) for part in (q[0, head], k[0, 0], v[0, 0])), length
        )
        # Merging weights each part by its lse.
        times = 3 if split else 1
        assert abs(float(lse[0, head]) - exact_lse[0, head]) <= times * of_lse
        assert (np.abs(oracle.to_float64(out[0, head]) - exact_out[0, head]) <= times * of_out).all()
        assert of_out.max() < 2.0**-9 * np.abs(exact_out).max() or magnitude > 1  # tighter than bfloat16


@pytest.mark.parametrize("backend", ATTENTION)
def test_empty_sequences_are_exact(backend: str):
    q, k = normal(3, 4, 64), jnp.full((3, 2, 256, 64), jnp.nan)
    out, lse = _attention(backend)(q, k, k, jnp.zeros(3, jnp.int32))
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()
    # Merging them with another result does not change a bit of it.
    other = normal(3, 4, seed=1)
    merged, merged_lse = merge_partials(jnp.stack([out, q]), jnp.stack([lse, other]))
    np.testing.assert_array_equal(merged, q)
    np.testing.assert_array_equal(merged_lse, other)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    dtype=st.sampled_from(["int8", "float8_e4m3fn", "float8_e5m2"]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_quantized_rows_are_within_half_a_code(dtype: str, spread: float, seed: int):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((8, 96)) * np.exp(spread * generator.standard_normal((8, 96)))
    codes, scales = _rows(jnp.asarray(x, jnp.float32), dtype)
    error = np.abs(oracle.to_float64(codes) * oracle.to_float64(scales)[:, None] - np.float32(x))
    largest = np.abs(np.float32(x)).max(axis=1, keepdims=True)
    if dtype == "int8":
        bound = np.broadcast_to(largest / 254, x.shape)
    else:
        info = jnp.finfo(dtype)
        smallest = largest * float(info.smallest_subnormal) / float(info.max)
        bound = np.maximum(np.abs(np.float32(x)) * float(info.eps) / 2, smallest / 2)
    # Rounding in float32 may move a quotient across the middle between two codes.
    assert (error <= bound * (1 + 1e-5) + 4 * UNIT_ROUNDOFF * largest).all()


_rows = jax.jit(quantize_rows, static_argnums=1)


# --------------------------------------------------------------- determinism, and independence of the rest of the batch


def _equal(found: Any, expected: Any) -> None:
    """Asserts that all leaves are equal to the last bit."""
    for part, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("backend", ATTENTION)
def test_attention_is_deterministic_and_independent_of_other_sequences(backend: str):
    q, k, v = normal(3, 4, 64), normal(3, 2, 256, 64, seed=1), normal(3, 2, 256, 64, seed=2)
    attend = _attention(backend)
    first = attend(q, k, v, jnp.array([200, 70, 129], jnp.int32))
    _equal(attend(q, k, v, jnp.array([200, 70, 129], jnp.int32)), first)
    for lengths in ([200, 256, 0], [200, 1, 256]):  # other sequences have more blocks, or fewer
        found = attend(q, k, v, jnp.array(lengths, jnp.int32))
        _equal([part[0] for part in found], [part[0] for part in first])
    order = jnp.array([2, 0, 1])
    found = attend(q[order], k[order], v[order], jnp.array([200, 70, 129], jnp.int32)[order])
    _equal(found, [part[order] for part in first])


@pytest.mark.parametrize("backend", MATMUL)
def test_products_are_deterministic_and_independent_of_other_rows(backend: str):
    x, w = normal(6, 128, seed=1), quantize(normal(128, 256), "int4-g32", order=ORDER_OF[backend])
    multiply = _multiplication(backend)
    first = multiply(x, w)
    _equal(multiply(x, w), first)
    _equal(multiply(x[::-1], w), first[::-1])
    _equal(multiply(x.at[1:].set(3 * x[:-1]), w)[0], first[0])


def test_recompiling_gives_the_same_bits():
    x, w = normal(3, 128), quantize(normal(128, 48), "int4-g64-minimums")
    once, again = (jax.jit(functools.partial(quantized_matmul, backend="xla")) for _ in range(2))
    _equal(once(x, w), again(x, w))
