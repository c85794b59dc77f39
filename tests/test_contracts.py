"""Contracts that hold for every operation and every backend."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import options_for
from product_oracle import ORDER_OF

from palladion import (
    KVCache,
    QuantizedArray,
    Scheme,
    Unsupported,
    append_kv,
    append_qkv,
    decode_attention,
    matmul,
    quantize,
    quantized_matmul,
)
from palladion.benchmarks.measure.operations import OPERATIONS
from palladion.kernels.devices import gpus, tpu_chips
from palladion.kernels.implementation import find_implementation
from palladion.kernels.matmul import IMPLEMENTATIONS as DENSE
from palladion.kernels.quantized_matmul.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.quantized_matmul.problem import ACTIVATION_FORMATS, Problem
from palladion.kernels.quantized_matmul.triton import call as triton
from palladion.reference import oracle
from palladion.reference.compare import assert_right
from palladion.reference.scheme import CODE_DTYPE

BACKENDS = ("xla", "mosaic_tpu", "triton")


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def how(backend: str) -> dict[str, Any]:
    """Runs a backend here: kernels are interpreted."""
    return {"backend": backend, "interpret": None if backend == "xla" else True}


# ------------------------------------------------------------------------------------------ constants of a program


def _attention(kv_dtype: Any) -> tuple[Callable[..., Any], list[Any]]:
    cache = KVCache.dense(2, 2, 128, 128, kv_dtype)
    lengths = jnp.array([7, 128], jnp.int32)
    k, v = (normal(2, 128, 2, 128, seed=seed) for seed in (1, 2))
    cache = append_kv(cache, k, v, jnp.full(2, 128, jnp.int32), backend="xla")

    def call(q: jax.Array, cache: KVCache, lengths: jax.Array, **how: Any) -> Any:
        scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
        return decode_attention(q, cache.k, cache.v, lengths, **scales, return_lse=True, **how)

    return call, [normal(2, 4, 128, dtype=jnp.bfloat16), cache, lengths]


def _append(kv_dtype: Any) -> tuple[Callable[..., Any], list[Any]]:
    cache = KVCache.dense(2, 2, 128, 128, kv_dtype)
    k, v = (normal(2, 3, 2, 128, dtype=jnp.bfloat16, seed=seed) for seed in (1, 2))
    return append_kv, [cache, k, v, jnp.array([3, 77], jnp.int32)]


def _append_qkv() -> tuple[Callable[..., Any], list[Any]]:
    cache = KVCache.dense(2, 2, 128, 128, "bfloat16")
    angles = normal(2, 64, seed=3)
    qkv = normal(2, 8, 128, dtype=jnp.bfloat16)
    return append_qkv, [cache, qkv, jnp.array([3, 77], jnp.int32), jnp.cos(angles), jnp.sin(angles)]


def _quantized(scheme: str) -> tuple[Callable[..., Any], list[Any]]:
    return quantized_matmul, [normal(3, 64, dtype=jnp.bfloat16), quantize(normal(64, 128, seed=1), scheme)]


CALLS = {
    "decode_attention": functools.partial(_attention, "bfloat16"),
    "decode_attention-int8": functools.partial(_attention, "int8"),
    "append_kv": functools.partial(_append, "bfloat16"),
    "append_kv-int8": functools.partial(_append, "int8"),
    "append_qkv": _append_qkv,
    **{f"quantized_matmul-{s}": functools.partial(_quantized, s) for s in ("int8", "int8-g32", "int4-g32", "mxfp4")},
    "matmul": lambda: (matmul, [normal(3, 64, dtype=jnp.bfloat16), normal(64, 128, dtype=jnp.bfloat16, seed=1)]),
}


def call_for(name: str, backend: str) -> tuple[Callable[..., Any], list[Any]]:
    """Returns a call and its arguments, with weights in the storage order of a backend."""
    function, arguments = CALLS[name]()
    order = ORDER_OF[backend]
    if function is matmul:
        x, w = arguments
        return functools.partial(matmul, order=order), [x, w if order == "in_out" else w.T]
    return function, [x.with_order(order) if isinstance(x, QuantizedArray) else x for x in arguments]


def every_call(*backends: str) -> pytest.MarkDecorator:
    """Calls a test for each call and each of these backends that is in the table of its operation."""
    pairs = [(name, backend) for name in CALLS for backend in backends]
    tables = {name: {row.name for row in OPERATIONS[name.partition("-")[0]].table} for name in CALLS}
    return pytest.mark.parametrize(
        ("name", "backend"), [(name, backend) for name, backend in pairs if backend in tables[name]]
    )


@every_call(*BACKENDS)
def test_constants_of_a_program_are_arguments(name: str, backend: str):
    """An array that jit closes over gives what it gives as an argument, up to the order in which XLA adds."""
    function, arguments = call_for(name, backend)
    call = functools.partial(function, **how(backend))
    expected = jax.jit(call, compiler_options=options_for(backend))(*arguments)
    every = set(range(len(arguments)))
    # Only what a TPU's kernels do to words is folded differently where a part of the operands is known.
    for closed in (every, *([{0}, {1}] if backend == "mosaic_tpu" else [])):
        given = [x for n, x in enumerate(arguments) if n not in closed]

        def program(*given: Any, closed: set[int] = closed) -> Any:
            left = iter(given)
            return call(*(x if n in closed else next(left) for n, x in enumerate(arguments)))

        result = jax.jit(program, compiler_options=options_for(backend))(*given)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(result), strict=True):
            where = f"{name} by {backend}, closed over {closed}"
            rounding = {"rtol": 2**-7 if one.dtype == jnp.bfloat16 else 2**-20, "atol": 2**-20}
            np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), **rounding, err_msg=where)


@every_call("mosaic_tpu", "triton")
def test_xla_has_no_bits_of_another_width_to_fold(name: str, backend: str):
    """No bitcast around a compiled kernel changes the width of numbers: XLA folds such bitcasts of constants wrongly.

    A kernel also reads every array in memory that it gets: with an unread operand, some TPU compilers read zeros from
    others.
    """
    function, arguments = call_for(name, backend)
    traced = jax.make_jaxpr(functools.partial(function, backend=backend, interpret=False))(*arguments)
    kernels = 0
    for equation in _equations(traced.jaxpr):
        if equation.primitive.name == "bitcast_convert_type":
            old, new = (jnp.dtype(v.aval.dtype).itemsize for v in (*equation.invars, *equation.outvars))
            assert old == new, equation
        if equation.primitive.name == "pallas_call":
            kernels += 1
            body = equation.params["jaxpr"]
            read = {v for inner in _equations(body, kernels=True) for v in inner.invars if not hasattr(v, "val")}
            outputs = len(equation.outvars)
            aliased = {n for n, _ in equation.params["input_output_aliases"]}
            operands = body.invars[: len(equation.invars)]
            unread = [
                n
                for n, v in enumerate(operands)
                if v not in read and n not in aliased and v.aval.size > 1 and n < len(body.invars) - outputs
            ]
            assert not unread, f"{name} by {backend}: operands {unread} are not read"
    has_kernel = name != "matmul" or find_implementation(DENSE, backend).has_kernel
    assert (kernels >= 1) == has_kernel


def _inner(equation: Any) -> Iterator[Any]:
    """Yields the programs that an equation runs."""
    for value in equation.params.values():
        for program in value if isinstance(value, tuple | list) else [value]:
            program = getattr(program, "jaxpr", program)
            if hasattr(program, "eqns"):
                yield program


def _equations(jaxpr: Any, *, kernels: bool = False) -> Iterator[Any]:
    """Yields the equations of a program and of those that it runs; with or without those of kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if kernels or equation.primitive.name != "pallas_call":
            for program in _inner(equation):
                yield from _equations(program, kernels=kernels)


