"""append_kv: every written number is exact, and every other number of the cache stays as it was."""

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
from compiling import QUICKLY, options_for

from palladion import KVCache, Unsupported, append_kv, quantize_kv
from palladion.kernels.append_kv import IMPLEMENTATIONS, Inputs, cases
from palladion.kernels.append_kv.cases import Case
from palladion.kernels.append_kv.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.append_kv.triton import call as triton
from palladion.kernels.backend import Implementation

HEADS, DIM = 2, 16
PARTS = ("k", "v", "k_scale", "v_scale")
TESTS = {case.name: case for case in cases.TESTS}
KERNELS = [row for row in IMPLEMENTATIONS if row.platform is not None]

# What a kernel refuses of the test cases: a case that is missing here and refused fails.
REFUSED = {"mosaic_tpu": {"float16", "odd-cache"}, "triton": set()}

every_row = pytest.mark.parametrize("row", IMPLEMENTATIONS, ids=lambda row: row.name)


def eager(row: Implementation, **options: Any) -> Any:
    """append_kv by one implementation, on any platform."""
    return functools.partial(append_kv, backend=row.name, interpret=row.platform is not None, **options)


@functools.cache
def compiled(row: Implementation, **options: Any) -> Any:
    """The same, compiled once for every shape."""
    return jax.jit(eager(row, **options), compiler_options=options_for(row.name))


def filled(rng: np.random.Generator, cache: KVCache) -> KVCache:
    """The cache with something in every place."""

    def fill(part: jax.Array | None) -> jax.Array | None:
        return None if part is None else jnp.asarray(rng.integers(-9, 9, part.shape).astype(part.dtype))

    return dataclasses.replace(cache, **{name: fill(getattr(cache, name)) for name in PARTS})


