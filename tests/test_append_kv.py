"""append_kv: every written number is exact, and every other number of the cache stays as it was."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion import KVCache, Unsupported, append_kv, quantize_kv

HEADS, DIM = 2, 16
PARTS = ("k", "v", "k_scale", "v_scale")


def filled(rng: np.random.Generator, cache: KVCache) -> KVCache:
    """The cache with something in every place."""

    def fill(part: jax.Array | None) -> jax.Array | None:
        return None if part is None else jnp.asarray(rng.integers(-9, 9, part.shape).astype(part.dtype))

    return dataclasses.replace(cache, **{name: fill(getattr(cache, name)) for name in PARTS})


def expected(cache: KVCache, k: Any, v: Any, lengths: Any, new_tokens: Any = None, layer: Any = None) -> dict[str, Any]:
    """The definition, token by token; what is stored of a token is what `quantize_kv` makes of it."""
    store = jax.jit(quantize_kv, static_argnums=1)
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


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("layer", [None, 1], ids=["one-layer", "stacked"])
@pytest.mark.parametrize(
    ("lengths", "new_tokens"),
    [
        pytest.param([4, 13, 9], None, id="ragged"),
        pytest.param([0, 2, 16], None, id="left-padded"),
        pytest.param([4, 13, 9], [4, 0, 2], id="new-tokens"),
        pytest.param([1, 13, 9], [3, 1, 4], id="new-tokens-left-padded"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_writes_what_is_new_and_nothing_else(
    paged: bool, layer: int | None, lengths: list[int], new_tokens: list[int] | None, compiled: bool
):
    cache, k, v = case(paged=paged, layers=None if layer is None else 3)
    lengths, new_tokens = (None if x is None else jnp.array(x, jnp.int32) for x in (lengths, new_tokens))
    parts = expected(cache, k, v, lengths, new_tokens, layer)
    append = jax.jit(append_kv) if compiled else append_kv
    assert_same(append(cache, k, v, lengths, new_tokens=new_tokens, layer=layer), parts)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("x", ["float32", "bfloat16"])
def test_quantizes_on_the_way_in(paged: bool, dtype: str, x: str):
    cache, k, v = case(paged=paged, dtype=dtype, layers=2, x=x)
    lengths = jnp.array([5, 13, 3], jnp.int32)
    assert_same(jax.jit(append_kv)(cache, k, v, lengths, layer=1), expected(cache, k, v, lengths, layer=1))


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


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("length", [-1, 0, 1, 24, 25, 26, 40, 2**31 - 1])
def test_outside_the_cache_nothing_is_written(paged: bool, batch: int, q_len: int, length: int):
    # One token of one sequence takes a path of its own.
    cache, k, v = case(paged=paged, batch=batch, q_len=q_len, dtype="int8", layers=2)
    if paged:
        cache = dataclasses.replace(cache, page_table=jnp.minimum(cache.page_table, 3 * batch + 1))
    lengths = jnp.array([9, length, 12][:batch] if batch > 1 else [length], jnp.int32)
    parts = expected(cache, k, v, lengths, layer=1)
    assert_same(jax.jit(append_kv)(cache, k, v, lengths, layer=1), parts)


def test_one_token_needs_no_q_len():
    cache, k, v = case(q_len=1)
    lengths = jnp.array([1, 2, 24], jnp.int32)
    assert_same(append_kv(cache, k[:, 0], v[:, 0], lengths), expected(cache, k, v, lengths))


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


def test_layers_are_written_one_by_one_under_scan():
    cache, k, v = case(layers=3)
    lengths = jnp.array([4, 13, 9], jnp.int32)

    @jax.jit
    def write(cache: KVCache) -> KVCache:
        def step(cache: KVCache, layer: jax.Array) -> tuple[KVCache, None]:
            return append_kv(cache, k + layer, v, lengths, layer=layer), None

        return jax.lax.scan(step, cache, jnp.arange(3, dtype=jnp.int32))[0]

    right = cache
    for layer in range(3):
        right = append_kv(right, k + layer, v, lengths, layer=layer)
    assert_same(write(cache), {name: np.asarray(getattr(right, name)) for name in ("k", "v")})


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
    with pytest.raises(ValueError, match=re.escape("cache.v_scale: got False; accepted: True for int8")):
        append_kv(dataclasses.replace(cache, v_scale=None), k, v, jnp.array([4, 4, 4], jnp.int32))


def test_there_is_no_kernel_for_it_yet():
    cache, k, v = case()
    with pytest.raises(Unsupported, match=r"append_kv\(batch=3, q_len=4.*pallas: has no kernel for it yet"):
        append_kv(cache, k, v, jnp.array([4, 4, 4], jnp.int32), backend="pallas")
