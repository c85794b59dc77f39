"""Products of one to four rows on a GPU: byte instructions, the two ways to multiply codes, and the whole kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICKLY, options_for
from product_oracle import judge

from palladion import quantized_matmul
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.kernels import gpu_rows
from palladion.kernels.gpu_ptx import Ptx
from palladion.kernels.gpu_rows import columns
from palladion.kernels.quantized_matmul import cases
from palladion.kernels.quantized_matmul.cases import Case
from palladion.kernels.quantized_matmul.triton import byte_products, few_rows
from palladion.kernels.quantized_matmul.triton import call as triton
from palladion.reference.compare import assert_right
from palladion.reference.e2m1 import decode_e2m1
from palladion.reference.scheme import CODE_DTYPE, Scheme

quickly = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)

WORDS = arrays.arrays(np.int32, 16, elements=st.integers(-(2**31), 2**31 - 1))
PTX = Ptx(native=False)
LAYER = jnp.int32(0)


def eight_bytes(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.concatenate([low[:, None].view(np.int8), high[:, None].view(np.int8)], axis=1)


@quickly
@hypothesis.given(low=WORDS, high=WORDS, places=st.tuples(*[st.integers(0, 15)] * 4), constant=st.booleans())
def test_a_permutation_picks_four_of_eight_bytes(
    low: np.ndarray, high: np.ndarray, places: tuple[int, ...], constant: bool
):
    """The PTX manual's `prmt`: bytes of the first word are 0 to 3, of the second 4 to 7, all of their signs 8 to 15."""
    high = np.full_like(high, high[0]) if constant else high
    second = int(high[0].view(np.uint32)) if constant else jnp.asarray(high)
    found = PTX.prmt(jnp.asarray(low), second, sum(place << (4 * to) for to, place in enumerate(places)))
    eight = eight_bytes(low, high)
    sixteen = np.concatenate([eight, eight >> 7], axis=1)
    np.testing.assert_array_equal(np.asarray(found)[:, None].view(np.int8), sixteen[:, list(places)])


@quickly
@hypothesis.given(low=WORDS, high=WORDS, selector=WORDS)
def test_a_selector_in_a_register_may_ask_for_signs(low: np.ndarray, high: np.ndarray, selector: np.ndarray):
    found = PTX.prmt(*map(jnp.asarray, (low, high, selector)))
    digits = (selector[:, None] >> np.array([0, 4, 8, 12])) & 15
    picked = np.take_along_axis(eight_bytes(low, high), digits & 7, axis=1)
    picked = np.where(digits >= 8, picked >> 7, picked)
    np.testing.assert_array_equal(np.asarray(found)[:, None].view(np.int8), picked)


@quickly
@hypothesis.given(first=WORDS, second=WORDS, total=WORDS, signed=st.tuples(st.booleans(), st.booleans()))
def test_a_dot_product_of_bytes(first: np.ndarray, second: np.ndarray, total: np.ndarray, signed: tuple[bool, bool]):
    """The PTX manual's `dp4a`, which wraps around."""
    found = PTX.dp4a(*map(jnp.asarray, (first, second, total)), signed=signed)
    kinds = [np.int8 if has_sign else np.uint8 for has_sign in signed]
    pairs = [word[:, None].view(kind).astype(np.int64) for word, kind in zip((first, second), kinds, strict=True)]
    exact = total.astype(np.int64) + (pairs[0] * pairs[1]).sum(axis=1)
    np.testing.assert_array_equal(found, exact.astype(np.int32))


def test_instructions_are_inline_assembly_on_a_gpu():
    words = [jax.ShapeDtypeStruct((4,), jnp.int32)] * 2

    def function(low: jax.Array, high: jax.Array) -> jax.Array:
        native = Ptx(native=True)
        return native.dp4a(native.prmt(low, 0x43000000, 0x7604), high, 0, signed=(True, False))

    prmt, dp4a = jax.make_jaxpr(function)(*words).eqns
    assert (prmt.params["asm"], prmt.params["constraints"]) == ("prmt.b32 $0, $1, 0x43000000, 0x7604;", "=r,r")
    assert (dp4a.params["asm"], dp4a.params["constraints"]) == ("dp4a.s32.u32 $0, $1, $2, 0x0;", "=r,r,r")


