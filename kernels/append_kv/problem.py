"""The problem of an append_kv call: its shapes and dtypes, validated before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.checks import (
    check,
    check_layer,
    check_lengths,
    check_shape,
    check_written,
    dtype_name,
    has_entries,
    swapped_layout,
)
from palladion.kernels.search_space import TuningKey
from palladion.kernels.sharding import ShardingRule, Share
from palladion.reference.caches import FLOAT_CACHE_DTYPES, QUANTIZED_CACHE_DTYPES, KVCache, bytes_per_token


class Inputs(NamedTuple):
    """Arrays of a call, in the shapes that all implementations take.

    Attributes:
      cache: dense or paged cache of one layer, or of all layers.
      k: `[batch, q_len, kv_heads, head_dim]`.
      v: like k.
      lengths: int32 `[batch]`.
      new_tokens: int32 `[batch]` or None.
      layer: int32 scalar or None.
    """

    cache: KVCache
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    new_tokens: jax.Array | None
    layer: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """An append_kv call without its arrays.

    Attributes:
      batch: number of sequences.
      q_len: new tokens per sequence.
      kv_heads: number of key/value heads.
      head_dim: width of a head.
      max_len: most tokens of a sequence.
      page_size: tokens of a page; None for a dense cache.
      num_pages: number of pages; None for a dense cache.
      num_layers: layers stacked in the cache; None for the cache of one layer.
      x_dtype: dtype of the new keys and values.
      kv_dtype: dtype of the cache.
      has_new_tokens: whether `new_tokens` is given.
    """

    batch: int
    q_len: int
    kv_heads: int
    head_dim: int
    max_len: int
    page_size: int | None
    num_pages: int | None
    num_layers: int | None
    x_dtype: str
    kv_dtype: str
    has_new_tokens: bool

    @classmethod
    def of(cls, inputs: Inputs) -> Problem:
        """Returns the problem of a call; raises ValueError, naming the argument, if its arrays do not fit together."""
        cache, k, v, lengths, new_tokens, layer = inputs
        rank = 4 if layer is None else 5
        shape = "[batch or num_pages, kv_heads, max_len or page_size, head_dim]"
        check(cache.k.ndim == rank, "cache", f"k of shape {cache.k.shape}", f"{shape}, [num_layers] first with layer=")
        check(
            cache.v.shape == cache.k.shape and cache.v.dtype == cache.k.dtype,
            "cache",
            f"v of shape {cache.v.shape} in {cache.v.dtype}",
            f"{cache.k.shape} in {cache.k.dtype}, as k",
        )
        for name, scales in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            if scales is not None:
                check_shape(f"cache.{name}", scales, cache.k.shape[:-1], "the shape of k without head_dim")
                check(scales.dtype == jnp.float32, f"cache.{name}", scales.dtype, "float32")
        if cache.page_table is not None:
            table = cache.page_table
            given = f"{table.dtype} {table.shape}"
            is_table = table.ndim == 2 and table.dtype == jnp.int32
            check(is_table, "cache.page_table", given, "int32 [batch, pages_per_seq]")
        check(k.ndim == 4 and has_entries(k), "k", k.shape, "[batch, (q_len,) kv_heads, head_dim], each at least 1")
        check_shape("v", v, k.shape, "the shape of k")
        check(dtype_name(k) in FLOAT_CACHE_DTYPES, "k", k.dtype, ", ".join(FLOAT_CACHE_DTYPES))
        check(v.dtype == k.dtype, "v", v.dtype, f"the dtype of k, {k.dtype}")
        batch, q_len, kv_heads, head_dim = k.shape
        slabs, cache_heads, rows, cache_dim = cache.k.shape[-4:]
        given = f"{kv_heads} heads of {head_dim}"
        hint = swapped_layout("cache.k", cache.k.shape, lambda heads: heads == kv_heads, cache.page_table is not None)
        accepted = f"{cache_heads} heads of {cache_dim}{hint}"
        check((kv_heads, head_dim) == (cache_heads, cache_dim), "k", given, accepted)
        sequences = slabs if cache.page_table is None else cache.page_table.shape[0]
        check(batch == sequences, "k", f"a batch of {batch}", f"{sequences}, that of the cache")
        needs_scales = dtype_name(cache.k) in QUANTIZED_CACHE_DTYPES
        accepted = f"{'an array' if needs_scales else 'None'} for a cache in {cache.k.dtype}"
        for name, scales in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            given = "None" if scales is None else "an array"
            check((scales is not None) == needs_scales, f"cache.{name}", given, accepted)
        check_lengths(lengths, batch, cache.max_len)
        if new_tokens is not None:
            check_shape("new_tokens", new_tokens, (batch,), "[batch]")
            check(new_tokens.dtype == jnp.int32, "new_tokens", new_tokens.dtype, "int32")
        check_written(lengths, new_tokens)
        if layer is not None:
            check_layer(layer, cache.k.shape[0])
        return cls(
            batch=batch,
            q_len=q_len,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_len=cache.max_len,
            page_size=None if cache.page_table is None else rows,
            num_pages=None if cache.page_table is None else slabs,
            num_layers=None if layer is None else cache.k.shape[0],
            x_dtype=dtype_name(k),
            kv_dtype=dtype_name(cache.k),
            has_new_tokens=new_tokens is not None,
        )

    @property
    def quantized(self) -> bool:
        """Whether the cache is quantized."""
        return self.kv_dtype in QUANTIZED_CACHE_DTYPES

    def bytes_moved(self) -> int:
        """Returns the bytes that must move: new keys and values, read once and written once."""
        read = 2 * self.kv_heads * self.head_dim * jnp.dtype(self.x_dtype).itemsize
        written = bytes_per_token(self.kv_heads, self.head_dim, self.kv_dtype)
        return self.batch * self.q_len * (read + written)

    def flops(self) -> int:
        """Returns 0: numbers are copied, and scaled at most."""
        return 0

    def planned(self) -> Problem:
        """Returns the problem that block sizes are chosen for: this one."""
        return self

    def sharding_rule(self, inputs: Inputs) -> ShardingRule:
        """Returns the rule of append_kv: heads and pages are apart, or heads, sequences and tokens of a dense cache."""
        cache = inputs.cache
        slabs, rows = ("batch", "max_len") if self.page_size is None else ("num_pages", "page_size")
        scale = f"{'' if self.num_layers is None else 'num_layers '}{slabs} kv_heads {rows}"
        token = f"{scale} head_dim"
        given = (cache.k, cache.v, cache.k_scale, cache.v_scale, cache.page_table)
        names = (token, token, scale, scale, "batch pages_per_seq")
        parts = [name for name, array in zip(names, given, strict=True) if array is not None]
        written = jax.tree.unflatten(jax.tree.structure(cache), parts)
        new, new_tokens = "batch q_len kv_heads head_dim", "batch" if self.has_new_tokens else None
        layer = None if self.num_layers is None else ""
        # Every device that holds a page writes it, so it must have the new tokens of all sequences.
        sharded = frozenset({"kv_heads"} | ({"batch", "max_len"} if self.page_size is None else {"num_pages"}))
        return ShardingRule((written, new, new, "batch", new_tokens, layer), written, sharded)

    def run_share(self, run: Callable[[Problem, Inputs], Any], inputs: Inputs, share: Share) -> Any:
        """Writes the new tokens of some of the sequences and heads, those that belong into the device's part."""
        written: KVCache = run(self.local(share), self.local_inputs(inputs, share))
        return dataclasses.replace(written, page_table=inputs.cache.page_table)

    def local(self, share: Share) -> Problem:
        """Returns the problem of a device's share."""
        return dataclasses.replace(
            self,
            batch=share.of(self.batch, "batch"),
            kv_heads=share.of(self.kv_heads, "kv_heads"),
            max_len=share.of(self.max_len, "max_len"),
            num_pages=None if self.num_pages is None else share.of(self.num_pages, "num_pages"),
        )

    def local_inputs(self, inputs: Any, share: Share) -> Any:
        """Returns inputs with lengths counted from the first token of a device's part, and pages from its first page.

        What belongs into other parts has no place in this one, and is not written.
        """
        cache, lengths = inputs.cache, inputs.lengths
        if "max_len" in share.axes:
            first = share.index("max_len") * share.of(self.max_len, "max_len")
            lengths = jnp.clip(lengths, 0, self.max_len + self.q_len) - first
        if "num_pages" in share.axes:
            first = share.index("num_pages") * cache.k.shape[-4]
            cache = dataclasses.replace(cache, page_table=cache.page_table - first)
        return inputs._replace(cache=cache, lengths=lengths)

    def tuning_key(self) -> TuningKey:
        """Returns what block sizes depend on."""
        cache = "dense" if self.page_size is None else f"pages of {self.page_size}"
        return TuningKey(
            kind=f"{self.x_dtype} to {self.kv_dtype} {cache}, heads of {self.head_dim}",
            sizes={"batch": self.batch, "q_len": self.q_len, "kv_heads": self.kv_heads, "max_len": self.max_len},
        )

    def __str__(self) -> str:
        cache = f"max_len={self.max_len}" if self.page_size is None else f"page_size={self.page_size}"
        heads = f"heads={self.kv_heads}x{self.head_dim}"
        return f"batch={self.batch}, q_len={self.q_len}, {heads}, {cache}, x={self.x_dtype}, kv={self.kv_dtype}"
