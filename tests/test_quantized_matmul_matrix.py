"""Tests the tensor-core form of quantized_matmul on a GPU: conversion of codes, every scheme, blocks and splits."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiling import QUICKLY, options_for
from product_oracle import judge

from palladion import quantized_matmul
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.quantized_matmul import cases
from palladion.kernels.quantized_matmul.cases import Case
from palladion.kernels.quantized_matmul.triton import call as triton
from palladion.kernels.quantized_matmul.triton import matrix, matrix_blocks, operands
from palladion.kernels.quantized_matmul.triton.config import Config
from palladion.reference.compare import assert_right
from palladion.reference.e2m1 import decode_e2m1
from palladion.reference.scheme import CODE_DTYPE, Scheme

BITWISE = {
    "mov.b32": lambda a: a,
    "xor.b32": np.bitwise_xor,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "sub.s32": np.subtract,
}
CONVERSIONS = [
    (format, operand, half, zero)
    for format in CODE_DTYPE
    for operand in ("bfloat16", "float16", "int8")
    for half in ((0, 1) if Scheme.parse(format).packed else (0,))
    for zero in ((0, 8) if format == "int4" else (0,))
    if operand != "int8" or format == "int4"
]


def prmt(low: np.ndarray, high: np.ndarray, selector: np.uint32) -> np.ndarray:
    """The PTX manual's `prmt` without signs: bytes of the first word are 0 to 3, of the second 4 to 7."""
    table = np.concatenate([word.reshape(-1, 1).view(np.uint8) for word in np.broadcast_arrays(low, high)], axis=1)
    places = [(int(selector) >> (4 * digit)) & 7 for digit in range(4)]
    return np.ascontiguousarray(table[:, places]).view(np.uint32)[:, 0]


def fma(dtype: Any, *words: np.ndarray) -> np.ndarray:
    """The PTX manual's `fma` on two 16-bit floats, subnormal ones included, rounded once."""
    x, times, plus = (np.atleast_1d(word).astype(np.uint32)[:, None].view(dtype).astype(np.float64) for word in words)
    with np.errstate(invalid="ignore"):  # of codes that are not finite
        return np.ascontiguousarray((x * times + plus).astype(dtype)).view(np.uint32)[:, 0]


def evaluate(text: str, words: np.ndarray, results: int) -> list[np.ndarray]:
    """Executes PTX whose last register, after those of the results, is a word."""
    registers: dict[str, Any] = {f"${results}": words}
    for line in re.sub("[{}]", "", text).split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        result, *inputs = rest.split(", ")
        values = [registers[one] if one in registers else np.uint32(int(one, 0)) for one in inputs]
        if name == "prmt.b32":
            registers[result] = prmt(*values)
        elif name.startswith("fma.rn."):
            registers[result] = fma(ml_dtypes.bfloat16 if name.endswith("bf16x2") else np.float16, *values)
        else:
            registers[result] = BITWISE[name](*values)
    return [registers[f"${number}"] for number in range(results)]


@pytest.mark.parametrize(("format", "operand", "half", "zero"), CONVERSIONS)
def test_codes_become_operands(format: str, operand: str, half: int, zero: int):
    """Every code, beside others, by PTX and without: the code less its zero, exactly."""
    stored = np.stack([np.arange(256), np.roll(np.arange(256), 77), np.arange(256)[::-1], np.arange(256) ^ 85], axis=1)
    stored = np.ascontiguousarray(stored.astype(np.uint8))
    codes = (stored >> (4 * half)) & 15 if Scheme.parse(format).packed else stored.view(np.dtype(CODE_DTYPE[format]))
    exact = np.asarray(decode_e2m1(codes) if format == "mxfp4" else codes).astype(np.float64) - zero
    finite = np.isfinite(exact)
    dtype, registers = np.dtype(jnp.dtype(operand)), 1 if operand == "int8" else 2
    words = stored.view(np.uint32)[:, 0]
    found = evaluate(operands.assembly(format, operand, half, zero), words, registers)
    by_ptx = np.stack(found, axis=1).view(dtype).astype(np.float64) * operands.unit(format, operand)
    np.testing.assert_array_equal(by_ptx[finite], exact[finite])
    plain = operands.widen(jnp.asarray(stored), format, operand, half, zero, native=False)
    by_numbers = np.asarray(plain).astype(np.float64) * operands.unit(format, operand)
    np.testing.assert_array_equal(by_numbers[finite], exact[finite])