def test_columns_and_their_sums():
    x = jnp.arange(64.0)
    np.testing.assert_array_equal(np.stack(columns(x, 8), axis=1), x.reshape(8, 8))
    np.testing.assert_array_equal(byte_products.of_threads(x), np.asarray(x).reshape(-1, 4).sum(axis=1))


def quads_of(numbers: np.ndarray) -> list[list[jax.Array]]:
    """Returns numbers `[threads, n]` in the order of `Operand`: four arrays `[threads * 4]` for each 16."""
    return [columns(jnp.asarray(numbers[:, start : start + 16]).ravel(), 4) for start in range(0, numbers.shape[1], 16)]


def stands_for(x: byte_products.Operand) -> np.ndarray:
    """Returns the numbers that the bytes of an operand stand for, float64 `[threads, n]`."""
    low, high = (np.stack([np.asarray(word) for word in piece], axis=1) for piece in x.numbers)
    integers = low.view(np.uint8).astype(np.int64) + 256 * high.view(np.int8).astype(np.int64)
    assert x.unit is not None
    return integers.reshape(len(low), -1) * np.asarray(x.unit, np.float64)[:, None]


BYTES = byte_products.Bytes(Scheme("int8"), PTX)
NUMBERS = st.floats(-65504, 65504, width=16)


@quickly
@hypothesis.given(
    numbers=arrays.arrays(np.float16, (4, 32), elements=NUMBERS),
    near=arrays.arrays(np.float16, (4, 32), elements=st.floats(-8, 8, width=16)),
    shrink=st.sampled_from([0, 0, 0, 60]),
)
def test_bytes_stand_for_the_numbers(numbers: np.ndarray, near: np.ndarray, shrink: int):
    """Numbers of 16 bits are off by half a unit at most, 2^-15 of the largest, whatever their magnitude."""
    both = np.concatenate([numbers, near]).astype(np.float32) * np.float32(2.0**-shrink)
    x = BYTES.operand(quads_of(both))
    unit, largest = np.asarray(x.unit, np.float64), np.abs(both).max(axis=1).astype(np.float64)
    assert (unit <= np.maximum(2.0**-14 * largest, 2.0**-126)).all()
    assert (np.abs(stands_for(x) - both) <= unit[:, None] / 2).all()
    exact = both.astype(np.float64)
    assert (np.abs(np.asarray(x.total) - exact.sum(axis=1)) <= 2.0**-20 * np.abs(exact).sum(axis=1)).all()


@pytest.mark.parametrize("largest", [65504.0, float(jnp.finfo(jnp.bfloat16).max), 2 - 2.0**-10, 0.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_have_a_byte_to_spare(largest: float, sign: int):
    numbers = np.zeros((1, 16), np.float32)
    numbers[0, 3] = sign * largest
    np.testing.assert_array_equal(stands_for(BYTES.operand(quads_of(numbers))), numbers)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.uint32(0x7FFFFFFF).view(np.float32)])
def test_a_bad_number_makes_a_segment_nan_and_no_other(bad: float):
    numbers = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    numbers[1, 5] = bad
    np.testing.assert_array_equal(np.isnan(BYTES.operand(quads_of(numbers)).unit), [False, True, False])


FORMATS = ("int8", "int4", "mxfp4", "float8_e4m3fn", "float8_e5m2")


def stored_bytes(threads: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (threads, gpu_rows.LOAD_BYTES)).astype(np.uint8)


