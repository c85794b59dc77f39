"""The key/value cache: dense or paged, float or quantized; a pytree that append_kv updates in place when donated."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.export import register_pytree_node_serialization
from jax.sharding import PartitionSpec

from palladion.reference.quantization import quantize_rows

FLOAT_CACHE_DTYPES: Final = ("float32", "bfloat16", "float16")
QUANTIZED_CACHE_DTYPES: Final = ("int8", "float8_e4m3fn", "float8_e5m2")
"""Cache dtypes that need a scale per token and head."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Cached keys and values; the caller keeps how many tokens of them are valid (`lengths`).

    The arrays hold one layer, or all layers with a leading `[num_layers]`: the operations then take `layer=` and read
    and write that layer in place, where slicing it out and writing it back would copy it.

    Attributes:
      k: dense `[batch, kv_heads, max_len, head_dim]` or paged `[num_pages, kv_heads, page_size, head_dim]`.
      v: like k.
      k_scale: float32, the shape of k without head_dim, for int8 and float8 caches; None otherwise.
      v_scale: like k_scale.
      page_table: int32 `[batch, pages_per_seq]` for a paged cache: page i of a sequence holds its tokens
        i * page_size to (i + 1) * page_size - 1. None for a dense cache.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    page_table: jax.Array | None = None

    @classmethod
    def dense(
        cls,
        batch: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: Any = jnp.bfloat16,
        *,
        num_layers: int | None = None,
    ) -> KVCache:
        """Makes an empty dense cache.

        Args:
          batch: sequences.
          kv_heads: key/value heads.
          max_len: tokens each sequence has room for.
          head_dim: width of a head.
          dtype: float32, bfloat16, float16, or int8, float8_e4m3fn, float8_e5m2 with a scale per token and head.
          num_layers: layers stacked in the cache; None makes a cache of one layer, without that dimension.

        Raises:
          ValueError: a size is below 1, or the dtype is not listed.
        """
        return _empty((batch, kv_heads, max_len, head_dim), dtype, None, num_layers)

    @classmethod
    def paged(
        cls,
        num_pages: int,
        kv_heads: int,
        page_size: int,
        head_dim: int,
        page_table: jax.Array,
        dtype: Any = jnp.bfloat16,
        *,
        num_layers: int | None = None,
    ) -> KVCache:
        """Makes an empty paged cache; `page_table` (int32 `[batch, pages_per_seq]`) assigns its pages to sequences.

        Raises:
          ValueError: a size is below 1, the dtype is none that `dense` accepts, or the page table has another rank or
            dtype.
        """
        page_table = jnp.asarray(page_table)
        if page_table.dtype == jnp.int64:  # of Python's integers, with x64
            page_table = page_table.astype(jnp.int32)
        if page_table.ndim != 2 or page_table.dtype != jnp.int32:
            given = f"{page_table.dtype} {page_table.shape}"
            raise ValueError(f"KVCache: page_table: got {given}; accepted: int32 [batch, pages_per_seq]")
        return _empty((num_pages, kv_heads, page_size, head_dim), dtype, page_table, num_layers)

    @property
    def max_len(self) -> int:
        """Tokens that the cache of one sequence has room for."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return self.k.shape[-2] * pages

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales."""
        parts = (self.k, self.v, self.k_scale, self.v_scale)
        return sum(part.size * part.dtype.itemsize for part in parts if part is not None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one cached token in all layers held here: a step reads so many for each token of context."""
        return self.nbytes // (self.k.shape[-4] * self.k.shape[-2])

    def specs(self, spec: PartitionSpec) -> KVCache:
        """Returns a KVCache that holds the PartitionSpec of each array, for `in_specs`, `NamedSharding`s and jit.

        Args:
          spec: PartitionSpec of k and v. Scales have the same without head_dim, and every device has the page table.
        """
        scales = PartitionSpec(*spec[: self.k.ndim - 1])
        specs = jax.tree.map(lambda array: spec if array.ndim == self.k.ndim else scales, self)
        return specs if self.page_table is None else dataclasses.replace(specs, page_table=PartitionSpec())


register_pytree_node_serialization(
    KVCache,
    serialized_name="palladion.KVCache",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
    from_children=lambda _, parts: KVCache(*parts),
)


def _empty(
    sizes: tuple[int, int, int, int], dtype: Any, page_table: jax.Array | None, num_layers: int | None
) -> KVCache:
    """Makes a cache of zeros."""
    shape = sizes if num_layers is None else (num_layers, *sizes)
    if min(shape) < 1:
        raise ValueError(f"KVCache: every size must be at least 1, got {shape}")
    name = jnp.dtype(dtype).name
    if name not in FLOAT_CACHE_DTYPES + QUANTIZED_CACHE_DTYPES:
        accepted = ", ".join(FLOAT_CACHE_DTYPES + QUANTIZED_CACHE_DTYPES)
        raise ValueError(f"KVCache: dtype {name} is not one of {accepted}")
    scaled = name in QUANTIZED_CACHE_DTYPES

    # Keys and values, and their scales, are separate buffers: a donated pytree may not hold a buffer twice.
    def zeros() -> jax.Array:
        return jnp.zeros(shape, dtype)

    def scales() -> jax.Array | None:
        return jnp.zeros(shape[:-1], jnp.float32) if scaled else None

    return KVCache(zeros(), zeros(), scales(), scales(), page_table)


def bytes_per_token(kv_heads: int, head_dim: int, dtype: Any) -> int:
    """Returns the bytes of one token's keys and values, scales included, in the cache of one layer."""
    scale = 4 if jnp.dtype(dtype).name in QUANTIZED_CACHE_DTYPES else 0
    return 2 * kv_heads * (head_dim * jnp.dtype(dtype).itemsize + scale)


def quantize_kv(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Converts keys or values to a cache's dtype, with one scale per token and head where that dtype needs it.

    Args:
      x: `[..., head_dim]`, float.
      dtype: the cache's dtype.

    Returns:
      `[..., head_dim]` in `dtype`, and float32 scales `[...]` or None.
    """
    if jnp.dtype(dtype).name in QUANTIZED_CACHE_DTYPES:
        return quantize_rows(x, dtype)
    return x.astype(dtype), None
