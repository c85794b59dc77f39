"""Exported programs: the platform's kernel or an error, symbolic sizes, and arguments that are our own pytrees."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion import (
    KVCache,
    QuantizedArray,
    Unsupported,
    append_kv,
    append_qkv,
    decode_attention,
    matmul,
    quantize,
    quantized_matmul,
    tracing_for,
)
from palladion.kernels.compat import PALLAS_TRITON_WARNING
from palladion.kernels.implementation import find_implementation
from palladion.kernels.matmul import IMPLEMENTATIONS

TPU_CALL, GPU_CALLS = "tpu_custom_call", ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def attend(q: jax.Array, cache: KVCache, lengths: jax.Array, **how: Any) -> jax.Array:
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    return decode_attention(q, cache.k, cache.v, lengths, page_table=cache.page_table, **scales, **how)


def append(k: jax.Array, cache: KVCache, lengths: jax.Array, **how: Any) -> KVCache:
    return append_kv(cache, k[:, :1], k[:, 1:], lengths, **how)


def append_joined(qkv: jax.Array, cache: KVCache, lengths: jax.Array, **how: Any) -> Any:
    angles = qkv[:, 0, :32].astype(jnp.float32)
    return append_qkv(cache, qkv, lengths, angles, angles, **how)


def attention_arguments(heads: int) -> tuple[Any, ...]:
    return normal(2, heads, 128, dtype=jnp.bfloat16), KVCache.dense(2, 1, 128, 128), jnp.array([3, 70], jnp.int32)


def product_arguments(order: Any) -> tuple[Any, ...]:
    return normal(2, 128, dtype=jnp.bfloat16), quantize(normal(128, 256, seed=1), "int8", order=order)


CALLS: dict[str, Callable[[Any], tuple[Any, tuple[Any, ...]]]] = {
    "decode_attention": lambda _: (attend, attention_arguments(4)),
    "append_kv": lambda _: (append, attention_arguments(2)),
    "append_qkv": lambda _: (append_joined, attention_arguments(3)),
    "quantized_matmul": lambda order: (quantized_matmul, product_arguments(order)),
}


def export(function: Any, *arguments: Any, platform: str, **how: Any) -> str:
    """Exports a call, and returns its program."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in GPU_CALLS]
    call = jax.jit(functools.partial(function, **how))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=PALLAS_TRITON_WARNING)
        return jax.export.export(call, platforms=[platform], disabled_checks=checks)(*arguments).mlir_module()


def has_kernel(program: str, calls: Sequence[str]) -> bool:
    """Returns whether a program has one of the calls of kernels."""
    return any(call in program for call in calls)


@pytest.mark.parametrize(
    ("platform", "chip", "kernel", "calls", "order"),
    [("tpu", "v6e", "mosaic_tpu", (TPU_CALL,), "in_out"), ("cuda", "h200", "triton", GPU_CALLS, "out_in")],
)
@pytest.mark.parametrize("name", CALLS)
def test_a_program_for_an_accelerator_has_its_kernel(
    name: str, platform: str, chip: str, kernel: str, calls: tuple[str, ...], order: str
):
    """Where it is traced for its chip; without that it is an error, never the reference or an interpreted kernel."""
    function, arguments = CALLS[name](order)
    for backend in (None, "pallas", kernel):
        with tracing_for(chip):
            assert has_kernel(export(function, *arguments, platform=platform, backend=backend), calls)
    for backend, chosen in ((None, "xla"), ("pallas", ".*, interpreted,")):
        message = (
            rf"{name}\(.*\): {chosen} was chosen for cpu while tracing, but .* lowered for {platform}.*tracing_for"
        )
        with pytest.raises(Unsupported, match=message):
            export(function, *arguments, platform=platform, backend=backend)
    with pytest.raises(Unsupported, match=f"{kernel}: runs on .*, not on cpu"):
        export(function, *arguments, platform=platform, backend=kernel)
    assert not has_kernel(export(function, *arguments, platform=platform, backend="xla"), calls)
    assert not has_kernel(export(function, *arguments, platform="cpu"), calls)


def test_a_program_for_several_platforms_has_no_reference_in_silence():
    function, arguments = CALLS["decode_attention"](None)
    with pytest.raises(Unsupported, match="lowered for tpu"):
        jax.export.export(jax.jit(function), platforms=["cpu", "tpu"])(*arguments)


def test_what_has_no_kernel_is_exported():
    """A dense product is XLA's on a TPU, unless its table has a kernel; float16 has no kernel there."""
    dense = export(matmul, normal(2, 64), normal(64, 128), platform="tpu")
    assert (TPU_CALL in dense) == find_implementation(IMPLEMENTATIONS, "mosaic_tpu").has_kernel
    q, _, lengths = attention_arguments(4)
    half = KVCache.dense(2, 1, 128, 128, "float16")
    assert TPU_CALL not in export(attend, q.astype(jnp.float16), half, lengths, platform="tpu")