def weights_of(stored: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Returns what stored bytes `[threads, 16]` stand for in the order of `in`, float64 `[threads, 16 or 32]`."""
    if not scheme.packed:
        return stored.view(np.dtype(CODE_DTYPE[scheme.format])).astype(np.float64)
    codes = np.concatenate([stored & 15, stored >> 4], axis=1)
    return (
        np.asarray(decode_e2m1(codes) if scheme.format == "mxfp4" else codes).astype(np.float64) - scheme.implied_zero
    )


def product(stored: np.ndarray, numbers: np.ndarray, format: str, multiply: str, exact: bool = True) -> jax.Array:
    """Returns the sums of a thread's products, as the kernel computes them in a trip."""
    scheme = Scheme(format)
    problem = Case(name="", rows=1, in_features=numbers.size, out_features=1, scheme=format).problem()
    multiplies = byte_products.Bytes(scheme, PTX) if multiply == "bytes" else byte_products.Floats(scheme, PTX, exact)
    codes = few_rows.Codes(None, problem, multiplies, PTX)  # type: ignore[arg-type]  # nothing is loaded
    runs = [jnp.asarray(numbers[:, start : start + 16].ravel()) for start in range(0, codes.per_thread, 16)]
    factors = few_rows.Factors(None, None, None)
    codes = dataclasses.replace(codes, ref=few_rows.Refs(LAYER[None], None, None, None))
    return codes.products((jnp.asarray(stored.ravel().view(np.int8)), [factors]), [codes.operand(runs)])[0]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_every_code_becomes_its_number(format: str, exact: bool):
    """Numbers of x are 1 at one place of a thread's weights, and 0 at the others."""
    scheme = Scheme(format)
    stored = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16).T, (32 if scheme.packed else 16, 1))
    per_thread = 32 if scheme.packed else 16
    numbers = np.repeat(np.eye(per_thread, dtype=np.float32), 16, axis=0)
    found = np.asarray(product(stored, numbers, format, "float", exact))
    weights = weights_of(stored, scheme)
    finite = np.isfinite(weights).all(axis=1)
    np.testing.assert_array_equal(found[finite], (weights[finite] * numbers[finite]).sum(axis=1))


@hypothesis.settings(quickly, max_examples=25)
@hypothesis.given(
    format=st.sampled_from(["int8", "int4", "mxfp4"]),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 3.0]),
    extreme=st.booleans(),
)
def test_products_of_bytes_are_those_of_the_numbers(format: str, seed: int, spread: float, extreme: bool):
    """Sums of products are exact: what is rounded is x, and then each of the two sums and what they make."""
    generator = np.random.default_rng(seed)
    scheme, threads = Scheme(format), 8
    stored, shape = stored_bytes(threads, seed), (threads, 32 if scheme.packed else 16)
    numbers = generator.standard_normal(shape) * np.exp(spread * generator.standard_normal(shape))
    if extreme:  # sums as large as they can be
        stored[:], numbers[:] = 0xFF if scheme.packed else 0x80, 2 - 2.0**-7
    numbers = numbers.astype(jnp.bfloat16).astype(np.float32)
    weights = weights_of(stored, scheme)
    found = np.asarray(product(stored, numbers, format, "bytes"), np.float64)
    exact = (weights * numbers).sum(axis=1)
    largest = np.abs(numbers).max(axis=1)
    zero = byte_products.byte_of_zero(scheme)
    bound = 2.0**-15 * largest * np.abs(weights).sum(axis=1) + 2.0**-20 * (
        (np.abs(weights) + zero) * np.abs(numbers)
    ).sum(1)
    assert (np.abs(found - exact) <= bound).all()


@functools.cache
def compiled(case: Case, backend: str, **options: Any) -> Any:
    call = functools.partial(quantized_matmul, **case.options, backend=backend, **options)
    return jax.jit(lambda inputs: call(**inputs._asdict()), compiler_options=options_for(backend))


def assert_kernel_right(case: Case, config: triton.Config) -> None:
    case = dataclasses.replace(case, order="out_in")
    inputs = cases.make_inputs(case)
    result = compiled(case, "triton", config=config, interpret=True)(inputs)
    assert_right(result, compiled(case, "xla")(inputs), judge(case, inputs), f"{case.name} {config}")


