"""decode_attention: every implementation on every case, and the properties that all of them share."""

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
from compiling import options_for
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion import KVCache, Unsupported, append_kv, decode_attention, merge_partials
from palladion.kernels.decode_attention import IMPLEMENTATIONS, Inputs, Problem, cases
from palladion.kernels.decode_attention.cases import Case
from palladion.kernels.decode_attention.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.decode_attention.mosaic_tpu import products as tpu_products
from palladion.kernels.decode_attention.triton import call as triton
from palladion.kernels.implementation import Implementation
from palladion.reference import oracle
from palladion.reference.compare import assert_right

# mosaic_gpu has tests of its own: jax's interpreter of such kernels is slow.
ROWS = [row for row in IMPLEMENTATIONS if row.name != "mosaic_gpu"]
KERNELS = [row for row in ROWS if row.platform is not None]
TESTS = {case.name: case for case in cases.TESTS}

# The test cases that each kernel refuses; any other refusal fails.
REFUSED = {
    "mosaic_tpu": {"gqa-float16", "odd-cache", "short-cache", "paged-narrow"},
    "triton": set(),
}

quickly = hypothesis.settings(max_examples=15, deadline=None, derandomize=True)

SMALL_BLOCKS = mosaic_tpu.Config(block_kv=128, block_q=16, buffers=2)
"""Several blocks even in a small cache."""


@functools.cache
def compiled(backend: str, interpret: Any, **options: Any) -> Any:
    call = functools.partial(decode_attention, return_lse=True, backend=backend, interpret=interpret, **options)
    return jax.jit(lambda inputs: call(**inputs._asdict()), compiler_options=options_for(backend))


def attend(inputs: Inputs, backend: str, interpret: Any = None, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Returns out and lse of one implementation, which is compiled once for every shape."""
    return compiled(backend, (backend != "xla") if interpret is None else interpret, **options)(inputs)


@functools.cache
def expected(name: str) -> tuple[Inputs, tuple[jax.Array, jax.Array], tuple[np.ndarray, np.ndarray]]:
    """Returns a test case's inputs, and the results of the reference and of the oracle."""
    case = TESTS[name]
    inputs = cases.make_inputs(case)
    return inputs, attend(inputs, "xla", **case.options), judge(inputs, **case.options)


def judge(inputs: Inputs, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the oracle's results; the oracle takes a single layer."""
    arrays = inputs._asdict()
    layer = arrays.pop("layer")
    if layer is not None:
        for part in ("k", "v", "k_scale", "v_scale"):
            arrays[part] = None if arrays[part] is None else arrays[part][int(layer)]
    return oracle.decode_attention(**arrays, **options)


def assert_all_right(result: Any, reference: Any, exact: Any, what: str) -> None:
    for name, *values in zip(("out", "lse"), result, reference, exact, strict=True):
        assert_right(*values, what=f"{what}: {name}")


def small(name: str = "case", **changes: Any) -> Case:
    base = Case(name=name, batch=2, q_heads=4, kv_heads=2, head_dim=16, max_len=128, dtype="float32")
    return dataclasses.replace(base, **changes)


# --- Every implementation, every case ---


@pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(row, name, id=f"{row.name}-{name}")
        for row in KERNELS
        for name in TESTS
        if name not in REFUSED[row.name]
    ],
)
def test_kernel_is_as_right_as_the_reference(row: Implementation, name: str):
    inputs, reference, exact = expected(name)
    assert_all_right(attend(inputs, row.name, **TESTS[name].options), reference, exact, name)


