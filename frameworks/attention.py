"""Attention for code that calls `jax.nn.dot_product_attention` and keeps its cache in the layout of that function.

JAX's layout of a cache is `[batch, max_len, kv_heads, head_dim]`. Kernels read `[batch, kv_heads, max_len, head_dim]`,
in which the tokens of a head are contiguous. `dot_product_attention` transposes. The program decides what that costs:

    a step that is jitted alone   copies the cache, with every backend, and so moves three times the bytes of
                                  `decode_attention`; XLA on a CPU copies keys or values
    a loop in one program         on a GPU, XLA carries the cache in the kernel's layout and copies it before and after
    (`jax.lax.scan`)              the loop only; on a TPU a kernel copies it in each step

`kv_cache_from_bskh` converts a cache once. `append_kv` and `decode_attention` then do without copies.
"""

from __future__ import annotations

import functools
from typing import Any, Final, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.checks import as_array, as_lengths, check, check_shape, is_integer
from palladion.kernels.decode_attention import decode_attention
from palladion.reference.caches import KVCache, quantize_kv

FROM_THE_FIRST_KEY: Final = (
    "JAX aligns query i with key i, also where a cache holds older tokens. In a decode loop leave it out: one new "
    "token sees all key_value_seq_lengths. Several new tokens at the end of a cache, and a window there, are "
    "palladion.decode_attention(..., sliding_window=)"
)
"""The way out for causal masks and windows that a decode loop does not mean."""