SILU: dict[str, Any] = {"gated": True, "activation": jax.nn.silu}
SMALL: dict[str, Any] = {"in_features": 192, "out_features": 6, "rows": 1}
KERNELS = {
    "int8": {"rows": 4, "bias": True, "residual": True},
    "int8-g32": {"dtype": "float16", "num_layers": 3},
    "int8-g64-zeros": {"rows": 3, "norm": True},
    "int8-minimums": {"rows": 2, **SILU, "bias": True},
    "int4": {"rows": 2, "norm": True, **SILU, "residual": True},
    "int4-g16": {"dtype": "float16", "activation": jax.nn.gelu},
    "int4-g32": {"rows": 4, "num_layers": 2, "residual": True},
    "int4-g48-zeros": {"rows": 2, "bias": True},
    "int4-g96": {"scale_dtype": "bfloat16"},
    "int4-g64-minimums": {"scale_dtype": "float16"},
    "int4-zeros": {},
    "mxfp4": {"rows": 2, **SILU},
    "float8_e4m3fn": {"rows": 2, "norm": True},
    "float8_e5m2-g32": {"dtype": "float16"},
}
"""Schemes, and what else the call does; options are spread over schemes."""


WAYS = [(scheme, way) for scheme in KERNELS for way in ("float", "bytes")]
WAYS = [way for way in WAYS if way[1] == "float" or not way[0].startswith("float8")]  # whose codes are no integers


@pytest.mark.parametrize(("scheme", "multiply"), WAYS)
def test_every_scheme(scheme: str, multiply: Any):
    """Blocks and steps divide neither channels nor `in`."""
    case = Case(name="every-scheme", scheme=scheme, **SMALL | KERNELS[scheme])
    assert_kernel_right(case, triton.Config("few_rows", 2, 1, multiply))


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "int8", "dtype": "float32", "rows": 3},
        {"scheme": "int4-g32", "dtype": "float32"},
        {"scheme": "int4-g32-minimums", "out_dtype": "float32"},
        {"scheme": "int8-g32-zeros", "out_dtype": "float32", "residual": True},
        {"scheme": "mxfp4", "out_dtype": "float32"},
        {"scheme": "float8_e4m3fn", "dtype": "float32"},
        {"scheme": "float8_e4m3fn", "quantize_x": "float8_e4m3fn", "rows": 2},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_wide_numbers_lose_nothing(changes: dict[str, Any]):
    assert_kernel_right(Case(name="wide", **SMALL | changes), triton.Config("few_rows", 2, 1))


