"""Backends: the implementation that runs a call, and the error if there is none."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from product_oracle import ORDER_OF

from palladion import (
    BACKENDS,
    KVCache,
    Unsupported,
    append_kv,
    decode_attention,
    quantize,
    quantized_matmul,
    record_choices,
    using_backend,
)
from palladion.kernels.decode_attention import IMPLEMENTATIONS
from palladion.reference.platforms import target_platform


def arguments(dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in ((1, 2, 8), (1, 1, 128, 8), (1, 1, 128, 8))
    )
    return q, k, v, jnp.array([5], jnp.int32)


def on(platform: str) -> Any:
    """Returns a context that traces for a platform that is not here."""
    kind = {"tpu": "TPU v6 lite", "gpu": "NVIDIA H200"}[platform]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def chosen(function: Any = decode_attention, *args: Any, **options: Any) -> tuple[str, bool]:
    """Returns the backend that a traced call takes, and whether it is interpreted."""
    with record_choices() as choices:
        jax.eval_shape(functools.partial(function, **options), *(args or arguments()))
    return choices[0].backend, choices[0].interpret


def test_backends_has_the_name_of_every_implementation():
    assert {row.name for row in IMPLEMENTATIONS} <= set(BACKENDS)


@pytest.mark.parametrize(
    ("backend", "interpret", "expected"),
    [
        (None, None, ("xla", False)),
        ("auto", None, ("xla", False)),
        ("xla", None, ("xla", False)),
        ("xla", True, ("xla", False)),
        ("auto", True, ("mosaic_tpu", True)),
        ("pallas", None, ("mosaic_tpu", True)),
        ("pallas", True, ("mosaic_tpu", True)),
        ("mosaic_tpu", True, ("mosaic_tpu", True)),
        ("triton", True, ("triton", True)),
        ("triton", False, ("triton", False)),
    ],
)
def test_on_a_cpu(backend: str | None, interpret: bool | None, expected: tuple[str, bool]):
    assert chosen(backend=backend, interpret=interpret) == expected


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("backend", [None, "auto", "pallas", "own"])
def test_on_an_accelerator_its_kernel_is_compiled(platform: str, backend: str | None):
    own = {"tpu": "mosaic_tpu", "gpu": "triton"}[platform]
    with on(platform):
        assert chosen(backend=own if backend == "own" else backend) == (own, False)
        assert chosen(backend="xla") == ("xla", False)


def test_auto_falls_back_and_keeps_the_reasons():
    with record_choices() as choices:
        decode_attention(*arguments())
    (choice,) = choices
    assert choice.operation == "decode_attention"
    assert str(choice.problem).startswith("batch=1, q_len=1, heads=2/1x8, max_len=128")
    assert choice.reasons == {
        "mosaic_tpu": "runs on tpu, not on cpu (interpret=True runs it anywhere)",
        "triton": "runs on gpu, not on cpu (interpret=True runs it anywhere)",
        "mosaic_gpu": "runs on gpu, not on cpu (interpret=True runs it anywhere)",
    }
    with on("tpu"), record_choices() as choices:
        jax.eval_shape(decode_attention, *arguments(jnp.float16))
    assert choices[0].backend == "xla"
    assert choices[0].reasons["mosaic_tpu"] == "float16 is not supported on TPUs, use bfloat16 or float32"


@pytest.mark.parametrize("backend", ["mosaic_tpu", "triton"])
def test_a_named_kernel_does_not_fall_back(backend: str):
    platform = {"mosaic_tpu": "tpu", "triton": "gpu"}[backend]
    message = f"{backend}: runs on {platform}, not on cpu (interpret=True runs it anywhere). backend='xla' covers it"
    with pytest.raises(Unsupported, match=re.escape(message)):
        decode_attention(*arguments(), backend=backend)


def test_pallas_does_not_fall_back():
    with pytest.raises(Unsupported, match=r"mosaic_tpu: float16 is .*; triton: runs on gpu, not on tpu"), on("tpu"):
        jax.eval_shape(functools.partial(decode_attention, backend="pallas"), *arguments(jnp.float16))


def test_a_backend_without_a_kernel_is_unsupported():
    q, k, v, lengths = arguments()
    new = q[:, :1]
    with pytest.raises(Unsupported, match="mosaic_gpu: has no kernel for it yet"):
        append_kv(KVCache(k, v), new, new, lengths, backend="mosaic_gpu")
    assert issubclass(Unsupported, NotImplementedError)


def test_unknown_backends_are_wrong_calls():
    for call in (lambda: using_backend("cuda"), lambda: decode_attention(*arguments(), backend="cuda")):
        with pytest.raises(ValueError, match=re.escape("backend: got 'cuda'; accepted: None, 'auto', 'xla', 'pallas'")):
            call()


def test_using_backend_sets_the_default_of_a_region():
    with using_backend("triton"):
        assert chosen(interpret=True) == ("triton", True)
        with using_backend("pallas"):
            assert chosen() == ("mosaic_tpu", True)
        assert chosen(backend="xla") == ("xla", False)
        assert chosen(interpret=True) == ("triton", True)
    assert chosen() == ("xla", False)


def test_using_backend_traces_jitted_functions_anew():
    step = jax.jit(lambda *arrays: decode_attention(*arrays))
    with record_choices() as choices:
        plain = step(*arguments())
        with using_backend("pallas"):
            kernel = step(*arguments())
            step(*arguments())  # cached
        step(*arguments())  # cached
    assert [choice.backend for choice in choices] == ["xla", "mosaic_tpu"]
    np.testing.assert_allclose(plain, kernel, rtol=1e-5, atol=1e-6)


def test_recorders_nest():
    with record_choices() as outer:
        decode_attention(*arguments())
        with record_choices() as inner:
            decode_attention(*arguments(), backend="xla")
    decode_attention(*arguments())
    assert [choice.backend for choice in outer] == ["xla", "xla"]
    assert [choice.reasons for choice in inner] == [{}]


def test_the_platform_is_that_of_the_default_device():
    assert target_platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert target_platform() == "cpu"
    with on("gpu"):
        assert target_platform() == "gpu"


@pytest.mark.parametrize("backend", ["mosaic_tpu", "triton", "mosaic_gpu"])
@pytest.mark.parametrize("transform", [lambda call: call, jax.jit], ids=["eager", "jit"])
def test_a_compiled_kernel_on_another_platform_says_what_runs_it(backend: str, transform: Any):
    x = jnp.ones((2, 128), jnp.bfloat16)
    w = quantize(jnp.ones((128, 128)), "int8", order=ORDER_OF[backend])
    call = transform(functools.partial(quantized_matmul, w=w, backend=backend, interpret=False))
    with pytest.raises(Unsupported, match=rf"{backend} is compiled for .*, and the program is for cpu; interpret=True"):
        call(x)
