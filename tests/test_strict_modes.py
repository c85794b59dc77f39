"""JAX's modes of strictness: every operation gives by every backend what it gives without them."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import options_for
from product_oracle import ORDER_OF

from palladion import KVCache, append_kv, append_qkv, decode_attention, dequantize, matmul, quantize, quantized_matmul
from palladion.benchmarks.measure.decode_steps import TINY
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.model.transformer import empty_cache, forward

BACKENDS = ("xla", "mosaic_tpu", "triton")
MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "x64": lambda: jax.enable_x64(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": lambda: jax.disable_jit(True),
}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def how(backend: str) -> dict[str, Any]:
    return {"backend": backend, "interpret": None if backend == "xla" else True}


def attend(backend: str, q: jax.Array, k: jax.Array) -> Any:
    """Appends to a paged int8 cache, and attends with everything that attention has."""
    cache = KVCache.paged(4, 2, 128, 64, [[2, 1], [0, 3]], "int8")
    cache = append_kv(cache, k, k + 1, [3, 200], **how(backend))
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    options = {"sliding_window": 100, "logits_soft_cap": 5.0, "return_lse": True, "sinks": q[0, 0, :, 0].astype(float)}
    lengths = jnp.array([3, 200], jnp.int32)
    return decode_attention(
        q, cache.k, cache.v, lengths, page_table=cache.page_table, **scales, **options, **how(backend)
    )


def attend_to_layer(backend: str, q: jax.Array, k: jax.Array) -> Any:
    """Appends to a layer of a dense cache, and attends to it; lengths are of the default type."""
    cache = KVCache.dense(2, 2, 128, 64, "float32", num_layers=2)
    cache = append_kv(cache, k, k, jnp.array([3, 7]), new_tokens=[1, 2], layer=1, **how(backend))
    return decode_attention(q[:, 0], cache.k, cache.v, 7, layer=1, **how(backend))


def append_joined(backend: str, q: jax.Array, k: jax.Array) -> Any:
    angles = np.linspace(0, 3, 64, dtype=np.float32).reshape(2, 32)
    cache = KVCache.dense(2, 2, 128, 64, "float32")
    qkv = jnp.concatenate([q, k, k], axis=2)[:, 0]
    return append_qkv(cache, qkv, [3, 70], np.cos(angles), np.sin(angles), **how(backend))


def multiply(scheme: str, options: dict[str, Any], backend: str, q: jax.Array, k: jax.Array) -> Any:
    w = quantize(normal(64, 128, seed=5), scheme, order="out_in" if backend == "triton" else "in_out")
    given = (
        {}
        if options.get("quantize_x")
        else {"norm": k[0, 0, 0], "bias": normal(128, seed=6).astype(float), "residual": q[:, 0, 0]}
    )
    return quantized_matmul(q[:, 0, 0], w, **given, **options, **how(backend))


def multiply_dense(backend: str, q: jax.Array, k: jax.Array) -> Any:
    del k
    order = ORDER_OF[backend]
    w = normal(128, 64, seed=5) if order == "out_in" else normal(64, 128, seed=5)
    return matmul(q[:, 0, 0], w, bias=normal(128, seed=6), order=order, **how(backend))


CALLS: dict[str, Callable[..., Any]] = {
    "decode_attention": attend,
    "decode_attention-layer": attend_to_layer,
    "append_qkv": append_joined,
    "int4-g32": functools.partial(multiply, "int4-g32-zeros", {"gated": True, "activation": jax.nn.silu}),
    "mxfp4": functools.partial(multiply, "mxfp4", {"gated": True}),
    "int8": functools.partial(multiply, "int8", {"quantize_x": "int8"}),
    "matmul": multiply_dense,
}
ARGUMENTS = (normal(2, 3, 4, 64), normal(2, 3, 2, 64, seed=1))


SLOW_WITHOUT_JIT = ("decode_attention", "mxfp4", "int4-g32")
"""Calls that run too many operations one by one; the others run the same code."""


@functools.cache
def usual(name: str, backend: str) -> Any:
    return jax.jit(functools.partial(CALLS[name], backend), compiler_options=options_for(backend))(*ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "backend", "mode"),
    [
        (name, backend, mode)
        for name, backend, mode in itertools.product(CALLS, BACKENDS, MODES)
        if mode != "disable_jit" or name not in SLOW_WITHOUT_JIT
    ],
)
def test_a_mode_changes_nothing(name: str, backend: str, mode: str):
    call = functools.partial(CALLS[name], backend)
    if "promotion" in mode:
        with MODES[mode]():  # what is promoted is seen while tracing
            result: Any = jax.eval_shape(call, *ARGUMENTS)
        expected = jax.eval_shape(call, *ARGUMENTS)
    else:
        compiled = call if mode == "disable_jit" else jax.jit(call, compiler_options=options_for(backend))
        with MODES[mode]():
            result = compiled(*ARGUMENTS)
        expected = usual(name, backend)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if "promotion" not in mode:
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["x64", "rank_promotion", "dtype_promotion"])
@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("int4-g32-minimums", "hqq"),
        *itertools.product(("int4-g32-minimums", "int8-zeros", "float8_e4m3fn", "mxfp4"), ("absmax", "mse")),
    ],
)
def test_weights_are_quantized_in_every_mode(scheme: str, method: Any, mode: str):

    def call(weight: Any) -> Any:
        w = quantize(weight, scheme, method=method, order="in_out")
        return w, dequantize(w), w.with_scale_dtype("bfloat16") if scheme != "mxfp4" else w

    weight = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    with MODES[mode]():
        result = jax.eval_shape(call, weight)
    assert result == jax.eval_shape(call, weight)


@pytest.mark.parametrize("mode", ["x64", "rank_promotion", "dtype_promotion"])
@pytest.mark.parametrize("scheme", ["float32", "int4-g32"])
def test_a_model_runs_in_every_mode(scheme: str, mode: str):
    config = TINY.config(64)

    def logits() -> jax.Array:
        parameters = random_parameters(TINY, scheme, dtype="float32")
        cache = empty_cache(parameters, config, 2, 64, "float32")
        return forward(parameters, config, jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([3, 2]), cache)[0]

    expected = jax.eval_shape(logits)
    with MODES[mode]():
        assert jax.eval_shape(logits) == expected