def test_unknown_chips_are_refused():
    with pytest.raises(ValueError, match=r"chip: got 'v99'; accepted: .*v6e.*h200"):
        tracing_for("v99")


@pytest.mark.parametrize("chip", [None, "v6e", "h200"])
@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "mxfp4"])
def test_the_number_of_rows_may_be_symbolic(scheme: str, chip: str | None):
    (b,) = jax.export.symbolic_shape("b")
    w = quantize(normal(64, 128), scheme, order="out_in" if chip == "h200" else "in_out")
    call = jax.jit(functools.partial(quantized_matmul, backend="xla"))
    x = jax.ShapeDtypeStruct((b, 64), jnp.float32)
    if chip is not None:
        with tracing_for(chip):
            jax.export.export(call, platforms=["cuda" if chip == "h200" else "tpu"])(x, w)
        return
    exported = jax.export.deserialize(jax.export.export(call)(x, w).serialize())
    for rows in (1, 7):
        given = normal(rows, 64, seed=rows)
        np.testing.assert_allclose(exported.call(given, w), call(given, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chip", [None, "v6e", "h200"])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_the_number_of_sequences_may_be_symbolic(kv_dtype: str, batch_invariant: bool, chip: str | None):
    """An append and attention, dense (float32) or paged (int8)."""
    (b,) = jax.export.symbolic_shape("b")

    def cache_of(batch: int) -> KVCache:
        if kv_dtype == "float32":
            return KVCache.dense(batch, 2, 64, 32, kv_dtype)
        return KVCache.paged(12, 2, 32, 32, jnp.arange(2 * batch, dtype=jnp.int32).reshape(batch, 2), kv_dtype)

    def step(q: jax.Array, k: jax.Array, cache: KVCache, lengths: jax.Array) -> Any:
        cache = append_kv(cache, k, k, lengths, backend="xla")
        return attend(q, cache, lengths, backend="xla", batch_invariant=batch_invariant, sliding_window=40), cache

    def arguments(batch: Any) -> tuple[Any, ...]:
        return (batch, 4, 32), (batch, 2, 32), (batch,)

    paged = kv_dtype == "int8"
    given = cache_of(2)
    symbolic = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct(part.shape if paged else (b, *part.shape[1:]), part.dtype), given
    )
    if paged:
        symbolic = dataclasses.replace(symbolic, page_table=jax.ShapeDtypeStruct((b, 2), jnp.int32))
    q, k, lengths = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(arguments(b), (jnp.float32, jnp.float32, jnp.int32), strict=True)
    )
    if chip is not None:
        with tracing_for(chip):
            jax.export.export(jax.jit(step), platforms=["cuda" if chip == "h200" else "tpu"])(q, k, symbolic, lengths)
        return
    exported = jax.export.deserialize(jax.export.export(jax.jit(step))(q, k, symbolic, lengths).serialize())
    for batch in (1, 3):
        values = normal(batch, 4, 32), normal(batch, 2, 32, seed=1), cache_of(batch), jnp.full(batch, 50, jnp.int32)
        expected = jax.jit(step)(*values)
        for one, other in zip(jax.tree.leaves(exported.call(*values)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_kernel_says_that_sizes_must_be_known():
    (b,) = jax.export.symbolic_shape("b")
    x, w = jax.ShapeDtypeStruct((b, 64), jnp.float32), quantize(normal(64, 128), "int8", order="in_out")
    for operation, arguments in ((quantized_matmul, (x, w)), (append_joined, None)):
        if arguments is None:
            cache = KVCache(*[jax.ShapeDtypeStruct((b, 1, 128, 128), jnp.float32)] * 2)
            arguments = (jax.ShapeDtypeStruct((b, 3, 128), jnp.float32), cache, jax.ShapeDtypeStruct((b,), jnp.int32))
        call = jax.jit(functools.partial(operation, backend="mosaic_tpu", interpret=True))
        with pytest.raises(Unsupported, match=r"mosaic_tpu: sizes must be known while tracing, got b.*backend='xla'"):
            jax.export.export(call)(*arguments)
        jax.export.export(jax.jit(operation))(*arguments)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32-zeros", "int8-g16-minimums", "mxfp4"])
@pytest.mark.parametrize("order", ["in_out", "out_in"])
def test_our_arrays_are_arguments_and_results_of_serialized_programs(scheme: str, order: Any):
    w = quantize(normal(64, 32), scheme, order=order)
    cache = KVCache.paged(4, 1, 16, 64, jnp.arange(4, dtype=jnp.int32).reshape(2, 2), "int8")
    exported = jax.export.export(jax.jit(lambda w, cache: (cache, w)))(w, cache)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.in_tree == exported.in_tree
    assert loaded.out_tree == exported.out_tree
    found = loaded.call(w, cache)
    assert jax.tree.structure(found) == jax.tree.structure((cache, w))
    assert isinstance(found[1], QuantizedArray)
    assert (found[1].scheme, found[1].order) == (w.scheme, w.order)
