"""The kernels of append_kv on all cases, on random shapes, with explicit block sizes, and what they do not support."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_interpreter
from append_kv_results import KERNELS, assert_same, compiled, every_row, expected
from compiling import QUICKLY

from palladion import KVCache, Unsupported, append_kv
from palladion.kernels.append_kv import Inputs, cases
from palladion.kernels.append_kv.cases import Case
from palladion.kernels.append_kv.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.append_kv.triton import call as triton
from palladion.kernels.implementation import Implementation

TESTS = {case.name: case for case in cases.TESTS}

UNSUPPORTED = {"mosaic_tpu": {"float16", "odd-cache"}, "triton": set()}
"""Test cases that each kernel does not support; any other case that it refuses fails."""


def append(inputs: Inputs, row: Implementation, **options: Any) -> KVCache:
    return compiled(row, **options)(**inputs._asdict())


def expected_of(inputs: Inputs) -> dict[str, np.ndarray]:
    layer = None if inputs.layer is None else int(inputs.layer)
    return expected(*inputs[:5], layer)


@every_row
@pytest.mark.parametrize("name", TESTS)
def test_every_case(name: str, row: Implementation):
    if name in UNSUPPORTED.get(row.name, ()):
        pytest.skip("unsupported, which another test checks")
    inputs = cases.make_inputs(TESTS[name])
    assert_same(append(inputs, row), expected_of(inputs))


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_kernel_supports_all_other_cases(row: Implementation):
    unsupported = {name for name, case in TESTS.items() if row.unsupported(case.problem()) is not None}
    assert unsupported == UNSUPPORTED[row.name]
    assert [case.name for case in cases.MODELS if row.unsupported(case.problem()) is not None] == []


@pytest.mark.parametrize("mode", tpu_interpreter.MODES)
@pytest.mark.parametrize(
    "name", ["int8", "scales-between-heads", "verify", "verify-head-dim-64", "prefill-int8", "paged", "paged-128-int8"]
)
def test_tpu_kernel_moves_its_memory_in_order(name: str, mode: str):
    # Groups have two sequences: the last may have one, and their new tokens begin inside a tile.
    inputs = cases.make_inputs(TESTS[name])
    config = dataclasses.replace(mosaic_tpu.heuristic(TESTS[name].problem()), sequences=2)
    options = {"backend": "mosaic_tpu", "config": config, "interpret": tpu_interpreter.MODES[mode]}
    call = jax.jit(functools.partial(append_kv, **options), compiler_options=QUICKLY)
    assert_same(call(**inputs._asdict()), expected_of(inputs))
    assert mode != "races" or not tpu_interpreter.races_found()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("float32", mosaic_tpu.Config(block=1, sequences=1, heads=1)),
        ("bfloat16", mosaic_tpu.Config(block=16, sequences=2, heads=1)),
        ("int8", mosaic_tpu.Config(block=256, sequences=3, heads=4)),
        ("scales-between-heads", mosaic_tpu.Config(block=4, sequences=3, heads=1)),
        ("verify", mosaic_tpu.Config(block=2, sequences=5, heads=2)),
        ("prefill", mosaic_tpu.Config(block=2, sequences=1, heads=2)),
        ("prefill-int8", mosaic_tpu.Config(block=128, sequences=2, heads=1)),
        ("prefill-head-dim-80", mosaic_tpu.Config(block=128, sequences=2, heads=1)),
        ("paged-48", mosaic_tpu.Config(block=4, sequences=2, heads=1)),
        ("verify-int8", triton.Config(block_rows=1)),  # less than a token
        ("verify-int8", triton.Config(block_rows=4)),  # parts of tokens
        ("prefill-int8", triton.Config(block_rows=1024, num_warps=8)),  # more rows than there are
        ("paged-prefill-float8", triton.Config(block_rows=64)),
    ],
    ids=str,
)
def test_explicit_blocks(name: str, config: Any):
    inputs = cases.make_inputs(TESTS[name])
    (row,) = (row for row in KERNELS if row.config_class is type(config))
    assert_same(append(inputs, row, config=config), expected_of(inputs))


def small(**changes: Any) -> Case:
    base = Case(name="case", batch=2, kv_heads=2, head_dim=16, max_len=128, dtype="float32")
    return dataclasses.replace(base, **changes)


@every_row
@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_lengths(row: Implementation, head_dim: int):
    # Every length of a cache of two blocks of scales in one batch.
    case = small(batch=257, max_len=256, kv_heads=1, head_dim=head_dim, q_len=3, lengths=tuple(range(257)))
    inputs = cases.make_inputs(dataclasses.replace(case, kv_dtype="int8"))
    assert_same(append(inputs, row), expected_of(inputs))


@every_row
@pytest.mark.parametrize("q_len", [1, 5])
def test_a_sequence_with_nothing_new_does_not_touch_its_pages(row: Implementation, q_len: int):
    # The sequence may have ended, and its pages may belong to another sequence.
    case = small(batch=3, head_dim=128, max_len=64, page_size=16, q_len=q_len, lengths=(21, 21, 0), dtype="bfloat16")
    inputs = cases.make_inputs(dataclasses.replace(case, new_tokens=(q_len, 0, q_len)))
    cache = dataclasses.replace(inputs.cache, page_table=jnp.tile(inputs.cache.page_table[:1], (3, 1)))
    inputs = inputs._replace(cache=cache)
    assert_same(append(inputs, row), expected_of(inputs))


quickly = hypothesis.settings(max_examples=15, deadline=None, derandomize=True)


@quickly
@hypothesis.given(
    name=st.sampled_from(["verify", "paged-48", "verify-int8", "head-dim-64"]), data=st.data(), seed=st.integers(0, 999)
)
@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_random_lengths(row: Implementation, name: str, data: st.DataObject, seed: int):
    case = TESTS[name]
    some = st.integers(-3, case.max_len + case.q_len + 3)
    lengths = data.draw(st.lists(some, min_size=case.batch, max_size=case.batch))
    new = data.draw(st.none() | st.lists(st.integers(-1, 9), min_size=case.batch, max_size=case.batch))
    case = dataclasses.replace(case, lengths=tuple(lengths), new_tokens=None if new is None else tuple(new))
    inputs = cases.make_inputs(case, seed)
    assert_same(append(inputs, row), expected_of(inputs))


@quickly
@hypothesis.given(
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 9),
    head_dim=st.sampled_from([8, 64, 128, 192]),
    q_len=st.sampled_from([1, 2, 3, 7, 20, 130]),
    tokens=st.sampled_from([8, 24, 40, 64, 128, 256]),
    pages=st.integers(0, 3),
    kv_dtype=st.sampled_from(["float32", "bfloat16", "int8", "float8_e4m3fn"]),
    row=st.sampled_from(KERNELS),
)
def test_random_shapes(row: Implementation, tokens: int, pages: int, **sizes: Any):
    max_len = tokens * max(pages, 1)
    lengths = tuple(np.random.default_rng(0).integers(0, max_len + 1, sizes["batch"]).tolist())
    case = small(max_len=max_len, page_size=tokens if pages else None, lengths=lengths, **sizes)
    if row.unsupported(case.problem()) is None:
        inputs = cases.make_inputs(case)
        assert_same(append(inputs, row), expected_of(inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, "config.block: got 0; accepted: at least 1"),
        ({"block": 3}, "config.block: got 3; accepted: one of [2, 4, 8, 16, 32, 64, 128, 256] for this cache"),
        ({"sequences": 10}, "config.sequences: got 10; accepted: at most 9 for this batch"),
        ({"heads": 3}, "config.heads: got 3; accepted: a divisor of the 2 KV heads"),
    ],
)
def test_wrong_blocks(changes: dict[str, int], message: str):
    inputs = cases.make_inputs(TESTS["verify"])
    assert KERNELS[0].name == "mosaic_tpu"
    with pytest.raises(ValueError, match=re.escape(message)):
        append(inputs, KERNELS[0], config=mosaic_tpu.Config(**{"block": 4, "sequences": 1, "heads": 1} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_rows": 3}, "config.block_rows: got 3; accepted: a power of two"),
        ({"block_rows": 4, "num_warps": 3}, "config.num_warps: got 3; accepted: 1, 2, 4, 8 or 16"),
    ],
)
def test_wrong_blocks_of_the_gpu_kernel(changes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        triton.Config(**changes)


def test_one_byte_caches_that_pallas_addresses_wrongly_are_unsupported():
    unsupported = small(kv_dtype="int8", kv_heads=8, head_dim=128, max_len=2**20, batch=1, num_layers=3)
    call = functools.partial(append_kv, backend="triton", interpret=True)
    message = (
        r"keys of a int8 cache must take up to 2 GiB, or more than 4, got 3221225472 bytes.*backend='xla' covers it"
    )
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(lambda inputs: call(**inputs._asdict()), unsupported.shapes())
    for layers in (2, 5):
        supported = dataclasses.replace(unsupported, num_layers=layers)
        jax.eval_shape(lambda inputs: call(**inputs._asdict()), supported.shapes())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (small(kv_dtype="float16"), "a float16 cache is not for TPUs: float32, bfloat16, int8 and float8 are"),
        (small(head_dim=20), "head_dim must be a multiple of 8, got 20"),
        (
            small(batch=64, page_size=16, head_dim=64),
            "page_size must be a multiple of 128, got 16: XLA lays out a cache of (515, 2, 16, 64) in float32 in",
        ),
        (small(max_len=600, head_dim=64), "max_len must be a multiple of 128 with head_dim = 64, got 600"),
        (small(max_len=6, kv_dtype="int8", head_dim=128), "max_len must be a multiple of 4 in int8, got 6"),
        (small(batch=1100, page_size=8, max_len=1024, head_dim=128), "a page table must fit into 512 KiB, got 550"),
        (
            small(q_len=8000, max_len=8192, head_dim=256),
            "must fit into 12 MiB, q_len = 8000 takes 31: append fewer",
        ),
    ],
)
def test_unsupported_says_why_and_names_a_backend_that_is(case: Case, message: str):
    call = functools.partial(append_kv, backend="mosaic_tpu", interpret=True)
    with pytest.raises(Unsupported, match=rf"append_kv\(batch=.*{re.escape(message)}.*backend='xla' covers it"):
        jax.eval_shape(lambda inputs: call(**inputs._asdict()), case.shapes())


def test_traffic_of_a_problem():
    # 16 numbers for each key and value of 2 heads, read in 4 bytes and written in 4, or in 1 with a scale of 4.
    assert small().problem().bytes_moved() == 2 * 2 * 2 * 16 * (4 + 4)
    assert small(q_len=3, kv_dtype="int8").problem().bytes_moved() == 3 * 2 * 2 * 2 * (16 * 4 + 16 + 4)
