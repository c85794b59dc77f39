"""Tests how the GPU kernel of quantized_matmul multiplies: rows of x as bytes, and inline PTX."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import options_for

from palladion import quantized_matmul
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.kernels import gpu_rows
from palladion.kernels.gpu_ptx import Program
from palladion.kernels.quantized_matmul import cases
from palladion.kernels.quantized_matmul.cases import Case
from palladion.kernels.quantized_matmul.triton import bytewise as gpu_bytes
from palladion.kernels.quantized_matmul.triton import call as triton
from palladion.kernels.quantized_matmul.triton import codes as gpu_codes
from palladion.kernels.quantized_matmul.triton import vector as gpu_vector
from palladion.reference import oracle
from palladion.reference.compare import assert_right
from palladion.reference.quantization import Scheme, decode_e2m1

quickly = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)

WORDS = arrays.arrays(np.int32, 16, elements=st.integers(-(2**31), 2**31 - 1))


@quickly
@hypothesis.given(low=WORDS, high=WORDS, places=st.tuples(*[st.integers(0, 15)] * 4))
def test_a_permutation_picks_four_of_eight_bytes(low: np.ndarray, high: np.ndarray, places: tuple[int, ...]):
    """The PTX manual's `prmt`: bytes of the first word are 0 to 3, of the second 4 to 7, all of their signs 8 to 15."""
    selector = sum(place << (4 * to) for to, place in enumerate(places))
    program = Program((f"prmt.b32 found, first, second, {selector:#06x}",), ("first", "second"))
    found = program.run(jnp.asarray(low), jnp.asarray(high), native=False)
    eight = np.concatenate([low[:, None].view(np.int8), high[:, None].view(np.int8)], axis=1)
    sixteen = np.concatenate([eight, eight >> 7], axis=1)
    np.testing.assert_array_equal(np.asarray(found)[:, None].view(np.int8), sixteen[:, list(places)])


@quickly
@hypothesis.given(low=WORDS, high=WORDS, selector=WORDS)
def test_a_selector_in_a_register_may_ask_for_signs(low: np.ndarray, high: np.ndarray, selector: np.ndarray):
    program = Program(("prmt.b32 found, first, second, selector",), ("first", "second", "selector"))
    found = program.run(*map(jnp.asarray, (low, high, selector)), native=False)
    eight = np.concatenate([low[:, None].view(np.int8), high[:, None].view(np.int8)], axis=1)
    digits = (selector[:, None] >> np.array([0, 4, 8, 12])) & 15
    picked = np.take_along_axis(eight, digits & 7, axis=1)
    picked = np.where(digits >= 8, picked >> 7, picked)
    np.testing.assert_array_equal(np.asarray(found)[:, None].view(np.int8), picked)


@quickly
@hypothesis.given(first=WORDS, second=WORDS, total=WORDS, signed=st.tuples(st.booleans(), st.booleans()))
def test_a_dot_product_of_bytes(first: np.ndarray, second: np.ndarray, total: np.ndarray, signed: tuple[bool, bool]):
    """The PTX manual's `dp4a`, which wraps around."""
    name = ".".join(["dp4a", *("s32" if has_sign else "u32" for has_sign in signed)])
    program = Program((f"{name} found, first, second, total",), ("first", "second", "total"))
    found = program.run(*map(jnp.asarray, (first, second, total)), native=False)
    kinds = [np.int8 if has_sign else np.uint8 for has_sign in signed]
    pairs = [word[:, None].view(kind).astype(np.int64) for word, kind in zip((first, second), kinds, strict=True)]
    exact = total.astype(np.int64) + (pairs[0] * pairs[1]).sum(axis=1)
    np.testing.assert_array_equal(found, exact.astype(np.int32))


def test_numbers_are_rounded_to_even():
    program = Program(("cvt.rni.s32.f32 found, x",), ("x",))
    numbers = jnp.asarray([0.5, 1.5, -0.5, -2.5, 2.4999, 8388607.0, -8388608.0], jnp.float32)
    np.testing.assert_array_equal(program.run(numbers, native=False), [0, 2, 0, -2, 2, 8388607, -8388608])


