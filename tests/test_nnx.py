"""Quantized Flax NNX models: held against the same models with dequantized weights, computed by Flax itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from compiling import UNOPTIMIZED
from flax import nnx

from palladion import QuantizedArray, dequantize, record_choices
from palladion.frameworks.nnx import quantize_model

FEATURES = 64
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Block(nnx.Module):
    """Attention and two layers, of which one is there twice, with dropout."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = nnx.Embed(8, FEATURES, **types)
        self.attention = nnx.MultiHeadAttention(4, FEATURES, num_kv_heads=2, dropout_rate=0.5, decode=False, **types)
        self.up = nnx.Linear(FEATURES, 96, use_bias=False, **types)
        self.down = nnx.Linear(96, FEATURES, bias_init=nnx.initializers.normal(), **types)
        self.norm = nnx.RMSNorm(FEATURES, **types)
        self.tied = self.down

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.tied(nnx.silu(self.up(x)))


def make(seed: int = 0, **types: Any) -> Block:
    model = Block(nnx.Rngs(seed), **types)
    model.eval()
    return model


def inputs(*lead: int, dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*lead, FEATURES), dtype)


def with_dense_weights(model: Any, original: Any) -> Any:
    """Returns a copy of the original model, with weights that are those of the quantized model."""
    copy = nnx.clone(original)
    quantized = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, param in nnx.to_flat_state(nnx.state(copy, nnx.Param)):
        w = quantized[path].get_value()
        if isinstance(w, QuantizedArray):
            dense = dequantize(w).reshape(param.shape).astype(param.dtype)
            nnx.update(copy, nnx.from_flat_state([(path, param.replace(dense))]))
    return copy


