"""RMS norm in one launch: right for any shape and dtype, each row by itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.kernels import gpu_norm
from palladion.reference import rms_norm
from palladion.reference.compare import assert_right


def inputs(rows: int, features: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(0), (rows, features)).astype(dtype)
    return x, 1 + 0.1 * jax.random.normal(jax.random.key(1), (features,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (3, 77), (2, 4096), (5, 200)])
def test_rows_are_normalized(rows: int, features: int, dtype: str):
    x, weight = inputs(rows, features, dtype)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    result = gpu_norm.rms_norm(x, weight, 1e-5, interpret=True)
    assert result.dtype == x.dtype
    assert_right(result, rms_norm(x, weight, 1e-5), exact)


def test_rows_do_not_meet():
    x, weight = inputs(3, 77, "float32")
    x = x.at[0].set(jnp.nan).at[2].set(0.0)
    result = np.asarray(gpu_norm.rms_norm(x, weight, 1e-5, interpret=True))
    alone = gpu_norm.rms_norm(x[1:2], weight, 1e-5, interpret=True)
    assert np.isnan(result[0]).all()
    np.testing.assert_array_equal(result[1:2], alone)
    assert (result[2] == 0).all()


SIZES = [(4096, "bfloat16"), (4096, "float32"), (16384, "bfloat16"), (77, "float16")]


@pytest.mark.skipif(not gpu_compiler.installed(), reason="triton is not installed")
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("features", "dtype"), SIZES)
def test_it_compiles_without_spills(features: int, dtype: str, arch: int):
    shapes = (jax.ShapeDtypeStruct((2, features), dtype), jax.ShapeDtypeStruct((features,), jnp.float32))
    function = functools.partial(gpu_norm.rms_norm, eps=1e-5, interpret=False)
    (kernel,) = gpu_compiler.compile_for_gpu(function, *shapes, arch=arch)
    assert kernel.spilled == 0
