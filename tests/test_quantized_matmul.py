"""quantized_matmul: every implementation on every case, and what must hold for all of them."""

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
from jax.experimental.pallas import tpu as pltpu
from scipy import special

from palladion import QuantizedArray, Unsupported, quantize, quantized_matmul, record_choices
from palladion.kernels.quantized_matmul import IMPLEMENTATIONS, Inputs, Problem, cases, mosaic_tpu, triton
from palladion.kernels.quantized_matmul.cases import Case
from palladion.reference import oracle
from palladion.reference.compare import assert_right

KERNELS = [row.name for row in IMPLEMENTATIONS if row.platform is not None]
TESTS = {case.name: case for case in cases.TESTS}

# What a kernel refuses of the test cases: a case that is missing here and refused fails.
NOT_YET = {"float8", "float8-activations", "mxfp4", "int8-activations", "int4-int8-activations", "small-group"}
REFUSED = {"mosaic_tpu": NOT_YET | {"float16"}, "triton": NOT_YET}

IN_NUMPY = {
    None: lambda y: y,
    jax.nn.relu: lambda y: np.maximum(y, 0),
    jax.nn.silu: lambda y: y * special.expit(y),
    jax.nn.gelu: lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
}
"""Activations in float64."""


def multiply(case: Case, inputs: Inputs, backend: str, interpret: Any = None) -> jax.Array:
    interpret = (backend != "xla") if interpret is None else interpret
    return _compiled(case, backend, interpret)(inputs)


@functools.cache
def _compiled(case: Case, backend: str, interpret: Any) -> Any:
    call = functools.partial(quantized_matmul, **case.options, backend=backend, interpret=interpret)
    return jax.jit(lambda inputs: call(inputs.x, inputs.w, bias=inputs.bias, layer=inputs.layer))


def judge(case: Case, inputs: Inputs) -> np.ndarray:
    w = inputs.w if inputs.layer is None else jax.tree.map(lambda part: part[int(inputs.layer)], inputs.w)
    return oracle.quantized_matmul(
        inputs.x,
        w,
        bias=inputs.bias,
        activation=IN_NUMPY[case.activation],
        gated=case.gated,
        quantize_x=case.quantize_x,
    )


@functools.cache
def expected(name: str) -> tuple[Inputs, jax.Array, np.ndarray]:
    """A test case's inputs, and what the reference and the oracle make of them."""
    case = TESTS[name]
    inputs = cases.make_inputs(case)
    return inputs, multiply(case, inputs, "xla"), judge(case, inputs)


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_are_right(backend: str, name: str):
    inputs, reference, exact = expected(name)
    if name in REFUSED[backend]:
        with pytest.raises(Unsupported, match=f"{backend}: .*backend='xla' covers it"):
            multiply(TESTS[name], inputs, backend)
        return
    result = multiply(TESTS[name], inputs, backend)
    assert_right(result, reference, exact, f"{backend} {name}")


@pytest.mark.parametrize("name", TESTS)
def test_the_reference_is_right(name: str):
    """Within what float32 sums and one rounding to the result's dtype may be off."""
    case, (_, result, exact) = TESTS[name], expected(name)
    eps = float(jnp.finfo(result.dtype).eps)
    scale = np.abs(exact).max()
    error = np.abs(np.asarray(result, np.float64) - exact).max() / scale
    # A sum of n products in any order is off by at most n eps / 2 times the sum of their magnitudes, typically by its
    # root; activations and the gate add a few roundings of their own.
    bound = 4 * np.sqrt(case.in_features) * float(jnp.finfo(jnp.float32).eps) + eps
    assert error <= bound


