"""`batch_invariant=True` gives the same bits for every batch size and whatever else is in the batch."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from product_oracle import ORDER_OF

from palladion import KVCache, decode_attention, quantize, quantized_matmul, tracing_for
from palladion.kernels.backend import record_choices
from palladion.kernels.decode_attention.api import IMPLEMENTATIONS as ATTENTION
from palladion.kernels.quantized_matmul.api import IMPLEMENTATIONS
from palladion.reference import oracle, quantize_kv
from palladion.reference.compare import assert_right

BATCH = 5
MAX_LEN = 256
ROWS = 70  # more than one block of rows, whose size does not depend on the number of rows
BACKENDS = tuple(row.name for row in ATTENTION if row.name != "mosaic_gpu")  # which has tests of its own
MATMUL = [row.name for row in IMPLEMENTATIONS if row.name != "mosaic_gpu"]
SCHEMES = ("int8", "int4-g32-zeros", "int4-g64-minimums")


def interpreted(backend: str) -> dict[str, Any]:
    return {"backend": backend} | ({} if backend == "xla" else {"interpret": True})


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@functools.cache
def attention(backend: str) -> Any:
    return jax.jit(functools.partial(decode_attention, batch_invariant=True, return_lse=True, **interpreted(backend)))


@functools.cache
def multiplication(backend: str, **options: Any) -> Any:
    return jax.jit(functools.partial(quantized_matmul, batch_invariant=True, **options, **interpreted(backend)))


def equal(found: Any, expected: Any) -> None:
    """Asserts that results are equal to the last bit."""
    for part, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(part, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(
    st.permutations(range(BATCH)),
    st.sampled_from([1, 2, BATCH]),
    st.lists(st.integers(0, MAX_LEN), min_size=BATCH, max_size=BATCH),
)
def test_attention(backend: str, order: list[int], size: int, lengths: list[int]):
    q, k, v = normal(BATCH, 4, 64), normal(BATCH, 2, MAX_LEN, 64, seed=1), normal(BATCH, 2, MAX_LEN, 64, seed=2)
    filled = jnp.array(lengths, jnp.int32)
    together = attention(backend)(q, k, v, filled)
    chosen = jnp.array(order[:size])
    found = attention(backend)(q[chosen], k[chosen], v[chosen], filled[chosen])
    equal(found, [part[chosen] for part in together])


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_over_pages_of_int8(backend: str):
    page_size, batch = 128, 3
    k, k_scale = quantize_kv(normal(2 * batch, 2, page_size, 64, seed=1), jnp.int8)
    v, v_scale = quantize_kv(normal(2 * batch, 2, page_size, 64, seed=2), jnp.int8)
    table = jnp.array([[3, 0], [5, 1], [4, 2]], jnp.int32)
    q, lengths = normal(batch, 4, 64), jnp.array([200, 40, 256], jnp.int32)
    attend = functools.partial(attention(backend), k_scale=k_scale, v_scale=v_scale)
    together = attend(q, k, v, lengths, page_table=table)
    for b in range(batch):
        one = slice(b, b + 1)
        equal(attend(q[one], k, v, lengths[one], page_table=table[one]), [part[one] for part in together])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", MATMUL)
def test_products(backend: str, scheme: str):
    x, w = normal(ROWS, 128, seed=1, dtype=jnp.bfloat16), quantize(normal(128, 256), scheme, order=ORDER_OF[backend])
    multiply = multiplication(backend)
    together = multiply(x, w)
    for rows in ([0], [ROWS - 1], [66, 3, 64]):
        equal(multiply(x[jnp.array(rows)], w), together[jnp.array(rows)])


@pytest.mark.parametrize("backend", MATMUL)
def test_gated_products_of_quantized_rows(backend: str):
    x, w = normal(9, 128, seed=1), quantize(normal(128, 256), "int8", order=ORDER_OF[backend])
    multiply = multiplication(backend, gated=True, activation=jax.nn.silu, quantize_x="int8")
    equal(multiply(x[5:6], w), multiply(x, w)[5:6])


@pytest.mark.parametrize("backend", MATMUL)
def test_products_with_norm_and_residual(backend: str):
    x, residual = normal(9, 200, seed=1, dtype=jnp.bfloat16), normal(9, 64, seed=2, dtype=jnp.bfloat16)
    w, norm = quantize(normal(200, 64), "int8", order=ORDER_OF[backend]), normal(200, seed=3)
    multiply = functools.partial(multiplication(backend), w=w, norm=norm)
    together = multiply(x, residual=residual)
    for rows in ([4], [8, 0, 4]):
        chosen = jnp.array(rows)
        equal(multiply(x[chosen], residual=residual[chosen]), together[chosen])


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_kernel_does_not_depend_on_the_batch(kv_dtype: str):
    """On a GPU where one kernel is preferred for one row, and another for several."""
    w = jax.eval_shape(lambda: quantize(jnp.ones((4096, 4096)), "int8", order="out_in"))

    def chosen(batch: int, *, batch_invariant: bool) -> list[str]:
        x = jax.ShapeDtypeStruct((batch, 4096), jnp.bfloat16)
        q = jax.ShapeDtypeStruct((batch, 32, 128), jnp.bfloat16)
        cache = jax.eval_shape(lambda: KVCache.dense(batch, 8, 4096, 128, kv_dtype))
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
        with tracing_for("h200"), record_choices() as choices:
            jax.eval_shape(functools.partial(quantized_matmul, batch_invariant=batch_invariant), x, w)
            attend = functools.partial(decode_attention, batch_invariant=batch_invariant)
            jax.eval_shape(attend, q, cache.k, cache.v, lengths, k_scale=cache.k_scale, v_scale=cache.v_scale)
        return [choice.backend for choice in choices]

    assert chosen(1, batch_invariant=True) == chosen(8, batch_invariant=True)
    assert chosen(1, batch_invariant=False) != chosen(8, batch_invariant=False)


def test_block_sizes_do_not_depend_on_the_batch():
    """Block sizes depend on the batch without `batch_invariant`, so the option has an effect."""
    w = jax.eval_shape(lambda: quantize(jnp.ones((4096, 4096)), "int8", order="out_in"))

    def config(rows: int, *, batch_invariant: bool) -> Any:
        x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
        multiply = functools.partial(quantized_matmul, batch_invariant=batch_invariant, **interpreted("triton"))
        with record_choices() as (choices):
            jax.eval_shape(multiply, x, w)
        return choices[0].config

    assert config(1, batch_invariant=True) == config(512, batch_invariant=True)
    assert config(1, batch_invariant=False) != config(512, batch_invariant=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_right(backend: str):
    q, k, v = normal(2, 4, 64), normal(2, 2, MAX_LEN, 64, seed=1), normal(2, 2, MAX_LEN, 64, seed=2)
    lengths = jnp.array([256, 100], jnp.int32)
    exact = oracle.decode_attention(q, k, v, lengths)
    reference = decode_attention(q, k, v, lengths, backend="xla", return_lse=True)
    for part, of_reference, of_oracle in zip(attention(backend)(q, k, v, lengths), reference, exact, strict=True):
        assert_right(part, of_reference, of_oracle)
    x, w = normal(3, 128), quantize(normal(128, 64), "int4-g32", order=ORDER_OF[backend])
    products = multiplication(backend)(x, w)
    assert_right(products, quantized_matmul(x, w, backend="xla"), oracle.quantized_matmul(x, w))
