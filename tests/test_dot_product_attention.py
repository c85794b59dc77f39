"""dot_product_attention: held against `jax.nn.dot_product_attention` itself and a float64 oracle, in JAX's layout."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import UNOPTIMIZED

from palladion import append_kv, decode_attention, dot_product_attention
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.frameworks.attention import kv_cache_from_bskh
from palladion.reference.compare import assert_right

BATCH, KV_LEN, HEAD_DIM = 3, 9, 64
LENGTHS = np.array([5, 1, 9], np.int32)


def arrays(q_len: int = 1, heads: tuple[int, int] = (4, 2), dtype: Any = "float32") -> tuple[jax.Array, ...]:
    """Returns query, key and value in JAX's layout."""
    shapes = [(BATCH, q_len, heads[0], HEAD_DIM), *[(BATCH, KV_LEN, heads[1], HEAD_DIM)] * 2]
    keys = jax.random.split(jax.random.key(q_len), 3)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def compiled(attend: Any = dot_product_attention, **static: Any) -> Any:
    """Returns attention of JAX or of Palladion as a compiled function of its arrays, named ones among them."""
    return jax.jit(functools.partial(attend, **static), compiler_options=UNOPTIMIZED)


def oracle(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes attention in float64, one query and one head at a time, with positions counted from the first key."""
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    out, lse = np.zeros(query.shape), np.full(query.shape[:3], -np.inf)
    group = query.shape[2] // key.shape[2]
    for b, i, h in np.ndindex(query.shape[:3]):
        seen = np.arange(key.shape[1])
        seen = seen if key_value_seq_lengths is None else seen[seen < np.asarray(key_value_seq_lengths)[b]]
        seen = seen[seen <= i] if is_causal else seen
        seen = seen if window is None else seen[(seen >= i - window[0]) & (seen <= i + window[1])]
        if (query_seq_lengths is not None and i >= np.asarray(query_seq_lengths)[b]) or not seen.size:
            continue
        logits = key[b, seen, h // group] @ query[b, i, h] * (query.shape[-1] ** -0.5 if scale is None else scale)
        weights = np.exp(logits - logits.max())
        lse[b, i, h] = np.log(weights.sum()) + logits.max()
        out[b, i, h] = weights @ value[b, seen, h // group] / weights.sum()
    return out, lse


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decode": ({}, {"key_value_seq_lengths": LENGTHS}),
    "decode-bfloat16": ({"dtype": "bfloat16"}, {"key_value_seq_lengths": LENGTHS}),
    "decode-float16": ({"dtype": "float16"}, {"key_value_seq_lengths": LENGTHS}),
    "decode-multi-head": ({"heads": (3, 3)}, {"key_value_seq_lengths": LENGTHS, "scale": 0.3}),
    "decode-multi-query": ({"heads": (4, 1)}, {"key_value_seq_lengths": LENGTHS}),
    "all-keys": ({}, {}),
    "cross": ({"q_len": 4}, {"key_value_seq_lengths": LENGTHS}),
    "cross-padded": ({"q_len": 4}, {"query_seq_lengths": np.array([4, 1, 2], np.int32)}),
    "prompt": ({"q_len": KV_LEN}, {"is_causal": True}),
    "prompt-bfloat16": ({"q_len": KV_LEN, "dtype": "bfloat16"}, {"is_causal": True}),
    "prompt-in-longer-cache": ({"q_len": 4}, {"is_causal": True}),
    "prompt-of-one-token": ({}, {"is_causal": True}),
    "prompt-padded": (
        {"q_len": KV_LEN},
        {"is_causal": True, "query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS},
    ),
    "window": ({"q_len": KV_LEN}, {"local_window_size": (3, 0)}),
    "window-of-self": ({"q_len": 4}, {"local_window_size": 0}),
    "window-causal": ({"q_len": KV_LEN}, {"local_window_size": (2, 5), "is_causal": True}),
    "window-symmetric": ({"q_len": KV_LEN}, {"local_window_size": 3, "is_causal": True}),
}


KERNELS = ("decode", "cross", "prompt-padded", "window")
"""Cases that a kernel runs, too: interpreted, and whichever of the platforms' covers a short cache."""


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "xla") for name in CASES), *((name, "pallas") for name in KERNELS)]
)
def test_the_result_is_that_of_jax(name: str, backend: str):
    shape, options = CASES[name]
    given = arrays(**shape)
    out, lse = compiled(return_residual=True, backend=backend, **options)(*given)
    theirs = functools.partial(jax.nn.dot_product_attention, return_residual=True, **options)
    # On a CPU, JAX does not compile it in float16.
    jax_out, jax_lse = (theirs if given[0].dtype == jnp.float16 else compiled(theirs))(*given)
    assert (out.dtype, lse.dtype) == (jax_out.dtype, jax_lse.dtype)
    exact_out, exact_lse = oracle(*given, **options)
    # A query that sees no key has zeros here, and the mean of all values in JAX.
    sees = np.isfinite(exact_lse)
    assert_right(out, jnp.where(sees[..., None], jax_out, 0), exact_out, name)
    assert_right(lse, jnp.where(sees, jax_lse, -jnp.inf), exact_lse, name)


