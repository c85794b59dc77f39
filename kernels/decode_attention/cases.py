"""Named decode_attention workloads, shared by tests, compile checks, the tuner and benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.reference.caches import QUANTIZED_CACHE_DTYPES

DEAD_PAGE: Final = 2_147_480_000
"""Value of page-table entries past a sequence's last filled page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A decode_attention workload: sizes, dtypes, options and lengths.

    Attributes:
      name: the case's name, of letters, digits and dashes.
      batch: sequences.
      q_heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of a head.
      max_len: tokens that a sequence has room for.
      q_len: new tokens of each sequence.
      lengths: tokens of each sequence, new ones included; None means full caches.
      page_size: tokens in a page; None for a dense cache.
      num_layers: layers stacked in the cache, the last of which is read; None for the cache of one layer.
      dtype: dtype of the queries.
      kv_dtype: dtype of the cache; None means that of the queries.
      scale: factor of the logits; None means 1 / sqrt(head_dim).
      sliding_window: tokens that a query sees, or None.
      logits_soft_cap: bound of the logits, or None.
      sinks: whether heads have attention sinks.
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    q_len: int = 1
    lengths: tuple[int, ...] | None = None
    page_size: int | None = None
    num_layers: int | None = None
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    scale: float | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    sinks: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `decode_attention` that are not arrays."""
        names = ("scale", "sliding_window", "logits_soft_cap")
        return {name: getattr(self, name) for name in names}

    @property
    def filled(self) -> tuple[int, ...]:
        """Length of each sequence."""
        return (self.max_len,) * self.batch if self.lengths is None else self.lengths

    def shapes(self) -> Inputs:
        """Returns the shapes and dtypes of the inputs, which are enough to compile a call."""
        kv_dtype = self.kv_dtype or self.dtype
        pages = None if self.page_size is None else self.max_len // self.page_size
        # A paged cache has a few spare pages.
        slabs, tokens = (self.batch, self.max_len) if pages is None else (self.batch * pages + 3, self.page_size)
        cache: tuple[Any, ...] = (slabs, self.kv_heads, tokens, self.head_dim)
        if self.num_layers is not None:
            cache = (self.num_layers, *cache)
        scaled = kv_dtype in QUANTIZED_CACHE_DTYPES

        def array(present: bool, shape: tuple[int, ...], dtype: str) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) if present else None

        return Inputs(
            q=array(True, (self.batch, self.q_len, self.q_heads, self.head_dim), self.dtype),
            k=array(True, cache, kv_dtype),
            v=array(True, cache, kv_dtype),
            lengths=array(True, (self.batch,), "int32"),
            page_table=array(pages is not None, (self.batch, pages or 1), "int32"),
            sinks=array(self.sinks, (self.q_heads,), "float32"),
            k_scale=array(scaled, cache[:-1], "float32"),
            v_scale=array(scaled, cache[:-1], "float32"),
            layer=array(self.num_layers is not None, (), "int32"),
        )

    def problem(self) -> Problem:
        """Returns the problem of a call with this case's inputs and options."""
        problems: list[Problem] = []
        jax.eval_shape(lambda inputs: problems.append(Problem.of(inputs, **self.options)), self.shapes())
        return problems[0]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Returns normal-distributed inputs in which everything that no query sees is poisoned.

    Dead tokens, other layers and spare pages are NaN (in an int8 cache the highest code, with NaN scales); pages are
    permuted, and dead entries of the page table point far outside the cache.
    """
    rng = np.random.default_rng(seed)
    shapes = case.shapes()
    slabs, kv_heads, _, head_dim = shapes.k.shape[-4:]
    lengths = np.asarray(case.filled, np.int32)

    # Where each visible token lies: a sequence or page (slab), and a token within it (row).
    token = np.arange(case.max_len)
    alive = token < lengths[:, None]  # [batch, max_len]
    if case.sliding_window is not None:
        alive &= token > lengths[:, None] - case.q_len - case.sliding_window
    page_table = None
    slab, row = np.broadcast_to(np.arange(case.batch)[:, None], alive.shape), np.broadcast_to(token, alive.shape)
    if case.page_size is not None:
        pages = case.max_len // case.page_size
        page_table = rng.permutation(slabs)[: case.batch * pages].reshape(case.batch, pages).astype(np.int32)
        slab, row = np.repeat(page_table, case.page_size, axis=1), row % case.page_size
        filled = np.arange(pages) * case.page_size < lengths[:, None]
        page_table = np.where(filled, page_table, np.int32(DEAD_PAGE))
    slab, row = slab[alive], row[alive]

    def cache() -> tuple[jax.Array, jax.Array | None]:
        values = rng.standard_normal((slab.size, kv_heads, head_dim), np.float32)
        dtype, scales = np.dtype(shapes.k.dtype), None
        if shapes.k_scale is not None:
            largest = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
            scale = np.abs(values).max(axis=-1) / largest  # [tokens, kv_heads]
            values = values / scale[..., None]
            values = np.round(values) if dtype == np.int8 else values
            scales = _poisoned(shapes.k_scale, slab, row, scale)
        return jnp.asarray(_poisoned(shapes.k, slab, row, values)), None if scales is None else jnp.asarray(scales)

    k, k_scale = cache()
    v, v_scale = cache()
    return Inputs(
        q=jnp.asarray(rng.standard_normal(shapes.q.shape, np.float32)).astype(shapes.q.dtype),
        k=k,
        v=v,
        lengths=jnp.asarray(lengths),
        page_table=None if page_table is None else jnp.asarray(page_table),
        sinks=jnp.asarray(rng.standard_normal(case.q_heads, np.float32)) if case.sinks else None,
        k_scale=k_scale,
        v_scale=v_scale,
        layer=None if case.num_layers is None else jnp.int32(case.num_layers - 1),
    )


def _poisoned(shape: Any, slab: np.ndarray, row: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns a cache, or its scales, that is poisoned except for the given tokens of its last layer."""
    dtype = np.dtype(shape.dtype)
    cache = np.full(shape.shape, 127 if dtype == np.int8 else np.nan, dtype)
    last = cache if len(shape.shape) == values.ndim + 1 else cache[-1]
    last[slab, :, row] = values.astype(dtype)
    return cache


