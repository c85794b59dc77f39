"""append_kv: every written number is exact, and every other number of the cache is unchanged."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from append_kv_results import ARRAYS, assert_same, compiled, eager, every_row, expected

from palladion import KVCache, append_kv, quantize_kv
from palladion.kernels.implementation import Implementation

HEADS, DIM = 2, 16


def filled(rng: np.random.Generator, cache: KVCache) -> KVCache:
    """Returns the cache with arbitrary numbers in all arrays."""

    def fill(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else jnp.asarray(rng.integers(-9, 9, array.shape).astype(array.dtype))

    return dataclasses.replace(cache, **{name: fill(getattr(cache, name)) for name in ARRAYS})


def case(
    *,
    batch: int = 3,
    q_len: int = 4,
    dtype: Any = "float32",
    paged: bool = False,
    layers: int | None = None,
    x: Any = None,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Returns a cache of 24 tokens with arbitrary numbers, and new keys and values."""
    rng = np.random.default_rng(0)
    if paged:
        # Pages are permuted, and the last entry of the last sequence is invalid.
        table = rng.permutation(batch * 3 + 2)[: batch * 3].reshape(batch, 3).astype(np.int32)
        table[-1, -1] = 2_147_480_000
        cache = KVCache.paged(batch * 3 + 2, HEADS, 8, DIM, jnp.asarray(table), dtype, num_layers=layers)
    else:
        cache = KVCache.dense(batch, HEADS, 24, DIM, dtype, num_layers=layers)
    new = (rng.standard_normal((2, batch, q_len, HEADS, DIM)) * 3).astype(np.float32)
    new[0, 0, 0, 0] = 0  # the scale of a row of zeros is 0
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
    arrays = expected(cache, k, v, lengths, new_tokens, layer)
    assert_same(how(row)(cache, k, v, lengths, new_tokens=new_tokens, layer=layer), arrays)


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
        pytest.skip("unsupported, which another test checks")
    cache, k, v = case(paged=paged, dtype=dtype, layers=2, x=x)
    lengths = jnp.array([5, 13, 3], jnp.int32)
    assert_same(compiled(row)(cache, k, v, lengths, layer=1), expected(cache, k, v, lengths, layer=1))


@pytest.mark.parametrize(("dtype", "step"), [("int8", 1 / 254), ("float8_e4m3fn", 1 / 28), ("float8_e5m2", 1 / 14)])
def test_quantized_tokens_are_near_the_given_ones(dtype: str, step: float):
    # The error is at most half a step between the largest codes, relative to the largest number; zeros are exact.
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
    # The reference has a separate path for one token of one sequence.
    cache, k, v = case(paged=paged, batch=batch, q_len=q_len, dtype="int8", layers=2)
    if paged:
        cache = dataclasses.replace(cache, page_table=jnp.minimum(cache.page_table, 3 * batch + 1))
    lengths = jnp.array([9, length, 12][:batch] if batch > 1 else [length], jnp.int32)
    arrays = expected(cache, k, v, lengths, layer=1)
    assert_same(compiled(row)(cache, k, v, lengths, layer=1), arrays)


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
    pointers = [cache.k.unsafe_buffer_pointer(), cache.v.unsafe_buffer_pointer()]
    append = jax.jit(functools.partial(append_kv, layer=layer), donate_argnums=0)
    new = append(cache, k, v, jnp.array([3] * batch, jnp.int32))
    assert [new.k.unsafe_buffer_pointer(), new.v.unsafe_buffer_pointer()] == pointers
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