@pytest.mark.parametrize("name", TESTS)
def test_reference_is_right_up_to_rounding(name: str):
    inputs, reference, exact = expected(name)
    values = np.asarray(inputs.v, np.float64)
    if inputs.v_scale is not None:
        values = values * np.asarray(inputs.v_scale, np.float64)[..., None]
    largest = np.nanmax(np.abs(values))
    scales = (largest, max(1.0, np.abs(exact[1][np.isfinite(exact[1])]).max()))
    for result, right, scale in zip(reference, exact, scales, strict=True):
        # A few roundings in float32 of sums that are no larger than the largest value, and one of the result.
        bound = 16 * np.finfo(np.float32).eps * scale + float(jnp.finfo(result.dtype).eps) / 2 * np.abs(right)
        finite = np.isfinite(right)
        result = np.asarray(result, np.float64)
        np.testing.assert_array_equal(result[~finite], right[~finite])
        assert (np.abs(result[finite] - right[finite]) <= bound[finite]).all()


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_kernel_refuses_only_what_is_known(row: Implementation):
    every = (*cases.TESTS, *cases.MODELS)
    assert {case.name for case in every if row.unsupported(case.problem()) is not None} == REFUSED[row.name]


@pytest.mark.parametrize("mode", tpu_interpreter.MODES)
@pytest.mark.parametrize(
    ("name", "block_batch"),
    [
        ("sinks", 3),
        ("window", 1),
        ("window", 2),
        ("layers", 1),
        ("q-len-5", 3),
        ("paged", 1),
        ("paged", 4),
        ("paged-window", 2),
        ("int8-paged-layers", 2),
        ("int8-window", 1),
        ("int8-window", 2),
    ],
)
def test_tpu_kernel_moves_its_memory_in_order(name: str, block_batch: int, mode: str):
    inputs, reference, exact = expected(name)
    config = dataclasses.replace(SMALL_BLOCKS, block_batch=block_batch)
    if TESTS[name].page_size is not None:
        config = dataclasses.replace(config, block_kv=2 * TESTS[name].page_size)
    result = attend(inputs, "mosaic_tpu", tpu_interpreter.MODES[mode], config=config, **TESTS[name].options)
    assert_all_right(result, reference, exact, name)
    assert mode != "races" or not tpu_interpreter.races_found()


def test_races_would_be_found():
    def kernel(x_hbm: Any, out: Any, scratch: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(x_hbm, scratch, arrived)
        copy.start()
        out[...] = scratch[...]
        copy.wait()

    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        interpret=tpu_interpreter.MODES["races"],
    )
    try:
        call(jnp.ones((8, 128))).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 raises
        assert "race" in str(error).lower()  # noqa: PT017
    else:
        assert tpu_interpreter.races_found()


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("mosaic_tpu", mosaic_tpu.Config(block_kv=128, block_q=16)),
        ("mosaic_tpu", mosaic_tpu.Config(block_kv=256, block_q=48, buffers=4, loop_heads=True)),
        ("mosaic_tpu", mosaic_tpu.Config(block_kv=384, block_q=1000, cores=2)),
        ("triton", triton.Config(block_kv=16, block_rows=32, splits=1)),
        ("triton", triton.Config(block_kv=64, block_rows=16, splits=3)),
        ("triton", triton.Config(block_kv=128, block_rows=512, splits=7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["prefill", "gqa"])
def test_explicit_blocks(backend: str, config: Any, name: str):
    inputs, reference, exact = expected(name)
    result = attend(inputs, backend, config=config, **TESTS[name].options)
    assert_all_right(result, reference, exact, f"{name} with {config}")


@pytest.mark.parametrize(
    ("name", "operands", "block_heads"),
    [
        ("int8-window", "integers", 1),
        ("int8-paged-layers", "integers", 2),
        ("int8", "integers", 2),
        ("int8", "words", 1),
        ("int8-window", "words", 2),
        ("float8-e4m3fn", "rebiased", 1),
        ("float8-e4m3fn", "rebiased", 2),
        ("float8-e4m3fn", "stored", 1),
        ("float8-e5m2", "stored", 2),
    ],
)
def test_ways_to_multiply_a_one_byte_cache(name: str, operands: str, block_heads: int):
    case = dataclasses.replace(TESTS[name], dtype="bfloat16")
    inputs = cases.make_inputs(case)
    reference, exact = attend(inputs, "xla", **case.options), judge(inputs, **case.options)
    config = mosaic_tpu.Config(
        block_kv=128, block_q=16, block_heads=block_heads, loop_heads=block_heads > 1, operands=operands
    )
    assert_all_right(attend(inputs, "mosaic_tpu", config=config, **case.options), reference, exact, name)


def test_float8_in_the_other_format():
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(32, 8).repeat(16, axis=1)  # whole registers
    numbers = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)

    def kernel(x: Any, out: Any) -> None:
        out[...] = tpu_products.as_operand(x[...], jnp.bfloat16, "rebiased").astype(jnp.float32)

    out_shape = jax.ShapeDtypeStruct(numbers.shape, jnp.float32)
    rebiased = pl.pallas_call(kernel, out_shape=out_shape, interpret=True)(numbers) * tpu_products.FACTOR["rebiased"]
    finite = np.isfinite(np.asarray(numbers, np.float32))
    np.testing.assert_array_equal(rebiased[finite], np.asarray(numbers, np.float32)[finite])
    assert np.isfinite(rebiased).all()  # NaN becomes a number