# ------------------------------------------------------------------------------------------------- nothing to compute


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows_make_an_empty_product(backend: str | None, shape: tuple[int, ...]):
    w = quantize(normal(64, 128), "int4-g32")
    x = jnp.zeros((*shape, 64), jnp.bfloat16)
    for product in (functools.partial(quantized_matmul, w=w), functools.partial(matmul, w=normal(64, 128))):
        call = functools.partial(product, backend=backend, gated=True)
        for result in (call(x), jax.jit(call)(x), jax.eval_shape(call, x)):
            assert (result.shape, result.dtype) == ((*shape, 64), jnp.bfloat16)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_no_channels_make_an_empty_product(backend: str | None):
    w = quantize(normal(64, 128), "int8")
    none = jax.tree.map(lambda part: part[:, :0], w)
    assert quantized_matmul(jnp.ones((3, 64)), none, backend=backend).shape == (3, 0)
    assert matmul(jnp.ones((3, 64)), jnp.ones((64, 0)), backend=backend).shape == (3, 0)


def test_no_inputs_are_refused():
    for call in (
        lambda: matmul(jnp.ones((3, 0)), jnp.ones((0, 5))),
        lambda: quantized_matmul(jnp.ones((3, 0)), quantize(normal(64, 128), "int8")),
    ):
        with pytest.raises(ValueError, match=r"x: got shape \(3, 0\); accepted: \[..., in\] with in of at least 1"):
            call()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_no_sequences_are_refused(backend: str | None):
    none, lengths = jnp.zeros((0, 2, 128)), jnp.zeros(0, jnp.int32)
    cache = KVCache.dense(1, 2, 128, 128, "float32")
    empty = jax.tree.map(lambda part: part[:0], cache)
    with pytest.raises(ValueError, match="q: got"):
        decode_attention(none, empty.k, empty.v, lengths, backend=backend)
    with pytest.raises(ValueError, match="k: got"):
        append_kv(empty, none, none, lengths, backend=backend)