@overload
def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: None = None,
    mask: None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: None = None,
    return_residual: Literal[False] = False,
    backend: str | None = None,
) -> jax.Array: ...
@overload
def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: None = None,
    mask: None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: None = None,
    return_residual: Literal[True],
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]: ...
def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: None = None,
    mask: None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: None = None,
    return_residual: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes what `jax.nn.dot_product_attention` computes, by `decode_attention`, where a decode loop calls it.

    In a decode loop the query is one new token, the keys are a cache that already holds it, and `key_value_seq_lengths`
    count the tokens of each sequence, the new one included. The cache is transposed, which may copy it in each step:
    `kv_cache_from_bskh` and the module's description say how to avoid that.

    Results are JAX's with one exception: a query that sees no key has zeros, and a residual of -inf, where JAX returns
    the mean of all values. `is_causal` and `local_window_size` align query i with key i, as in JAX: they serve prompts.

    Args:
      query: `[batch, q_len, q_heads, head_dim]`, or without batch; float32, bfloat16 or float16.
      key: `[batch, kv_len, kv_heads, head_dim]`, or without batch; kv_heads divides q_heads.
      value: in shape and dtype like key.
      bias: None.
      mask: None; lengths, causality and windows have arguments of their own.
      scale: factor of the logits, a number known while tracing; None means 1 / sqrt(head_dim).
      is_causal: whether query i sees the keys 0 to i only. With `key_value_seq_lengths` it needs `query_seq_lengths`,
        which must not be larger.
      query_seq_lengths: int32 `[batch]`; queries from there on are padding and see nothing.
      key_value_seq_lengths: int32 `[batch]`, or a scalar for all sequences: keys from there on are not seen, and their
        values, NaN included, do not reach the result. None means all keys.
      local_window_size: (left, right), or one number for both: query i sees the keys i - left to i + right. `right`
        must be 0 unless `is_causal`.
      implementation: None; `backend` chooses.
      return_residual: whether to return the log-sum-exp of each softmax too.
      backend: one of `palladion.BACKENDS`; see `decode_attention`.

    Returns:
      The output in the shape and dtype of query. With `return_residual` also the log-sum-exp, in the shape of query
      without head_dim and in its dtype; no derivative passes through it.

    Raises:
      ValueError: an argument is wrong, or asks for what `decode_attention` does not compute; the message names it.
      Unsupported: the chosen backend does not cover the call.
    """
    for name, given, way_out in (
        ("bias", bias, "jax.nn.dot_product_attention adds one"),
        ("mask", mask, "key_value_seq_lengths masks the end of a cache, is_causal=True a prompt"),
        ("implementation", implementation, "backend= names one of palladion.BACKENDS"),
    ):
        check(given is None, name, given if isinstance(given, str) else type(given).__name__, f"None; {way_out}")
    shape = jnp.shape(query)
    q, k, v = (_with_batch(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    (batch, q_len, q_heads, head_dim), kv_len, kv_heads = q.shape, k.shape[1], k.shape[2]
    check(k.shape[0] == batch, "key", f"a batch of {k.shape[0]}", f"{batch}, that of query")
    check(k.shape[3] == head_dim, "key", f"shape {k.shape}", f"head_dim = {head_dim}, that of query")
    check_shape("value", v, k.shape, "the shape of key")
    check(q_heads % kv_heads == 0, "query", f"{q_heads} heads", f"a multiple of the {kv_heads} heads of key")

    lengths, queries = (
        None if given is None else _lengths(name, given, batch, most)
        for name, given, most in (
            ("key_value_seq_lengths", key_value_seq_lengths, kv_len),
            ("query_seq_lengths", query_seq_lengths, q_len),
        )
    )
    aligned, window = _alignment(is_causal, local_window_size)
    if aligned:
        _check_aligned(q_len, kv_len, aligned, lengths, queries)
        k, v = k[:, :q_len], v[:, :q_len]
        if lengths is not None and queries is not None:
            queries = jnp.minimum(queries, lengths)
    attend = functools.partial(decode_attention, scale=scale, sliding_window=window, return_lse=True, backend=backend)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if aligned:
        # Query i has position i in a full cache.
        out, lse = attend(q, keys, values, q_len)
    else:
        # All queries see the same keys, as the heads of a group do: they become heads of the group.
        heads = q.reshape(batch, q_len, kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4)
        out, lse = attend(heads.reshape(batch, -1, head_dim), keys, values, kv_len if lengths is None else lengths)
        out = out.reshape(heads.shape).transpose(0, 2, 1, 3, 4).reshape(q.shape)
        lse = lse.reshape(heads.shape[:-1]).transpose(0, 2, 1, 3).reshape(q.shape[:-1])
    if queries is not None:
        real = (jnp.arange(q_len, dtype=jnp.int32) < queries[:, None])[..., None]
        out, lse = jnp.where(real[..., None], out, 0), jnp.where(real, lse, -jnp.inf)
    if not return_residual:
        return out.reshape(shape)
    return out.reshape(shape), jax.lax.stop_gradient(lse.astype(q.dtype).reshape(shape[:-1]))


def kv_cache_from_bskh(key: jax.Array, value: jax.Array, dtype: Any = None) -> KVCache:
    """Converts a cache in JAX's layout to a `KVCache`, once, which `append_kv` and `decode_attention` read in place.

    Args:
      key: `[..., batch, max_len, kv_heads, head_dim]`; a leading dimension is that of stacked layers.
      value: in shape and dtype like key.
      dtype: dtype of the result, one that `KVCache.dense` accepts; int8 and float8 are quantized per token and head.
        None means that of key.

    Raises:
      ValueError: key and value are not such arrays.
    """
    key, value = as_array("key", key), as_array("value", value)
    check(key.ndim in (4, 5), "key", f"shape {key.shape}", "[(num_layers,) batch, max_len, kv_heads, head_dim]")
    check_shape("value", value, key.shape, "the shape of key")
    (k, k_scale), (v, v_scale) = (
        quantize_kv(jnp.swapaxes(part, -3, -2), key.dtype if dtype is None else dtype) for part in (key, value)
    )
    return KVCache(k, v, k_scale, v_scale)


def _with_batch(name: str, x: Any) -> jax.Array:
    """Returns an array with a batch of 1 where it has none."""
    x = as_array(name, x)
    check(x.ndim in (3, 4), name, f"shape {x.shape}", "[(batch,) length, heads, head_dim]")
    return x if x.ndim == 4 else x[None]


def _lengths(name: str, given: Any, batch: int, most: int) -> jax.Array:
    """Returns lengths as int32 `[batch]`; raises ValueError where they are known to be none."""
    lengths = as_lengths(given, batch)
    right = lengths.shape == (batch,) and lengths.dtype == jnp.int32
    check(right, name, f"{lengths.dtype} {lengths.shape}", f"int32 [batch = {batch}], or a scalar for all sequences")
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        outside = values[(values < 0) | (values > most)]
        check(outside.size == 0, name, outside.tolist(), f"0 to {most}")
    return lengths


def _alignment(is_causal: bool, local_window_size: Any) -> tuple[str, int | None]:
    """Returns the argument that aligns queries with keys, empty where none does, and the width of the window."""
    if local_window_size is None:
        return ("is_causal" if is_causal else ""), None
    pair = (local_window_size, local_window_size) if is_integer(local_window_size) else tuple(local_window_size)
    right = len(pair) == 2 and all(is_integer(size) and size >= 0 for size in pair)
    check(right, "local_window_size", local_window_size, "a number of at least 0, or two: (left, right)")
    accepted = f"right = 0 or is_causal=True, because decode_attention is causal. {FROM_THE_FIRST_KEY}"
    check(is_causal or pair[1] == 0, "local_window_size", local_window_size, accepted)
    return "local_window_size", int(pair[0]) + 1


def _check_aligned(q_len: int, kv_len: int, name: str, lengths: jax.Array | None, queries: jax.Array | None) -> None:
    """Raises ValueError where queries that are aligned with keys see what is not in a cache of q_len tokens."""
    check(q_len <= kv_len, name, f"{q_len} queries and {kv_len} keys", f"at least as many keys. {FROM_THE_FIRST_KEY}")
    accepted = f"neither, or query_seq_lengths too, which mark the padding of prompts. {FROM_THE_FIRST_KEY}"
    check(lengths is None or queries is not None, name, "it with key_value_seq_lengths", accepted)
    known = not isinstance(lengths, jax.core.Tracer) and not isinstance(queries, jax.core.Tracer)
    if lengths is not None and queries is not None and known:
        fewer = np.asarray(lengths) < np.asarray(queries)
        accepted = f"at least query_seq_lengths, {np.asarray(queries)[fewer].tolist()}, with {name}"
        check(not fewer.any(), "key_value_seq_lengths", np.asarray(lengths)[fewer].tolist(), accepted)