@quickly
@hypothesis.given(pieces=st.integers(1, 3), seed=st.integers(0, 999), size=st.sampled_from([0.0, 1e-3, 1.0, 1e4]))
def test_fixed_point(pieces: int, seed: int, size: float):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, 8, 64)) * size).astype(np.float32)
    bound = np.abs(x).max(axis=2, keepdims=True)
    codes, factor = tpu_products.split(jnp.asarray(x), jnp.asarray(bound), pieces)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_less(np.abs(np.asarray(codes, np.int32)), 128)
    back = tpu_products.join(jnp.asarray(codes, jnp.int32), factor)
    # Half a step, and the rounding of float32.
    steps = 127 * 128.0 ** (pieces - 1)
    assert (np.abs(back - x) <= bound * (0.5 / steps + 2e-7)).all()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_any_lengths(row: Implementation):
    # Every length of a cache of two blocks (and more, for Triton) in one batch.
    case = small(
        batch=137,
        head_dim=128,
        max_len=136,
        kv_heads=1,
        q_heads=2,
        q_len=2,
        lengths=tuple(range(137)),
        sliding_window=70,
    )
    inputs = cases.make_inputs(case)
    reference, exact = attend(inputs, "xla", **case.options), judge(inputs, **case.options)
    assert_all_right(attend(inputs, row.name, **case.options), reference, exact, row.name)