@pytest.mark.parametrize("name", ["decode", "cross-padded", "prompt-padded"])
def test_lengths_may_be_traced(name: str):
    shape, options = CASES[name]
    given = arrays(**shape)
    traced = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
    static = {name: value for name, value in options.items() if name not in traced}
    out = compiled(**static)(*given, **traced)
    np.testing.assert_allclose(out, compiled(**options)(*given), rtol=1e-5, atol=1e-6)


def test_arrays_without_a_batch():
    query, key, value = (x[0] for x in arrays())
    out, lse = compiled(return_residual=True)(query, key, value)
    jax_out, jax_lse = compiled(jax.nn.dot_product_attention, return_residual=True)(query, key, value)
    np.testing.assert_allclose(out, jax_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, jax_lse, rtol=1e-5)


def test_a_query_that_sees_nothing_has_zeros():
    query, key, value = arrays()
    lengths = np.array([0, 2, 0], np.int32)
    out, lse = compiled(return_residual=True)(query, key, value, key_value_seq_lengths=lengths)
    np.testing.assert_array_equal(np.asarray(out != 0).any((1, 2, 3)), [False, True, False])
    np.testing.assert_array_equal(np.isneginf(lse).all((1, 2)), [True, False, True])


def test_values_past_the_lengths_do_not_matter():
    query, key, value = arrays(q_len=2)
    past = (jnp.arange(KV_LEN) >= LENGTHS[:, None])[..., None, None]
    poisoned = (jnp.where(past, jnp.nan, part) for part in (key, value))
    attend = compiled(key_value_seq_lengths=LENGTHS)
    np.testing.assert_array_equal(attend(query, *poisoned), attend(query, key, value))


def test_no_derivative_passes_through_the_residual():
    def both(attend: Any) -> Any:
        def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            out, lse = attend(query, key, value, key_value_seq_lengths=LENGTHS, return_residual=True)
            return jnp.sum(out**2) + jnp.sum(lse)

        return compiled(jax.grad(total, (0, 1, 2)))(*arrays())

    for ours, theirs in zip(both(dot_product_attention), both(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bias": jnp.zeros((1, 1, 1, KV_LEN))},
            "bias: got .*; accepted: None; jax.nn.dot_product_attention adds",
        ),
        ({"mask": jnp.ones((1, 1, 1, KV_LEN), bool)}, "mask: got .*; key_value_seq_lengths masks the end of a cache"),
        ({"implementation": "cudnn"}, "implementation: got cudnn; accepted: None; backend= names one of"),
        ({"scale": jnp.ones(3)}, "scale: got .*; accepted: None or a finite number"),
        ({"key_value_seq_lengths": 10}, r"key_value_seq_lengths: got \[10, 10, 10\]; accepted: 0 to 9"),
        ({"key_value_seq_lengths": [1, 2]}, r"key_value_seq_lengths: got int32 \(2,\); accepted: int32 \[batch = 3\]"),
        ({"query_seq_lengths": 1.0}, "query_seq_lengths: got float32"),
        (
            {"is_causal": True, "key_value_seq_lengths": 5},
            "is_causal: got it with key_value_seq_lengths; .* JAX aligns query i.* In a decode loop leave it",
        ),
        ({"local_window_size": (3, 0), "key_value_seq_lengths": 5}, "local_window_size: .* palladion.decode_attention"),
        ({"local_window_size": (3, 1)}, r"local_window_size: got \(3, 1\); accepted: right = 0 or is_causal=True"),
        ({"local_window_size": (3, 1, 2)}, "local_window_size: got .*; accepted: a number of at least 0, or two"),
        ({"local_window_size": -1}, "local_window_size: got -1; accepted: a number of at least 0, or two"),
        (
            {"is_causal": True, "query_seq_lengths": 1, "key_value_seq_lengths": [0, 1, 2]},
            r"key_value_seq_lengths: got \[0\]; accepted: at least query_seq_lengths, \[1\], with is_causal",
        ),
    ],
)
def test_what_cannot_be_expressed_is_an_error(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*arrays(), **options)