@pytest.mark.parametrize(
    ("in_features", "out_features", "config"),
    [
        (2048, 5, triton.Config("few_rows", 1, 4)),
        (512, 5, triton.Config("few_rows", 4, 1)),
        (1040, 3, triton.Config("few_rows", 2, 2)),
        (77, 3, triton.Config("few_rows", 2, 1)),
        (1100, 3, triton.Config("few_rows", 2, 1, ahead=True)),
        (512, 3, triton.Config("few_rows", 2, 1, ahead=True)),
        (1, 1, triton.Config("few_rows", 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("multiply", ["float", "bytes"])
def test_any_shape(in_features: int, out_features: int, config: triton.Config, multiply: Any):
    case = Case(name="shape", rows=2, in_features=in_features, out_features=out_features, scheme="int8")
    assert_kernel_right(case, dataclasses.replace(config, multiply=multiply))


@pytest.mark.parametrize(
    ("scheme", "config"),
    [
        ("int8", triton.Config("few_rows", 2, 1, normalizes=True)),
        ("int4-g32-minimums", triton.Config("few_rows", 2, 1, "bytes", ahead=True, normalizes=True)),
    ],
    ids=str,
)
def test_rows_are_normalized_on_their_way(scheme: str, config: triton.Config):
    """The last of several trips is not full."""
    case = Case(name="norm", rows=3, in_features=1120, out_features=5, scheme=scheme, norm=True, bias=True)
    assert_kernel_right(case, config)
    case = dataclasses.replace(case, order="out_in")
    launches = [
        str(compiled(case, "triton", config=one, interpret=True).trace(case.shapes()).jaxpr).count("pallas_call[")
        for one in (config, dataclasses.replace(config, normalizes=False))
    ]
    assert launches == [1, 2]


def test_a_bad_scale_stays_in_its_channel():
    case = Case(name="poison", rows=2, in_features=96, out_features=5, scheme="int4-g32", order="out_in")
    inputs = cases.make_inputs(case)
    inputs = inputs._replace(w=dataclasses.replace(inputs.w, scales=inputs.w.scales.at[2, 1].set(jnp.nan)))
    result = compiled(case, "triton", config=triton.Config("few_rows", 2, 1, "bytes"), interpret=True)(inputs)
    np.testing.assert_array_equal(np.isnan(result), [[False, False, True, False, False]] * 2)


@pytest.mark.parametrize("multiply", ["float", "bytes"])
def test_a_row_does_not_depend_on_the_others(multiply: Any):
    case = Case(name="rows", rows=3, in_features=192, out_features=4, scheme="int8-g32", order="out_in")
    inputs = cases.make_inputs(case)
    config = triton.Config("few_rows", 2, 1, multiply)
    call = functools.partial(quantized_matmul, backend="triton", config=config, interpret=True)
    together = jax.jit(call, compiler_options=QUICKLY)(inputs.x, inputs.w)
    alone = jax.jit(call, compiler_options=QUICKLY)(inputs.x[2:3], inputs.w)
    np.testing.assert_array_equal(together[2:3], alone)


def test_what_does_not_go_together():
    x, w = cases.make_inputs(Case(name="", rows=1, in_features=32, out_features=4, scheme="int8", order="out_in"))[:2]
    call = functools.partial(quantized_matmul, backend="triton", interpret=True)
    with pytest.raises(ValueError, match=r"config\.multiply: got bytes; accepted: 'float' for 1x32x4, x=float32"):
        call(x.astype(jnp.float32), w, config=triton.Config("few_rows", 1, 1, "bytes"))
    with pytest.raises(
        ValueError, match=r"config\.form: got few_rows; accepted: 'tensor_core': few_rows takes up to 4"
    ):
        call(jnp.ones((5, 32)), w, config=triton.Config("few_rows", 1, 1))
    with pytest.raises(ValueError, match=r"config\.multiply: got half; accepted: 'float' or 'bytes'"):
        triton.Config("few_rows", 1, 1, "half")  # type: ignore[arg-type]


LAYERS: list[dict[str, Any]] = [
    {"in_features": 4096, "out_features": 6144},
    {"in_features": 4096, "out_features": 4096},
    {"in_features": 4096, "out_features": 28672, **SILU},
    {"in_features": 14336, "out_features": 4096},
]
"""The layers of Llama 3 8B."""


@pytest.mark.parametrize(
    ("scheme", "rows", "form", "multiply"),
    [
        ("int8", 1, "few_rows", "float"),
        ("int8", 2, "few_rows", "float"),
        ("int8", 3, "tensor_core", "float"),
        ("int4-g128", 1, "few_rows", "bytes"),
        ("int4-g128", 2, "tensor_core", "float"),
        ("mxfp4", 1, "few_rows", "bytes"),
        ("float8_e4m3fn", 1, "few_rows", "float"),
    ],
)
def test_few_rows_keep_the_memory_busy(scheme: str, rows: int, form: str, multiply: str):
    for layer in LAYERS:
        problem = Case(name="layer", rows=rows, scheme=scheme, **layer).problem()
        with gpu_compiler.tracing_for(90):
            config, space = triton.heuristic(problem), triton.space(problem)
        assert (config.form, config.multiply) == (form, multiply)
        assert config in space
        if form == "few_rows":
            flying = problem.out_features * config.num_warps * 512 / 132
            assert flying >= 40 * 1024 or config.num_warps * 32 * few_rows.per_thread(problem) >= problem.in_features
            assert dataclasses.replace(config, form="tensor_core", multiply="float", block_out=64, num_warps=4) in space
            assert dataclasses.replace(config, splits=2) not in space, "which few rows do not use"


def test_small_layers_have_a_program_for_every_multiprocessor():
    problem = Case(name="small", rows=1, in_features=576, out_features=960, scheme="int4").problem()
    with gpu_compiler.tracing_for(90):
        config = triton.heuristic(problem)
    assert 960 / config.block_out >= 132 > 960 / (2 * config.block_out)