def test_a_program_is_inline_assembly_on_a_gpu():
    """Whose result is written last: it may have the register of an input."""
    program = Program(("prmt.b32 half, w0, w1, 0x5410", "dp4a.s32.u32 sum, half, x, 0x01010101"), ("w0", "w1", "x"))
    words = [jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    (equation,) = jax.make_jaxpr(functools.partial(program.run, native=True))(*words).eqns
    assert equation.params["constraints"] == "=r,r,r,f"
    assert equation.params["asm"] == (
        "{ .reg .b32 half, sum; prmt.b32 half, $1, $2, 0x5410; "
        "dp4a.s32.u32 sum, half, $3, 0x01010101; mov.b32 $0, sum; }"
    )


def numbers_of(row: gpu_bytes.Row) -> np.ndarray:
    """Returns the numbers that the bytes of a row stand for, float64 `[in, lanes]`."""
    places = [
        np.stack([np.asarray(word).reshape(-1, 1).view(np.int8 if signed else np.uint8) for word in words])
        for words, signed in zip(row.words, gpu_bytes.SIGNED, strict=True)
    ]  # [quads, lanes, 4] each
    integers = sum(place.astype(np.int64) << (8 * n) for n, place in enumerate(places))
    unit = np.asarray(row.unit, np.float64).reshape(-1)
    return (integers * unit[:, None]).transpose(0, 2, 1).reshape(-1, len(unit))


def row_of(numbers: np.ndarray) -> gpu_bytes.Row:
    return gpu_bytes.row([jnp.asarray(number)[:, None] for number in numbers], native=False)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@quickly
@hypothesis.given(
    numbers=arrays.arrays(np.float32, (16, 4), elements=FLOATS),
    near=arrays.arrays(np.float32, (16, 4), elements=st.floats(-8, 8, width=32, allow_subnormal=False)),
    shrunk=st.sampled_from([0, 0, 0, 1]),
)
def test_bytes_stand_for_the_numbers(numbers: np.ndarray, near: np.ndarray, shrunk: int):
    """Half a unit off at most, whatever the magnitudes; half of the lanes have numbers of one magnitude."""
    numbers = np.concatenate([numbers, near * np.float32(2.0 ** (-120 * shrunk))], axis=1)
    row = row_of(numbers)
    unit = np.asarray(row.unit, np.float64)[:, 0]
    largest = np.abs(numbers).max(axis=0).astype(np.float64)
    assert (unit <= np.maximum(2.0**-22 * largest * (1 + 2.0**-23), 2.0**-125)).all()
    stood_for = numbers_of(row)
    # XLA on a CPU takes subnormal numbers for zeros.
    flushed = np.where(np.abs(numbers) < np.finfo(np.float32).tiny, 0, numbers).astype(np.float64)
    assert (np.abs(stood_for - flushed) <= unit / 2).all()
    total = np.asarray(row.total, np.float64)[:, 0]
    exact = stood_for.sum(axis=0)
    assert (np.abs(total - exact) <= 2.0**-22 * np.abs(stood_for).sum(axis=0)).all()


@pytest.mark.parametrize(
    ("largest", "stands_for"),
    [(np.nextafter(np.float32(2), np.float32(0)), 2.0), (np.finfo(np.float32).max, 2.0**128), (0.0, 0.0), (1e-45, 0.0)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_last_number_below_a_power_of_two_has_a_byte_to_spare(largest: float, stands_for: float, sign: int):
    numbers = np.zeros((8, 1), np.float32)
    numbers[3] = sign * largest
    found = numbers_of(row_of(numbers))
    assert found[3] == sign * stands_for
    assert (np.delete(found, 3, axis=0) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.uint32(0x7FFFFFFF).view(np.float32)])
def test_a_bad_number_makes_a_chunk_nan_and_no_other(bad: float):
    numbers = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    numbers[5, 1] = bad
    np.testing.assert_array_equal(np.isnan(row_of(numbers).unit[:, 0]), [False, True, False])


@hypothesis.settings(quickly, max_examples=25)
@hypothesis.given(
    format=st.sampled_from(["int8", "int4", "int4-g32-zeros", "mxfp4"]),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 3.0]),
    extreme=st.booleans(),
)
def test_products_of_bytes_are_those_of_the_numbers(format: str, seed: int, spread: float, extreme: bool):
    """Sums are exact: what is rounded is putting the three of them together, once."""
    generator = np.random.default_rng(seed)
    scheme, threads, rows = Scheme.parse(format), 2, 8
    codes = generator.integers(0, 256, (rows, threads * gpu_rows.LOAD_BYTES)).astype(np.uint8)
    shape = (rows * (1 + scheme.packed), 1)
    numbers = generator.standard_normal(shape) * np.exp(spread * generator.standard_normal(shape))
    if extreme:  # sums as large as they can be
        codes[:], numbers[:] = 0xFF if scheme.packed else 0x80, 2 - 2.0**-22
    lanes = np.broadcast_to(numbers.astype(np.float32), (len(numbers), threads))
    multiply = gpu_bytes.Bytes(scheme, lambda constant: jnp.int32(constant), native=False)
    words = [gpu_codes.channel_words(jnp.asarray(codes[row : row + 1])) for row in range(rows)]
    row = multiply.row([jnp.asarray(number)[None, :] for number in lanes])
    halves = multiply.weights(words)
    found = np.asarray(multiply.product([quad for half in halves for quad in half], row), np.float64)[0]
    stood_for = numbers_of(row)[:, 0]
    if scheme.format == "mxfp4":  # codes of a byte side by side
        stood_for = np.concatenate([stood_for[0::2], stood_for[1::2]])
    weights = np.concatenate([codes & 15, codes >> 4]) if scheme.packed else codes.view(np.int8)
    weights = np.asarray(decode_e2m1(weights) if scheme.format == "mxfp4" else weights).astype(np.float64)
    exact = stood_for @ (weights - scheme.implied_zero)
    magnitude = np.abs(stood_for) @ (np.abs(weights) + multiply.zero)
    assert (np.abs(found * multiply.times - exact) <= 2.0**-21 * magnitude + 2.0**-22 * np.abs(exact)).all()