def run(model: nnx.Module, *arguments: jax.Array) -> Any:
    """Calls a model in a compiled program."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, arguments: nnx.merge(graphdef, state)(*arguments), compiler_options=UNOPTIMIZED)
    return call(state, arguments)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float16", None, "float16"),
    ],
)
def test_the_result_is_that_of_the_model_with_dequantized_weights(x_dtype: str, dtype: Any, param_dtype: str):
    model = make(dtype=dtype, param_dtype=jnp.dtype(param_dtype))
    original, x = nnx.clone(model), inputs(2, 3, dtype=x_dtype)
    quantize_model(model, "int8")
    assert isinstance(model.attention.query.kernel.get_value(), QuantizedArray)
    expected, result = run(with_dense_weights(model, original), x), run(model, x)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    rounding = 8 * float(jnp.finfo(result.dtype).eps)
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (result, expected)), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("scheme", ["int4-g32-minimums", "float8_e4m3fn", "mxfp4"])
def test_schemes(scheme: str):
    layer = nnx.Linear(FEATURES, 32, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    original, x = nnx.clone(layer), inputs(5)
    quantize_model(layer, scheme)
    np.testing.assert_allclose(run(layer, x), run(with_dense_weights(layer, original), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "axis", "shape"),
    [
        ((FEATURES, (4, 8)), -1, (2, 3, FEATURES)),
        (((4, 16), 24), (-2, -1), (2, 3, 4, 16)),
        (((4, 16), (3, 8)), (1, -1), (2, 4, 3, 16)),
        ((FEATURES, 8), 0, (FEATURES, 5)),
    ],
)
def test_general_layers_contract_any_axes(sizes: Any, axis: Any, shape: Any):
    layer = nnx.LinearGeneral(*sizes, axis=axis, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    original, x = nnx.clone(layer), jax.random.normal(jax.random.key(1), shape)
    report = quantize_model(layer, "int4-g32")
    assert [leaf.shape for leaf in report.quantized] == [original.kernel.shape]
    np.testing.assert_allclose(run(layer, x), run(with_dense_weights(layer, original), x), **CLOSE)


@pytest.mark.parametrize(
    ("equation", "kernel", "bias", "x", "order"),
    [
        ("btd,df->btf", (64, 24), (24,), (2, 3, 64), (0, 1)),
        ("...td,hde->...the", (4, 64, 8), (4, 8), (2, 3, 64), (1, 0, 2)),
        ("bthe,hed->bdt", (4, 16, 24), None, (2, 3, 4, 16), (0, 1, 2)),
        ("bteh,hed->btd", (4, 16, 24), None, (2, 3, 16, 4), (0, 1, 2)),  # contracted axes in another order
        ("bd,fd->fb", (24, 64), (24,), (3, 64), (1, 0)),
    ],
)
def test_einsums(equation: str, kernel: Any, bias: Any, x: Any, order: tuple[int, ...]):
    options = {"bias_init": nnx.initializers.normal(), "rngs": nnx.Rngs(0)}
    layer = nnx.Einsum(equation, kernel, bias if equation != "bd,fd->fb" else None, **options)
    dense = nnx.clone(layer)
    quantize_model(layer, "int8-g32")
    matrix = dequantize(layer.kernel.get_value()).reshape([kernel[axis] for axis in order])
    dense.kernel.set_value(matrix.transpose(np.argsort(order)))
    given = jax.random.normal(jax.random.key(1), x)
    np.testing.assert_allclose(run(layer, given), run(dense, given), **CLOSE)


def test_layers_that_are_no_matrix_are_left_and_reported():
    rngs = nnx.Rngs(0)

    class Own(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
            return x @ self.kernel[...].T

    model = nnx.Dict(
        odd=nnx.Linear(40, 8, rngs=rngs),
        batch=nnx.LinearGeneral(64, 8, batch_axis={0: 2}, rngs=rngs),
        mapped=nnx.Einsum("bhd,hde->bhe", (2, 64, 8), rngs=rngs),
        summed=nnx.Einsum("bd,def->bf", (64, 2, 8), rngs=rngs),
        twice=nnx.Einsum("bdd,de->be", (64, 8), rngs=rngs),
        dots=nnx.Linear(64, 8, dot_general=lambda *args, **_: jax.lax.dot_general(*args[:3]), rngs=rngs),
        own=Own(64, 64, rngs=rngs),
        taken=nnx.Linear(64, 8, rngs=rngs),
        embed=nnx.Embed(64, 64, rngs=rngs),
    )
    report = quantize_model(model, "int4-g32")
    reasons = {leaf.path: leaf.reason for leaf in report.leaves if leaf.path.endswith(("kernel", "embedding"))}
    assert [leaf.path for leaf in report.quantized] == ["taken/kernel"]
    for name, reason in {
        "odd/kernel": "in = 40 is not a multiple of group_size",
        "batch/kernel": "batch_axis",
        "mapped/kernel": "an axis is mapped over both operands",
        "summed/kernel": "summed in one",
        "twice/kernel": "named twice",
        "dots/kernel": "a function of its own",
        "own/kernel": "Own has a __call__ of its own",
        "embed/embedding": "no kernel of a linear layer",
    }.items():
        assert reason in reasons[name]
    assert model.odd.dot_general is jax.lax.dot_general
    assert model.odd(jnp.ones((2, 40))).shape == (2, 8)


def test_where_selects_and_a_second_scheme_follows():
    model = make()
    before = sum(param.nbytes for param in jax.tree.leaves(nnx.state(model, nnx.Param)))
    first = quantize_model(model, "int8", where="attention/")
    assert {leaf.path.split("/")[0] for leaf in first.quantized} == {"attention"}
    assert first.bytes_before == before > first.bytes_after
    assert {leaf.reason for leaf in first.left if leaf.path == "up/kernel"} == {"not selected by where"}
    second = quantize_model(model, "int4-g32", where=lambda _, array: array.shape[0] == 96)
    assert [leaf.path for leaf in second.quantized] == ["down/kernel"]
    assert second.bytes_before == first.bytes_after
    third = quantize_model(model, "mxfp4")
    assert [leaf.path for leaf in third.quantized] == ["up/kernel"]
    assert {leaf.reason for leaf in third.left if leaf.path == "down/kernel"} == {"quantized before"}
    assert "down/kernel" in str(third)
    embed = nnx.Embed(8, 8, rngs=nnx.Rngs(0))
    for call in (lambda: quantize_model(model, "int8", where="nothing"), lambda: quantize_model(embed, "int8")):
        with pytest.raises(ValueError, match=r"quantize_model: where: got .*, which selects no kernel"):
            call()


def quantized_block(seed: int = 0) -> Block:
    model = make(seed)
    quantize_model(model, "int4-g32")
    return model


def test_it_is_split_merged_jitted_and_printed():
    model, x = quantized_block(), inputs(2, 3)
    graphdef, state = nnx.split(model)
    expected = run(model, x)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(model, x), expected, **CLOSE)
    assert graphdef == nnx.graphdef(quantized_block(1)), "a jitted function is not compiled again for other weights"
    assert "QuantizedArray(int4-g32, in_out, [96, 64]" in str(model)
    assert "QuantizedArray" in str(state)
    assert "down" in nnx.tabulate(model, x)


def test_derivatives_are_those_of_the_dequantized_weights():
    model, x = quantized_block(), inputs(2, 3)

    def gradient(model: Block) -> Any:
        graphdef, state = nnx.split(model)
        total = jax.grad(lambda x: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x))))
        return jax.jit(total, compiler_options=UNOPTIMIZED)(x)

    right = gradient(with_dense_weights(model, make()))
    np.testing.assert_allclose(gradient(model), right, rtol=1e-4, atol=1e-4)
    assert np.abs(right).max() > 0.1


def test_stacked_layers_are_scanned():
    layers = 3

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0)
    def stack(rngs: nnx.Rngs) -> Block:
        block = Block(rngs)
        block.eval()
        return block

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scan(x: jax.Array, block: Block) -> jax.Array:
        return block(x)

    model, x = stack(nnx.Rngs(0)), inputs(2, 3)
    original = nnx.clone(model)
    quantize_model(model, "int8")
    assert model.attention.out.kernel.get_value().shape == (layers, FEATURES, FEATURES)
    np.testing.assert_allclose(scan(x, model), scan(x, with_dense_weights(model, original)), rtol=1e-4, atol=1e-4)


def test_checkpoints(tmp_path: Path):
    """An abstract quantized model is restored into, without the dense weights."""
    model, x = quantized_block(), inputs(2, 3)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        checkpointer.wait_until_finished()
        graphdef, state, rest = nnx.split(nnx.eval_shape(lambda: quantized_block(1)), nnx.Param, ...)
        restored = checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(state))
    del rest
    nnx.replace_by_pure_dict(state, restored)
    fresh = nnx.merge(graphdef, state, nnx.state(quantized_block(1), nnx.Not(nnx.Param)))
    np.testing.assert_array_equal(run(fresh, x), run(model, x))


def test_an_adapter_over_quantized_weights():
    layer = nnx.LoRALinear(FEATURES, 32, lora_rank=2, b_initializer=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    original, x = nnx.clone(layer), inputs(3)
    assert [leaf.path for leaf in quantize_model(layer, "int8").quantized] == ["kernel"]
    np.testing.assert_allclose(run(layer, x), run(with_dense_weights(layer, original), x), **CLOSE)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x)), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    assert np.abs(gradient["lora"]["lora_a"].get_value()).max() > 0


def test_the_layer_multiplies_by_the_kernel_of_the_backend():
    model = quantized_block()
    with record_choices() as choices:
        jax.eval_shape(lambda x: model(x), inputs(2, 3))
    products = [choice.problem for choice in choices if choice.operation == "quantized_matmul"]
    assert [problem.rows for problem in products] == [6] * 6
    assert {str(problem.scheme) for problem in products} == {"int4-g32"}


def test_the_result_has_the_sharding_that_is_asked_for():
    code = """
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from palladion.frameworks.nnx import quantize_model
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
layers = nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.Einsum("bd,df->fb", (64, 32), rngs=nnx.Rngs(0))
with jax.set_mesh(mesh):
    for layer, spec in zip(layers, (P(None, "model"), P("model", None))):
        x = jnp.ones((8, 64))
        expected = layer(x, out_sharding=spec)
        quantize_model(layer, "int8")
        result = layer(x, out_sharding=spec)
        assert jax.typeof(result).sharding.spec == jax.typeof(expected).sharding.spec == spec, jax.typeof(result)
        assert jnp.allclose(result, expected, atol=0.1)
"""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    _run(code, environment)


def test_without_flax_the_error_names_the_extra():
    code = """
import sys
sys.modules["flax"] = None
try:
    import palladion.frameworks.nnx
except ImportError as error:
    assert "pip install 'palladion[frameworks]'" in str(error), error
else:
    raise AssertionError("flax was imported")
"""
    _run(code, {"JAX_PLATFORMS": "cpu"})


def _run(code: str, environment: dict[str, str]) -> None:
    path = str(Path(__file__).parent.parent / "src")
    run: Callable[..., Any] = subprocess.run
    done = run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
