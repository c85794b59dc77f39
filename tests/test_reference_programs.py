"""The references on a GPU: what XLA's compiler launches and copies, in programs for a GPU that is not present."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from palladion import decode_attention, matmul, quantize, quantized_matmul
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.static.gpu.program import CompiledProgram
from palladion.kernels.decode_attention.cases import Case
from palladion.reference.quantization import ORDERS, Order

pytestmark = pytest.mark.skipif(not gpu_program.installed(), reason="jax-cuda12-plugin is not installed")

ROWS, MANY_ROWS, IN, OUT = 16, 256, 4096, 6144
SUMS_BYTES = IN * OUT // 6
"""Most bytes of float32 sums over parts of the depth of a product; no copy of codes is so small."""

# ---------------------------------------------------------------------------------------------------------- attention

DENSE = Case(name="dense", batch=4, q_heads=32, kv_heads=8, head_dim=128, max_len=4096)
IN_PLACE = {
    "bfloat16": DENSE,
    "one-sequence": dataclasses.replace(DENSE, batch=1),
    "int8": dataclasses.replace(DENSE, kv_dtype="int8"),
    "float8": dataclasses.replace(DENSE, kv_dtype="float8_e4m3fn"),
    "float32-queries": dataclasses.replace(DENSE, dtype="float32", kv_dtype="bfloat16"),
    "float32-queries-int8": dataclasses.replace(DENSE, dtype="float32", kv_dtype="int8"),
    "multi-head": dataclasses.replace(DENSE, kv_heads=32),
    "wide-window": dataclasses.replace(DENSE, sliding_window=3000, logits_soft_cap=50.0, sinks=True),
    "verify": dataclasses.replace(DENSE, q_len=4),
}
COPIED = {
    "pages": dataclasses.replace(DENSE, page_size=64),
    "pages-int8": dataclasses.replace(DENSE, page_size=64, kv_dtype="int8"),
    "layers": dataclasses.replace(DENSE, num_layers=3),
    "window": dataclasses.replace(DENSE, sliding_window=128, sinks=True),
    "window-layers": dataclasses.replace(DENSE, sliding_window=128, num_layers=3),
    "window-pages": dataclasses.replace(DENSE, sliding_window=128, page_size=16),
}
MOST_LAUNCHES = 16
"""Launches of attention: 3 products, 2 reductions, a copied chunk at either end, and indices."""


def attention_program(case: Case) -> CompiledProgram:
    attend = functools.partial(decode_attention, return_lse=True, backend="xla", **case.options)
    return gpu_program.compile_program(lambda inputs: attend(**inputs._asdict()), case.shapes())


def cache_bytes(case: Case, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens of each sequence."""
    itemsize = jnp.dtype(case.kv_dtype or case.dtype).itemsize
    return 2 * case.batch * case.kv_heads * tokens * case.head_dim * itemsize


def logit_bytes(case: Case, tokens: int) -> int:
    """Bytes of logits, weights, and as many for what XLA keeps of them in another order."""
    return 16 * case.batch * case.q_len * case.q_heads * tokens


@pytest.mark.parametrize("name", IN_PLACE)
def test_attention_reads_a_dense_cache_where_it_is(name: str):
    case = IN_PLACE[name]
    program = attention_program(case)
    assert all(launch.loops == 0 for launch in program.launches)
    assert len(program.launches) <= MOST_LAUNCHES, [launch.name for launch in program.launches]
    # Chunks of 512 of 4096 tokens at two ends; no copy of keys or values, in whatever dtype, is so small.
    assert program.temporary_bytes < logit_bytes(case, case.max_len) + cache_bytes(case, case.max_len) // 4


@pytest.mark.parametrize("name", COPIED)
def test_attention_copies_once_what_it_cannot_multiply_in_place(name: str):
    case = COPIED[name]
    program = attention_program(case)
    assert all(launch.loops == 0 for launch in program.launches)
    assert len(program.launches) <= MOST_LAUNCHES, [launch.name for launch in program.launches]
    tokens = case.max_len if case.sliding_window is None else case.sliding_window + 2 * (case.page_size or 0)
    assert program.temporary_bytes < logit_bytes(case, tokens) + 1.1 * cache_bytes(case, tokens)


