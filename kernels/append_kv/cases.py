"""Named append_kv workloads, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.append_kv.problem import Inputs, Problem
from palladion.reference.caches import KVCache

DEAD_PAGE: Final = 2_147_480_000
"""Value of page-table entries after a sequence's last filled page, far outside the cache."""

SPARE_PAGES: Final = 3
"""Pages that belong to no sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A workload: sizes, dtypes and lengths.

    Attributes:
      name: name of letters, digits and dashes.
      batch: number of sequences.
      kv_heads: number of key/value heads.
      head_dim: width of a head.
      max_len: most tokens of a sequence.
      q_len: new tokens per sequence.
      lengths: tokens of each sequence, new ones included; None means full caches.
      new_tokens: number of real tokens among each sequence's q_len; None means all.
      page_size: tokens of a page; None for a dense cache.
      num_layers: layers stacked in the cache, of which the last is written; None for the cache of one layer.
      dtype: dtype of the new keys and values.
      kv_dtype: dtype of the cache; None means that of the new keys and values.
    """

    name: str
    batch: int
    kv_heads: int
    head_dim: int
    max_len: int
    q_len: int = 1
    lengths: tuple[int, ...] | None = None
    new_tokens: tuple[int, ...] | None = None
    page_size: int | None = None
    num_layers: int | None = None
    dtype: str = "bfloat16"
    kv_dtype: str | None = None

    @property
    def filled(self) -> tuple[int, ...]:
        """Tokens of each sequence, new ones included."""
        return (self.max_len,) * self.batch if self.lengths is None else self.lengths

    def shapes(self) -> Inputs:
        """Returns the shapes and dtypes of the inputs, which are enough to compile."""
        return jax.eval_shape(lambda: _inputs(self))

    def problem(self) -> Problem:
        """Returns the problem of a call with this case's inputs."""
        problems: list[Problem] = []
        jax.eval_shape(lambda inputs: problems.append(Problem.of(inputs)), self.shapes())
        return problems[0]


