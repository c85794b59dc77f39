"""Products under vmap: one product of all rows, which reads the weight once, where only rows are mapped."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICKLY

from palladion import dequantize, matmul, quantize, quantized_matmul, record_choices
from palladion.benchmarks.static.kernel_calls import kernel_calls

IN, OUT = 64, 128
KERNELS = {"mosaic_tpu": "in_out", "triton": "out_in"}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def weight(order: Any = None, stack: tuple[int, ...] = ()) -> Any:
    return quantize(normal(*stack, IN, OUT), "int8-g32", order=order)


def grids(function: Callable[..., Any], *arguments: Any) -> list[tuple[int, ...]]:
    """Returns the grid of each kernel that a function calls."""

    def walk(jaxpr: Any) -> Iterator[tuple[int, ...]]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation.params["grid_mapping"].grid
            elif equation.primitive.name != "custom_jvp_call":
                for parameter in jax.tree.leaves(list(equation.params.values())):
                    yield from walk(getattr(parameter, "jaxpr", parameter)) if hasattr(parameter, "eqns") else ()
            else:
                yield from walk(equation.params["call_jaxpr"].jaxpr)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_runs_once_for_all_mapped_rows(backend: str):
    w, x = weight(KERNELS[backend]), normal(2, 4, IN, seed=1)
    multiply = functools.partial(quantized_matmul, w=w, backend=backend, interpret=True)
    direct = grids(multiply, x)
    assert len(direct) == 1
    for mapped in (jax.vmap(multiply), jax.vmap(jax.vmap(multiply)), jax.jit(jax.vmap(jax.jit(multiply)))):
        assert grids(mapped, x) == direct
    quickly = functools.partial(jax.jit, compiler_options=QUICKLY)
    np.testing.assert_array_equal(quickly(jax.vmap(multiply))(x), quickly(multiply)(x))


def test_the_static_analysis_finds_the_kernel():
    multiply = functools.partial(quantized_matmul, backend="mosaic_tpu", interpret=False)
    assert len(kernel_calls(multiply, (normal(4, IN), weight("in_out")), contextlib.nullcontext())) == 1


def test_rows_of_every_argument_are_merged():
    w, x, residual = weight(), normal(3, 2, IN, seed=1), normal(3, 2, OUT, seed=2)
    options: dict[str, Any] = {"bias": normal(OUT, seed=3), "activation": jax.nn.silu, "norm": normal(IN, seed=4)}

    def call(x: jax.Array, residual: jax.Array) -> jax.Array:
        return quantized_matmul(x, w, residual=residual, **options)

    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(jax.vmap(call)(x, residual), call(x, residual), **close)
    np.testing.assert_allclose(jax.vmap(call, 1, 1)(x, residual), call(x, residual), **close)
    one = jnp.broadcast_to(x[:1], x.shape)
    np.testing.assert_allclose(jax.vmap(call, (None, 0))(x[0], residual), call(one, residual), **close)
    same = jnp.broadcast_to(residual[:1], residual.shape)
    np.testing.assert_allclose(jax.vmap(call, (0, None))(x, residual[0]), call(x, same), **close)


def test_the_reference_takes_the_form_for_all_rows():
    w = weight()
    with record_choices() as choices:
        jax.vmap(lambda x: quantized_matmul(x, w))(normal(16, IN))
    assert choices[-1].problem.rows == 16
    with record_choices() as choices:
        jax.jit(lambda x: matmul(x, normal(IN, OUT)))(normal(16, IN))
    assert [choice.problem.rows for choice in choices] == [16]


def test_mapped_weights_have_a_product_each():
    w, x = weight(stack=(3,)), normal(3, 2, IN, seed=1)
    expected = jnp.einsum("lri,lio->lro", x, dequantize(w))
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(jax.vmap(quantized_matmul)(x, w), expected, **close)
    together = jax.vmap(jax.vmap(quantized_matmul, (0, None)))(x, w)
    np.testing.assert_allclose(together, expected, **close)
    by_layer = jax.vmap(lambda x, layer: quantized_matmul(x, w, layer=layer))(x, jnp.arange(3))
    np.testing.assert_allclose(by_layer, expected, **close)


def test_derivatives_pass_through_mapped_products():
    w, x = weight(), normal(3, IN, seed=1)
    single = jax.grad(lambda x: jnp.sum(jnp.sin(quantized_matmul(x, w))))
    expected = jnp.cos(x @ dequantize(w)) @ dequantize(w).T
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-3}
    np.testing.assert_allclose(jax.vmap(single)(x), expected, **close)
    total = jax.grad(lambda x: jnp.sum(jnp.sin(jax.vmap(lambda x: quantized_matmul(x, w))(x))))
    np.testing.assert_allclose(total(x), expected, **close)