_SMALL: Final = Case(name="", batch=2, q_heads=8, kv_heads=2, head_dim=64, max_len=384, dtype="float32")


def _small(name: str, **changes: Any) -> Case:
    return dataclasses.replace(_SMALL, name=name, **changes)


TESTS: Final = (
    _small("mha", kv_heads=8, lengths=(1, 384)),
    _small("gqa", lengths=(127, 129)),
    _small("gqa-bfloat16", batch=3, head_dim=128, max_len=304, dtype="bfloat16", lengths=(0, 128, 299)),
    _small("gqa-float16", dtype="float16", lengths=(255, 257)),
    _small("mqa-head-dim-80", kv_heads=1, head_dim=80, lengths=(64, 384)),
    _small("group-of-3", q_heads=9, kv_heads=3, dtype="bfloat16", lengths=(5, 256)),
    _small("head-dim-256", q_heads=2, kv_heads=1, head_dim=256, dtype="bfloat16", lengths=(17, 200)),
    _small("head-dim-72", head_dim=72, lengths=(33, 131)),
    _small("odd-cache", max_len=300, lengths=(299, 131)),
    _small("short-cache", head_dim=128, max_len=37, lengths=(37, 12)),
    _small("wide-queries", kv_dtype="bfloat16", lengths=(100, 300)),
    _small("narrow-queries", dtype="bfloat16", kv_dtype="float32", lengths=(100, 300)),
    _small("soft-cap", logits_soft_cap=2.0, scale=0.5, lengths=(90, 260)),
    _small("sinks", batch=3, sinks=True, lengths=(0, 1, 200)),
    _small("window", batch=4, sliding_window=128, lengths=(300, 128, 129, 5)),
    _small("window-of-1", dtype="bfloat16", sliding_window=1, lengths=(300, 257)),
    _small(
        "window-sinks-soft-cap", dtype="bfloat16", sliding_window=70, sinks=True, logits_soft_cap=5.0, lengths=(299, 9)
    ),
    _small("layers", num_layers=3, lengths=(130, 20)),
    _small("q-len-5", batch=3, q_len=5, lengths=(3, 130, 300)),
    _small("q-len-3-group-of-3", q_heads=9, kv_heads=3, q_len=3, dtype="bfloat16", lengths=(2, 258)),
    _small(
        "prefill", q_heads=6, head_dim=80, q_len=150, sliding_window=60, sinks=True, num_layers=2, lengths=(140, 300)
    ),
    _small("paged", batch=4, head_dim=128, max_len=320, page_size=16, lengths=(0, 16, 17, 320)),
    _small("paged-layers", max_len=512, page_size=128, num_layers=2, q_len=4, dtype="bfloat16", lengths=(65, 300)),
    _small("paged-large", max_len=1024, page_size=512, dtype="bfloat16", lengths=(1, 513)),
    _small("paged-window", head_dim=128, max_len=320, page_size=8, sliding_window=9, sinks=True),
    _small("paged-narrow", max_len=320, page_size=16, lengths=(300, 31)),
    _small("int8", kv_dtype="int8", lengths=(300, 31)),
    _small("int8-window", head_dim=128, kv_dtype="int8", sliding_window=100, q_len=3, lengths=(300, 131)),
    _small("int8-paged", head_dim=128, max_len=512, kv_dtype="int8", page_size=128, lengths=(512, 129)),
    _small(
        "int8-paged-layers",
        head_dim=128,
        max_len=320,
        kv_dtype="int8",
        page_size=32,
        num_layers=2,
        q_len=2,
        dtype="bfloat16",
    ),
    _small("float8-e4m3fn", kv_dtype="float8_e4m3fn", dtype="bfloat16", lengths=(257, 2)),
    _small("float8-e5m2", kv_dtype="float8_e5m2", lengths=(257, 2), logits_soft_cap=9.0),
)
"""Small cases for tests, each with something that goes wrong easily."""

