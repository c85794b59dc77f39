"""append_qkv: rotations agree with float64, written numbers are exact, and all other numbers are unchanged."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import options_for

from palladion import KVCache, Unsupported, append_kv, append_qkv, decode_attention
from palladion.benchmarks.measure.operations import OPERATIONS
from palladion.kernels.append_qkv import IMPLEMENTATIONS, Inputs, cases
from palladion.kernels.append_qkv.cases import Case
from palladion.kernels.append_qkv.triton import Config
from palladion.kernels.implementation import Implementation
from palladion.reference import compare, oracle, rotate

TESTS = {case.name: case for case in cases.TESTS}
KERNELS = [row for row in IMPLEMENTATIONS if row.platform is not None]

every_row = pytest.mark.parametrize("row", IMPLEMENTATIONS, ids=lambda row: row.name)


@functools.cache
def compiled(row: Implementation, **options: Any) -> Any:
    call = functools.partial(append_qkv, backend=row.name, interpret=row.platform is not None, **options)
    return jax.jit(call, compiler_options=options_for(row.name))


def run(row: Implementation, inputs: Inputs, **options: Any) -> tuple[np.ndarray, KVCache]:
    q, cache = compiled(row, **options)(**inputs._asdict())
    return np.asarray(q), cache


def assert_as_defined(row: Implementation, case: Case, **options: Any) -> None:
    inputs = cases.make_inputs(case)
    assert_right(case, inputs, run(row, inputs, **options))


def assert_right(case: Case, inputs: Inputs, result: tuple[Any, KVCache]) -> None:
    reference = run(IMPLEMENTATIONS[-1], inputs)
    assert result[0].dtype == inputs.qkv.dtype
    verdict = OPERATIONS["append_qkv"].judge(case, inputs, result, reference)
    assert verdict.right, verdict


@every_row
@pytest.mark.parametrize("name", TESTS)
def test_every_case(name: str, row: Implementation):
    assert_as_defined(row, TESTS[name])


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_kernels_support_every_case(row: Implementation):
    unsupported = [case.name for case in (*cases.TESTS, *cases.MODELS) if row.unsupported(case.problem()) is not None]
    assert unsupported == []


@pytest.mark.parametrize(
    ("name", "block_rows"),
    [*itertools.product(["multi-query", "prefill", "paged"], [1, 4, 256]), ("int8", 4)],
)
def test_explicit_blocks(name: str, block_rows: int):
    (row,) = (row for row in KERNELS if row.name == "triton")
    assert_as_defined(row, TESTS[name], config=Config(block_rows))


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_shape(data: st.DataObject):
    draw = data.draw
    kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 20))
    batch, q_len, max_len = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(5, 20))
    case = Case(
        name="any",
        batch=batch,
        q_heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        max_len=max_len,
        q_len=q_len,
        lengths=tuple(draw(st.lists(st.integers(1, max_len), min_size=batch, max_size=batch))),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        num_layers=draw(st.sampled_from([None, 2])),
    )
    (row,) = (row for row in KERNELS if row.name == "triton")
    assert_as_defined(row, case)


@every_row
def test_one_token_needs_no_q_len(row: Implementation):
    inputs = cases.make_inputs(TESTS["float32"])
    q, cache = run(row, inputs)
    one = inputs._replace(qkv=inputs.qkv[:, 0], cosine=inputs.cosine[:, 0], sine=inputs.sine[:, 0])
    one_q, one_cache = run(row, one)
    np.testing.assert_array_equal(one_q, q[:, 0])
    np.testing.assert_array_equal(np.asarray(one_cache.k), np.asarray(cache.k))


def test_it_equals_rotation_and_append_kv_for_attention():
    inputs = cases.make_inputs(TESTS["verify"])
    kv_heads = inputs.cache.k.shape[1]
    cache = dataclasses.replace(inputs.cache, k=jnp.nan_to_num(inputs.cache.k), v=jnp.nan_to_num(inputs.cache.v))
    q, joined = append_qkv(*inputs._replace(cache=cache)[:5], backend="triton", interpret=True)
    rotated = rotate(inputs.qkv[:, :, :-kv_heads], inputs.cosine, inputs.sine)
    k, v = rotated[:, :, -kv_heads:], inputs.qkv[:, :, -kv_heads:]
    apart = append_kv(cache, k, v, inputs.lengths)
    attended = decode_attention(q, joined.k, joined.v, inputs.lengths, backend="xla")
    expected = decode_attention(rotated[:, :, :-kv_heads], apart.k, apart.v, inputs.lengths, backend="xla")
    exact_q = oracle.rotate(inputs.qkv, inputs.cosine, inputs.sine)[:, :, : -2 * kv_heads]
    exact, _ = oracle.decode_attention(exact_q, apart.k, apart.v, inputs.lengths)
    compare.assert_right(attended, expected, exact)


@every_row
def test_batches_of_batches(row: Implementation):
    case = TESTS["rotary-dim-32"]
    inputs = cases.make_inputs(case)
    lengths = jnp.stack([inputs.lengths, inputs.lengths + 1])
    mapped = jax.vmap(lambda lengths: compiled(row)(**inputs._replace(lengths=lengths)._asdict()))(lengths)
    for n in range(2):
        assert_right(case, inputs._replace(lengths=lengths[n]), jax.tree.map(operator.itemgetter(n), mapped))


def test_a_donated_cache_is_updated_in_place():
    inputs = cases.make_inputs(TESTS["bfloat16"])
    pointers = [inputs.cache.k.unsafe_buffer_pointer(), inputs.cache.v.unsafe_buffer_pointer()]
    append = jax.jit(append_qkv, donate_argnums=0)
    _, new = append(*inputs[:5])
    assert [new.k.unsafe_buffer_pointer(), new.v.unsafe_buffer_pointer()] == pointers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": 3}, "cache: got int; accepted: a KVCache"),
        ({"qkv": jnp.zeros((3, 128))}, "qkv: got shape (3, 128); accepted: [batch, (q_len,) q_heads + 2 * kv_heads"),
        ({"qkv": jnp.zeros((3, 1, 7, 128))}, "qkv: got 7 heads for a cache of 2; accepted: a multiple of kv_heads"),
        ({"qkv": jnp.zeros((3, 1, 4, 128))}, "qkv: got 4 heads for a cache of 2"),
        ({"qkv": jnp.zeros((3, 1, 8, 64))}, "cosine: got 64 angles; accepted: 1 to 32, half of head_dim"),
        ({"qkv": jnp.zeros((2, 1, 8, 128))}, "cosine: got shape (3, 1, 64); accepted: (2, 1, 64)"),
        ({"qkv": jnp.zeros((3, 1, 8, 128), jnp.int8)}, "k: got int8; accepted: float32"),
        ({"cosine": jnp.zeros((3, 64))}, "cosine: got shape (3, 64); accepted: [batch, (q_len,) rotary_dim / 2]"),
        ({"cosine": jnp.zeros((3, 1, 65))}, "cosine: got 65 angles; accepted: 1 to 64, half of head_dim"),
        ({"sine": jnp.zeros((3, 1, 63))}, "sine: got shape (3, 1, 63); accepted: (3, 1, 64), the shape of cosine"),
        ({"sine": jnp.zeros((3, 1, 64), jnp.bfloat16)}, "sine: got bfloat16; accepted: float32"),
        ({"lengths": jnp.array([4, 257, 9], jnp.int32)}, "lengths: got [257]; accepted: 0 to 256"),
        ({"backend": "triton", "interpret": True, "config": 8}, "config: got 8; accepted: triton.Config"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else None,
)
def test_wrong_calls(changes: dict[str, Any], message: str):
    given = cases.make_inputs(TESTS["float32"])._asdict() | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        append_qkv(**given)


def test_unsupported_says_why():
    case = dataclasses.replace(TESTS["float32"], dtype="float16")
    with pytest.raises(Unsupported, match="mosaic_tpu: a float16 cache is not for TPUs"):
        append_qkv(**cases.make_inputs(case)._asdict(), backend="mosaic_tpu", interpret=True)


def test_bytes_and_flops():
    problem = Case(name="", batch=2, q_heads=4, kv_heads=2, head_dim=16, max_len=8, dtype="bfloat16").problem()
    # 8 heads of 16 are read; 4 as queries and 4 into the cache are written; 8 cosines and sines of each token.
    assert problem.bytes_moved() == 2 * (2 * 8 * 16 * 2 + 2 * 8 * 4)
    assert problem.flops() == 3 * 2 * 6 * 16


@pytest.mark.parametrize("name", ["prefill", "int8", "paged"])
def test_the_judge_finds_errors(name: str):
    case, operation = TESTS[name], OPERATIONS["append_qkv"]
    inputs = cases.make_inputs(case)
    q, cache = run(IMPLEMENTATIONS[-1], inputs)
    assert operation.judge(case, inputs, (q, cache), (q, cache)).right
    unrotated = np.asarray(inputs.qkv[:, :, : case.q_heads])
    assert not operation.judge(case, inputs, (unrotated, cache), (q, cache)).right
    swapped = dataclasses.replace(cache, k=cache.v, v=cache.k)
    assert not operation.judge(case, inputs, (q, swapped), (q, cache)).right
    # The first number of the first layer, page or sequence, which must not change.
    touched = dataclasses.replace(cache, v=cache.v.at[(0,) * cache.v.ndim].set(7))
    verdict = operation.judge(case, inputs, (q, touched), (q, cache))
    assert verdict.description == "v differs where nothing was to be written"
