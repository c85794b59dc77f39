"""The problem of an append_qkv call: its shapes and dtypes, validated before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.append_kv import problem as append
from palladion.kernels.checks import check, check_shape, has_entries, swapped_layout
from palladion.kernels.search_space import TuningKey
from palladion.kernels.sharding import ShardingRule, Share
from palladion.reference.append_qkv import split_qkv
from palladion.reference.caches import KVCache


class Inputs(NamedTuple):
    """Arrays of a call, in the shapes that all implementations take.

    Attributes:
      cache: dense or paged cache of one layer, or of all layers.
      qkv: `[batch, q_len, q_heads + 2 * kv_heads, head_dim]`.
      lengths: int32 `[batch]`.
      cosine: float32 `[batch, q_len, rotary_dim / 2]`.
      sine: like cosine.
      new_tokens: int32 `[batch]` or None.
      layer: int32 scalar or None.
    """

    cache: KVCache
    qkv: jax.Array
    lengths: jax.Array
    cosine: jax.Array
    sine: jax.Array
    new_tokens: jax.Array | None
    layer: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """An append_qkv call without its arrays.

    Attributes:
      append: append_kv's problem for the new keys and values.
      q_heads: number of query heads.
      rotary_dim: number of features of a head that are rotated, the first ones.
    """

    append: append.Problem
    q_heads: int
    rotary_dim: int

    @classmethod
    def of(cls, inputs: Inputs) -> Problem:
        """Returns the problem of a call; raises ValueError, naming the argument, if its arrays do not fit together."""
        cache, qkv, _, cosine, sine, _, _ = inputs
        shape = "[batch, (q_len,) q_heads + 2 * kv_heads, head_dim], each at least 1"
        check(qkv.ndim == 4 and has_entries(qkv), "qkv", f"shape {qkv.shape}", shape)
        batch, q_len, heads, head_dim = qkv.shape
        kv_heads = cache.k.shape[-3] if cache.k.ndim >= 3 else 1
        q_heads = heads - 2 * kv_heads
        grouped = q_heads >= 1 and q_heads % kv_heads == 0
        given = f"{heads} heads for a cache of {kv_heads}"
        accepted = "a multiple of kv_heads for queries, and twice kv_heads for keys and values"
        if cache.k.ndim >= 3:
            paged = cache.page_table is not None
            accepted += swapped_layout("cache.k", cache.k.shape, lambda n: heads > 2 * n and heads % n == 0, paged)
        check(grouped, "qkv", given, accepted)
        check(cosine.ndim == 3, "cosine", f"shape {cosine.shape}", "[batch, q_len, rotary_dim / 2]")
        pairs = cosine.shape[-1]
        check_shape("cosine", cosine, (batch, q_len, pairs), "[batch, q_len, rotary_dim / 2]")
        check(1 <= pairs <= head_dim // 2, "cosine", f"{pairs} angles", f"1 to {head_dim // 2}, half of head_dim")
        check_shape("sine", sine, cosine.shape, "the shape of cosine")
        for name, angles in (("cosine", cosine), ("sine", sine)):
            check(angles.dtype == jnp.float32, name, angles.dtype, "float32")
        new = jax.ShapeDtypeStruct((batch, q_len, kv_heads, head_dim), qkv.dtype)
        written = append.Inputs(cache, new, new, inputs.lengths, inputs.new_tokens, inputs.layer)  # type: ignore[arg-type]
        return cls(append.Problem.of(written), q_heads, 2 * pairs)

    @property
    def heads(self) -> int:
        """Heads of queries, keys and values together."""
        return self.q_heads + 2 * self.append.kv_heads

    @property
    def quantized(self) -> bool:
        """Whether the cache is quantized."""
        return self.append.quantized

    def bytes_moved(self) -> int:
        """Returns the bytes that must move: all heads and angles are read, queries and new tokens are written."""
        p = self.append
        item = jnp.dtype(p.x_dtype).itemsize
        q = p.batch * p.q_len * self.q_heads * p.head_dim * item
        return p.bytes_moved() + 2 * q + p.batch * p.q_len * self.rotary_dim * 4

    def flops(self) -> int:
        """Returns the floating-point operations of the rotations: two multiplications and an addition per number."""
        p = self.append
        return 3 * p.batch * p.q_len * (self.q_heads + p.kv_heads) * self.rotary_dim

    def planned(self) -> Problem:
        """Returns the problem that block sizes are chosen for: this one."""
        return self

    def sharding_rule(self, inputs: Inputs) -> ShardingRule:
        """Returns append_kv's rule for the cache; a device has all of qkv and takes its heads."""
        cache, qkv, lengths, _, _, new_tokens, layer = inputs
        new: Any = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
        rule = self.append.sharding_rule(append.Inputs(cache, new, new, lengths, new_tokens, layer))
        written, _, _, *rest = rule.inputs
        angles = "batch q_len pairs"
        heads = "batch q_len (kv_heads group) head_dim"
        sizes = {"kv_heads": self.append.kv_heads, "group": self.q_heads // self.append.kv_heads}
        joined = (written, "batch q_len joined_heads head_dim", rest[0], angles, angles, *rest[1:])
        return ShardingRule(joined, (heads, written), rule.sharded, sizes=sizes)

    def run_share(self, run: Callable[[Problem, Inputs], Any], inputs: Inputs, share: Share) -> Any:
        """Rotates and writes some of the sequences and heads."""
        p = self.append
        kv_heads, q_heads = share.of(p.kv_heads, "kv_heads"), share.of(self.q_heads, "kv_heads")
        index = share.index("kv_heads")
        parts = [
            jax.lax.dynamic_slice_in_dim(inputs.qkv, start + index * heads, heads, axis=2)
            for start, heads in ((0, q_heads), (self.q_heads, kv_heads), (self.q_heads + p.kv_heads, kv_heads))
        ]
        qkv = inputs.qkv if kv_heads == p.kv_heads else jnp.concatenate(parts, axis=2)
        local = p.local_inputs(inputs._replace(qkv=qkv), share)
        q, written = run(dataclasses.replace(self, append=p.local(share), q_heads=q_heads), local)
        return q, dataclasses.replace(written, page_table=inputs.cache.page_table)

    def tuning_key(self) -> TuningKey:
        """Returns what block sizes depend on."""
        key = self.append.tuning_key()
        return dataclasses.replace(key, sizes={**key.sizes, "q_heads": self.q_heads})

    def __str__(self) -> str:
        return f"q_heads={self.q_heads}, rotary_dim={self.rotary_dim}, {self.append}"


def rotate_in_xla(inputs: Inputs) -> tuple[jax.Array, append.Inputs]:
    """Returns the rotated queries, and append_kv's inputs with the rotated keys, for kernels that do not rotate."""
    q, k, v = split_qkv(inputs.qkv, inputs.cosine, inputs.sine, inputs.cache.k.shape[-3])
    return q, append.Inputs(inputs.cache, k, v, inputs.lengths, inputs.new_tokens, inputs.layer)