@pytest.mark.parametrize("pair", [2, 4])
@pytest.mark.parametrize("count", [16, 32, 64, 256])
def test_x_has_the_order_of_codes(count: int, pair: int):
    """A thread's bytes lie side by side in memory, and its pairs apart among the operands, where wgmma takes them."""
    order = np.asarray(matrix.reorder(jnp.arange(count)[None], pair))[0]
    begin, offset = matrix.in_order(count, pair)
    np.testing.assert_array_equal(begin + offset, order)
    threads = order.reshape(-1, matrix.QUAD, pair).transpose(1, 0, 2).reshape(matrix.QUAD, -1, matrix.run(count))
    np.testing.assert_array_equal(threads, threads[..., :1] + np.arange(matrix.run(count)))
    begin, offset = matrix.in_order(count, count)
    np.testing.assert_array_equal(begin + offset, np.arange(count))


def assert_multiplies(case: Case, config: Config) -> None:
    """Asserts that a config's result is right, with NaN in all layers but one."""
    case = dataclasses.replace(case, order="out_in")
    inputs = cases.make_inputs(case)

    def compiled(backend: str, **options: Any) -> Any:
        call = functools.partial(quantized_matmul, **case.options, backend=backend, **options)
        return jax.jit(lambda inputs: call(**inputs._asdict()), compiler_options=options_for(backend))(inputs)

    result = compiled("triton", config=config, interpret=True)
    assert_right(result, compiled("xla"), judge(case, inputs), f"{case.name} {config}")


ODD: dict[str, Any] = {"in_features": 288, "out_features": 88}
SILU: dict[str, Any] = {"gated": True, "activation": jax.nn.silu}
NARROW = Config(form="tensor_core", block_rows=16, block_out=16, tile=32, splits=1, num_warps=1)
WIDE = dataclasses.replace(NARROW, block_out=64, tile=128, num_warps=4)
SPLIT = dataclasses.replace(WIDE, splits=2)
RIGHT = {
    "int8": (Case(name="int8", rows=5, scheme="int8", bias=True, **ODD), SPLIT),
    "int8-narrow": (Case(name="int8", rows=17, scheme="int8", out_dtype="float32", **ODD), NARROW),
    "int8-group": (Case(name="int8-group", rows=16, scheme="int8-g96", out_dtype="float32", **ODD), WIDE),
    "int8-small-group": (Case(name="int8-small-group", rows=17, scheme="int8-g48", **ODD), WIDE),
    "int8-zeros": (Case(name="int8-zeros", rows=5, scheme="int8-g32-zeros", num_layers=2, **ODD), SPLIT),
    "int8-channel-zeros": (Case(name="int8-channel-zeros", rows=5, scheme="int8-zeros", **ODD), WIDE),
    "int8-minimums": (Case(name="int8-minimums", rows=5, scheme="int8-minimums", **ODD), WIDE),
    "int4": (Case(name="int4", rows=64, scheme="int4", num_layers=2, **ODD), SPLIT),
    "int4-group": (Case(name="int4-group", rows=17, scheme="int4-g32", bias=True, **ODD | SILU), WIDE),
    "int4-large-group": (Case(name="g", rows=5, scheme="int4-g128", in_features=384, out_features=144), SPLIT),
    "int4-small-group": (Case(name="g", rows=5, scheme="int4-g16-zeros", scale_dtype="float16", **ODD), WIDE),
    "int4-zeros": (Case(name="int4-zeros", rows=5, scheme="int4-g96-zeros", out_dtype="float32", **ODD), NARROW),
    "int4-minimums": (Case(name="m", rows=16, scheme="int4-g32-minimums", dtype="float32", **ODD), SPLIT),
    "int4-float16": (Case(name="f", rows=5, scheme="int4-g32-minimums", dtype="float16", **ODD), WIDE),
    "int4-float16-scales": (
        Case(name="f", rows=5, scheme="int4-g32-zeros", dtype="float16", scale_dtype="float16", **ODD),
        WIDE,
    ),
    "float8": (Case(name="float8", rows=16, scheme="float8_e4m3fn", residual=True, norm=True, **ODD), WIDE),
    "float8-float16": (Case(name="float8", rows=5, scheme="float8_e5m2", dtype="float16", **ODD), WIDE),
    "mxfp4": (Case(name="mxfp4", rows=17, scheme="mxfp4", num_layers=2, **ODD), SPLIT),
    "int8-by-int8": (Case(name="int8-by-int8", rows=5, scheme="int8", quantize_x="int8", **ODD), SPLIT),
    "int4-by-int8": (Case(name="int4-by-int8", rows=5, scheme="int4", quantize_x="int8", **ODD | SILU), WIDE),
    "group-by-int8": (Case(name="g", rows=5, scheme="int4-g32", quantize_x="int8", dtype="float32", **ODD), WIDE),
    "float8-by-float8": (Case(name="f", rows=5, scheme="float8_e4m3fn", quantize_x="float8_e4m3fn", **ODD), WIDE),
}
"""Cases in sizes that divide no block: in the order of wgmma and in that of memory, with splits and without."""