@pytest.mark.parametrize("name", ["int4-minimums", "gated", "int8"])
def test_uninitialized_memory_is_never_read(name: str):
    inputs, reference, exact = expected(name)
    result = multiply(TESTS[name], inputs, "mosaic_tpu", pltpu.InterpretParams())
    assert_right(result, reference, exact, name)


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("mosaic_tpu", mosaic_tpu.Config(block_rows=16, block_out=128, chunk=128)),
        ("mosaic_tpu", mosaic_tpu.Config(block_rows=32, block_out=256, chunk=64)),
        ("triton", triton.Config(block_rows=16, block_out=16, tile=32, splits=1)),
        ("triton", triton.Config(block_rows=32, block_out=128, tile=128, splits=3)),
    ],
)
@pytest.mark.parametrize("name", ["int4-group", "int8-minimums", "gated"])
def test_every_config_gives_the_same(backend: str, config: Any, name: str):
    case, (inputs, reference, exact) = TESTS[name], expected(name)
    result = quantized_matmul(
        inputs.x, inputs.w, bias=inputs.bias, **case.options, backend=backend, config=config, interpret=True
    )
    assert_right(result, reference, exact, f"{config}")


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
    rows=st.integers(1, 20),
    blocks=st.integers(1, 6),
    out_features=st.integers(40, 300),  # fewer results have no typical size to set an error against
    scheme=st.sampled_from(["int8", "int8-g32", "int4", "int4-g32", "int4-g32-zeros", "int4-g32-minimums"]),
    backend=st.sampled_from(["xla", *KERNELS]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(rows: int, blocks: int, out_features: int, scheme: str, backend: str, seed: int):
    case = Case(
        name="any", rows=rows, in_features=32 * blocks, out_features=out_features, scheme=scheme, dtype="float32"
    )
    inputs = cases.make_inputs(case, seed)
    result = quantized_matmul(inputs.x, inputs.w, backend=backend, interpret=None if backend == "xla" else True)
    assert_right(result, quantized_matmul(inputs.x, inputs.w, backend="xla"), judge(case, inputs), str(case))


@pytest.mark.parametrize("backend", ["xla", *KERNELS])
def test_leading_dimensions_and_no_rows(backend: str):
    inputs = cases.make_inputs(TESTS["int8"])
    x = jnp.stack([inputs.x, 2 * inputs.x])[None]
    call = functools.partial(quantized_matmul, backend=backend, interpret=None if backend == "xla" else True)
    result = call(x, inputs.w)
    assert result.shape == (1, 2, 3, 512)
    np.testing.assert_array_equal(result[0, 0], call(inputs.x, inputs.w))
    assert call(x[0, 0, 0], inputs.w).shape == (512,)
    assert quantized_matmul(x[:0], inputs.w).shape == (0, 2, 3, 512)


@pytest.mark.parametrize("backend", ["xla", *KERNELS])
def test_vmap_and_scan(backend: str):
    case = dataclasses.replace(TESTS["int4-minimums"], num_layers=None, in_features=64, out_features=128)
    several = [cases.make_inputs(case, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *several)
    call = functools.partial(quantized_matmul, backend=backend, interpret=None if backend == "xla" else True)
    alone = [call(inputs.x, inputs.w) for inputs in several]
    together = jax.vmap(lambda inputs: call(inputs.x, inputs.w))(stacked)
    _, scanned = jax.lax.scan(lambda _, inputs: (None, call(inputs.x, inputs.w)), None, stacked)
    _, by_layer = jax.lax.scan(
        lambda _, step: (None, call(step[1], stacked.w, layer=step[0])), None, (jnp.arange(2), stacked.x)
    )
    for result in (together, scanned, by_layer):
        for one, other in zip(result, alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_the_reference_streams_narrow_weights():
    """One row multiplies without a wide copy of the weights: they are read as they are stored."""
    for scheme in ("int4-g32-minimums", "int8", "float8_e4m3fn"):
        case = Case(name="stream", rows=1, in_features=4096, out_features=1024, scheme=scheme, dtype="float32")
        inputs = case.shapes()
        lowered = jax.jit(lambda x, w: quantized_matmul(x, w, backend="xla")).lower(inputs.x, inputs.w)
        temporary = lowered.compile().memory_analysis().temp_size_in_bytes
        wide = 4096 * 1024 * 4
        # float8 arguments are viewed as bits first, which takes a copy as narrow as they are.
        assert temporary < wide / 3, f"{scheme}: {temporary} of {wide}"


def test_a_layer_that_triton_cannot_reach_is_copied(monkeypatch: pytest.MonkeyPatch):
    inputs, reference, exact = expected("int4-minimums")
    case = dataclasses.replace(TESTS["int4-minimums"], name="copied")  # compiled anew
    monkeypatch.setattr(triton, "offsets_wrap", lambda codes: codes == inputs.w.values.size)
    assert_right(multiply(case, inputs, "triton"), reference, exact)


def test_matrices_that_triton_cannot_reach_are_refused():
    case = Case(name="large", rows=1, in_features=2**16, out_features=2**15 + 128, scheme="int8")
    assert triton.unsupported(case.problem()) == (
        "codes of a matrix must take up to 2 GiB, or more than 4, got 2155872256 bytes"
    )
    assert triton.unsupported(dataclasses.replace(case, out_features=2**15).problem()) is None


def test_backends_are_chosen_and_reported():
    inputs = cases.make_inputs(TESTS["float16"])
    with record_choices() as choices:
        quantized_matmul(inputs.x, inputs.w)
        quantized_matmul(inputs.x, inputs.w, backend="pallas")
    assert [choice.backend for choice in choices] == ["xla", "triton"]
    assert "x must be float32 or bfloat16, got float16" in choices[1].reasons["mosaic_tpu"]
    assert choices[1].interpret


def broken(**changes: Any) -> dict[str, Any]:
    inputs = cases.make_inputs(TESTS["int4-group"])
    return {"x": inputs.x, "w": inputs.w, "bias": inputs.bias} | changes


def replaced(**changes: Any) -> QuantizedArray:
    return dataclasses.replace(cases.make_inputs(TESTS["int4-group"]).w, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": "text"}, "x: got str; accepted: an array"),
        ({"x": jnp.ones((3, 100))}, r"x: got shape \(3, 100\); accepted: \[\.\.\., in\] with in = 384, that of w"),
        ({"x": jnp.ones((3, 384), jnp.int32)}, "x: got int32; accepted: float32, bfloat16, float16"),
        ({"x": jnp.float32(1)}, r"x: got shape \(\); accepted: \[\.\.\., in\]"),
        ({"w": jnp.ones((384, 512))}, "w: got .*; accepted: a QuantizedArray; palladion.quantize makes one"),
        ({"w": quantize(jnp.ones((2, 384, 512)), "int4-g32")}, r"w: got shape \(2, 384, 512\); .* say which by layer="),
        ({"w": quantize(jnp.ones((2, 384, 512)), "int4-g32"), "layer": 2}, "layer: got 2; accepted: 0 to 1"),
        ({"layer": 0}, r"w: got shape \(384, 512\); accepted: \[num_layers, in, out\] with layer="),
        ({"w": replaced(scales=jnp.ones((12, 5)))}, r"w\.scales: got shape \(12, 5\); accepted: \(12, 512\)"),
        ({"w": replaced(zeros=jnp.ones((12, 512)))}, r"w\.zeros: got True; accepted: False for int4-g32"),
        ({"w": replaced(values=jnp.ones((192, 512)))}, r"w\.values: got float32; accepted: uint8"),
        ({"bias": jnp.ones(3)}, r"bias: got shape \(3,\); accepted: \(512,\), \[out\]"),
        ({"bias": jnp.ones(512, jnp.int32)}, "bias: got int32; accepted: a float dtype"),
        ({"activation": "silu"}, "activation: got silu; accepted: a function of an array, or None"),
        ({"quantize_x": "int4"}, "quantize_x: got int4; accepted: None, int8, float8_e4m3fn"),
        (
            {"quantize_x": "float8_e4m3fn"},
            "float8_e4m3fn with int4-g32 weights; accepted: float8_e4m3fn or float8_e5m2",
        ),
        ({"out_dtype": "int8"}, "out_dtype: got int8; accepted: None, float32, bfloat16, float16"),
        ({"backend": "cuda"}, "backend: got 'cuda'; accepted: None, 'auto', 'xla', 'pallas'"),
        ({"backend": "triton", "interpret": True, "config": 7}, "config: got 7; accepted: triton.Config or None"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        quantized_matmul(**broken(**arguments))


def test_gated_needs_an_even_number_of_channels():
    w = quantize(jnp.ones((32, 7)), "int8")
    with pytest.raises(ValueError, match="gated: got 7 channels; accepted: an even number"):
        quantized_matmul(jnp.ones((1, 32)), w, gated=True)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (mosaic_tpu.Config, {"block_rows": 8, "block_out": 128, "chunk": 32}, "config.block_rows: got 8; .* of 16"),
        (mosaic_tpu.Config, {"block_rows": 16, "block_out": 100, "chunk": 32}, "config.block_out: got 100; .* of 128"),
        (triton.Config, {"block_rows": 8, "block_out": 64, "tile": 32, "splits": 1}, "config.block_rows: got 8"),
        (triton.Config, {"block_rows": 16, "block_out": 48, "tile": 32, "splits": 1}, "a power of two of at least 16"),
        (triton.Config, {"block_rows": 16, "block_out": 64, "tile": 16, "splits": 1}, "config.tile: got 16"),
    ],
)
def test_wrong_configs(config: Any, arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        config(**arguments)


def test_problem_counts_what_must_move():
    case = Case(
        name="count", rows=2, in_features=64, out_features=128, scheme="int4-g32-minimums", scale_dtype="float16"
    )
    problem = case.problem()
    codes, factors = 64 * 128 // 2, 2 * 2 * 128 * 2
    assert problem.bytes_moved() == codes + factors + 2 * 64 * 2 + 2 * 128 * 2
    assert problem.flops() == 2 * 2 * 64 * 128
    assert isinstance(problem, Problem)
    assert str(problem) == "2x64x128, x=bfloat16, w=int4-g32-minimums, scales=float16, out=bfloat16"