SMALL: dict[str, Any] = {"name": "bytes", "in_features": 192, "out_features": 144, "out_dtype": "float32"}
KERNELS = {
    "int8-norm-gated": (Case(rows=2, scheme="int8", norm=True, gated=True, activation=jax.nn.silu, **SMALL), 1),
    "int8-zeros": (Case(rows=3, scheme="int8-g32-zeros", bias=True, **SMALL), 2),
    "int4": (Case(rows=1, scheme="int4-g32", norm=True, **SMALL), 2),
    "int4-float16": (Case(rows=2, scheme="int4", dtype="float16", **SMALL), 1),
    "int4-zeros": (Case(rows=1, scheme="int4-g64-zeros", gated=True, norm=True, **SMALL), 1),
    "int4-minimums": (Case(rows=2, scheme="int4-g32-minimums", residual=True, **SMALL), 1),
    "mxfp4": (Case(rows=1, scheme="mxfp4", norm=True, **SMALL), 1),
    "int4-stacked": (Case(rows=1, scheme="int4-g96", num_layers=2, **SMALL), 1),
}
"""Cases and splits. Results are float32, which would show what bytes lose."""


@functools.cache
def compiled(case: Case, backend: str, **options: Any) -> Any:
    call = functools.partial(quantized_matmul, **case.options, backend=backend, **options)
    return jax.jit(lambda inputs: call(**inputs._asdict()), compiler_options=options_for(backend))


@pytest.mark.parametrize("name", KERNELS)
def test_rows_that_are_bytes_lose_nothing(name: str):
    case, splits = KERNELS[name]
    config = triton.Config("vector", case.rows, 64, 32, splits, num_warps=1)
    assert gpu_vector.in_bytes(case.problem(), config.num_warps)
    inputs = cases.make_inputs(case)
    result = compiled(case, "triton", config=config, interpret=True)(inputs)
    w = inputs.w if case.num_layers is None else jax.tree.map(lambda part: part[-1], inputs.w)
    exact = oracle.quantized_matmul(
        inputs.x,
        w,
        bias=inputs.bias,
        norm=inputs.norm,
        residual=inputs.residual,
        activation=None if case.activation is None else lambda y: y / (1 + np.exp(-y)),
        gated=case.gated,
    )
    assert_right(result, compiled(case, "xla")(inputs), exact, name)


@pytest.mark.parametrize(
    ("scheme", "rows", "arch", "forms"),
    [
        # Of qkv, output, gate-up and down.
        ("int8", 1, 90, "vector vector vector vector"),
        ("int8", 3, 80, "vector vector vector vector"),
        ("int8", 3, 90, "vector vector vector vector"),
        ("int8", 4, 90, "tensor_core tensor_core tensor_core tensor_core"),
        ("int4-g128", 1, 90, "vector vector vector vector"),
        ("int4-g128", 2, 90, "vector vector tensor_core tensor_core"),  # as many instructions as both others take
        ("int4-g128", 2, 100, "vector vector vector vector"),
        ("int4-g128", 3, 90, "tensor_core tensor_core tensor_core tensor_core"),
        ("float8_e4m3fn", 2, 90, "vector vector vector vector"),
        ("mxfp4", 2, 90, "tensor_core tensor_core tensor_core tensor_core"),
    ],
)
def test_few_rows_take_the_form_that_is_quicker(scheme: str, rows: int, arch: int, forms: str):
    """The layers of Llama 3 8B, with norm and residual: one more launch costs as much as many instructions."""
    layers: list[dict[str, Any]] = [
        {"in_features": 4096, "out_features": 6144, "norm": True},
        {"in_features": 4096, "out_features": 4096, "residual": True},
        {"in_features": 4096, "out_features": 28672, "norm": True, "gated": True, "activation": jax.nn.silu},
        {"in_features": 14336, "out_features": 4096, "residual": True},
    ]
    problems = [Case(name="layer", rows=rows, scheme=scheme, **layer).problem() for layer in layers]
    with gpu_compiler.tracing_for(arch):
        configs = [triton.heuristic(problem) for problem in problems]
    assert [config.form for config in configs] == forms.split()
    assert all(config.splits == 1 for config in configs if config.form == "vector")