def _inputs(case: Case) -> Inputs:
    """Returns zeros as inputs, with pages in order."""
    dtype, layers = case.kv_dtype or case.dtype, case.num_layers
    if case.page_size is None:
        cache = KVCache.dense(case.batch, case.kv_heads, case.max_len, case.head_dim, dtype, num_layers=layers)
    else:
        pages = case.max_len // case.page_size
        table = jnp.arange(case.batch * pages, dtype=jnp.int32).reshape(case.batch, pages)
        sizes = (table.size + SPARE_PAGES, case.kv_heads, case.page_size, case.head_dim)
        cache = KVCache.paged(*sizes, table, dtype, num_layers=layers)
    new = jnp.zeros((case.batch, case.q_len, case.kv_heads, case.head_dim), case.dtype)
    return Inputs(
        cache=cache,
        k=new,
        v=new,
        lengths=jnp.asarray(case.filled, jnp.int32),
        new_tokens=None if case.new_tokens is None else jnp.asarray(case.new_tokens, jnp.int32),
        layer=None if layers is None else jnp.int32(layers - 1),
    )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Returns normal-distributed keys and values, with one zero, and a cache full of other numbers, some of them NaN.

    Pages are permuted, and page-table entries after a sequence's last page point far outside the cache.
    """
    rng = np.random.default_rng(seed)
    inputs = _inputs(case)

    def noise(array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        if array.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-128, 128, array.shape, np.int8))
        values = rng.standard_normal(array.shape, np.float32)
        values[rng.random(array.shape, np.float32) < 0.1] = np.nan
        return jnp.asarray(values).astype(array.dtype)

    cache = inputs.cache
    arrays: dict[str, Any] = {name: noise(getattr(cache, name)) for name in ("k", "v", "k_scale", "v_scale")}
    if cache.page_table is not None:
        pages = rng.permutation(cache.k.shape[-4])[: cache.page_table.size].reshape(cache.page_table.shape)
        filled = np.arange(pages.shape[1]) * cache.k.shape[-2] < np.asarray(case.filled)[:, None]
        arrays["page_table"] = jnp.asarray(np.where(filled, pages, DEAD_PAGE), jnp.int32)
    new = rng.standard_normal((2, *inputs.k.shape), np.float32)
    new[0, 0, -1, 0] = 0  # a head of zeros, whose scale is 0
    k, v = (jnp.asarray(x).astype(inputs.k.dtype) for x in new)
    return inputs._replace(cache=dataclasses.replace(cache, **arrays), k=k, v=v)


_SMALL: Final = Case(name="", batch=3, kv_heads=2, head_dim=128, max_len=256, dtype="float32", lengths=(1, 129, 256))


def _small(name: str, **changes: Any) -> Case:
    return dataclasses.replace(_SMALL, name=name, **changes)


_RAGGED: Final = {"q_len": 5, "lengths": (2, 131, 256)}

TESTS: Final = (
    _small("float32"),
    _small("bfloat16", dtype="bfloat16", lengths=(6, 129, 0)),
    _small("float16", dtype="float16"),
    _small("int8", kv_dtype="int8", kv_heads=8, lengths=(3, 130, 256)),
    _small("float8-e4m3fn", kv_dtype="float8_e4m3fn", dtype="bfloat16", num_layers=2),
    _small("float8-e5m2", kv_dtype="float8_e5m2", lengths=(7, 8, 9)),
    _small("head-dim-64", head_dim=64, dtype="bfloat16", num_layers=2),
    _small("head-dim-80-int8", head_dim=80, kv_dtype="int8", kv_heads=3),
    _small("head-dim-192", head_dim=192, dtype="bfloat16", **_RAGGED),
    _small("short-cache", head_dim=16, max_len=24, lengths=(24, 1, 9)),
    _small("odd-cache", max_len=300, lengths=(300, 150, 4)),
    _small("scales-between-heads", kv_dtype="int8", kv_heads=3, batch=4, lengths=(1, 127, 128, 129)),
    _small("verify", batch=9, dtype="bfloat16", q_len=4, lengths=(0, 1, 2, 3, 4, 128, 130, 255, 256)),
    _small("verify-int8", kv_dtype="int8", kv_heads=3, batch=4, q_len=5, lengths=(2, 131, 256, 0)),
    _small("verify-head-dim-64", head_dim=64, kv_dtype="int8", **_RAGGED),
    _small("prefill", q_len=150, dtype="bfloat16", lengths=(40, 150, 255), num_layers=2),
    _small("prefill-int8", q_len=150, kv_dtype="int8", lengths=(40, 150, 255), new_tokens=(7, 150, 91)),
    _small("prefill-head-dim-80", head_dim=80, q_len=200, dtype="bfloat16", lengths=(0, 201, 256)),
    _small("new-tokens", q_len=6, dtype="bfloat16", lengths=(3, 77, 256), new_tokens=(6, 0, 4)),
    _small("paged", page_size=16, max_len=64, dtype="bfloat16", lengths=(1, 16, 17), num_layers=2),
    _small("paged-8-int8", page_size=8, max_len=24, kv_dtype="int8", lengths=(1, 8, 9)),
    _small("paged-48", page_size=48, max_len=144, q_len=50, dtype="bfloat16", lengths=(48, 49, 100)),
    _small("paged-128-int8", page_size=128, kv_dtype="int8", q_len=3, lengths=(130, 0, 128), num_layers=2),
    _small("paged-prefill-float8", page_size=16, kv_dtype="float8_e5m2", q_len=100, lengths=(256, 70, 101)),
)
"""Small cases for tests, each with a property that is easy to get wrong."""

MODELS: Final = (
    Case(name="llama-3-8b", batch=8, kv_heads=8, head_dim=128, max_len=4096, num_layers=4),
    Case(name="llama-3-8b-256", batch=256, kv_heads=8, head_dim=128, max_len=512, num_layers=2),
    Case(name="llama-3-8b-int8", batch=8, kv_heads=8, head_dim=128, max_len=4096, num_layers=4, kv_dtype="int8"),
    Case(name="llama-3-8b-prefill", batch=1, kv_heads=8, head_dim=128, max_len=4096, q_len=512, num_layers=4),
    Case(name="llama-3-8b-paged", batch=8, kv_heads=8, head_dim=128, max_len=4096, page_size=16, num_layers=2),
    Case(name="smollm2-135m", batch=1, kv_heads=3, head_dim=64, max_len=2048, num_layers=30),
    Case(name="gpt-oss-20b-float8", batch=8, kv_heads=8, head_dim=64, max_len=8192, kv_dtype="float8_e4m3fn"),
)
"""Cases of real models."""