def test_shapes_that_do_not_fit_are_errors():
    query, key, value = arrays()
    with pytest.raises(ValueError, match=r"value: got shape .*; accepted: .*, the shape of key"):
        dot_product_attention(query, key, value[:, :2])
    with pytest.raises(ValueError, match=r"query: got 3 heads; accepted: a multiple of the 2 heads of key"):
        dot_product_attention(query[:, :, :3], key, value)
    with pytest.raises(ValueError, match=r"key: got a batch of 1; accepted: 3"):
        dot_product_attention(query, key[:1], value[:1])
    with pytest.raises(ValueError, match=r"is_causal: got 10 queries and 9 keys; accepted: at least as many keys"):
        dot_product_attention(jnp.zeros((3, 10, 2, 64)), key, value, is_causal=True)
    with pytest.raises(ValueError, match=r"key: got shape .*; accepted: head_dim = 32"):
        dot_product_attention(query[..., :32], key, value)
    with pytest.raises(ValueError, match=r"query: got shape \(2, 3\); accepted: \[\(batch,\) length, heads"):
        dot_product_attention(jnp.zeros((2, 3)), key, value)


def test_the_arguments_are_those_of_jax():
    ours, theirs = (inspect.signature(f).parameters for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert [*theirs, "backend"] == list(ours)
    for name, parameter in theirs.items():
        assert (parameter.kind, parameter.default) == (ours[name].kind, ours[name].default)


# --- The cost of JAX's layout, and the way around it ---


@pytest.mark.parametrize("dtype", [None, "int8", "float8_e4m3fn"])
def test_a_converted_cache_is_appended_to_and_read(dtype: Any):
    query, key, value = arrays()
    cache = kv_cache_from_bskh(key, value, dtype)
    assert cache.k.dtype == (dtype or key.dtype)
    new_k, new_v = (part[:, :1] * 2 for part in (key, value))  # [batch, 1, kv_heads, head_dim]
    cache = append_kv(cache, new_k, new_v, LENGTHS)
    at = (jnp.arange(BATCH), LENGTHS - 1)
    expected = jax.nn.dot_product_attention(
        query, key.at[at].set(new_k[:, 0]), value.at[at].set(new_v[:, 0]), key_value_seq_lengths=LENGTHS
    )
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    out = decode_attention(query, cache.k, cache.v, LENGTHS, **scales)
    tolerance = {None: 1e-5, "int8": 0.05, "float8_e4m3fn": 0.2}[dtype]
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


def test_a_stacked_cache_is_converted():
    _, key, value = arrays()
    stacked = kv_cache_from_bskh(jnp.stack([key, key + 1]), jnp.stack([value, value + 1]))
    one = kv_cache_from_bskh(key + 1, value + 1)
    np.testing.assert_array_equal(stacked.k[1], one.k)
    np.testing.assert_array_equal(stacked.v[1], one.v)
    with pytest.raises(ValueError, match=r"key: got shape \(9, 2, 64\); accepted: \[\(num_layers,\) batch, max_len"):
        kv_cache_from_bskh(key[0], value[0])
    with pytest.raises(ValueError, match="value: got shape"):
        kv_cache_from_bskh(key, value[:1])


@pytest.mark.skipif(not gpu_program.installed(), reason="jax-cuda12-plugin is not installed")
def test_a_step_copies_the_cache_and_a_loop_does_not():
    """The description of `frameworks/attention.py` says so."""
    batch, kv_len, kv_heads, heads, head_dim = 2, 2048, 8, 32, 128
    query = jax.ShapeDtypeStruct((batch, 1, heads, head_dim), jnp.bfloat16)
    part = jax.ShapeDtypeStruct((batch, kv_len, kv_heads, head_dim), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def step(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> jax.Array:
        return dot_product_attention(query, key, value, key_value_seq_lengths=lengths, backend="triton")

    def loop(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Any:
        def one(carry: Any, _: Any) -> Any:
            query, key, value, lengths = carry
            at = (jnp.arange(batch), lengths - 1)
            key, value = (part.at[at].set(query[:, 0, :kv_heads]) for part in (key, value))
            return (step(query, key, value, lengths), key, value, lengths + 1), None

        return jax.lax.scan(one, (query, key, value, lengths), length=4)[0]

    def transposes(function: Any) -> list[int]:
        """Returns the number of loops around each transposition."""
        program = gpu_program.compile_program(function, query, part, part, lengths)
        return [launch.loops for launch in program.launches if "transpose" in launch.name]

    assert transposes(step) == [0, 0]
    assert set(transposes(loop)) == {0}
