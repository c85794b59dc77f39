"""Calls of append_kv by each implementation, and the expected result, written token by token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from compiling import QUICKLY, options_for

from palladion import KVCache, append_kv, quantize_kv
from palladion.kernels.append_kv import IMPLEMENTATIONS
from palladion.kernels.implementation import Implementation

ARRAYS = ("k", "v", "k_scale", "v_scale")
KERNELS = [row for row in IMPLEMENTATIONS if row.platform is not None]

every_row = pytest.mark.parametrize("row", IMPLEMENTATIONS, ids=lambda row: row.name)


def eager(row: Implementation, **options: Any) -> Any:
    """Returns append_kv by one implementation, on any platform."""
    return functools.partial(append_kv, backend=row.name, interpret=row.platform is not None, **options)


@functools.cache
def compiled(row: Implementation, **options: Any) -> Any:
    """Returns append_kv by one implementation, compiled once per shape."""
    return jax.jit(eager(row, **options), compiler_options=options_for(row.name))


def expected(cache: KVCache, k: Any, v: Any, lengths: Any, new_tokens: Any = None, layer: Any = None) -> dict[str, Any]:
    """Returns the arrays of the cache after a call; each token is stored as `quantize_kv` returns it."""
    store = jax.jit(quantize_kv, static_argnums=1, compiler_options=QUICKLY)
    (k, k_scale), (v, v_scale) = store(k, cache.k.dtype), store(v, cache.v.dtype)
    new = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    arrays = {name: np.array(getattr(cache, name)) for name in ARRAYS if getattr(cache, name) is not None}
    batch, q_len = k.shape[:2]
    rows = cache.k.shape[-2]
    for b, i in np.ndindex(batch, q_len):
        position = int(lengths[b]) - q_len + i
        real = q_len if new_tokens is None else int(new_tokens[b])
        if not 0 <= position < cache.max_len or i < q_len - real:
            continue
        slab, row = b, position
        if cache.page_table is not None:
            slab, row = int(cache.page_table[b, position // rows]), position % rows
        for name, array in arrays.items():
            target = array if layer is None else array[layer]
            target[slab, :, row] = new[name][b, i]
    return arrays


def assert_same(cache: KVCache, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        result = np.asarray(getattr(cache, name))
        assert result.dtype == array.dtype
        np.testing.assert_array_equal(result.astype(np.float64), array.astype(np.float64), err_msg=name)
