"""Derivatives of kernels: those of the reference for products, an error that says so for what has none."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import options_for

from palladion import (
    KVCache,
    QuantizedArray,
    Unsupported,
    append_kv,
    append_qkv,
    decode_attention,
    dequantize,
    matmul,
    quantize,
    quantized_matmul,
)

ORDER: dict[str, Any] = {"xla": "in_out", "mosaic_tpu": "in_out", "triton": "out_in"}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def how(backend: str) -> dict[str, Any]:
    return {"backend": backend, "interpret": None if backend == "xla" else True}


def compiled(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, compiler_options=options_for(backend))


def assert_near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("quantize_x", [None, "int8"])
@pytest.mark.parametrize("backend", ORDER)
def test_a_quantized_product_is_differentiated_straight_through_the_weight(backend: str, quantize_x: str | None):
    """Reverse and forward mode, under vmap and scan, against float64; quantized activations count as unquantized."""
    w = quantize(normal(64, 128, seed=1), "int8", order=ORDER[backend])
    weights = np.asarray(dequantize(w), np.float64)
    x, cotangent, direction = normal(3, 64), normal(3, 128, seed=2), normal(3, 64, seed=3)
    call = functools.partial(quantized_matmul, quantize_x=quantize_x, **how(backend))
    expected = np.asarray(cotangent, np.float64) @ weights.T

    def gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(call(x, w) * cotangent))(x)

    def every(x: jax.Array) -> Any:
        out, forward = jax.jvp(lambda x: call(x, w), (x,), (direction,))
        mapped = jax.vmap(gradient)(x[:, None], cotangent[:, None])[:, 0]
        total = jax.grad(lambda x: jax.lax.scan(lambda c, y: (c + jnp.sum(call(x, w) * y), None), 0.0, cotangent)[0])
        return out, forward, gradient(x, cotangent), mapped, total(x)

    out, forward, backward, mapped, scanned = compiled(backend, every)(x)
    assert_near(out, compiled(backend, call)(x, w))
    assert_near(forward, np.asarray(direction, np.float64) @ weights)
    assert_near(backward, expected)
    assert_near(mapped, expected)
    assert_near(scanned, np.broadcast_to(np.asarray(cotangent, np.float64).sum(0) @ weights.T, x.shape))


@pytest.mark.parametrize("backend", ["mosaic_tpu", "triton"])
def test_everything_that_a_product_fuses_is_differentiated_as_the_reference(backend: str):
    """Norm, bias, gate, residual, a stacked weight, and its scales."""
    w = quantize(normal(2, 64, 256, seed=1), "int4-g32", order=ORDER[backend])
    given = {"bias": normal(256, seed=2), "norm": normal(64, seed=3), "residual": normal(3, 128, seed=4)}

    def loss(x: jax.Array, scales: jax.Array, given: dict[str, jax.Array], **how: Any) -> jax.Array:
        weight: QuantizedArray = dataclasses.replace(w, scales=scales)
        y = quantized_matmul(x, weight, gated=True, activation=jax.nn.silu, layer=1, **given, **how)
        return jnp.sum(y * normal(3, 128, seed=5))

    arguments = (normal(3, 64), w.scales, given)
    found, expected = (
        compiled(name, jax.grad(functools.partial(loss, **how(name)), argnums=(0, 1, 2)))(*arguments)
        for name in (backend, "xla")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert not np.asarray(found[1][0]).any()
    assert np.asarray(found[1][1]).any()


def test_a_dense_product_by_a_kernel_is_differentiated():
    x, w, cotangent = normal(3, 64), normal(128, 64, seed=1), normal(3, 128, seed=2)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(matmul(x, w, order="out_in", **how("triton")) * cotangent)

    of_x, of_w = compiled("triton", jax.grad(loss, argnums=(0, 1)))(x, w)
    assert_near(of_x, np.asarray(cotangent, np.float64) @ np.asarray(w, np.float64))
    assert_near(of_w, np.asarray(cotangent, np.float64).T @ np.asarray(x, np.float64))


def test_every_kernel_of_a_quantized_product_has_a_derivative():
    w = quantize(normal(128, 128, seed=1), "int8", order="out_in")
    x = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
    call = functools.partial(quantized_matmul, w=w, backend="mosaic_gpu", interpret=False)
    gradient = jax.eval_shape(jax.grad(lambda x: jnp.sum(call(x).astype(jnp.float32))), x)
    assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


def test_an_argument_that_is_not_differentiated_costs_nothing():
    """The derivative for x has no product with a derivative of the weight."""
    w = quantize(normal(64, 128, seed=1), "int8", order="in_out")
    tangent = jax.make_jaxpr(lambda x, dx: jax.jvp(lambda x: quantized_matmul(x, w, backend="xla"), (x,), (dx,))[1])
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    assert (
        str(tangent(x, x)).count("dot_general") == 4
    )  # the form, there and in its derivative, the definition, its derivative


def _attend(backend: str) -> Callable[[jax.Array], Any]:
    cache, lengths = KVCache.dense(1, 1, 128, 128, "float32"), jnp.array([5], jnp.int32)
    return lambda x: decode_attention(x, cache.k, cache.v, lengths, **how(backend))


def _append(backend: str) -> Callable[[jax.Array], Any]:
    cache, lengths = KVCache.dense(1, 2, 128, 128, "float32"), jnp.array([5], jnp.int32)
    return lambda x: append_kv(cache, x, x, lengths, **how(backend)).k


def _append_qkv(backend: str) -> Callable[[jax.Array], Any]:
    cache, lengths = KVCache.dense(1, 2, 128, 128, "float32"), jnp.array([5], jnp.int32)
    angles = jnp.ones((1, 64))
    return lambda x: append_qkv(cache, jnp.tile(x, (1, 3, 1)), lengths, angles, angles, **how(backend))[0]


@pytest.mark.parametrize("backend", ["mosaic_tpu", "triton"])
@pytest.mark.parametrize(
    ("name", "operation"), [("decode_attention", _attend), ("append_kv", _append), ("append_qkv", _append_qkv)]
)
def test_a_kernel_without_derivatives_says_so(name: str, operation: Any, backend: str):
    x = normal(1, 2, 128)
    message = rf"{name}\(.*\): {backend}: has no derivative\. backend='xla' has one"
    for differentiate in (
        jax.grad(lambda x: jnp.sum(operation(backend)(x))),
        lambda x: jax.jvp(jax.jit(operation(backend)), (x,), (x,)),
        jax.vmap(jax.grad(lambda x: jnp.sum(operation(backend)(x[None])))),
    ):
        with pytest.raises(Unsupported, match=message):
            jax.eval_shape(differentiate, x)
    jax.eval_shape(jax.grad(lambda x: jnp.sum(operation("xla")(x))), x)
    constant = jax.grad(lambda x: jnp.sum(operation(backend)(jax.lax.stop_gradient(x))) + jnp.sum(x))
    assert jax.eval_shape(constant, x).shape == x.shape