# ------------------------------------------------------------------------------------------------- large activations


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["int4-g32", "float8_e5m2", "mxfp4"])
def test_activations_up_to_the_documented_bound(scheme: str, backend: str):
    w = quantize(normal(64, 128), scheme, order=ORDER_OF[backend])
    x = normal(2, 64, seed=1)
    x = x / jnp.max(jnp.abs(x)) * 1e27
    call = functools.partial(quantized_matmul, **how(backend))
    result = jax.jit(call, compiler_options=options_for(backend))(x, w)
    assert_right(result, quantized_matmul(x, w, backend="xla"), oracle.quantized_matmul(x, w), f"{scheme} by {backend}")


# ------------------------------------------------------------------------------- what cannot be refused while tracing

OUT_OF_RANGE = ([257, 300, 5], [256, 512, 5], [-1, -(2**31), 5], [2**31 - 1, 0, 5], [2**31 - 2, 2 - 2**31, 7])
MAX_LEN = 256


@functools.cache
def _attend(backend: str, window: int | None) -> Any:
    def call(q: jax.Array, cache: KVCache, lengths: jax.Array) -> Any:
        options = {"page_table": cache.page_table, "sliding_window": window, "return_lse": True}
        return decode_attention(q, cache.k, cache.v, lengths, **options, **how(backend))

    return jax.jit(call, compiler_options=options_for(backend))