def test_prompts_take_bounded_memory():
    case = dataclasses.replace(DENSE, q_len=512, max_len=16384)
    program = attention_program(case)
    assert any(launch.loops for launch in program.launches)
    assert program.temporary_bytes < 2**30 < logit_bytes(case, case.max_len) // 8


# ----------------------------------------------------------------------------------------------------------- products


def product_program(scheme: str, rows: int, order: Order, dtype: Any = jnp.bfloat16) -> CompiledProgram:
    w = jax.eval_shape(lambda: quantize(jnp.ones((IN, OUT)), scheme, order=order))
    x = jax.ShapeDtypeStruct((rows, IN), dtype)
    return gpu_program.compile_program(functools.partial(quantized_matmul, backend="xla"), x, w)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [1, ROWS, MANY_ROWS])
def test_codes_of_one_byte_are_converted_as_they_are_read(rows: int, dtype: Any, order: Order):
    for scheme in ("int8", "float8_e4m3fn"):
        program = product_program(scheme, rows, order, dtype)
        assert len(program.launches) <= 2
        assert program.temporary_bytes < SUMS_BYTES


@pytest.mark.parametrize("scheme", ["int4", "int4-g128", "int4-g32-zeros", "int8-g64", "mxfp4"])
def test_one_row_reads_the_stored_codes_once(scheme: str):
    program = product_program(scheme, 1, "out_in")
    assert len(program.launches) <= 4
    assert program.temporary_bytes <= 4 * OUT * (IN // 32) + 2**16  # a sum for each group
    assert not any("gemm" in launch.name for launch in program.launches)


@pytest.mark.parametrize(
    ("scheme", "launches", "most_bytes"),
    [
        ("int4", 4, 0.5 * IN * OUT),  # packed codes with other highest bits
        ("int4-g128", 5, 0.5 * IN * OUT + 4 * ROWS * OUT * IN // 128 + 4 * OUT * IN // 128),  # and sums, and scales
        ("int8-g64-zeros", 6, 4.5 * ROWS * OUT * IN // 64 + 8 * OUT * IN // 64),
        ("mxfp4", 5, 2.2 * IN * OUT),  # the weight in bfloat16
    ],
)
def test_groups_take_no_more_memory_than_a_narrow_weight(scheme: str, launches: int, most_bytes: float):
    program = product_program(scheme, ROWS, "out_in")
    assert len(program.launches) <= launches, [launch.name for launch in program.launches]
    assert program.temporary_bytes < most_bytes + SUMS_BYTES


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-g64-minimums", "mxfp4"])
def test_many_rows_dequantize_to_16_bits(scheme: str, order: Order):
    program = product_program(scheme, MANY_ROWS, order)
    assert len(program.launches) <= 8, [launch.name for launch in program.launches]
    # The weight, its scales, and the float32 product.
    assert program.temporary_bytes < 2 * IN * OUT + 12 * OUT * IN // 32 + 4 * MANY_ROWS * OUT


@pytest.mark.parametrize(
    ("rows", "order"),
    # XLA makes a sum of one row of x, which in the order "in_out" writes all its terms where the weight is small.
    [(1, "out_in"), (ROWS, "out_in"), (MANY_ROWS, "out_in"), (ROWS, "in_out"), (MANY_ROWS, "in_out")],
)
def test_a_dense_product_is_one_product_without_conversions(rows: int, order: Order):
    w = jax.ShapeDtypeStruct((IN, OUT) if order == "in_out" else (OUT, IN), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((rows, IN), jnp.bfloat16)
    program = gpu_program.compile_program(functools.partial(matmul, order=order, backend="xla"), x, w)
    assert len(program.launches) <= 2  # the second adds splits of the depth up
    assert program.temporary_bytes < SUMS_BYTES
