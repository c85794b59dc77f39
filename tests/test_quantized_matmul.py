"""quantized_matmul: every implementation on every case, and what must hold for all of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_interpreter
from compiling import QUICKLY, options_for, unoptimized
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from product_oracle import ORDER_OF, judge

from palladion import QuantizedArray, Unsupported, dequantize, quantize, quantized_matmul, record_choices
from palladion.benchmarks.static import Examiner, WorkloadName
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.devices import tpu_chips
from palladion.kernels.quantized_matmul import IMPLEMENTATIONS, Inputs, Problem, cases
from palladion.kernels.quantized_matmul.cases import Case
from palladion.kernels.quantized_matmul.float_bits import bfloat16_pieces, decode_e8m0, decode_float16
from palladion.kernels.quantized_matmul.mosaic_tpu import block_sizes
from palladion.kernels.quantized_matmul.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.quantized_matmul.mosaic_tpu.dequantize import Dequantizer, dequantizers
from palladion.kernels.quantized_matmul.problem import ACTIVATION_FORMATS
from palladion.kernels.quantized_matmul.triton import call as triton
from palladion.reference.compare import assert_right
from palladion.reference.e2m1 import decode_e2m1
from palladion.reference.quantization import unpack_codes
from palladion.reference.scheme import CODE_DTYPE, Scheme

# The package's `quantized_matmul` is the function.
reference_forms = importlib.import_module("palladion.reference.quantized_matmul")
# mosaic_gpu has tests of its own: jax's interpreter of such kernels is slow.
KERNELS = [row.name for row in IMPLEMENTATIONS if row.platform is not None and row.name != "mosaic_gpu"]
TESTS = {case.name: case for case in cases.TESTS}

# What a kernel refuses of the test cases: a case that is missing here and refused fails.
REFUSED: dict[str, set[str]] = {"mosaic_tpu": set(), "triton": set()}


@pytest.fixture(scope="module", autouse=True)
def programs_compile_quickly() -> Iterator[None]:
    with unoptimized():
        yield


def multiply(case: Case, inputs: Inputs, backend: str, interpret: Any = None) -> jax.Array:
    interpret = (backend != "xla") if interpret is None else interpret
    return _compiled(case, backend, interpret)(inputs._replace(w=inputs.w.with_order(ORDER_OF[backend])))


@functools.cache
def _compiled(case: Case, backend: str, interpret: Any) -> Any:
    call = functools.partial(quantized_matmul, **case.options, backend=backend, interpret=interpret)
    return jax.jit(
        lambda inputs: call(**inputs._asdict()),
        compiler_options=options_for(backend),
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


@pytest.mark.parametrize("mode", tpu_interpreter.MODES)
@pytest.mark.parametrize("name", ["int4-minimums", "gated", "odd-out"])
def test_tpu_kernel_moves_its_memory_in_order(name: str, mode: str):
    """Takes more blocks than there are buffers, along `in` too, the last of them not full."""
    case, (inputs, reference, exact) = TESTS[name], expected(name)
    chunk = case.in_features if name == "odd-out" else 64
    config = mosaic_tpu.Config(8, 128, chunk if name == "odd-out" else 128, chunk, "float8_e4m3b11fnuz")
    interpret = tpu_interpreter.MODES[mode]
    call = functools.partial(quantized_matmul, backend="mosaic_tpu", config=config, interpret=interpret, **case.options)
    call = jax.jit(call, compiler_options=QUICKLY)
    assert_right(call(**inputs._asdict()), reference, exact, f"{name} {mode}")
    assert mode != "races" or not tpu_interpreter.races_found()


@pytest.mark.parametrize("chip", tpu_chips())
@pytest.mark.parametrize("name", ["int4-large-group", "mxfp4-many-rows", "float8", "odd-in"])
def test_what_is_chosen_for_a_chip_is_right(name: str, chip: str, monkeypatch: pytest.MonkeyPatch):
    """Dequantizers, and two cores that share an odd number of blocks."""
    inputs, reference, exact = expected(name)
    monkeypatch.setattr(block_sizes, "target_chip", lambda: tpu_chips()[chip])
    config = mosaic_tpu.heuristic(TESTS[name].problem())
    config = dataclasses.replace(config, block_out=256 if name == "odd-in" else 128 * (1 + (chip == "v5p")))
    case = dataclasses.replace(TESTS[name], name=f"{name} on {chip}")  # compiled anew
    call = functools.partial(quantized_matmul, backend="mosaic_tpu", config=config, interpret=True, **case.options)
    result = jax.jit(call, compiler_options=QUICKLY)(**inputs._asdict())
    assert_right(result, reference, exact, f"{config}")


@pytest.mark.parametrize(
    ("name", "dequantizer", "chunk"),
    [
        ("int4-large-group", "bfloat16", 128),
        ("int4-large-group", "float32", 384),
        ("int4-zeros", "float32", 192),
        ("int4-minimums", "float32", 128),
        ("mxfp4-many-rows", "float32", 384),
        ("int8-group", "float32", 32),
    ],
)
def test_scaled_weights_give_the_same(name: str, dequantizer: str, chunk: int):
    case, (inputs, reference, exact) = TESTS[name], expected(name)
    config = mosaic_tpu.Config(8, 256, 384, chunk, dequantizer, scales_weights=True)
    call = functools.partial(quantized_matmul, backend="mosaic_tpu", config=config, interpret=True, **case.options)
    call = jax.jit(call, compiler_options=QUICKLY)
    assert_right(call(**inputs._asdict()), reference, exact, f"{config}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("out_features", "gated"), [(1440, False), (2816, True), (4096, False)])
def test_blocks_become_smaller_until_they_fit(out_features: int, gated: bool, monkeypatch: pytest.MonkeyPatch):
    """Channels in any number, gated or not: no block is tried twice, or the search would not end."""
    monkeypatch.setattr(block_sizes, "target_chip", lambda: tpu_chips()["v4"])
    case = Case(
        name="large",
        rows=700,
        in_features=2944,
        out_features=out_features,
        scheme="int8",
        dtype="float32",
        gated=gated,
        activation=jax.nn.silu if gated else None,
    )
    config = mosaic_tpu.heuristic(case.problem())
    assert mosaic_tpu.fits(case.problem(), config), config


STATIC = [
    ("llama-3-8b-gate-up-1-int8", "v4", 0.75),
    ("llama-3-8b-gate-up-1-int8", "v6e", 0.95),
    ("llama-3-8b-gate-up-1-int4-g32", "v5e", 0.93),
    ("llama-3-8b-gate-up-1-int4-g32", "v7x", 0.8),
    ("llama-3-8b-gate-up-16-int4-g128-zeros", "v5p", 0.9),
]
"""Shares of the memory's bandwidth that the compiler's schedule comes to, a few percent below what it was."""


@pytest.fixture(scope="module")
def examiner() -> Iterator[Examiner]:
    with Examiner() as examiner:
        yield examiner


@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")
@pytest.mark.parametrize(("name", "chip", "least"), STATIC)
def test_the_memory_is_kept_busy(name: str, chip: str, least: float, examiner: Examiner):
    row = examiner.examine(WorkloadName("quantized_matmul", name), chip)
    assert row.failure is None, row.failure
    (report,) = row.reports
    assert report.agrees
    assert report.roofline is not None
    assert report.roofline > least


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("mosaic_tpu", mosaic_tpu.Config(block_rows=8, block_out=128, block_in=384, chunk=128, dequantizer="float32")),
        ("mosaic_tpu", mosaic_tpu.Config(block_rows=32, block_out=256, block_in=192, chunk=64, dequantizer="float32")),
    ],
)
@pytest.mark.parametrize("name", ["int4-group", "int8-minimums", "gated"])
def test_every_config_gives_the_same(backend: str, config: Any, name: str):
    case, (inputs, reference, exact) = TESTS[name], expected(name)
    call = functools.partial(quantized_matmul, **case.options, backend=backend, config=config, interpret=True)
    inputs = inputs._replace(w=inputs.w.with_order(ORDER_OF[backend]))
    result = jax.jit(call, compiler_options=QUICKLY)(**inputs._asdict())
    assert_right(result, reference, exact, f"{config}")


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 64, 65, 300])
def test_any_number_of_rows_on_a_gpu(rows: int):
    """Around the blocks; channels and `in` divide no block, and shares of `in` are not equal."""
    scheme = "int8" if rows % 2 else "int4-g32"
    case = Case(name="rows", rows=rows, in_features=160, out_features=88, scheme=scheme)
    block_rows = min(max(16, pl.next_power_of_2(rows)), 64)
    config = triton.Config("tensor_core", block_rows=block_rows, block_out=64, tile=32, splits=2)
    inputs = cases.make_inputs(case)
    call = functools.partial(quantized_matmul, backend="triton", config=config, interpret=True)
    result = jax.jit(call, compiler_options=QUICKLY)(inputs.x, inputs.w.with_order("out_in"))
    assert_right(result, multiply(case, inputs, "xla"), judge(case, inputs), f"{rows} {config}")


DEQUANTIZERS = [
    (name, dequantizer)
    for name in (
        "int8",
        "int8-zeros",
        "int8-minimums",
        "int4-minimums",
        "int4-zeros",
        "gated",
        "mxfp4",
        "float8",
        "int4",
    )
    for dequantizer in dequantizers(TESTS[name].problem().scheme)
    # Between integers only; and 16 in every code for results that do not show it.
    if dequantizer != "int8" and (dequantizer != "words" or name not in ("int4-minimums", "int4-zeros", "gated"))
] + [("int8-activations", "int8"), ("int8-activations", "bfloat16"), ("int4-int8-activations", "int8")]


@pytest.mark.parametrize(
    ("name", "dequantizer", "block_in", "chunk"),
    [(*one, *((384, 128) if number % 2 else (192, 64))) for number, one in enumerate(DEQUANTIZERS)],
)
def test_every_dequantizer_gives_the_same(name: str, dequantizer: str, block_in: int, chunk: int):
    """Each dequantizer is right on every generation, in one step or several along `in`."""
    case, (inputs, reference, exact) = TESTS[name], expected(name)
    config = mosaic_tpu.Config(8 if case.rows < 8 else 24, 128, block_in, chunk, dequantizer)
    call = functools.partial(quantized_matmul, backend="mosaic_tpu", config=config, interpret=True, **case.options)
    call = jax.jit(call, compiler_options=QUICKLY)
    result = call(**inputs._asdict())
    assert_right(result, reference, exact, f"{config}")


@pytest.mark.parametrize("format", ["int8", "int4", "float8_e4m3fn", "float8_e5m2", "mxfp4"])
def test_dequantizers_are_exact(format: str):
    """Every code, next to every other one in its word, comes in the order that x is given."""
    scheme, weights = Scheme.parse(format), 128
    stored = np.stack([np.roll(np.arange(256), 3 * row * row) for row in range(weights // (2 if scheme.packed else 1))])
    values = stored.astype(np.uint8) if scheme.packed else stored.astype(np.uint8).view(np.dtype(CODE_DTYPE[format]))
    numbers = np.asarray(values).astype(np.float64)
    values = values if scheme.packed else np.where(np.isfinite(numbers), values, np.zeros_like(values))
    w = QuantizedArray(jnp.asarray(values), jnp.ones((1, 256)), None, None, scheme)
    codes = np.asarray(decode_e2m1(unpack_codes(w)) if format == "mxfp4" else unpack_codes(w)).astype(np.float64)
    for name, dequantizer in dequantizers(scheme).items():

        def kernel(codes_ref: Any, out_ref: Any, *, dequantizer: Dequantizer = dequantizer) -> None:
            out_ref[...] = dequantizer.to_operands(codes_ref[...])

        shape = jax.ShapeDtypeStruct((weights, 256), dequantizer.operand)
        operands = np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=True)(w.values)).astype(np.float64)
        found = dequantizer.unit * (operands - dequantizer.offset)
        np.testing.assert_array_equal(found, dequantizer.reorder(codes.T, weights).T, err_msg=name)


@pytest.mark.parametrize("dequantizer", ["float8_e4m3b11fnuz", "nibbles", "float32"])
def test_outliers_in_x_do_not_drown_the_rest(dequantizer: str):
    inputs, _, _ = expected("int4-group")
    inputs = inputs._replace(x=inputs.x.at[:, 5].mul(1e4).at[1].add(100))
    case = TESTS["int4-group"]
    config = mosaic_tpu.Config(8, 512, 384, 128, dequantizer)
    result = quantized_matmul(**inputs._asdict(), backend="mosaic_tpu", config=config, interpret=True, **case.options)
    assert_right(result, multiply(case, inputs, "xla"), judge(case, inputs), dequantizer)


def test_a_long_in_is_taken_in_steps():
    case = Case(name="llama-3-405b-down", rows=8, in_features=53248, out_features=16384, scheme="int8")
    config = mosaic_tpu.heuristic(case.problem())
    assert config.block_in < case.in_features
    assert case.in_features % config.block_in == 0
    assert mosaic_tpu.unsupported(case.problem()) is None
    case = dataclasses.replace(case, name="small", out_features=256, in_features=2048)
    config = mosaic_tpu.Config(8, 128, 512, 256, "bfloat16")
    for scheme, out_dtype in (("int8-g64-minimums", "float32"), ("int8-zeros", None)):
        some = dataclasses.replace(case, scheme=scheme, out_dtype=out_dtype)
        inputs = cases.make_inputs(some)
        call = functools.partial(quantized_matmul, backend="mosaic_tpu", config=config, **some.options)
        call = jax.jit(functools.partial(call, interpret=pltpu.InterpretParams()), compiler_options=QUICKLY)
        result = call(inputs.x, inputs.w)
        assert_right(result, multiply(some, inputs, "xla"), judge(some, inputs), scheme)


def test_integer_products_are_exact():
    case = TESTS["int8-activations"]
    inputs = cases.make_inputs(case)
    ones = dataclasses.replace(inputs.w, scales=jnp.ones_like(inputs.w.scales))
    x = jnp.round(inputs.x.astype(jnp.float32) * 20).at[:, 0].set(127)  # its own codes
    result = quantized_matmul(x, ones, quantize_x="int8", backend="mosaic_tpu", interpret=True)
    exact = np.asarray(x, np.int64) @ np.asarray(ones.values, np.int64)
    np.testing.assert_array_equal(np.asarray(result), exact)


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
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
    result = multiply(case, inputs, backend)
    assert_right(result, multiply(case, inputs, "xla"), judge(case, inputs), str(case))


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 6),
    out_features=st.integers(40, 300),
    scheme=st.sampled_from(
        ["int8-g16", "int4-g16-zeros", "int4", "int4-g64", "float8_e4m3fn-g32", "float8_e5m2", "mxfp4"]
    ),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    gated=st.booleans(),
    quantized=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_option_on_a_tpu(
    rows: int, blocks: int, out_features: int, scheme: str, dtype: str, gated: bool, quantized: bool, seed: int
):
    accepted = next(
        (name for name, formats in ACTIVATION_FORMATS.items() if Scheme.parse(scheme).format in formats), None
    )
    case = Case(
        name="any",
        rows=rows,
        in_features=64 * blocks,
        out_features=2 * out_features if gated else out_features,
        scheme=scheme,
        dtype=dtype,
        gated=gated,
        quantize_x=accepted if quantized else None,
    )
    inputs = cases.make_inputs(case, seed)
    result = multiply(case, inputs, "mosaic_tpu")
    assert_right(result, multiply(case, inputs, "xla"), judge(case, inputs), str(case))


@pytest.mark.parametrize("backend", ["xla", *KERNELS])
def test_leading_dimensions_and_no_rows(backend: str):
    case = Case(
        name="leading", rows=1, in_features=40, out_features=128, scheme="float8_e4m3fn", order=ORDER_OF[backend]
    )
    inputs = cases.make_inputs(case)
    x = jnp.stack([inputs.x, 2 * inputs.x])[None]
    call = functools.partial(quantized_matmul, backend=backend, interpret=None if backend == "xla" else True)
    call = jax.jit(call, compiler_options=options_for(backend))
    result = call(x, inputs.w)
    assert result.shape == (1, 2, 1, 128)
    np.testing.assert_array_equal(result[0, 0], call(inputs.x, inputs.w))
    assert call(x[0, 0, 0], inputs.w).shape == (128,)
    assert quantized_matmul(x[:0], inputs.w).shape == (0, 2, 1, 128)


@pytest.mark.parametrize("backend", ["xla", *KERNELS])
def test_vmap_and_scan(backend: str):
    sizes = {"num_layers": None, "in_features": 64, "out_features": 128, "order": ORDER_OF[backend]}
    case = dataclasses.replace(TESTS["int4-minimums"], **sizes)
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


WIDE: dict[str, Any] = {"in_features": 2048, "out_features": 5 * 256 + 44, "dtype": "float32"}
"""Five blocks of channels for a CPU, and a rest."""


@pytest.mark.parametrize(
    ("scheme", "num_layers", "rows"),
    [("int8", None, 2), ("int8-g32", 2, 7), ("int4-g32-minimums", 2, 3), ("float8_e4m3fn", 2, 5), ("mxfp4", None, 40)],
)
def test_the_reference_widens_a_wide_weight_by_blocks(scheme: str, num_layers: int | None, rows: int):
    case = Case(name="wide", rows=rows, scheme=scheme, num_layers=num_layers, bias=True, **WIDE)
    assert reference_forms.cpu.block_channels(2048, WIDE["out_features"]) == 256
    inputs = cases.make_inputs(case)
    call = jax.jit(lambda given: quantized_matmul(given.x, given.w, bias=given.bias, layer=given.layer, backend="xla"))
    exact = judge(case, inputs)
    # A product in float32 of all of the weight, widened: what a block is must not be off by more.
    w = inputs.w if inputs.layer is None else jax.tree.map(lambda part: part[int(inputs.layer)], inputs.w)
    whole = inputs.x @ dequantize(w) + inputs.bias
    assert_right(call(inputs), whole, exact, scheme)
    temporary = call.lower(case.shapes()).compile().memory_analysis().temp_size_in_bytes
    viewed = inputs.w.values.size if scheme.startswith("float8") else 0  # float8 arguments are copied as bits
    assert temporary < 1.5 * reference_forms.cpu.BLOCK_BYTES + viewed


@pytest.mark.parametrize(("num_layers", "rows"), [(None, 2), (3, 6)])
def test_the_reference_widens_a_wide_dense_weight_by_blocks(num_layers: int | None, rows: int):
    key_x, key_w = jax.random.split(jax.random.key(0))
    shape = (2048, WIDE["out_features"])
    x = jax.random.normal(key_x, (rows, 2048))
    w = jax.random.normal(key_w, shape if num_layers is None else (num_layers, *shape), jnp.bfloat16)
    layer = None if num_layers is None else jnp.int32(1)
    one = (w if layer is None else w[1]).astype(jnp.float32)
    result = jax.jit(reference_forms.matmul)(x, w, layer=layer)
    assert_right(result, x @ one, np.asarray(x, np.float64) @ np.asarray(one, np.float64))


def test_a_layer_that_triton_cannot_reach_is_copied(monkeypatch: pytest.MonkeyPatch):
    inputs, reference, exact = expected("int4-minimums")
    case = dataclasses.replace(TESTS["int4-minimums"], name="copied")  # compiled anew
    monkeypatch.setattr(triton, "offsets_wrap", lambda codes: codes == inputs.w.values.size)
    assert_right(multiply(case, inputs, "triton"), reference, exact)


def test_matrices_that_triton_cannot_reach_are_refused():
    case = Case(name="large", rows=1, in_features=2**16, out_features=2**15 + 128, scheme="int8", order="out_in")
    assert triton.unsupported(case.problem()) == (
        "codes of a matrix must take up to 2 GiB, or more than 4, got 2155872256 bytes"
    )
    assert triton.unsupported(dataclasses.replace(case, out_features=2**15).problem()) is None


def test_backends_are_chosen_and_reported():
    inputs = cases.make_inputs(TESTS["float16"])
    with record_choices() as choices:
        quantized_matmul(inputs.x, inputs.w)
        quantized_matmul(inputs.x, inputs.w, backend="pallas")
    assert [choice.backend for choice in choices] == ["xla", "mosaic_tpu"]
    assert "runs on tpu, not on cpu" in choices[0].reasons["mosaic_tpu"]
    assert choices[1].interpret
    deep = Case(name="deep", rows=8, in_features=2**18, out_features=256, scheme="int8", dtype="float32").shapes()
    with pytest.raises(Unsupported, match=r"mosaic_tpu: blocks must fit into 12 MiB.*backend='xla' covers it"):
        jax.eval_shape(functools.partial(quantized_matmul, backend="mosaic_tpu", interpret=True), deep.x, deep.w)


def broken(**changes: Any) -> dict[str, Any]:
    inputs = cases.make_inputs(TESTS["int4-group"])
    return {"x": inputs.x, "w": inputs.w, "bias": inputs.bias} | changes


def replaced(**changes: Any) -> QuantizedArray:
    return dataclasses.replace(cases.make_inputs(TESTS["int4-group"]).w, **changes)


OUT_IN = quantize(jnp.ones((384, 512)), "int4-g32", order="out_in")
SCALING = mosaic_tpu.Config(8, 128, 384, 128, "words", scales_weights=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": "text"}, "x: got str; accepted: an array"),
        ({"x": jnp.ones((3, 100))}, r"x: got shape \(3, 100\); accepted: \[\.\.\., in\] with in = 384, that of w"),
        ({"x": jnp.ones((3, 384), jnp.int32)}, "x: got int32; accepted: float32, bfloat16, float16"),
        ({"x": jnp.float32(1)}, r"x: got shape \(\); accepted: \[\.\.\., in\]"),
        ({"w": jnp.ones((384, 512))}, "w: got .*; accepted: a QuantizedArray; palladion.quantize makes one"),
        (
            {"w": quantize(jnp.ones((2, 384, 512)), "int4-g32")},
            r"w: got shape \(2, 384, 512\); .* say which by layer=, or",
        ),
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
        (
            {"backend": "mosaic_tpu", "interpret": True, "config": SCALING},
            "config.scales_weights: got True; accepted: False for int4-g32 by words to float32",
        ),
        (
            {"w": OUT_IN, "backend": "triton", "interpret": True, "config": 7},
            "config: got 7; accepted: triton.Config or None",
        ),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        quantized_matmul(**broken(**arguments))


def test_gated_needs_an_even_number_of_channels():
    w = quantize(jnp.ones((32, 7)), "int8")
    with pytest.raises(ValueError, match="gated: got 7 channels; accepted: an even number"):
        quantized_matmul(jnp.ones((1, 32)), w, gated=True)


TENSOR_CORE: dict[str, Any] = {"form": "tensor_core", "block_rows": 16, "block_out": 64, "tile": 32, "splits": 1}
SOUND: dict[str, Any] = {"block_rows": 8, "block_out": 128, "block_in": 64, "chunk": 32, "dequantizer": "words"}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (mosaic_tpu.Config, SOUND | {"block_rows": 4}, "config.block_rows: got 4; .* of 8"),
        (mosaic_tpu.Config, SOUND | {"block_out": 100}, "config.block_out: got 100; .* of 128"),
        (mosaic_tpu.Config, SOUND | {"chunk": 48}, "config.block_in: got 64; accepted: a multiple of chunk, 48"),
        (triton.Config, TENSOR_CORE | {"block_rows": 8}, "config.block_rows: got 8"),
        (triton.Config, TENSOR_CORE | {"block_out": 48}, "a power of two of at least 16"),
        (triton.Config, TENSOR_CORE | {"tile": 16}, "config.tile: got 16"),
        (
            triton.Config,
            TENSOR_CORE | {"form": "matrix"},
            "config.form: got matrix; accepted: 'few_rows' or 'tensor_core'",
        ),
    ],
)
def test_wrong_configs(config: Any, arguments: dict[str, Any], message: str):
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


def test_every_byte_of_e8m0_is_a_power_of_two():
    """OCP Microscaling Formats 1.0, 5.4.1: 2^(byte - 127), and NaN for 255. Bits are compared: flushing hides zeros."""
    found = np.asarray(jax.lax.bitcast_convert_type(decode_e8m0(jnp.arange(256)), jnp.uint32))
    exact = np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32)
    assert exact[0] == 2.0**-127
    np.testing.assert_array_equal(found, exact.view(np.uint32))


def test_three_bfloat16_pieces_are_a_float32():
    x = jax.random.normal(jax.random.key(0), (1000,)) * 10.0 ** jnp.linspace(-20, 20, 1000)
    pieces = [
        np.asarray(piece.astype(jnp.bfloat16), np.float64) for piece in jax.jit(lambda x: [*bfloat16_pieces(x, 3)])(x)
    ]
    np.testing.assert_array_equal(sum(pieces), np.asarray(x, np.float64))
    assert (np.abs(np.asarray(x, np.float64) - pieces[0] - pieces[1]) <= 2.0**-15 * np.abs(x)).all()


def test_every_float16_is_decoded():
    bits = np.arange(2**16, dtype=np.uint16)
    found = np.asarray(decode_float16(jnp.asarray(bits.view(np.int16))))
    np.testing.assert_array_equal(found, bits.view(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("backend", "form"), [("xla", None), ("mosaic_tpu", None), ("triton", "few_rows"), ("triton", "tensor_core")]
)
@pytest.mark.parametrize(("x", "first"), [(2.0**60, 0), (1.0, 100)])
def test_every_scale_of_mxfp4_is_the_same_on_all_backends(backend: str, form: Any, x: float, first: int):
    """A channel of one group for each byte; a weight of 1 shows its scale times x, and no product underflows."""
    scales = np.arange(256, dtype=np.uint8)
    ones = np.zeros((16, 256), np.uint8)
    ones[0] = 2  # e2m1 of 1, in the low nibble of row 0
    factors = jax.lax.bitcast_convert_type(jnp.asarray(scales)[None], jnp.float8_e8m0fnu)
    w = QuantizedArray(jnp.asarray(ones), factors, None, None, Scheme.parse("mxfp4")).with_order(ORDER_OF[backend])
    config = None if form is None else triton.Config(form, block_out=16, tile=64, num_warps=1)
    options = {"backend": backend, "config": config, "interpret": None if backend == "xla" else True}
    row = jnp.zeros((1, 32)).at[0, 0].set(x)
    result = np.asarray(jax.jit(functools.partial(quantized_matmul, **options))(row, w), np.float64)[0]
    exact = np.append(x * 2.0 ** (np.arange(255) - 127.0), np.nan)
    flushed = (scales == 0) & (result == 0)  # 2^-127 is subnormal
    last = 127 + 127 - int(np.log2(x))  # beyond float32
    tested = slice(first, min(last, 255) + 1)
    np.testing.assert_array_equal(result[tested], np.where(flushed, 0, exact)[tested])
    assert np.isnan(result[255])
