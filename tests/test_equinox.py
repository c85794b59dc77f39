"""Quantized Equinox models: held against the same models with dequantized weights, computed by Equinox itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import UNOPTIMIZED

from palladion import TransposedWeight, dequantize, record_choices
from palladion.frameworks.equinox import quantize_model

FEATURES = 64
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Block(eqx.Module):
    """Embeddings, attention and two layers, which are applied to each token by vmap."""

    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, seed: int = 0, dtype: Any = None):
        keys = jax.random.split(jax.random.key(seed), 3)
        self.embedding = eqx.nn.Embedding(8, FEATURES, dtype=dtype, key=keys[0])
        biases = {"use_query_bias": True, "use_output_bias": True}
        self.attention = eqx.nn.MultiheadAttention(4, FEATURES, dropout_p=0.5, dtype=dtype, key=keys[1], **biases)
        self.mlp = eqx.nn.MLP(FEATURES, FEATURES, 96, 1, activation=jax.nn.silu, dtype=dtype, key=keys[2])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embedding)(tokens)
        return jax.vmap(self.mlp)(x + self.attention(x, x, x))


def make(seed: int = 0, dtype: Any = None) -> Block:
    return eqx.nn.inference_mode(Block(seed, dtype))


TOKENS = jnp.array([3, 1, 4, 1, 5])


def run(model: Any, *arguments: Any) -> Any:
    """Calls a model in a compiled program."""
    arrays, static = eqx.partition(model, eqx.is_array)
    call = jax.jit(lambda arrays, given: eqx.combine(arrays, static)(*given), compiler_options=UNOPTIMIZED)
    return call(arrays, arguments)


def is_weight(node: Any) -> bool:
    return isinstance(node, TransposedWeight)


def with_dense_weights(model: Any, dtype: Any = jnp.float32) -> Any:
    """Returns a model with dense weights, those of a quantized model."""
    return jax.tree.map(
        lambda node: dequantize(node.mT, dtype).mT if is_weight(node) else node, model, is_leaf=is_weight
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_result_is_that_of_the_model_with_dequantized_weights(dtype: str):
    model, report = quantize_model(make(dtype=jnp.dtype(dtype)), "int8")
    assert [leaf.path for leaf in report.quantized] == [
        *(f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")),
        *(f"mlp/layers/{n}/weight" for n in range(2)),
    ]
    expected, result = run(with_dense_weights(model, jnp.dtype(dtype)), TOKENS), run(model, TOKENS)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    rounding = 8 * float(jnp.finfo(result.dtype).eps)
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (result, expected)), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("scheme", ["int4-g32-minimums", "float8_e4m3fn", "mxfp4"])
def test_schemes(scheme: str):
    layer, x = eqx.nn.Linear(FEATURES, 24, key=jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, FEATURES))
    quantized, _ = quantize_model(layer, scheme)
    assert isinstance(quantized, eqx.nn.Linear)
    expected = run(eqx.filter_vmap(with_dense_weights(quantized)), x)
    np.testing.assert_allclose(run(eqx.filter_vmap(quantized), x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(quantized, x[0]), expected[0], rtol=1e-4, atol=1e-4)


def test_a_product_under_vmap_is_one_product_of_all_rows():
    model, _ = quantize_model(make(), "int8")
    with record_choices() as choices:
        eqx.filter_eval_shape(jax.vmap(model), jnp.stack([TOKENS, TOKENS]))
    rows = [choice.problem.rows for choice in choices if choice.operation == "quantized_matmul"]
    assert max(rows) == 2 * len(TOKENS)
    assert rows.count(2 * len(TOKENS)) == 6, "each layer multiplies once, whatever it was traced with on the way"


def test_the_dtype_is_that_of_x():
    layer, _ = quantize_model(eqx.nn.Linear(FEATURES, 8, use_bias=False, key=jax.random.key(0)), "int8")
    assert layer(jnp.ones(FEATURES, jnp.bfloat16)).dtype == jnp.bfloat16
    layer, _ = quantize_model(eqx.nn.Linear(FEATURES, 8, key=jax.random.key(0)), "int8")
    assert layer(jnp.ones(FEATURES, jnp.bfloat16)).dtype == jnp.float32, "that of the bias"


def test_what_the_scheme_does_not_fit_is_left_and_reported():
    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "odd": eqx.nn.Linear(40, 8, key=keys[0]),
        "scalar": eqx.nn.Linear("scalar", 8, key=keys[1]),
        "taken": eqx.nn.Linear(FEATURES, "scalar", key=keys[2]),
        "matrix": jnp.ones((FEATURES, FEATURES)),
        "name": "model",
    }
    quantized, report = quantize_model(model, "int4-g32")
    assert [leaf.path for leaf in report.quantized] == ["taken/weight"]
    reasons = {leaf.path: leaf.reason for leaf in report.left}
    assert "in = 40 is not a multiple of group_size" in reasons["odd/weight"]
    assert "in = 1 is not a multiple of group_size" in reasons["scalar/weight"]
    assert reasons["matrix"] == "not selected by where"
    assert eqx.tree_equal(quantized["odd"], model["odd"])
    x = jnp.ones(FEATURES)
    np.testing.assert_allclose(quantized["taken"](x), with_dense_weights(quantized["taken"])(x), **CLOSE)


def test_where_selects_and_a_second_scheme_follows():
    model, first = quantize_model(make(), "int8", where="attention")
    assert len(first.quantized) == 4
    assert (
        first.bytes_after
        < first.bytes_before
        == sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(make(), eqx.is_array)))
    )
    model, second = quantize_model(model, "int4-g32", where=lambda _, weight: weight.shape == (FEATURES, 96))
    assert [leaf.path for leaf in second.quantized] == ["mlp/layers/1/weight"]
    with pytest.raises(
        ValueError, match=r"where: got 'nothing', which selects none of \['attention/query_proj/weight'"
    ):
        quantize_model(model, "int8", where="nothing")
    with pytest.raises(ValueError, match="where: got None, which selects none of no layers"):
        quantize_model(eqx.nn.Embedding(8, 8, key=jax.random.key(0)), "int8")


def test_derivatives_are_those_of_the_dequantized_weights():
    model, _ = quantize_model(make(), "int4-g32")
    x = jax.random.normal(jax.random.key(1), (3, FEATURES))

    def gradient(mlp: Any) -> Any:
        total = jax.grad(lambda x: jnp.sum(jnp.sin(jax.vmap(mlp)(x))))
        return jax.jit(total, compiler_options=UNOPTIMIZED)(x)

    np.testing.assert_allclose(gradient(model.mlp), gradient(with_dense_weights(model.mlp)), rtol=1e-4, atol=1e-4)
    trained = eqx.filter_grad(lambda bias, model: jnp.sum(eqx.tree_at(lambda m: m.layers[1].bias, model, bias)(x[0])))
    np.testing.assert_allclose(trained(model.mlp.layers[1].bias, model.mlp), jnp.ones(FEATURES))


def test_stacked_layers_are_scanned():
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(FEATURES, FEATURES, key=key))(
        jax.random.split(jax.random.key(0), 3)
    )
    quantized, report = quantize_model(stack, "int8")
    assert [leaf.shape for leaf in report.quantized] == [(3, FEATURES, FEATURES)]

    def scan(stack: Any, x: jax.Array) -> jax.Array:
        arrays, static = eqx.partition(stack, eqx.is_array)
        return jax.lax.scan(lambda x, one: (jax.nn.silu(eqx.combine(one, static)(x)), None), x, arrays)[0]

    x = jax.random.normal(jax.random.key(1), (FEATURES,))
    compiled = jax.jit(scan, static_argnums=(), compiler_options=UNOPTIMIZED)
    np.testing.assert_allclose(compiled(quantized, x), compiled(with_dense_weights(quantized), x), **CLOSE)


def test_it_is_printed_and_saved(tmp_path: Path):
    model, _ = quantize_model(make(), "int4-g32")
    assert "TransposedWeight" in str(model)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    like = eqx.filter_eval_shape(lambda: quantize_model(make(1), "int4-g32")[0])
    restored = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like)
    np.testing.assert_array_equal(run(restored, TOKENS), run(model, TOKENS))


def test_without_equinox_the_error_names_the_extra():
    code = """
import sys
sys.modules["equinox"] = None
try:
    import palladion.frameworks.equinox
except ImportError as error:
    assert "pip install 'palladion[frameworks]'" in str(error), error
else:
    raise AssertionError("equinox was imported")
"""
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
