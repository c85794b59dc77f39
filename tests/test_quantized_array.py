"""Quantized weights behave as arrays where they can, and say what to do instead where they cannot."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from palladion import QuantizedArray, Scheme, TransposedWeight, dequantize, quantize, quantized_matmul
from palladion.reference.quantization import ORDERS

SCHEMES = ("int8-g32-zeros", "int4-g32-minimums", "float8_e4m3fn", "mxfp4")
MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "x64": lambda: jax.enable_x64(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
}

of_each_form = pytest.mark.parametrize(("scheme", "order"), [(s, o) for s in SCHEMES for o in ORDERS])


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def matrix(scheme: str = "int4-g32", order: Any = "in_out", *, stack: tuple[int, ...] = (), seed: int = 0) -> Any:
    return quantize(normal(*stack, 64, 24, seed=seed), scheme, order=order)


@of_each_form
def test_products_are_written_as_those_of_arrays(scheme: str, order: Any):
    w, x = matrix(scheme, order), normal(3, 64, seed=1)
    expected = quantized_matmul(jnp.asarray(x), w)
    assert np.abs(expected).max() > 1
    for given in (x, jnp.asarray(x)):
        np.testing.assert_array_equal(given @ w, expected)
        np.testing.assert_array_equal(w.T @ given.T, expected.T)


def test_products_of_vectors_and_batches():
    w, x, batch = matrix(), normal(64, seed=1), normal(2, 64, 5, seed=2)
    dense = dequantize(w)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}
    np.testing.assert_allclose(x @ w, x @ dense, **close)
    np.testing.assert_allclose(w.T @ jnp.asarray(x), x @ dense, **close)
    np.testing.assert_allclose(jax.jit(lambda w, x: w @ x)(w.T, batch), dense.T @ batch, **close)
    np.testing.assert_allclose(jax.jit(lambda x, w: x @ w)(batch.mT, w), batch.mT @ dense, **close)


@of_each_form
def test_it_has_the_attributes_of_an_array(scheme: str, order: Any):
    w = matrix(scheme, order, stack=(3,))
    assert (w.shape, w.ndim, w.size) == ((3, 64, 24), 3, 3 * 64 * 24)
    assert w.dtype == w.with_order("in_out").dtype == (jnp.float32 if scheme == "mxfp4" else w.scales.dtype)
    assert w.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    turned = w.mT
    assert isinstance(turned, TransposedWeight)
    assert (turned.shape, turned.ndim, turned.size) == ((3, 24, 64), 3, w.size)
    assert (turned.dtype, turned.nbytes) == (w.dtype, w.nbytes)
    assert turned.mT is w
    assert w[1] == turned[1].T
    assert w[1] == w[1].T.T


def test_the_dtype_is_that_of_the_scales():
    assert quantize(normal(64, 8), "int8", scale_dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_products_of_every_weight_of_a_stack():
    w, x = matrix(stack=(3,)), jnp.asarray(normal(3, 2, 64, seed=1))
    expected = np.stack([x[n] @ w[n] for n in range(3)])
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}
    np.testing.assert_allclose(jax.vmap(lambda x, w: x @ w)(x, w), expected, **close)
    scanned = jax.lax.scan(lambda _, given: (None, given[0] @ given[1]), None, (x, w))[1]
    np.testing.assert_allclose(scanned, expected, **close)
    turned = jax.vmap(lambda w, x: w @ x)(w.mT, x.mT)
    np.testing.assert_allclose(turned.mT, expected, **close)
    assert [one.shape for one in w] == [one.mT.shape for one in w.mT] == [(64, 24)] * 3
    assert all(one == w[n] for n, one in enumerate(w))


@pytest.mark.parametrize("mode", MODES)
def test_products_in_strict_modes(mode: str):
    w, x = matrix("int4-g32-minimums", stack=(2,)), jnp.asarray(normal(3, 64, seed=1))

    def call(x: jax.Array, w: QuantizedArray) -> Any:
        return x @ w[1], w[0].T @ x.T, w[None, 1:]

    expected = jax.eval_shape(call, x, w)
    with MODES[mode]():
        assert jax.eval_shape(call, x, w) == expected


INDICES: list[Any] = [
    0,
    -1,
    np.int64(1),
    slice(1, None),
    slice(None, None, -1),
    np.array([2, 0]),
    np.array([True, False, True]),
    (1, ...),
    (slice(None), 1),
    (..., 0, slice(None), slice(None)),
    (2, slice(0, 2), slice(None), slice(None)),
    (slice(None), np.array([1, 0, 1])),
    (None, 1, None, 0),
    None,
    np.ones((3, 2), bool),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_leading_dimensions_are_indexed(index: Any):
    w = matrix("int4-g32-minimums", "out_in", stack=(3, 2))
    expected = np.asarray(dequantize(w))[index]
    for found, exact in ((w[index], expected), (w.mT[index].mT, expected)):
        assert found.shape == exact.shape
        np.testing.assert_array_equal(dequantize(found), exact)


@pytest.mark.parametrize("index", [..., slice(None), (), (..., slice(None)), (slice(0, 64), slice(0, 24))])
def test_what_selects_everything_changes_nothing(index: Any):
    w = matrix()
    assert w[index] is w
    assert jax.eval_shape(lambda: matrix())[index].shape == (64, 24)


@pytest.mark.parametrize(
    ("stack", "index", "message"),
    [
        ((), 0, r"\[0\]: accepted: an index of the 0 leading dimensions of shape \(64, 24\); .*dequantize"),
        ((), (slice(None), 0), "of the 0 leading dimensions"),
        ((), slice(0, 32), "of the 0 leading dimensions"),
        ((), slice(None, None, -1), "of the 0 leading dimensions"),
        ((), (..., None), "of the 0 leading dimensions"),
        ((), np.ones((64, 24), bool), "of the 0 leading dimensions"),
        ((3,), (0, 0), "of the 1 leading dimensions"),
        ((3,), np.ones((3, 64), bool), "of the 1 leading dimensions"),
        ((3,), 3, r"\[3\]: 3 is out of bounds for dimension 0 of shape \(3, 64, 24\)"),
        ((3,), -4, "out of bounds"),
        ((3,), (..., 0, ...), "one ellipsis at most"),
        ((3,), (0, slice(None), slice(None), slice(None)), "and 3 indices, for shape"),
    ],
)
def test_codes_are_not_indexed(stack: tuple[int, ...], index: Any, message: str):
    with pytest.raises(IndexError, match=message):
        matrix(stack=stack)[index]


def test_a_traced_index_reads_one_matrix():
    w = matrix(stack=(3,))
    found = jax.jit(lambda w, n: w[n])(w, 2)
    assert found == w[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (len, "one matrix: it has no length"),
        (iter, "one matrix: it has no length"),
        (np.asarray, "no dense array: `x @ w`"),
        (jnp.asarray, "no dense array: .*palladion.dequantize makes it dense"),
        (lambda w: w @ np.ones((24, 2)), r"is \[in, out\], here \(64, 24\), and stands on the right: x @ w; w.T @ x"),
        (lambda w: np.ones((2, 24)) @ w.T, r"is \[out, in\], here \(24, 64\), and stands on the left: w @ x; x @ w.T"),
        (lambda w: jnp.ones((2, 24)) @ w.T, "stands on the left"),
        (lambda w: np.ones(24, np.float32) * w, "unsupported operand"),
        (hash, "unhashable"),
    ],
)
def test_what_it_cannot_do(call: Callable[[Any], Any], message: str):
    with pytest.raises(TypeError, match=message):
        call(matrix())


def test_a_stack_has_no_t():
    for w in (matrix(stack=(3,)), matrix(stack=(3,)).mT):
        with pytest.raises(AttributeError, match=r"T: a stack of shape \(3, .*\) has none; mT swaps"):
            _ = w.T


def test_it_is_readable():
    assert repr(matrix()) == "QuantizedArray(int4-g32, in_out, [64, 24], float32 scales, 960 bytes)"
    assert repr(matrix().T) == "QuantizedArray(int4-g32, in_out, [64, 24], float32 scales, 960 bytes).mT"
    traced: list[str] = []
    jax.vmap(jax.jit(lambda w: traced.append(repr(w))))(matrix("mxfp4", "out_in", stack=(3,)))
    traced.append(repr(jax.eval_shape(lambda: matrix("mxfp4", "out_in"))))
    assert traced == ["QuantizedArray(mxfp4, out_in, [64, 24], float8_e8m0fnu scales, 816 bytes)"] * 2
    specs = repr(matrix("int8").specs(PartitionSpec("x", None)))
    assert specs.startswith("QuantizedArray(int8, in_out, values=")
    assert "zeros" not in specs
    assert repr(jax.tree.map(lambda _: 0, matrix())) == "QuantizedArray(int4-g32, in_out, values=0, scales=0)"


@of_each_form
def test_equality_is_one_bool(scheme: str, order: Any):
    w = matrix(scheme, order)
    again = matrix(scheme, order)
    assert (w == again) is True
    assert w == jax.tree.map(np.asarray, again)
    assert w.T == again.T
    changed = dataclasses.replace(w, values=w.values.at[0, 0].set(w.values[5, 5] + 1))
    assert w != changed
    assert w != dataclasses.replace(w, scales=w.scales.at[0, 0].set(jnp.nan))
    assert w != w.with_order("out_in" if order == "in_out" else "in_out")
    assert w != matrix(scheme, order, stack=(1,))
    assert w != "w"
    if scheme != "mxfp4":
        assert w != w.with_scale_dtype(jnp.bfloat16)
    abstract = jax.eval_shape(lambda: matrix(scheme, order))
    assert abstract == jax.eval_shape(lambda: matrix(scheme, order))
    assert abstract not in (w, w.T)
    assert w != abstract
    assert w.specs(PartitionSpec("x")) == w.specs(PartitionSpec("x", None))
    assert w.specs(PartitionSpec("x")) != w.specs(PartitionSpec(None, "x"))


def test_groups_of_nan_are_equal():
    one, other = (quantize(jnp.full((64, 8), jnp.nan), "int8") for _ in range(2))
    assert one == other


def test_the_static_part_is_hashable():
    structures = {jax.tree.structure(matrix(scheme, order)) for scheme in SCHEMES for order in ORDERS for _ in range(2)}
    assert len(structures) == len(SCHEMES) * len(ORDERS)
    assert len({Scheme.parse("int4-g32"), Scheme("int4", 32), Scheme("int4", 64)}) == 2


@of_each_form
def test_it_is_copied_and_pickled(scheme: str, order: Any):
    w = matrix(scheme, order)
    for again in (copy.deepcopy(w), pickle.loads(pickle.dumps(w)), pickle.loads(pickle.dumps(w.T)).T):
        assert again == w


def test_a_transposed_weight_is_exported():
    w = matrix("mxfp4").T
    exported = jax.export.export(jax.jit(lambda w, x: (w @ x, w)))(w, jnp.ones(64))
    y, again = jax.export.deserialize(exported.serialize()).call(w, jnp.ones(64))
    assert again == w
    np.testing.assert_allclose(y, w @ jnp.ones(64), rtol=1e-5)


def test_it_is_the_weight_of_an_equinox_layer():
    layer = equinox.nn.Linear(64, 24, key=jax.random.key(0))
    w = quantize(layer.weight.T, "int8")
    quantized = equinox.tree_at(lambda layer: layer.weight, layer, w.T)
    x = jnp.asarray(normal(5, 64))
    exact = x @ dequantize(w) + layer.bias
    y = equinox.filter_jit(lambda layer, x: jax.vmap(layer)(x))(quantized, x)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


def test_it_is_the_parameter_of_an_nnx_module():
    class Layer(nnx.Module):
        def __init__(self, w: QuantizedArray):
            self.kernel = nnx.Param(w)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.kernel[...]

    w, x = matrix(), jnp.asarray(normal(5, 64))
    layer = Layer(w)
    assert layer.kernel.shape == (64, 24)
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x), x @ w, rtol=1e-5, atol=1e-5)
    assert jax.tree.leaves(nnx.state(layer), is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)) == [w]


@pytest.mark.parametrize("order", ORDERS)
def test_axes_of_a_kernel_become_one_matrix(order: Any):
    """Flax's attention has kernels `[in, heads, head_dim]`, and `[heads, head_dim, out]` at the end."""
    kernel, x = normal(64, 4, 16), normal(3, 64, seed=1)
    w = quantize(kernel, "int8-g32", in_axes=1, order=order)
    assert w == quantize(kernel.reshape(64, 64), "int8-g32", order=order)
    exact = np.einsum("bi,ihd->bhd", x, kernel)
    assert np.abs((x @ w).reshape(3, 4, 16) - exact).max() < 0.05 * np.abs(exact).max()
    assert quantize(kernel, "int8-g32", in_axes=2, order=order).shape == (256, 16)
    stacked = normal(2, 64, 4, 16)
    each = [quantize(one, "int8-g32", in_axes=1, order=order) for one in stacked]
    both = quantize(stacked, "int8-g32", in_axes=1, stack_axes=1, order=order)
    assert list(both) == each
    assert quantize(stacked, "int8", order=order).shape == stacked.shape


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"in_axes": 0}, r"in_axes: got 0, .* shape \(64, 4, 16\); accepted: 1 to 2, and at least one axis after them"),
        ({"in_axes": 3}, "in_axes: got 3"),
        ({"in_axes": 2, "stack_axes": 1}, "got 2, with stack_axes = 1, .*: 1 to 1"),
        ({"in_axes": 1, "stack_axes": -1}, "with stack_axes = -1"),
        ({"stack_axes": 1}, "stack_axes: got 1 without in_axes"),
    ],
)
def test_axes_that_a_kernel_does_not_have(axes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        quantize(normal(64, 4, 16), "int8", **axes)