@pytest.mark.parametrize(("kv_heads", "block_batch"), [(1, 1), (1, 4), (2, 2), (2, 4)])
def test_cores_and_batch_blocks(kv_heads: int, block_batch: int):
    case = small(batch=8, kv_heads=kv_heads, q_heads=6, max_len=384, lengths=(0, 131, 384, 5, 0, 0, 1, 300), sinks=True)
    inputs = cases.make_inputs(case)
    reference, exact = attend(inputs, "xla", **case.options), judge(inputs, **case.options)
    config = mosaic_tpu.Config(block_kv=128, block_q=1, cores=2, block_batch=block_batch)
    result = attend(inputs, "mosaic_tpu", pltpu.InterpretParams(), config=config, **case.options)
    assert_all_right(result, reference, exact, f"{config}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_ragged_batch_is_each_sequence_alone(row: Implementation):
    case = small(batch=3, max_len=256, lengths=(0, 131, 77), q_len=2, sinks=True)
    inputs = cases.make_inputs(case)
    together = attend(inputs, row.name)
    for b in range(case.batch):
        alone = inputs._replace(**{part: getattr(inputs, part)[b : b + 1] for part in ("q", "k", "v", "lengths")})
        for whole, one in zip(together, attend(alone, row.name), strict=True):
            np.testing.assert_allclose(whole[b : b + 1], one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_transformations(row: Implementation):
    # Under scan the layer is traced, under vmap there are batches of batches.
    case = small(num_layers=3, lengths=(40, 7))
    inputs = cases.make_inputs(case)
    filled = inputs._replace(k=jnp.nan_to_num(inputs.k), v=jnp.nan_to_num(inputs.v))
    call = functools.partial(decode_attention, backend=row.name, interpret=row.name != "xla")
    quick = functools.partial(jax.jit, compiler_options=options_for(row.name))

    def one(layer: jax.Array) -> jax.Array:
        return call(**filled._replace(layer=layer)._asdict())

    layers = jnp.arange(3, dtype=jnp.int32)
    scanned = quick(lambda layers: jax.lax.scan(lambda _, layer: (None, one(layer)), None, layers)[1])(layers)
    sliced = filled._replace(layer=None)
    for layer in range(3):
        alone, _ = attend(sliced._replace(k=filled.k[layer], v=filled.v[layer]), row.name)
        np.testing.assert_allclose(scanned[layer], alone, rtol=1e-6, atol=1e-6)
    mapped = quick(jax.vmap(lambda k, v, lengths: call(filled.q, k, v, lengths)))(
        filled.k, filled.v, jnp.stack([filled.lengths] * 3)
    )
    np.testing.assert_allclose(mapped, scanned, rtol=1e-6, atol=1e-6)


def test_one_token_needs_no_q_len():
    inputs, (out, lse), _ = expected("gqa")
    arrays = inputs._asdict() | {"q": inputs.q[:, 0]}
    got, got_lse = decode_attention(**arrays, return_lse=True)
    np.testing.assert_array_equal(got, out[:, 0])
    np.testing.assert_array_equal(got_lse, lse[:, 0])
    np.testing.assert_array_equal(decode_attention(**arrays), got)


def test_default_scale_is_one_over_root_head_dim():
    inputs = cases.make_inputs(small(head_dim=64))
    np.testing.assert_array_equal(
        decode_attention(**inputs._asdict()), decode_attention(**inputs._asdict(), scale=1 / 8)
    )


def test_append_then_attend():
    # The last query of a prompt written at once and token by token sees the same.
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 9, heads, 16), np.float32)) for heads in (4, 2, 2))
    whole = append_kv(KVCache.dense(2, 2, 16, 16, jnp.float32), k, v, jnp.array([9, 9], jnp.int32))
    out = decode_attention(q, whole.k, whole.v, jnp.array([9, 9], jnp.int32))

    @jax.jit
    def step(cache: KVCache, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> Any:
        cache = append_kv(cache, k, v, lengths)
        return decode_attention(q, cache.k, cache.v, lengths), cache

    cache = KVCache.dense(2, 2, 16, 16, jnp.float32)
    for t in range(9):
        one, cache = step(cache, q[:, t], k[:, t], v[:, t], jnp.full(2, t + 1, jnp.int32))
        np.testing.assert_allclose(one, out[:, t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_a_quantized_cache_is_near_the_float_one(dtype: str):
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 12, heads, 16), np.float32)) for heads in (4, 2, 2))
    lengths = jnp.array([12, 5], jnp.int32)

    @jax.jit
    def attended(cache: KVCache) -> jax.Array:
        cache = append_kv(cache, k, v, lengths)
        return decode_attention(q[:, -1], cache.k, cache.v, lengths, k_scale=cache.k_scale, v_scale=cache.v_scale)

    outs = [attended(KVCache.dense(2, 2, 16, 16, kv_dtype)) for kv_dtype in ("float32", dtype)]
    step = {"int8": 1 / 254, "float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 8}[dtype]
    assert np.abs(outs[0] - outs[1]).max() < 4 * step
    assert np.abs(outs[0] - outs[1]).max() > 0


# --- Properties ---


@quickly
@hypothesis.given(parts=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_merged_parts_are_the_whole(parts: list[int], seed: int):
    rng = np.random.default_rng(seed)
    total = sum(parts)
    logits = rng.standard_normal((3, total)) * 5
    values = rng.standard_normal((total, 4))

    def softmax(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        weights = np.exp(logits[:, first:last])
        sums = weights.sum(axis=1)
        with np.errstate(divide="ignore"):
            lse = np.log(sums)
        return weights @ values[first:last] / np.where(sums == 0, 1, sums)[:, None], lse

    ends = np.cumsum(parts)
    partials = [softmax(end - part, end) for part, end in zip(parts, ends, strict=True)]
    outs, lses = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(*partials, strict=True))
    out, lse = merge_partials(outs, lses)
    right, right_lse = softmax(0, total)
    np.testing.assert_allclose(out, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, right_lse, rtol=1e-5, atol=1e-5)


@quickly
@hypothesis.given(cut=st.integers(1, 127), backend=st.sampled_from([row.name for row in ROWS]))
def test_attention_over_parts_of_a_cache_merges_into_the_whole(cut: int, backend: str):
    inputs = cases.make_inputs(small(sinks=True))
    whole = attend(inputs, backend)
    # Tokens before and from the cut, each at the beginning of a cache of its own: positions do not count here.
    first = inputs._replace(lengths=jnp.full(2, cut, jnp.int32))
    k, v = (jnp.roll(x, -cut, axis=2) for x in (inputs.k, inputs.v))
    second = inputs._replace(k=k, v=v, lengths=jnp.full(2, 128 - cut, jnp.int32), sinks=jnp.full(4, -jnp.inf))
    outs, lses = zip(attend(first, backend), attend(second, backend), strict=True)
    out, lse = merge_partials(jnp.stack(outs), jnp.stack(lses))
    np.testing.assert_allclose(out, whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-5, atol=1e-6)


@quickly
@hypothesis.given(
    lengths=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    name=st.sampled_from(["q-len-5", "window", "sinks"]),
    backend=st.sampled_from([row.name for row in KERNELS]),
)
def test_kernels_at_random_lengths(lengths: tuple[int, int], name: str, backend: str):
    config = SMALL_BLOCKS if backend == "mosaic_tpu" else None
    case = dataclasses.replace(TESTS[name], batch=2, lengths=lengths)
    inputs = cases.make_inputs(case)
    reference, exact = attend(inputs, "xla", **case.options), judge(inputs, **case.options)
    result = attend(inputs, backend, config=config, **case.options)
    assert_all_right(result, reference, exact, f"{name} {lengths}")


@quickly
@hypothesis.given(seed=st.integers(0, 999))
def test_pages_may_lie_anywhere(seed: int):
    case = small(max_len=48, page_size=8, lengths=(48, 17), num_layers=2)
    inputs = cases.make_inputs(case)
    pages = inputs.k.shape[1]
    order = np.random.default_rng(seed).permutation(pages)
    table = np.asarray(inputs.page_table)
    moved = jnp.asarray(
        np.where(table < pages, np.argsort(order)[np.minimum(table, pages - 1)], table).astype(np.int32)
    )
    permuted = inputs._replace(k=inputs.k[:, order], v=inputs.v[:, order], page_table=moved)
    for one, other in zip(attend(inputs, "xla"), attend(permuted, "xla"), strict=True):
        np.testing.assert_array_equal(one, other)


@quickly
@hypothesis.given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 24, 128]),
    max_len=st.sampled_from([1, 8, 37, 40, 128, 136, 256]),
    q_len=st.integers(1, 3),
    window=st.none() | st.integers(1, 50),
    row=st.sampled_from(ROWS),
)
def test_random_shapes(row: Implementation, batch: int, group: int, window: int | None, **sizes: int):
    lengths = tuple(np.random.default_rng(0).integers(0, sizes["max_len"] + 1, batch).tolist())
    q_heads = group * sizes["kv_heads"]
    case = small(**sizes, batch=batch, q_heads=q_heads, lengths=lengths, sliding_window=window)
    hypothesis.assume(row.unsupported(case.problem()) is None)
    inputs = cases.make_inputs(case)
    reference, exact = attend(inputs, "xla", **case.options), judge(inputs, **case.options)
    assert_all_right(attend(inputs, row.name, **case.options), reference, exact, f"{row.name} {case}")