MODELS: Final = (
    Case(name="llama-3-8b", batch=8, q_heads=32, kv_heads=8, head_dim=128, max_len=4096),
    Case(name="llama-3-8b-layers", batch=8, q_heads=32, kv_heads=8, head_dim=128, max_len=4096, num_layers=4),
    Case(name="llama-3-8b-32k", batch=1, q_heads=32, kv_heads=8, head_dim=128, max_len=32768),
    Case(name="llama-3-8b-float32", batch=2, q_heads=32, kv_heads=8, head_dim=128, max_len=4096, dtype="float32"),
    Case(name="llama-3-8b-int8", batch=8, q_heads=32, kv_heads=8, head_dim=128, max_len=4096, kv_dtype="int8"),
    Case(
        name="llama-3-8b-float8", batch=8, q_heads=32, kv_heads=8, head_dim=128, max_len=4096, kv_dtype="float8_e4m3fn"
    ),
    Case(name="llama-3-8b-paged", batch=8, q_heads=32, kv_heads=8, head_dim=128, max_len=4096, page_size=16),
    Case(
        name="llama-3-8b-paged-int8",
        batch=8,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        max_len=4096,
        page_size=64,
        kv_dtype="int8",
    ),
    Case(name="llama-3-8b-verify", batch=8, q_heads=32, kv_heads=8, head_dim=128, max_len=4096, q_len=8),
    Case(name="llama-3-8b-prefill", batch=1, q_heads=32, kv_heads=8, head_dim=128, max_len=4096, q_len=512),
    Case(name="smollm2-135m", batch=1, q_heads=9, kv_heads=3, head_dim=64, max_len=2048, num_layers=30),
    Case(name="qwen-2.5-7b", batch=8, q_heads=28, kv_heads=4, head_dim=128, max_len=4096),
    Case(name="phi-3-mini", batch=4, q_heads=32, kv_heads=32, head_dim=96, max_len=4096),
    Case(name="phi-2", batch=4, q_heads=32, kv_heads=32, head_dim=80, max_len=2048),
    Case(name="head-dim-112", batch=2, q_heads=64, kv_heads=64, head_dim=112, max_len=4096),
    Case(name="head-dim-192", batch=4, q_heads=32, kv_heads=8, head_dim=192, max_len=4096),
    Case(name="falcon-7b", batch=8, q_heads=71, kv_heads=1, head_dim=64, max_len=2048),
    Case(
        name="gemma-2-9b",
        batch=4,
        q_heads=16,
        kv_heads=8,
        head_dim=256,
        max_len=8192,
        sliding_window=4096,
        logits_soft_cap=50.0,
    ),
    Case(
        name="gpt-oss-20b",
        batch=8,
        q_heads=64,
        kv_heads=8,
        head_dim=64,
        max_len=8192,
        sliding_window=128,
        sinks=True,
    ),
)
"""Cases of real models."""


def _shapes() -> Iterator[Case]:
    """Yields a grid of batches, lengths, head counts and cache dtypes."""
    heads = ((32, 8, 128), (64, 8, 128), (16, 16, 128), (8, 1, 128), (32, 8, 64), (32, 8, 256))
    sizes = itertools.product(heads, ("bfloat16", "int8", "float8_e4m3fn"), (1, 8, 64), (1024, 4096, 32768))
    for (q_heads, kv_heads, head_dim), kv_dtype, batch, max_len in sizes:
        yield Case(
            name=f"{q_heads}x{kv_heads}x{head_dim}-{kv_dtype}-{batch}x{max_len}",
            batch=batch,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_len=max_len,
            kv_dtype=None if kv_dtype == "bfloat16" else kv_dtype,
        )


SHAPES: Final = tuple(_shapes())
"""A grid of shapes that shows where a kernel is near the memory bandwidth."""