def _pages() -> jax.Array:
    """Returns a page table of three sequences with pages of 32 tokens, some of which do not exist."""
    table = np.random.default_rng(0).permutation(24).reshape(3, 8)
    table[0, 7], table[1, 0], table[2, 0] = 2**31 - 1, 24, -1
    return jnp.asarray(table, jnp.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("paged", [False, True])
def test_lengths_and_pages_out_of_range_are_read_as_the_nearest(
    backend: str, window: int | None, q_len: int, paged: bool
):
    q = normal(3, q_len, 2, 128, dtype=jnp.bfloat16)
    shape = (24, 1, 32, 128) if paged else (3, 1, MAX_LEN, 128)
    cache = KVCache(
        *(normal(*shape, dtype=jnp.bfloat16, seed=seed) for seed in (1, 2)), page_table=_pages() if paged else None
    )
    for values in OUT_OF_RANGE:
        lengths = jnp.array(values, jnp.int32)
        options = {"page_table": cache.page_table, "sliding_window": window}
        exact = oracle.decode_attention(q, cache.k, cache.v, lengths, **options)
        reference = _attend("xla", window)(q, cache, lengths)
        result = _attend(backend, window)(q, cache, lengths)
        for one, other, right in zip(result, reference, exact, strict=True):
            assert_right(one, other, right, f"{backend} at lengths {values}")
        within = lengths.clip(0, MAX_LEN)
        for one, other in zip(result, _attend(backend, window)(q, cache, within), strict=True):
            np.testing.assert_array_equal(one, other, f"{values} clipped")


@functools.cache
def _write(backend: str) -> Any:
    def call(cache: KVCache, k: jax.Array, v: jax.Array, lengths: jax.Array, new: Any, layer: jax.Array) -> KVCache:
        return append_kv(cache, k, v, lengths, new_tokens=new, layer=layer, **how(backend))

    return jax.jit(call, compiler_options=options_for(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("paged", [False, True])
def test_what_does_not_exist_is_not_written(backend: str, q_len: int, dtype: str, paged: bool):
    layers, rows = 2, 32 if paged else MAX_LEN
    page_table = _pages()
    sizes = (24, 1, 32, 128, page_table) if paged else (3, 1, MAX_LEN, 128)
    cache = (KVCache.paged if paged else KVCache.dense)(*sizes, dtype, num_layers=layers)
    cache = dataclasses.replace(cache, k=jnp.full_like(cache.k, 100), v=jnp.full_like(cache.v, 100))
    k, v = (normal(3, q_len, 1, 128, seed=seed) for seed in (1, 2))
    calls = [(values, None, 1) for values in OUT_OF_RANGE]
    calls += [([5, 9, 250], new, 1) for new in ([1, -5, 2**31 - 1], [-(2**31), 7, 0])]
    calls += [([5, 9, 250], None, layer) for layer in (-1, layers, 2**31 - 1)]
    for values, new, layer in calls:
        arguments = (jnp.array(values, jnp.int32), None if new is None else jnp.array(new, jnp.int32), jnp.int32(layer))
        written = _write(backend)(cache, k, v, *arguments)
        expected = np.zeros((layers, cache.k.shape[1], rows), bool)
        for b in range(3):
            for i in range(q_len):
                position = values[b] - q_len + i
                is_new = new is None or i >= q_len - min(max(new[b], 0), q_len)
                slab, row = (int(page_table[b, min(max(position, 0), MAX_LEN - 1) // 32]), position % 32)
                slab, row = (slab, row) if paged else (b, position)
                if is_new and 0 <= position < MAX_LEN and 0 <= slab < cache.k.shape[1] and 0 <= layer < layers:
                    expected[layer, slab, row] = True
        where = f"{backend} at lengths {values}, new tokens {new}, layer {layer}"
        for name in ("k", "v"):
            changed = np.asarray(getattr(written, name) != getattr(cache, name)).any(axis=(2, 4))
            np.testing.assert_array_equal(changed, expected, where)
        for one, other in zip(
            jax.tree.leaves(written), jax.tree.leaves(_write("xla")(cache, k, v, *arguments)), strict=True
        ):
            np.testing.assert_array_equal(one, other, where)


def test_what_does_not_fit_together_is_refused_at_the_door():
    cache = KVCache.dense(1, 1, 128, 128)
    k, lengths = jnp.ones((1, 1, 128)), jnp.ones(1, jnp.int32)
    other = dataclasses.replace(cache, v=cache.v[:, :, :64])
    with pytest.raises(ValueError, match=r"cache: got v of shape \(1, 1, 64, 128\) in bfloat16; accepted: \(1, 1, 128"):
        append_kv(other, k, k, lengths)
    with pytest.raises(ValueError, match="KVCache: page_table: got float32"):
        KVCache.paged(4, 1, 16, 64, [[0.0, 1.0]])
    assert KVCache.paged(4, 1, 16, 64, [[0, 1]]).max_len == 32
    with pytest.raises(ValueError, match="quantize: weight: got int32; accepted: a float dtype"):
        quantize([[1, 2], [3, 4]], "int8")
    assert quantize([[1.0, 2.0], [3.0, 4.0]], "int8").shape == (2, 2)


def test_a_program_can_be_exported_and_loaded():
    w = quantize(normal(64, 128), "int4-g32")
    arrays, tree = jax.tree.flatten(w)
    call = jax.jit(lambda x, *arrays: quantized_matmul(x, jax.tree.unflatten(tree, arrays)))
    x = normal(3, 64)
    exported = jax.export.export(call)(x, *arrays)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(loaded.call(x, *arrays), call(x, *arrays))


# -------------------------------------------------------------------------------------- what the heuristics may choose


@contextlib.contextmanager
def planned_for(kind: str, platform: str, cores: int | None) -> Iterator[None]:
    """Makes heuristics plan for a chip that is not present."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


DEVICES = {
    "mosaic_tpu": [(chip.device_kind, "tpu", chip.cores) for chip in tpu_chips().values()],
    "triton": [(gpu.device_kind, "gpu", None) for gpu in gpus().values()],
}
FLOATS = ("float32", "bfloat16", "float16")
SCHEMES = (
    *("int8", "int8-g32", "int8-g64-zeros", "int8-g128-minimums", "int4", "int4-g32", "int4-g128-zeros"),
    *("int4-g32-minimums", "float8_e4m3fn", "float8_e5m2-g64", "mxfp4"),
)


def _schemed(scheme: Scheme, in_features: int, out_features: int, scale_dtype: str) -> QuantizedArray:
    """Returns a weight that has only shapes and dtypes."""
    rows = in_features // 2 if scheme.packed else in_features
    values = jax.ShapeDtypeStruct((rows, out_features), CODE_DTYPE[scheme.format])
    groups = (scheme.groups(in_features), out_features)
    factors = jax.ShapeDtypeStruct(groups, "float8_e8m0fnu" if scheme.format == "mxfp4" else scale_dtype)
    zeros = jax.ShapeDtypeStruct(groups, values.dtype) if scheme.offset == "zeros" else None
    return QuantizedArray(values, factors, zeros, factors if scheme.offset == "minimums" else None, scheme)


@pytest.mark.parametrize("backend", DEVICES)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_heuristics_of_products_choose_what_their_kernel_takes(backend: str, data: st.DataObject):
    """A backend traces every call or raises Unsupported: block sizes that it chose itself are never an error."""
    draw: Callable[[Any], Any] = data.draw
    scheme = Scheme.parse(draw(st.sampled_from(SCHEMES)))
    in_features = 128 * draw(st.sampled_from([1, 2, 3, 9, 16]))
    gated = draw(st.booleans())
    out_features = draw(st.sampled_from([2, 127, 128, 200, 1440, 2880])) * (2 if gated else 1)
    quantizable = next((name for name, formats in ACTIVATION_FORMATS.items() if scheme.format in formats), None)
    options = {
        "gated": gated,
        "activation": draw(st.sampled_from([None, jax.nn.silu])),
        "quantize_x": draw(st.sampled_from([None, quantizable])),
        "out_dtype": draw(st.sampled_from([None, *FLOATS])),
        "batch_invariant": draw(st.booleans()),
    }
    x = jax.ShapeDtypeStruct((draw(st.sampled_from([1, 3, 16, 100, 700])), in_features), draw(st.sampled_from(FLOATS)))
    w = _schemed(scheme, in_features, out_features, draw(st.sampled_from(FLOATS)))
    w = jax.eval_shape(functools.partial(QuantizedArray.with_order, order=ORDER_OF[backend]), w)
    shape = (x.shape[0], out_features // (2 if gated else 1))
    arrays = {"norm": (in_features,), "bias": (out_features,), "residual": shape}
    given = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in arrays.items() if draw(st.booleans())}
    with planned_for(*draw(st.sampled_from(DEVICES[backend]))):
        call = functools.partial(quantized_matmul, backend=backend, interpret=False, **options)
        try:
            result = jax.eval_shape(lambda x, w, given: call(x, w, **given), x, w, given)
        except Unsupported:
            return
    assert result.shape == shape


@pytest.mark.parametrize("backend", DEVICES)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_heuristics_of_attention_and_append_choose_what_their_kernel_takes(backend: str, data: st.DataObject):
    draw: Callable[[Any], Any] = data.draw
    batch, q_len, kv_heads = (draw(st.sampled_from(some)) for some in ([1, 3, 8, 64], [1, 2, 5, 130], [1, 2, 3, 8]))
    head_dim, group = draw(st.sampled_from([64, 80, 96, 112, 128, 192, 256])), draw(st.sampled_from([1, 3, 4, 16]))
    rows, pages = draw(st.sampled_from([(128, None), (1000, None), (4096, None), (16, 9), (64, 33), (256, 4)]))
    dtype, kv_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([*FLOATS, "int8", "float8_e4m3fn"]))
    table = None if pages is None else jnp.zeros((batch, pages), jnp.int32)
    cache = jax.eval_shape(
        lambda: (
            KVCache.dense(batch, kv_heads, rows, head_dim, kv_dtype)
            if table is None
            else KVCache.paged(batch * table.shape[1], kv_heads, rows, head_dim, table, kv_dtype)
        )
    )
    options = {
        "sliding_window": draw(st.sampled_from([None, 1, 100, 2048])),
        "logits_soft_cap": draw(st.sampled_from([None, 30.0])),
        "batch_invariant": draw(st.booleans()),
    }
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((batch, q_len, heads, head_dim), dtype) for heads in (group * kv_heads, kv_heads))

    def attend(q: jax.Array, cache: KVCache, lengths: jax.Array) -> jax.Array:
        rest = {"page_table": cache.page_table, "k_scale": cache.k_scale, "v_scale": cache.v_scale}
        return decode_attention(q, cache.k, cache.v, lengths, **rest, **options, backend=backend, interpret=False)

    def write(cache: KVCache, k: jax.Array, lengths: jax.Array) -> KVCache:
        return append_kv(cache, k, k, lengths, backend=backend, interpret=False)

    with planned_for(*draw(st.sampled_from(DEVICES[backend]))):
        with contextlib.suppress(Unsupported):
            assert jax.eval_shape(attend, q, cache, lengths).shape == q.shape
        with contextlib.suppress(Unsupported):
            assert jax.eval_shape(write, cache, k, lengths).k.shape == cache.k.shape


@pytest.mark.parametrize("backend", DEVICES)
def test_heuristics_of_products_pass_their_own_check(backend: str):
    """The heuristic's choice passes the kernel's check for far more problems than the traced ones."""
    random = np.random.default_rng(0)

    def any_of(*values: Any) -> Any:
        return values[random.integers(len(values))]

    module = {"mosaic_tpu": mosaic_tpu, "triton": triton}[backend]
    checked = 0
    for _ in range(1500):
        scheme = Scheme.parse(any_of(*SCHEMES))
        gated = any_of(True, False)
        quantizable = next((name for name, formats in ACTIVATION_FORMATS.items() if scheme.format in formats), None)
        problem = Problem(
            rows=any_of(1, 2, 5, 16, 64, 128, 700),
            in_features=any_of(128, 384, 1152, 2048, 2944),
            out_features=any_of(2, 127, 128, 200, 1440, 2880, 4096) * (2 if gated else 1),
            num_layers=any_of(None, 2),
            x_dtype=any_of(*FLOATS),
            out_dtype=any_of(*FLOATS),
            has_bias=any_of(True, False),
            activation=any_of(None, jax.nn.silu),
            gated=gated,
            norm_eps=any_of(None, 1e-5),
            has_residual=any_of(True, False),
            scheme=scheme,
            scale_dtype="float8_e8m0fnu" if scheme.format == "mxfp4" else any_of(*FLOATS),
            quantize_x=any_of(None, quantizable),
            batch_invariant=any_of(True, False),
            order=ORDER_OF[backend],
        )
        with planned_for(*any_of(*DEVICES[backend])):
            if module.unsupported(problem) is None:
                checked += 1
                module.check_config(problem, module.heuristic(problem.planned()))
    assert checked > 1000
