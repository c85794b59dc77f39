"""A decode_attention call as data: its arrays, and its shapes, dtypes and options, validated before any computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.checks import (
    check,
    check_layer,
    check_lengths,
    check_number,
    check_shape,
    dtype_name,
    has_entries,
    is_integer,
    swapped_layout,
)
from palladion.kernels.decode_attention.length_shards import attend_to_part
from palladion.kernels.search_space import TuningKey
from palladion.kernels.sharding import ShardingRule, Share
from palladion.reference.caches import FLOAT_CACHE_DTYPES, QUANTIZED_CACHE_DTYPES, bytes_per_token

MOST_ROWS_OF_PARTS: Final = 128
"""Most query heads that share a KV head, over all new tokens, for which parts of a cache are attended to apart: kernels
then take them as heads of one token."""


class Inputs(NamedTuple):
    """The arrays of a call, in the shapes that every implementation takes.

    Attributes:
      q: `[batch, q_len, q_heads, head_dim]`.
      k: `[batch, kv_heads, max_len, head_dim]`, or `[num_pages, kv_heads, page_size, head_dim]` where there is a page
        table; with a leading `[num_layers]` where there is a layer.
      v: like k.
      lengths: int32 `[batch]`.
      page_table: int32 `[batch, pages_per_seq]` or None.
      sinks: `[q_heads]` or None.
      k_scale: the shape of k without head_dim, float32, or None.
      v_scale: like k_scale.
      layer: int32 scalar or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    page_table: jax.Array | None
    sinks: jax.Array | None
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    layer: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes, dtypes and options of a decode_attention call.

    Attributes:
      batch: sequences.
      q_len: new tokens of each sequence, 1 in plain decoding.
      q_heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of a head.
      max_len: tokens that a sequence has room for.
      page_size: tokens in a page of a paged cache; None for a dense cache.
      num_pages: pages of a paged cache; None for a dense cache.
      num_layers: layers stacked in the cache; None for the cache of one layer.
      q_dtype: dtype of queries and output.
      kv_dtype: dtype of the cache.
      scale: factor of the logits.
      sliding_window: tokens that a query sees, or None.
      logits_soft_cap: bound of the logits, or None.
      has_sinks: whether each head has an attention sink.
      batch_invariant: whether a sequence's result must be the same in every batch.
    """

    batch: int
    q_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    page_size: int | None
    num_pages: int | None
    num_layers: int | None
    q_dtype: str
    kv_dtype: str
    scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    has_sinks: bool
    batch_invariant: bool = False

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        *,
        scale: float | None,
        sliding_window: int | None,
        logits_soft_cap: float | None,
        batch_invariant: bool = False,
    ) -> Problem:
        """Returns the problem of a call; raises ValueError, naming the argument, where an argument is wrong."""
        q, k, v, lengths, page_table, sinks, k_scale, v_scale, layer = inputs
        check(q.ndim == 4 and has_entries(q), "q", q.shape, "[batch, (q_len,) q_heads, head_dim], each at least 1")
        batch, q_len, q_heads, head_dim = q.shape
        cache = "[num_layers, " if layer is not None else "["
        cache += "batch, kv_heads, max_len" if page_table is None else "num_pages, kv_heads, page_size"
        rank = 4 if layer is None else 5
        check(k.ndim == rank and has_entries(k), "k", k.shape, f"{cache}, head_dim], each at least 1")
        check_shape("v", v, k.shape, "the shape of k")
        check(v.dtype == k.dtype, "v", v.dtype, f"the dtype of k, {k.dtype}")
        check(k.shape[-1] == head_dim, "k", k.shape, f"head_dim = {head_dim}, that of q")
        slabs, kv_heads, rows = k.shape[-4:-1]
        hint = swapped_layout("k", k.shape, lambda heads: q_heads % heads == 0, page_table is not None)
        accepted = f"a multiple of the cache's {kv_heads} KV heads{hint}"
        check(q_heads % kv_heads == 0, "q", f"{q_heads} heads", accepted)
        if page_table is None:
            check(slabs == batch, "k", f"a batch of {slabs}", f"{batch}, that of q; a paged cache needs page_table")
            max_len = rows
        else:
            check(
                page_table.ndim == 2 and page_table.shape[0] == batch and page_table.shape[1] >= 1,
                "page_table",
                page_table.shape,
                f"[batch = {batch}, pages_per_seq]",
            )
            check(page_table.dtype == jnp.int32, "page_table", page_table.dtype, "int32")
            max_len = rows * page_table.shape[1]
        check(dtype_name(q) in FLOAT_CACHE_DTYPES, "q", q.dtype, ", ".join(FLOAT_CACHE_DTYPES))
        kv_dtype = dtype_name(k)
        accepted = ", ".join(FLOAT_CACHE_DTYPES + QUANTIZED_CACHE_DTYPES)
        check(kv_dtype in FLOAT_CACHE_DTYPES + QUANTIZED_CACHE_DTYPES, "k", k.dtype, accepted)
        _check_scales(k, k_scale, v_scale)
        check_lengths(lengths, batch, max_len)
        if sinks is not None:
            check_shape("sinks", sinks, (q_heads,), "[q_heads]")
            check(jnp.issubdtype(sinks.dtype, jnp.floating), "sinks", sinks.dtype, "a float dtype")
        if layer is not None:
            check_layer(layer, k.shape[0])
        _check_options(scale, sliding_window, logits_soft_cap)
        return cls(
            batch=batch,
            q_len=q_len,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_len=max_len,
            page_size=None if page_table is None else rows,
            num_pages=None if page_table is None else slabs,
            num_layers=None if layer is None else k.shape[0],
            q_dtype=dtype_name(q),
            kv_dtype=kv_dtype,
            scale=head_dim**-0.5 if scale is None else float(scale),
            # A window as wide as the cache hides nothing.
            sliding_window=None if sliding_window is None or sliding_window >= max_len else int(sliding_window),
            logits_soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
            has_sinks=sinks is not None,
            batch_invariant=batch_invariant,
        )

    @property
    def group(self) -> int:
        """Number of query heads that share a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def layer_size(self) -> int:
        """Number of elements in the keys of one layer."""
        slabs = self.batch * self.max_len if self.num_pages is None else self.num_pages * (self.page_size or 1)
        return slabs * self.kv_heads * self.head_dim

    @property
    def has_scales(self) -> bool:
        """True for a quantized cache, which has scales."""
        return self.kv_dtype in QUANTIZED_CACHE_DTYPES

    def bytes_moved(self, lengths: Any = None) -> int:
        """Returns the bytes that must move to and from memory: queries, outputs, visible keys and values, once each.

        Args:
          lengths: tokens of each sequence, `[batch]`; None means full caches.
        """
        filled = np.full(self.batch, self.max_len) if lengths is None else np.asarray(lengths, np.int64)
        seen = filled if self.sliding_window is None else np.minimum(filled, self.sliding_window + self.q_len - 1)
        cached = int(seen.sum()) * bytes_per_token(self.kv_heads, self.head_dim, self.kv_dtype)
        queries = self.batch * self.q_len * self.q_heads * self.head_dim * jnp.dtype(self.q_dtype).itemsize
        return cached + 2 * queries

    def flops(self, lengths: Any = None) -> int:
        """Returns the floating-point operations of the two products, 2 for each multiply-add."""
        filled = np.full(self.batch, self.max_len) if lengths is None else np.asarray(lengths, np.int64)
        position = filled[:, None] - self.q_len + np.arange(self.q_len)
        seen = np.maximum(position + 1, 0)
        if self.sliding_window is not None:
            seen = np.minimum(seen, self.sliding_window)
        return int(seen.sum()) * self.q_heads * self.head_dim * 4

    def planned(self) -> Problem:
        """Returns the problem that block sizes are chosen for; a batch-invariant one is planned for one sequence."""
        return dataclasses.replace(self, batch=1, batch_invariant=False) if self.batch_invariant else self

    def sharding_rule(self, inputs: Inputs) -> ShardingRule:
        """Returns the rule of attention, which is apart for each sequence and each KV head.

        Parts of a dense cache are attended to apart, too (`length_shards.py`), unless queries have windows or are too
        many: such a cache is gathered, as are pages.
        """
        slabs, rows = ("batch", "max_len") if self.page_size is None else ("num_pages", "page_size")
        scale = f"{'' if self.num_layers is None else 'num_layers '}{slabs} kv_heads {rows}"
        heads = "(kv_heads group)"
        q, token = f"batch q_len {heads} head_dim", f"{scale} head_dim"
        names = (q, token, token, "batch", "batch pages_per_seq", heads, scale, scale, "")
        given = [name for name, array in zip(names, inputs, strict=True) if array is not None]
        sizes = {"kv_heads": self.kv_heads, "group": self.group}
        # One KV head that all query heads share is on every device, and they are sharded.
        sharded = frozenset({"batch", "kv_heads" if self.kv_heads > 1 else "group"})
        in_parts = self.sliding_window is None and self.q_len * self.group <= MOST_ROWS_OF_PARTS
        reduced = frozenset({"max_len"} if in_parts else ())
        return ShardingRule(given, (q, f"batch q_len {heads}"), sharded, reduced, sizes)

    def run_share(self, run: Callable[[Problem, Inputs], Any], inputs: Inputs, share: Share) -> Any:
        """Runs attention for some of the sequences and heads, over a part of their caches where these are sharded."""
        local = dataclasses.replace(
            self,
            batch=share.of(self.batch, "batch"),
            q_heads=share.of(self.q_heads, "kv_heads", "group"),
            kv_heads=share.of(self.kv_heads, "kv_heads"),
        )
        return attend_to_part(local, run, inputs, share) if share.reduced else run(local, inputs)

    def tuning_key(self) -> TuningKey:
        """Returns the key under which tuned block sizes are stored."""
        seen = self.max_len
        if self.sliding_window is not None:
            seen = min(seen, self.sliding_window + self.q_len - 1)
        cache = "dense" if self.page_size is None else f"pages of {self.page_size}"
        window = " windowed" if self.sliding_window is not None else ""
        return TuningKey(
            kind=f"{self.q_dtype} queries, {self.group} x {self.head_dim}, {self.kv_dtype} {cache}{window}",
            sizes={"batch": self.batch, "q_len": self.q_len, "kv_heads": self.kv_heads, "seen": seen},
        )

    def __str__(self) -> str:
        cache = f"max_len={self.max_len}" if self.page_size is None else f"page_size={self.page_size}"
        options = [
            f"sliding_window={self.sliding_window}" if self.sliding_window is not None else "",
            f"logits_soft_cap={self.logits_soft_cap:g}" if self.logits_soft_cap is not None else "",
            "sinks" if self.has_sinks else "",
            "batch_invariant" if self.batch_invariant else "",
        ]
        return ", ".join(
            part
            for part in (
                f"batch={self.batch}",
                f"q_len={self.q_len}",
                f"heads={self.q_heads}/{self.kv_heads}x{self.head_dim}",
                cache,
                f"q={self.q_dtype}",
                f"kv={self.kv_dtype}",
                *options,
            )
            if part
        )


def _check_scales(k: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    """Raises ValueError unless the scales go with the cache."""
    kv_dtype = dtype_name(k)
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if kv_dtype in QUANTIZED_CACHE_DTYPES:
            check(scales is not None, name, "None", f"float32 {k.shape[:-1]}: a {kv_dtype} cache has scales")
        else:
            check(scales is None, name, "an array", f"None: a {kv_dtype} cache has no scales")
        if scales is not None:
            check_shape(name, scales, k.shape[:-1], "the shape of k without head_dim")
            check(scales.dtype == jnp.float32, name, scales.dtype, "float32")


def _check_options(scale: Any, sliding_window: Any, logits_soft_cap: Any) -> None:
    """Raises ValueError unless the options are None or numbers in their ranges."""
    check_number("scale", scale, np.isfinite, "None or a finite number")
    check_number(
        "sliding_window", sliding_window, lambda n: is_integer(n) and n >= 1, "None or an integer of at least 1"
    )
    check_number("logits_soft_cap", logits_soft_cap, lambda cap: 0 < cap < np.inf, "None or a finite number above 0")