def expected(cache: KVCache, k: Any, v: Any, lengths: Any, new_tokens: Any = None, layer: Any = None) -> dict[str, Any]:
    """The definition, token by token; what is stored of a token is what `quantize_kv` makes of it."""
    store = jax.jit(quantize_kv, static_argnums=1, compiler_options=QUICKLY)
    stored = {"k": store(k, cache.k.dtype), "v": store(v, cache.v.dtype)}
    parts = {name: np.array(getattr(cache, name)) for name in PARTS if getattr(cache, name) is not None}
    batch, q_len = k.shape[:2]
    rows = cache.k.shape[-2]
    for b in range(batch):
        for i in range(q_len):
            position = int(lengths[b]) - q_len + i
            new = q_len if new_tokens is None else int(new_tokens[b])
            if not 0 <= position < cache.max_len or i < q_len - new:
                continue
            slab, row = b, position
            if cache.page_table is not None:
                slab, row = int(cache.page_table[b, position // rows]), position % rows
            for name, (codes, scales) in stored.items():
                for part, new_values in ((name, codes), (f"{name}_scale", scales)):
                    if new_values is not None:
                        target = parts[part] if layer is None else parts[part][layer]
                        target[slab, :, row] = new_values[b, i]
    return parts


def assert_same(cache: KVCache, parts: dict[str, np.ndarray]) -> None:
    for name, part in parts.items():
        got = np.asarray(getattr(cache, name))
        assert got.dtype == part.dtype
        np.testing.assert_array_equal(got.astype(np.float64), part.astype(np.float64), err_msg=name)


def case(
    *,
    batch: int = 3,
    q_len: int = 4,
    dtype: Any = "float32",
    paged: bool = False,
    layers: int | None = None,
    x: Any = None,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """A cache of 24 tokens with something in it, and new keys and values."""
    rng = np.random.default_rng(0)
    if paged:
        # Pages in any order, and the last entry of the last sequence dead.
        table = rng.permutation(batch * 3 + 2)[: batch * 3].reshape(batch, 3).astype(np.int32)
        table[-1, -1] = 2_147_480_000
        cache = KVCache.paged(batch * 3 + 2, HEADS, 8, DIM, jnp.asarray(table), dtype, num_layers=layers)
    else:
        cache = KVCache.dense(batch, HEADS, 24, DIM, dtype, num_layers=layers)
    new = (rng.standard_normal((2, batch, q_len, HEADS, DIM)) * 3).astype(np.float32)
    new[0, 0, 0, 0] = 0  # a row of zeros has no scale to divide by
    k, v = jnp.asarray(new).astype(x or jnp.float32)
    return filled(rng, cache), k, v


LENGTHS_AND_NEW_TOKENS: dict[str, tuple[list[int], list[int] | None]] = {
    "ragged": ([4, 13, 9], None),
    "left-padded": ([0, 2, 16], None),
    "new-tokens": ([4, 13, 9], [4, 0, 2]),
    "new-tokens-left-padded": ([1, 0, 9], [3, 2, 4]),
}


@pytest.mark.parametrize(
    ("how", "lengths_and_new", "paged", "layer"),
    # Every pair of two options.
    [
        (compiled, name, paged, 1 if paged == (n % 2 == 0) else None)
        for n, name in enumerate(LENGTHS_AND_NEW_TOKENS)
        for paged in (False, True)
    ]
    + [(eager, "new-tokens-left-padded", True, 1)],
)
@every_row
def test_writes_what_is_new_and_nothing_else(
    row: Implementation, how: Any, lengths_and_new: str, paged: bool, layer: int | None
):
    cache, k, v = case(paged=paged, layers=None if layer is None else 3)
    given = LENGTHS_AND_NEW_TOKENS[lengths_and_new]
    lengths, new_tokens = (None if x is None else jnp.array(x, jnp.int32) for x in given)
    parts = expected(cache, k, v, lengths, new_tokens, layer)
    assert_same(how(row)(cache, k, v, lengths, new_tokens=new_tokens, layer=layer), parts)


@pytest.mark.parametrize(
    ("dtype", "x", "paged"),
    # Every pair of two options.
    [
        (dtype, x, (n + (x == "float32")) % 2 == 0)
        for n, dtype in enumerate(("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"))
        for x in ("float32", "bfloat16")
    ],
)
@every_row
def test_quantizes_on_the_way_in(row: Implementation, dtype: str, x: str, paged: bool):
    if (row.name, dtype) == ("mosaic_tpu", "float16"):
        pytest.skip("refused, as another test has it")
    cache, k, v = case(paged=paged, dtype=dtype, layers=2, x=x)
    lengths = jnp.array([5, 13, 3], jnp.int32)
    assert_same(compiled(row)(cache, k, v, lengths, layer=1), expected(cache, k, v, lengths, layer=1))


@pytest.mark.parametrize(("dtype", "step"), [("int8", 1 / 254), ("float8_e4m3fn", 1 / 28), ("float8_e5m2", 1 / 14)])
def test_quantized_tokens_are_near_the_given_ones(dtype: str, step: float):
    # Half a step between the largest codes, relative to the token's largest number; rows of zeros are exact.
    _, k, _ = case(dtype=dtype)
    codes, scales = quantize_kv(k, dtype)
    assert scales is not None
    back = np.asarray(codes, np.float32) * np.asarray(scales)[..., None]
    assert (np.abs(back - k) <= 1.001 * step * np.abs(k).max(axis=-1, keepdims=True)).all()
    assert (np.asarray(codes, np.float32)[0, 0, 0] == 0).all()
    assert scales[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("paged", "batch", "q_len"),
    # Every pair of two options.
    [(False, 1, 1), (False, 3, 4), (True, 1, 4), (True, 3, 1)],
)
@pytest.mark.parametrize("length", [-1, 0, 1, 24, 25, 26, 40, 2**31 - 1])
@every_row
def test_outside_the_cache_nothing_is_written(row: Implementation, paged: bool, batch: int, q_len: int, length: int):
    # One token of one sequence takes a path of its own.
    cache, k, v = case(paged=paged, batch=batch, q_len=q_len, dtype="int8", layers=2)
    if paged:
        cache = dataclasses.replace(cache, page_table=jnp.minimum(cache.page_table, 3 * batch + 1))
    lengths = jnp.array([9, length, 12][:batch] if batch > 1 else [length], jnp.int32)
    parts = expected(cache, k, v, lengths, layer=1)
    assert_same(compiled(row)(cache, k, v, lengths, layer=1), parts)


@every_row
def test_one_token_needs_no_q_len(row: Implementation):
    cache, k, v = case(q_len=1)
    lengths = jnp.array([1, 2, 24], jnp.int32)
    assert_same(eager(row)(cache, k[:, 0], v[:, 0], lengths), expected(cache, k, v, lengths))


@pytest.mark.parametrize("layers", [None, 2], ids=["one-layer", "stacked"])
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_donated_cache_is_updated_in_place(layers: int | None, paged: bool, batch: int):
    cache, k, v = case(batch=batch, q_len=1, paged=paged, layers=layers)
    layer = None if layers is None else jnp.int32(1)
    places = [cache.k.unsafe_buffer_pointer(), cache.v.unsafe_buffer_pointer()]
    append = jax.jit(functools.partial(append_kv, layer=layer), donate_argnums=0)
    new = append(cache, k, v, jnp.array([3] * batch, jnp.int32))
    assert [new.k.unsafe_buffer_pointer(), new.v.unsafe_buffer_pointer()] == places
    assert cache.k.is_deleted()


@every_row
def test_layers_are_written_one_by_one_under_scan(row: Implementation):
    cache, k, v = case(layers=3)
    lengths = jnp.array([4, 13, 9], jnp.int32)

    @jax.jit
    def write(cache: KVCache, k: jax.Array, v: jax.Array) -> KVCache:
        def step(cache: KVCache, layer: jax.Array) -> tuple[KVCache, None]:
            return eager(row)(cache, k + layer, v, lengths, layer=layer), None

        return jax.lax.scan(step, cache, jnp.arange(3, dtype=jnp.int32))[0]

    right = cache
    for layer in range(3):
        right = append_kv(right, k + layer, v, lengths, layer=layer)
    assert_same(write(cache, k, v), {name: np.asarray(getattr(right, name)) for name in ("k", "v")})


@every_row
def test_batches_of_batches(row: Implementation):
    cache, k, v = case(layers=3)
    lengths = jnp.array([[4, 13, 9], [5, 0, 24], [6, 7, 8]], jnp.int32)
    written = jax.vmap(lambda cache, lengths: eager(row)(cache, k, v, lengths))(cache, lengths)
    for n in range(3):
        alone, got = (dataclasses.replace(cache, k=x.k[n], v=x.v[n]) for x in (cache, written))
        assert_same(got, expected(alone, k, v, lengths[n]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": 3}, "cache: got int; accepted: a KVCache"),
        ({"k": jnp.zeros((3, 16))}, "k: got shape (3, 16); accepted: [batch, (q_len,) kv_heads, head_dim]"),
        ({"v": jnp.zeros((3, 2, 16))}, "v: got shape (3, 2, 16); accepted: (3, 4, 2, 16), the shape of k"),
        ({"v": jnp.zeros((3, 5, 2, 16))}, "v: got shape (3, 5, 2, 16)"),
        ({"v": jnp.zeros((3, 4, 2, 16), jnp.bfloat16)}, "v: got bfloat16; accepted: the dtype of k, float32"),
        ({"k": jnp.zeros((3, 4, 2, 16), jnp.int8)}, "k: got int8; accepted: float32, bfloat16, float16"),
        (dict.fromkeys("kv", jnp.zeros((3, 4, 1, 16))), "k: got 1 heads of 16; accepted: 2 heads of 16"),
        (dict.fromkeys("kv", jnp.zeros((2, 4, 2, 16))), "k: got a batch of 2; accepted: 3, that of the cache"),
        ({"lengths": jnp.array([4, 25, 9], jnp.int32)}, "lengths: got [25]; accepted: 0 to 24"),
        ({"lengths": jnp.array([4, 4], jnp.int32)}, "lengths: got shape (2,); accepted: (3,), [batch]"),
        ({"lengths": jnp.array([4.0, 4.0, 4.0])}, "lengths: got float32; accepted: int32"),
        ({"new_tokens": jnp.array([4], jnp.int32)}, "new_tokens: got shape (1,); accepted: (3,), [batch]"),
        ({"layer": 0}, "cache: got k of shape (3, 2, 24, 16); accepted:"),
        ({"backend": "tpu"}, "backend: got 'tpu'"),
        ({"backend": "mosaic_tpu", "interpret": True, "config": 128}, "config: got 128; accepted: mosaic_tpu.Config"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else None,
)
def test_wrong_calls(changes: dict[str, Any], message: str):
    cache, k, v = case()
    given = {"cache": cache, "k": k, "v": v, "lengths": jnp.array([4, 4, 4], jnp.int32)} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        append_kv(**given)


def test_a_quantized_cache_needs_its_scales():
    cache, k, v = case(dtype="int8")
    with pytest.raises(ValueError, match=re.escape("cache.v_scale: got None; accepted: an array for a cache in int8")):
        append_kv(dataclasses.replace(cache, v_scale=None), k, v, jnp.array([4, 4, 4], jnp.int32))


# --- The kernels on the cases ---


def append(inputs: Inputs, row: Implementation, **options: Any) -> KVCache:
    return compiled(row, **options)(**inputs._asdict())


def right(inputs: Inputs) -> dict[str, np.ndarray]:
    layer = None if inputs.layer is None else int(inputs.layer)
    return expected(*inputs[:5], layer)


@every_row
@pytest.mark.parametrize("name", TESTS)
def test_every_case(name: str, row: Implementation):
    if name in REFUSED.get(row.name, ()):
        pytest.skip("refused, as another test has it")
    inputs = cases.make_inputs(TESTS[name])
    assert_same(append(inputs, row), right(inputs))


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_kernel_refuses_only_what_is_known(row: Implementation):
    refused = {name for name, case in TESTS.items() if row.unsupported(case.problem()) is not None}
    assert refused == REFUSED[row.name]
    assert [case.name for case in cases.MODELS if row.unsupported(case.problem()) is not None] == []


@pytest.mark.parametrize("mode", tpu_interpreter.MODES)
@pytest.mark.parametrize(
    "name", ["int8", "scales-between-heads", "verify", "verify-head-dim-64", "prefill-int8", "paged", "paged-128-int8"]
)
def test_tpu_kernel_moves_its_memory_in_order(name: str, mode: str):
    # In groups of two sequences: one of them is not full, and windows begin in the middle of a tile.
    inputs = cases.make_inputs(TESTS[name])
    config = dataclasses.replace(mosaic_tpu.heuristic(TESTS[name].problem()), sequences=2)
    options = {"backend": "mosaic_tpu", "config": config, "interpret": tpu_interpreter.MODES[mode]}
    call = jax.jit(functools.partial(append_kv, **options), compiler_options=QUICKLY)
    assert_same(call(**inputs._asdict()), right(inputs))
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
        ("prefill-int8", triton.Config(block_rows=1024, num_warps=8)),  # more than there are
        ("paged-prefill-float8", triton.Config(block_rows=64)),
    ],
    ids=str,
)
def test_explicit_blocks(name: str, config: Any):
    inputs = cases.make_inputs(TESTS[name])
    (row,) = (row for row in KERNELS if config.__module__.endswith(row.name))
    assert_same(append(inputs, row, config=config), right(inputs))


def small(**changes: Any) -> Case:
    base = Case(name="case", batch=2, kv_heads=2, head_dim=16, max_len=128, dtype="float32")
    return dataclasses.replace(base, **changes)


@every_row
@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_lengths(row: Implementation, head_dim: int):
    # Every length of a cache of two blocks of scales in one batch.
    case = small(batch=257, max_len=256, kv_heads=1, head_dim=head_dim, q_len=3, lengths=tuple(range(257)))
    inputs = cases.make_inputs(dataclasses.replace(case, kv_dtype="int8"))
    assert_same(append(inputs, row), right(inputs))


@every_row
@pytest.mark.parametrize("q_len", [1, 5])
def test_a_sequence_with_nothing_new_does_not_touch_its_pages(row: Implementation, q_len: int):
    # Its slot may be free, and its pages those of another one by now.
    case = small(batch=3, head_dim=128, max_len=64, page_size=16, q_len=q_len, lengths=(21, 21, 0), dtype="bfloat16")
    inputs = cases.make_inputs(dataclasses.replace(case, new_tokens=(q_len, 0, q_len)))
    cache = dataclasses.replace(inputs.cache, page_table=jnp.tile(inputs.cache.page_table[:1], (3, 1)))
    inputs = inputs._replace(cache=cache)
    assert_same(append(inputs, row), right(inputs))


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
    assert_same(append(inputs, row), right(inputs))


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
        assert_same(append(inputs, row), right(inputs))


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


def test_one_byte_caches_that_pallas_would_write_elsewhere_are_refused():
    refused = small(kv_dtype="int8", kv_heads=8, head_dim=128, max_len=2**20, batch=1, num_layers=3)
    call = functools.partial(append_kv, backend="triton", interpret=True)
    message = (
        r"keys of a int8 cache must take up to 2 GiB, or more than 4, got 3221225472 bytes.*backend='xla' covers it"
    )
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(lambda inputs: call(**inputs._asdict()), refused.shapes())
    for layers in (2, 5):
        fine = dataclasses.replace(refused, num_layers=layers)
        jax.eval_shape(lambda inputs: call(**inputs._asdict()), fine.shapes())


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
def test_unsupported_says_what_is_not_covered_and_what_covers_it(case: Case, message: str):
    call = functools.partial(append_kv, backend="mosaic_tpu", interpret=True)
    with pytest.raises(Unsupported, match=rf"append_kv\(batch=.*{re.escape(message)}.*backend='xla' covers it"):
        jax.eval_shape(lambda inputs: call(**inputs._asdict()), case.shapes())


def test_traffic_of_a_problem():
    # 16 numbers for each key and value of 2 heads, read in 4 bytes and written in 4, or in 1 with a scale of 4.
    assert small().problem().bytes_moved() == 2 * 2 * 2 * 16 * (4 + 4)
    assert small(q_len=3, kv_dtype="int8").problem().bytes_moved() == 3 * 2 * 2 * 2 * (16 * 4 + 16 + 4)
