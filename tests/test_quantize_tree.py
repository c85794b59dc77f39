"""quantize_tree: which arrays of a model are quantized, how, and what the report says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from palladion import QuantizedArray, TransposedWeight, quantize, quantize_tree
from palladion.reference.quantization import ORDERS


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def model() -> dict[str, Any]:
    return {
        "embedder": {"table": normal(256, 128)},
        "layers": [
            {"attention": normal(128, 4, 32, dtype=jnp.bfloat16), "out": normal(4, 32, 128), "bias": normal(4, 32)},
            {"mlp": normal(128, 192), "down": normal(160, 128), "small": normal(128, 64), "steps": jnp.arange(9)},
        ],
        "stack": normal(2, 128, 128),
        "norm": normal(128),
        "act": jax.nn.silu,
        "name": "toy",
    }


def reasons(report: Any) -> dict[str, str]:
    return {leaf.path: leaf.reason for leaf in report.leaves}


def test_the_default_is_matrices():
    given = model()
    tree, report = quantize_tree(given, "int4-g64")
    assert reasons(report) == {
        "embedder/table": "named as an embedding",
        "layers/0/attention": "[4, 32] has a dimension below 128",
        "layers/0/bias": "[4, 32] has a dimension below 128",
        "layers/0/out": "[32, 128] has a dimension below 128",
        "layers/1/down": "int4-g64: in = 160 is not a multiple of group_size; group sizes that divide it: [32, 16]",
        "layers/1/mlp": "",
        "layers/1/small": "[128, 64] has a dimension below 128",
        "layers/1/steps": "no float dtype",
        "norm": "fewer than two dimensions",
        "stack": "",
    }
    assert tree["layers"][1]["mlp"] == quantize(given["layers"][1]["mlp"], "int4-g64")
    assert tree["stack"] == quantize(given["stack"], "int4-g64")
    assert all(tree[name] is given[name] for name in ("norm", "name", "act"))
    assert tree["embedder"]["table"] is given["embedder"]["table"]


def test_the_report_counts_bytes_and_is_a_table():
    tree, report = quantize_tree({"a": normal(128, 256), "b": normal(3)}, "int8")
    assert (report.bytes_before, report.bytes_after) == (128 * 256 * 4 + 12, 128 * 256 + 256 * 4 + 12)
    assert report.bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert [leaf.path for leaf in report.quantized] == ["a"]
    assert [leaf.path for leaf in report.left] == ["b"]
    assert str(report).splitlines() == [
        "path  shape       dtype       MB  now MB",
        "a     [128, 256]  float32  0.131   0.034  int8",
        "b     [3]         float32  0.000   0.000  left: fewer than two dimensions",
        "1 of 2 arrays quantized: 0.131 MB before, 0.034 MB after, 26%",
    ]


@pytest.mark.parametrize(
    "where", ["(small|table|bias|norm)$", lambda path, _: path.endswith(("small", "table", "bias", "norm"))]
)
def test_the_caller_selects(where: Any):
    """An array that is selected by name is quantized if the scheme fits, whatever its size and name."""
    tree, report = quantize_tree(model(), "int8", where=where)
    found = reasons(report)
    assert [path for path, reason in found.items() if not reason] == [
        "embedder/table",
        "layers/0/bias",
        "layers/1/small",
    ]
    assert found["norm"] == "fewer than two dimensions"
    assert found["stack"] == "not selected by where"
    assert isinstance(tree["embedder"]["table"], QuantizedArray)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "in_axes",
    [{"attention": 1, "out": 2}, lambda path, _: {"attention": 1, "out": 2}.get(path.rsplit("/", 1)[-1])],
)
def test_kernels_with_several_axes(in_axes: Any, order: Any):
    given = model()
    tree, report = quantize_tree(given, "int8-g32", in_axes=in_axes, order=order)
    attention, out = (tree["layers"][0][name] for name in ("attention", "out"))
    assert attention == quantize(given["layers"][0]["attention"].reshape(128, 128), "int8-g32", order=order)
    assert out == quantize(given["layers"][0]["out"].reshape(128, 128), "int8-g32", order=order)
    assert tree["layers"][1]["mlp"].shape == (128, 192)
    assert next(leaf.shape for leaf in report.leaves if leaf.path == "layers/0/attention") == (128, 4, 32)


def test_a_stack_of_kernels():
    kernels = normal(3, 128, 4, 32)
    tree, _ = quantize_tree({"kernel": kernels, "bias": normal(3, 128)}, "int8", in_axes=1, stack_axes=1)
    assert list(tree["kernel"]) == [quantize(kernel, "int8", in_axes=1) for kernel in kernels]
    _, report = quantize_tree({"kernel": kernels, "bias": normal(3, 128)}, "int8", in_axes=1, stack_axes=1)
    assert "in_axes: got 1" in reasons(report)["bias"]


def test_options_reach_quantize():
    given = {"w": normal(128, 128)}
    options: dict[str, Any] = {"method": "mse", "scale_dtype": jnp.bfloat16, "order": "out_in"}
    assert quantize_tree(given, "int4-g32", **options)[0]["w"] == quantize(given["w"], "int4-g32", **options)
    with pytest.raises(ValueError, match="method: got 'best'"):
        quantize_tree(given, "int8", method="best")  # type: ignore[arg-type]


def test_a_second_scheme_for_other_arrays():
    first, _ = quantize_tree(model(), "int4-g32", where="stack")
    tree, report = quantize_tree(first, "int8")
    assert tree["stack"] is first["stack"]
    assert reasons(report)["stack"] == "quantized before"
    assert str(tree["layers"][1]["mlp"].scheme) == "int8"
    assert report.bytes_after == sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


@pytest.mark.parametrize("where", ["kernel", lambda path, leaf: path == leaf])
def test_selecting_nothing_is_an_error(where: Any):
    with pytest.raises(ValueError, match=r"where: got .*, which selects none of 2 arrays: a/0, b"):
        quantize_tree({"a": [normal(128, 128)], "b": normal(3)}, "int8", where=where)
    many = {f"{n:02}": normal(2) for n in range(9)}
    with pytest.raises(ValueError, match=re.escape("05, 06, 07, …")):
        quantize_tree(many, "int8", where=where)


def test_memory_is_planned_without_weights():
    given = model()
    arrays = {key: value for key, value in given.items() if key not in ("act", "name")}
    expected, exact = quantize_tree(arrays, "mxfp4")
    abstract = jax.eval_shape(lambda: arrays)
    for tree in (quantize_tree(abstract, "mxfp4")[0], jax.eval_shape(lambda t: quantize_tree(t, "mxfp4")[0], arrays)):
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        assert tree == jax.eval_shape(lambda: expected)
    assert quantize_tree(abstract, "mxfp4")[1] == exact


def test_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.attention = nnx.MultiHeadAttention(4, 128, decode=False, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.linear = nnx.Linear(128, 256, rngs=rngs)

    layers = Model(nnx.Rngs(0))
    kernel = layers.linear.kernel[...]
    state = nnx.state(layers)
    state, report = quantize_tree(state, "int8", in_axes={"(query|key|value)/kernel": 1, "out/kernel": 2})
    assert len(report.quantized) == 5
    assert sum(leaf.path.startswith("dropout") for leaf in report.left) == 2
    nnx.update(layers, state)
    assert layers.linear.kernel[...] == quantize(kernel, "int8")
    assert layers.attention.out.kernel.shape == (128, 128)


def test_an_equinox_model():
    layers = equinox.nn.MLP(128, 128, 256, 1, key=jax.random.key(0))
    quantized, report = quantize_tree(layers, "int8-g64", transposed=True)
    assert [leaf.path for leaf in report.quantized] == ["layers/0/weight", "layers/1/weight"]
    weight = quantized.layers[0].weight
    assert isinstance(weight, TransposedWeight)
    assert quantize(layers.layers[0].weight.T, "int8-g64") == weight.T
    x = normal(2, 128)
    run: Callable[..., Any] = equinox.filter_jit(lambda layers, x: jax.vmap(layers)(x))
    exact = run(layers, x)
    assert np.abs(run(quantized, x) - exact).max() < 0.02 * np.abs(exact).max()
    abstract = equinox.filter_eval_shape(lambda: layers)
    assert quantize_tree(abstract, "int8-g64", transposed=True)[1] == report


@pytest.mark.parametrize("mode", ["x64", "strict"])
def test_modes(mode: str):
    given = {"w": np.asarray(normal(128, 128)), "double": np.ones((128, 128))}
    with jax.enable_x64(True) if mode == "x64" else jax.numpy_dtype_promotion("strict"):
        tree, report = quantize_tree(given, "int4-g32-zeros", transposed=True)
    assert quantize(given["w"].T, "int4-g32-zeros") == tree["w"].T
    assert report.bytes_before == 128 * 128 * 12


def test_only_kernels_without_in_axes_are_transposed():
    given = {"attention": normal(4, 32, 64), "linear": normal(64, 128)}
    tree, _ = quantize_tree(given, "int8", where="", in_axes={"attention": 2}, transposed=True)
    assert tree["attention"] == quantize(given["attention"], "int8", in_axes=2)
    linear = tree["linear"].T
    assert linear == quantize(given["linear"].T, "int8")