# --- Wrong calls ---


def arrays(**changes: Any) -> dict[str, Any]:
    given = cases.make_inputs(small())._asdict()
    return {name: value for name, value in (given | changes).items() if value is not None}


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


CACHE = (2, 2, 128, 16)
INT8 = {"k": zeros(*CACHE, dtype=jnp.int8), "v": zeros(*CACHE, dtype=jnp.int8)}
TABLE = zeros(2, 3, dtype=jnp.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(4, 16)}, "q: got shape (4, 16); accepted: [batch, (q_len,) q_heads, head_dim]"),
        ({"q": "hello"}, "q: got str; accepted: an array"),
        ({"q": zeros(2, 0, 16)}, "q: got (2, 1, 0, 16)"),
        ({"k": zeros(2, 128, 16)}, "k: got (2, 128, 16); accepted: [batch, kv_heads, max_len, head_dim]"),
        ({"k": zeros(2, 128, 16), "page_table": TABLE}, "accepted: [num_pages, kv_heads, page_size, head_dim]"),
        ({"layer": 0}, "k: got (2, 2, 128, 16); accepted: [num_layers, batch, kv_heads, max_len, head_dim]"),
        ({"v": zeros(2, 2, 41, 16)}, "v: got shape (2, 2, 41, 16); accepted: (2, 2, 128, 16), the shape of k"),
        ({"v": zeros(*CACHE, dtype=jnp.bfloat16)}, "v: got bfloat16; accepted: the dtype of k, float32"),
        ({"q": zeros(2, 4, 8)}, "k: got (2, 2, 128, 16); accepted: head_dim = 8, that of q"),
        ({"q": zeros(2, 3, 16)}, "q: got 3 heads; accepted: a multiple of the cache's 2 KV heads"),
        ({"q": zeros(3, 4, 16)}, "k: got a batch of 2; accepted: 3, that of q; a paged cache needs page_table"),
        ({"page_table": zeros(3, 3, dtype=jnp.int32)}, "page_table: got (3, 3); accepted: [batch = 2, pages_per_seq]"),
        ({"page_table": zeros(2, 3)}, "page_table: got float32; accepted: int32"),
        ({"q": zeros(2, 4, 16, dtype=jnp.int8)}, "q: got int8; accepted: float32, bfloat16, float16"),
        ({"k": zeros(*CACHE, dtype=jnp.int32), "v": zeros(*CACHE, dtype=jnp.int32)}, "k: got int32; accepted: float32"),
        (INT8, "k_scale: got None; accepted: float32 (2, 2, 128): a int8 cache has scales"),
        ({"k_scale": zeros(*CACHE[:3])}, "k_scale: got an array; accepted: None: a float32 cache has no scales"),
        (INT8 | {"k_scale": zeros(2, 2, 4), "v_scale": zeros(2, 2, 128)}, "k_scale: got shape (2, 2, 4)"),
        (
            INT8 | {"k_scale": zeros(2, 2, 128), "v_scale": zeros(2, 2, 128, dtype=jnp.bfloat16)},
            "v_scale: got bfloat16; accepted: float32",
        ),
        ({"lengths": zeros(3, dtype=jnp.int32)}, "lengths: got shape (3,); accepted: (2,), [batch]"),
        ({"lengths": zeros(2)}, "lengths: got float32; accepted: int32"),
        ({"lengths": jnp.array([129, 3], jnp.int32)}, "lengths: got [129]; accepted: 0 to 128"),
        ({"lengths": jnp.array([5, -1], jnp.int32)}, "lengths: got [-1]; accepted: 0 to 128"),
        ({"sinks": zeros(2)}, "sinks: got shape (2,); accepted: (4,), [q_heads]"),
        ({"sinks": zeros(4, dtype=jnp.int32)}, "sinks: got int32; accepted: a float dtype"),
        (
            {"k": zeros(1, *CACHE), "v": zeros(1, *CACHE), "layer": [0]},
            "layer: got int32[1]; accepted: an int32 scalar",
        ),
        ({"scale": float("inf")}, "scale: got inf; accepted: None or a finite number"),
        ({"sliding_window": 0}, "sliding_window: got 0; accepted: None or an integer of at least 1"),
        ({"sliding_window": 5.5}, "sliding_window: got 5.5; accepted: None or an integer of at least 1"),
        ({"logits_soft_cap": float("inf")}, "logits_soft_cap: got inf; accepted: None or a finite number above 0"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap: got 0.0; accepted: None or a finite number above 0"),
        ({"backend": "cuda"}, "backend: got 'cuda'; accepted: None, 'auto', 'xla'"),
        ({"backend": "mosaic_tpu", "interpret": True, "config": 128}, "config: got 128; accepted: mosaic_tpu.Config"),
        ({"backend": "triton", "interpret": True, "config": 128}, "config: got 128; accepted: triton.Config"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else None,
)
def test_wrong_calls(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**arrays(**changes))


@pytest.mark.parametrize("name", ["scale", "sliding_window", "logits_soft_cap"])
def test_options_must_be_known_while_tracing(name: str):
    given = arrays()
    with pytest.raises(ValueError, match=f"{name}: got a traced value; accepted: a number that is known while tracing"):
        jax.jit(lambda value: decode_attention(**given, **{name: value}))(1)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (mosaic_tpu.Config, {"block_kv": 0, "block_q": 1}, "config.block_kv: got 0; accepted: at least 1"),
        (
            mosaic_tpu.Config,
            {"block_kv": 128, "block_q": 1, "buffers": 1},
            "config.buffers: got 1",
        ),
        (mosaic_tpu.Config, {"block_kv": 128, "block_q": 1, "operands": "bits"}, "config.operands: got bits; accepted"),
        (mosaic_tpu.Config, {"block_kv": 128, "block_q": 0}, "config.block_q: got 0; accepted: at least 1"),
        (triton.Config, {"block_kv": 8, "block_rows": 16, "splits": 1}, "config.block_kv: got 8"),
        (triton.Config, {"block_kv": 16, "block_rows": 24, "splits": 1}, "config.block_rows: got 24"),
        (triton.Config, {"block_kv": 16, "block_rows": 16, "splits": 0}, "config.splits: got 0; accepted: 1 to 256"),
        (triton.Config, {"block_kv": 16, "block_rows": 16, "splits": 1, "num_warps": 3}, "config.num_warps: got 3"),
        (triton.Config, {"block_kv": 16, "block_rows": 16, "splits": 1, "merge": "first"}, "accepted: launch, last"),
    ],
)
def test_wrong_blocks(config: Any, changes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_kv": 128, "block_q": 3}, "config.block_q: got 3; accepted: at least q_len = 5, or a multiple of 16"),
        ({"block_kv": 100, "block_q": 16}, "config.block_kv: got 100; accepted: a multiple of 128 for this cache"),
        (
            {"block_kv": 128, "block_q": 16, "cores": 4},
            "config.cores: got 4; accepted: a divisor of 2 KV heads or of 3",
        ),
        (
            {"block_kv": 128, "block_q": 16, "block_batch": 2},
            "config.block_batch: got 2; accepted: a divisor of the 3 sequences",
        ),
        (
            {"block_kv": 128, "block_q": 16, "block_batch": 3, "loop_heads": True},
            "config.block_batch: got 3; accepted: 1 where loop_heads is set",
        ),
        (
            {"block_kv": 128, "block_q": 16, "block_heads": 3},
            "config.block_heads: got 3; accepted: a divisor of the 2 KV heads of",
        ),
        (
            {"block_kv": 128, "block_q": 16, "operands": "integers"},
            "config.operands: got integers; accepted: 'floats', or what multiplies float32",
        ),
    ],
)
def test_blocks_of_the_tpu_kernel_that_do_not_go_with_the_cache(config: dict[str, int], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(expected("q-len-5")[0], "mosaic_tpu", config=mosaic_tpu.Config(**config))


@pytest.mark.parametrize(
    ("backend", "case", "message"),
    [
        ("mosaic_tpu", small(max_len=48, page_size=16), "page_size must be a multiple of 128 .* head_dim = 16"),
        ("mosaic_tpu", small(max_len=300), "max_len must be a multiple of 128 .* head_dim = 16 in float32, got 300"),
        ("mosaic_tpu", small(max_len=20, head_dim=128), "max_len must be a multiple of 8 .* got 20"),
        ("mosaic_tpu", small(dtype="float16"), "float16 is not supported on TPUs, use bfloat16 or float32"),
        ("mosaic_tpu", small(head_dim=20), "head_dim must be a multiple of 8, got 20"),
        ("mosaic_tpu", small(kv_heads=99, q_heads=99, head_dim=240), "99 KV heads of 240 in float32 they take 69"),
        ("triton", small(head_dim=320), "head_dim must be at most 256, got 320"),
    ],
)
def test_unsupported_says_what_is_not_covered_and_what_covers_it(backend: str, case: Case, message: str):
    inputs = cases.make_inputs(case)._asdict()
    with pytest.raises(Unsupported, match=rf"decode_attention\(batch=2.*{message}.*backend='xla' covers it"):
        decode_attention(**inputs, backend=backend, interpret=True)
    assert decode_attention(**inputs).shape == case.shapes().q.shape


def test_a_page_table_must_fit_into_scalar_memory():
    problem = small(head_dim=128, max_len=2**20, page_size=8).problem()
    reason = mosaic_tpu.unsupported(problem)
    assert reason == "the page table must fit into 512 KiB, got 1024; larger pages make it smaller"


# --- Traffic, work and block sizes ---


def test_traffic_and_work_of_a_problem():
    problem = small(lengths=(40, 10)).problem()
    # 16 numbers of 4 bytes for each key and value of 2 heads; queries and outputs of 4 heads.
    assert problem.bytes_moved((40, 10)) == 50 * 2 * 2 * 64 + 2 * 2 * 4 * 64
    assert problem.bytes_moved() == 256 * 2 * 2 * 64 + 2 * 2 * 4 * 64
    assert problem.flops((40, 10)) == 50 * 4 * 16 * 4
    windowed = dataclasses.replace(problem, sliding_window=8, q_len=2)
    assert windowed.bytes_moved((40, 10)) == 2 * 9 * 2 * 2 * 64 + 2 * 2 * 2 * 4 * 64
    assert windowed.flops((40, 1)) == (8 + 8 + 0 + 1) * 4 * 16 * 4
    quantized = dataclasses.replace(problem, kv_dtype="int8")
    assert quantized.bytes_moved((40, 10)) == 50 * 2 * 2 * 20 + 2 * 2 * 4 * 64


@pytest.mark.parametrize("case", cases.MODELS, ids=lambda case: case.name)
def test_heuristics_fit_the_chips(case: Case):
    problem: Problem = case.problem()
    blocks = mosaic_tpu.heuristic(problem)
    width = problem.head_dim if problem.head_dim % 128 else -(-problem.head_dim // 128) * 128
    per_token = 2 * problem.kv_heads * width * jnp.dtype(problem.kv_dtype).itemsize
    assert blocks.buffers * blocks.block_kv * per_token <= 12 * 2**20
    assert blocks.block_kv <= problem.max_len
    programs = triton.heuristic(problem)
    assert 1 <= programs.splits <= problem.max_len // programs.block_kv
    assert triton.loaded_bytes(problem, programs) <= 160 * 2**10