@pytest.mark.parametrize("scales_weights", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_every_scheme_is_multiplied(name: str, scales_weights: bool):
    case, config = RIGHT[name]
    if scales_weights and not matrix.can_scale_weights(case.problem()):
        with pytest.raises(ValueError, match=r"config\.scales_weights: got True; accepted: False"):
            assert_multiplies(case, dataclasses.replace(config, scales_weights=True))
        return
    assert_multiplies(case, dataclasses.replace(config, scales_weights=scales_weights))


@pytest.mark.parametrize("name", ["int8", "int4-group", "int8-by-int8", "float8"])
def test_the_last_program_adds_up_splits(name: str):
    """The last program also applies bias, gate, residual and the scales of rows."""
    assert_multiplies(RIGHT[name][0], dataclasses.replace(SPLIT, merge="last"))


@pytest.mark.parametrize("rows", [5, 64, 100])
@pytest.mark.parametrize("scheme", ["int8", "int4-g128-zeros"])
def test_what_is_chosen_is_right(scheme: str, rows: int):
    case = Case(name="chosen", rows=rows, scheme=scheme, in_features=640, out_features=176, dtype="bfloat16")
    problem = case.problem()
    assert_multiplies(case, matrix_blocks.heuristic(problem, gpu_to_plan_for()))


def test_integer_products_are_exact():
    case = Case(
        name="exact", rows=1, scheme="int8", quantize_x="int8", order="out_in", in_features=384, out_features=80
    )
    inputs = cases.make_inputs(case)
    ones = dataclasses.replace(inputs.w, scales=jnp.ones_like(inputs.w.scales))
    x = jnp.round(inputs.x.astype(jnp.float32) * 20).at[:, 0].set(127)  # its own codes
    call = functools.partial(quantized_matmul, quantize_x="int8", backend="triton", interpret=True)
    result = jax.jit(call, compiler_options=QUICKLY, static_argnames="config")(x, ones, config=WIDE)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(x, np.int64) @ np.asarray(ones.values, np.int64).T)


@pytest.mark.parametrize(
    ("scheme", "rows", "blocks"),
    [
        # Channels and splits of qkv, output, gate-up and down.
        ("int8", 16, "64x2 64x4 64x1 64x4"),
        ("int4-g128", 16, "128x4 128x8 64x1 128x8"),
        ("int8", 64, "128x5 128x8 64x1 128x8"),
        ("int8", 256, "64x1 64x2 128x1 64x2"),
        ("int8", 1024, "128x1 128x1 128x1 128x1"),
    ],
)
def test_blocks_of_an_h200(scheme: str, rows: int, blocks: str):
    layers = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
    found = []
    with gpu_compiler.tracing_for(90):
        for in_features, out_features in layers:
            options = SILU if out_features == 28672 else {}
            case = Case(
                name="layer", rows=rows, scheme=scheme, in_features=in_features, out_features=out_features, **options
            )
            space = triton.space(case.problem())
            tried = list(space.spread())
            assert space.start in tried
            found.append(f"{space.start.block_out}x{space.start.splits}")
    assert found == blocks.split()
