"""The references: each faster form computes what its definition says, values and derivatives, on every platform."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import UNOPTIMIZED, unoptimized

from palladion import KVCache, QuantizedArray, append_kv, decode_attention, matmul, quantize, quantized_matmul
from palladion.kernels.decode_attention import Inputs, cases
from palladion.kernels.decode_attention.cases import Case
from palladion.reference import oracle
from palladion.reference.compare import assert_right
from palladion.reference.quantization import ORDERS, Order

# The names of the packages are those of functions in `palladion.reference`.
appends = importlib.import_module("palladion.reference.append_kv")
attention = importlib.import_module("palladion.reference.decode_attention")
products = importlib.import_module("palladion.reference.quantized_matmul")

EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(scope="module", autouse=True)
def programs_compile_quickly() -> Iterator[None]:
    with unoptimized():
        yield


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, compiler_options=UNOPTIMIZED)


@pytest.fixture(params=["cpu", "gpu"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The platform by which forms are chosen; they run here whatever it is."""
    for module in ("bits", "quantized_matmul", "decode_attention"):
        name = f"palladion.reference.{module}"
        monkeypatch.setattr(importlib.import_module(name), "target_platform", lambda: request.param)
    return request.param


# ---------------------------------------------------------------------------------------------------------- attention

SMALL = Case(
    name="", batch=3, q_heads=4, kv_heads=2, head_dim=8, max_len=256, dtype="float32", q_len=3, lengths=(2, 131, 256)
)
CASES = {
    "dense": dataclasses.replace(SMALL, q_len=1, lengths=(0, 131, 256)),
    "dense-verify": dataclasses.replace(SMALL, logits_soft_cap=2.0, scale=0.5),
    "dense-window": dataclasses.replace(SMALL, sliding_window=70, sinks=True, kv_dtype="bfloat16", num_layers=2),
    "one-block": dataclasses.replace(SMALL, max_len=120, lengths=(0, 1, 120), sinks=True),
    "paged": dataclasses.replace(SMALL, q_len=1, page_size=16, sinks=True, sliding_window=9),
    "paged-verify": dataclasses.replace(SMALL, page_size=32, logits_soft_cap=5.0, sliding_window=140, num_layers=2),
    "int8": dataclasses.replace(SMALL, kv_dtype="int8", page_size=64, sinks=True),
    "float8": dataclasses.replace(SMALL, kv_dtype="float8_e4m3fn", q_len=1, logits_soft_cap=4.0),
}

GPU_CASES = CASES | {
    "two-ends": dataclasses.replace(SMALL, dtype="bfloat16", sliding_window=100),
    "two-ends-sinks": dataclasses.replace(SMALL, q_len=1, sliding_window=120, sinks=True, lengths=(0, 128, 255)),
    "window-of-1": dataclasses.replace(SMALL, dtype="bfloat16", sliding_window=1, q_len=1),
    "window-of-pages": dataclasses.replace(SMALL, page_size=8, sliding_window=17, num_layers=2, lengths=(0, 41, 256)),
    "window-of-codes": dataclasses.replace(SMALL, kv_dtype="float8_e5m2", sliding_window=30, sinks=True),
    "float16": dataclasses.replace(SMALL, dtype="float16", lengths=(1, 95, 96)),
    "int8-dense": dataclasses.replace(SMALL, dtype="bfloat16", kv_dtype="int8", q_len=1, lengths=(0, 131, 256)),
    "float8-narrow": dataclasses.replace(SMALL, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
    "float8-float16": dataclasses.replace(SMALL, dtype="float16", kv_dtype="float8_e5m2", q_len=1),
    "many-rows": dataclasses.replace(SMALL, dtype="bfloat16", q_len=40, lengths=(20, 150, 256)),
}


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    """The arguments of both forms of attention."""
    cache = KVCache(inputs.k, inputs.v, inputs.k_scale, inputs.v_scale, inputs.page_table)
    return inputs.q, cache, inputs.lengths, inputs.sinks, inputs.layer


def exact_attention(inputs: Inputs, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = inputs._asdict()
    layer = arrays.pop("layer")
    if layer is not None:
        for part in ("k", "v", "k_scale", "v_scale"):
            arrays[part] = None if arrays[part] is None else arrays[part][int(layer)]
    return oracle.decode_attention(**arrays, **options)


@pytest.mark.parametrize("name", CASES)
def test_blocked_attention_is_the_definition(name: str):
    case = CASES[name]
    inputs = cases.make_inputs(case)
    options = case.options | {"scale": case.scale or case.head_dim**-0.5}
    exact = exact_attention(inputs, **options)
    page, blocked = (
        compiled(functools.partial(form.decode_attention, **options))(*arguments(inputs))
        for form in (attention.definition, attention.blocked)
    )
    alone = compiled(
        functools.partial(
            attention.blocked.one_by_one, functools.partial(attention.blocked.decode_attention, **options)
        )
    )(*arguments(inputs))
    for part, right in enumerate(exact):
        scale = max(1.0, np.abs(right[np.isfinite(right)]).max())
        for form in (page, blocked, alone):
            found, finite = np.asarray(form[part], np.float64), np.isfinite(right)
            np.testing.assert_array_equal(found[~finite], right[~finite])
            # A few roundings in float32 of sums no larger than the largest value.
            assert np.abs(found[finite] - right[finite]).max() <= 32 * EPS * scale
            assert_right(form[part], page[part], right)


@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
def test_attention_on_gpus_is_the_definition(name: str, platform: str, monkeypatch: pytest.MonkeyPatch):
    """All at once, in chunks of 32 tokens so that ends lie in the middle of one, and in a loop over blocks of 32."""
    del platform
    case = GPU_CASES[name]
    inputs = cases.make_inputs(case)
    options = case.options | {"scale": case.scale or case.head_dim**-0.5}
    exact = exact_attention(inputs, **options)

    def attend(form: Any) -> tuple[jax.Array, jax.Array]:
        return compiled(functools.partial(form.decode_attention, **options))(*arguments(inputs))

    page, forms = attend(attention.definition), []
    for most_bytes in (2**29, 1):
        for constant, value in (("CHUNK", 32), ("FEWEST", 32), ("MOST_BYTES", most_bytes)):
            monkeypatch.setattr(attention.gpu, constant, value)
        forms.append(attend(attention.gpu))
    values = oracle.to_float64(inputs.v)
    if inputs.v_scale is not None:
        values = values * oracle.to_float64(inputs.v_scale)[..., None]
    # The result is rounded to its dtype, and the weights to that of the values.
    narrow = 0.0 if case.dtype == "float32" else float(jnp.finfo(case.dtype).eps)
    for form, (part, right) in itertools.product(forms, enumerate(exact)):
        found, finite = np.asarray(form[part], np.float64), np.isfinite(right)
        scale = max(1.0, np.abs(right[finite]).max())
        bound = 32 * EPS * scale + (narrow * np.nanmax(np.abs(values)) if part == 0 else 0.0)
        np.testing.assert_array_equal(found[~finite], right[~finite])
        assert np.abs(found[finite] - right[finite]).max() <= bound
        assert_right(form[part], page[part], right)


@pytest.mark.parametrize(
    ("name", "batch_invariant", "platform"),
    [
        *((name, False, "cpu") for name in CASES),
        *((name, True, platform) for name in ("dense-window", "paged") for platform in ("cpu", "gpu")),
        ("dense-window", False, "gpu"),
    ],
    indirect=["platform"],
)
def test_attention_is_differentiated_as_the_formula_says(name: str, batch_invariant: bool, platform: str):
    """Directional derivatives of every float input against central differences of the float64 oracle."""
    del platform
    case = CASES[name]
    inputs = cases.make_inputs(case)
    # Queries that see nothing, in front of a short sequence, may be anything.
    sees = inputs.lengths[:, None] - case.q_len + jnp.arange(case.q_len) >= 0
    inputs = inputs._replace(q=jnp.where(sees[..., None, None], inputs.q, jnp.nan))
    exact_lse = exact_attention(inputs, **case.options)[1]
    rng = np.random.default_rng(1)
    out_weights, lse_weights = rng.standard_normal(inputs.q.shape), rng.standard_normal(exact_lse.shape)
    lse_weights = np.where(np.isfinite(exact_lse), lse_weights, 0.0)  # a query that sees nothing has no finite lse

    def loss(varied: dict[str, Any]) -> jax.Array:
        given = inputs._replace(**varied)._asdict()
        options = case.options | {"return_lse": True, "batch_invariant": batch_invariant}
        out, lse = decode_attention(**given, **options, backend="xla")
        return jnp.sum(out * out_weights.astype(np.float32)) + jnp.sum(
            jnp.where(lse_weights == 0, 0.0, lse) * lse_weights.astype(np.float32)
        )

    quantized = inputs.k_scale is not None
    names = ["q", "k_scale", "v_scale"] if quantized else ["q", "k", "v"]
    names += ["sinks"] if case.sinks else []
    gradients = compiled(jax.grad(loss))({part: getattr(inputs, part) for part in names})

    def exact_loss(part: str, value: np.ndarray) -> float:
        out, lse = exact_attention(inputs._replace(**{part: value}), **case.options)
        return float((out * out_weights).sum() + (np.where(lse_weights == 0, 0.0, lse) * lse_weights).sum())

    for part, gradient in gradients.items():
        value = oracle.to_float64(getattr(inputs, part))
        direction = rng.standard_normal(value.shape)
        step = 1e-5 * direction
        expected = (exact_loss(part, value + step) - exact_loss(part, value - step)) / 2e-5
        assert gradient.dtype == getattr(inputs, part).dtype
        found = oracle.to_float64(gradient)
        assert np.isfinite(found).all()
        assert (found[np.isnan(value)] == 0).all()  # what no query sees
        terms = found * direction
        # Roundings of float32, and of the gradient to its dtype; 1e-8 is the error of the differences.
        bound = (128 * EPS + float(jnp.finfo(gradient.dtype).eps) / 2) * np.abs(terms).sum() + 1e-8
        assert abs(terms.sum() - expected) <= bound
        assert np.abs(terms).sum() > 1e-3


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_codes_of_a_cache_are_constants_to_differentiation(name: str):
    case = CASES[name]
    inputs = cases.make_inputs(case)

    def loss(k: jax.Array) -> jax.Array:
        return jnp.sum(decode_attention(**inputs._replace(k=k)._asdict(), **case.options, backend="xla"))

    gradient = compiled(jax.grad(loss, allow_int=True))(inputs.k)
    assert gradient.shape == inputs.k.shape
    assert gradient.dtype == (jax.dtypes.float0 if name == "int8" else inputs.k.dtype)
    assert name == "int8" or (np.asarray(gradient, np.float32) == 0).all()


def test_attention_is_differentiated_forwards_under_vmap_and_keeps_its_inputs_only():
    case = CASES["dense-window"]
    inputs = cases.make_inputs(case)

    def attend(q: jax.Array) -> jax.Array:
        return decode_attention(**inputs._replace(q=q)._asdict(), sliding_window=70, backend="xla")

    gradient = jax.grad(lambda q: jnp.sum(attend(q) ** 2) / 2)
    direction = normal(*inputs.q.shape)
    backward = compiled(gradient)(inputs.q)
    out, forward = compiled(lambda q: jax.jvp(attend, (q,), (direction,)))(inputs.q)
    np.testing.assert_allclose(jnp.sum(forward * out), jnp.sum(backward * direction), rtol=1e-5)
    mapped = compiled(jax.vmap(gradient))(jnp.stack([inputs.q, 2 * inputs.q]))
    np.testing.assert_allclose(mapped[0], backward, rtol=1e-5, atol=1e-6)
    pullback = jax.eval_shape(lambda q: jax.vjp(attend, q)[1], inputs.q)
    kept = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    logits = case.batch * case.q_heads * case.q_len * case.max_len
    assert kept
    assert all(shape in (inputs.k.shape, inputs.q.shape) or np.prod(shape) < logits for shape in kept), kept


# ----------------------------------------------------------------------------------------------------------- products

SCHEMES = ["int8", "int8-g64-zeros", "int4-g32", "int4-minimums", "float8_e4m3fn-g32", "float8_e5m2", "mxfp4"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_form_of_a_quantized_product_is_the_definition(scheme: str, rows: int, order: Order, platform: str):
    del platform
    x = normal(rows, 128)
    weights = normal(2, 128, 72, seed=1) / 12
    w, layer = quantize(weights, scheme, order=order), jnp.int32(1)
    exact = oracle.quantized_matmul(x, jax.tree.map(lambda part: part[1], w))
    page = compiled(products.definition.quantized_matmul)(x, w, layer=layer)
    fast = compiled(lambda *given: products.quantized_matmul(*given, layer=layer))(x, w)
    bound = 4 * np.sqrt(128) * EPS * np.abs(exact).max()
    assert np.abs(np.asarray(page) - exact).max() <= bound
    assert_right(fast, page, exact)


@pytest.mark.parametrize(("dtype", "order"), [("bfloat16", "out_in"), ("float16", "out_in"), ("bfloat16", "in_out")])
@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("scheme", [*SCHEMES, "int4-g64-zeros", "int4-g16"])
@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
def test_narrow_activations_on_gpus_meet_exact_codes(scheme: str, rows: int, dtype: str, order: Order, platform: str):
    """Weights are rounded to x's dtype only for many rows, or where a product cannot convert their codes."""
    del platform
    x = normal(rows, 128, dtype=dtype)
    weights = (normal(128, 72, seed=1) / 12).at[:, 3].set(0.0).at[32:64, 5].set(0.0)
    w = quantize(weights, scheme, order=order)
    if scheme != "mxfp4":  # GGUF's scales may be negative
        w = dataclasses.replace(w, scales=-w.scales)
    exact = oracle.quantized_matmul(x, w)
    found = compiled(functools.partial(products.quantized_matmul, out_dtype=jnp.float32))(x, w)
    bound = 4 * np.sqrt(128) * EPS * np.abs(exact).max()
    unconverted = scheme in ("mxfp4", "int4-g16") or (w.scheme.packed and order == "in_out")
    if w.scheme.groups(128) > 1 and (rows == 40 or (rows == 6 and unconverted) or scheme == "int4-g16"):
        rounded = np.abs(oracle.dequantize(dataclasses.replace(w, minimums=None)))
        bound = bound + float(jnp.finfo(dtype).eps) / 2 * (np.abs(oracle.to_float64(x)) @ rounded)
    assert (np.abs(np.asarray(found) - exact) <= bound).all()


@pytest.mark.parametrize("quantize_x", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("rows", [1, 6])
def test_quantized_activations_meet_codes_exactly(quantize_x: str, rows: int, platform: str):
    x = normal(rows, 128, dtype=jnp.bfloat16)
    w = quantize(normal(128, 72, seed=1), "int8", order="out_in" if platform == "gpu" else "in_out")
    exact = oracle.quantized_matmul(x, w, quantize_x=quantize_x)
    multiply = functools.partial(products.quantized_matmul, quantize_x=quantize_x, out_dtype=jnp.float32)
    assert np.abs(compiled(multiply)(x, w) - exact).max() <= 4 * np.sqrt(128) * EPS * np.abs(exact).max()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "float8_e5m2-g32"])
@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
def test_a_group_of_nan_is_seen_on_gpus(scheme: str, rows: int, order: Order, platform: str):
    del platform
    w = quantize(normal(128, 72, seed=1).at[40, 7].set(jnp.nan), scheme, order=order)
    found = compiled(products.quantized_matmul)(normal(rows, 128, dtype=jnp.bfloat16), w)
    assert (jnp.isnan(found) == (jnp.arange(72) == 7)).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_every_form_of_a_dense_product_is_the_definition(
    dtypes: tuple[str, str], rows: int, order: Order, platform: str
):
    del platform
    x, w, layer = normal(rows, 128, dtype=dtypes[0]), normal(2, 128, 72, seed=1, dtype=dtypes[1]), jnp.int32(1)
    exact = oracle.quantized_matmul(x, w[1])
    page = compiled(products.definition.matmul)(x, w, layer=layer, out_dtype=None)
    stored = w if order == "in_out" else jnp.swapaxes(w, -1, -2)
    fast = compiled(lambda *given: products.matmul(*given, layer=layer, order=order))(x, stored)
    bound = 4 * np.sqrt(128) * EPS + float(jnp.finfo(dtypes[0]).eps)
    assert np.abs(np.asarray(page, np.float64) - exact).max() <= bound * np.abs(exact).max()
    assert_right(fast, page, exact)


@pytest.mark.parametrize("rows", [1, 6])
def test_products_are_differentiated_as_the_definition(rows: int, platform: str):
    """Narrow weights pass through a CPU as bits, which have no derivatives."""
    x, w, cotangent = normal(rows, 64), normal(64, 48, seed=1, dtype=jnp.bfloat16), normal(rows, 48, seed=2)
    pullback = jax.vjp(functools.partial(matmul, backend="xla"), x, w)[1]
    x_gradient, w_gradient = pullback(cotangent)
    np.testing.assert_allclose(x_gradient, cotangent @ w.astype(jnp.float32).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(w_gradient.astype(jnp.float32), x.T @ cotangent, rtol=2**-8, atol=1e-5)

    order: Order = "out_in" if platform == "gpu" else "in_out"
    codes = quantize(normal(64, 48, seed=1), "int4-g32-minimums", order=order)

    def multiply(x: jax.Array, scales: jax.Array, minimums: jax.Array) -> jax.Array:
        return quantized_matmul(
            x, dataclasses.replace(codes, scales=scales, minimums=minimums), activation=jnp.tanh, backend="xla"
        )

    def define(x: jax.Array, scales: jax.Array, minimums: jax.Array) -> jax.Array:
        w: QuantizedArray = dataclasses.replace(codes, scales=scales, minimums=minimums)
        return products.definition.quantized_matmul(x, w, activation=jnp.tanh)

    given = (x, codes.scales, codes.minimums)
    found, expected = (jax.vjp(form, *given)[1](cotangent) for form in (multiply, define))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ appends


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e5m2"])
def test_every_form_of_an_append_is_the_definition_and_differentiated_as_it(dtype: str, batch: int):
    """One token of one sequence is a slice update, others are a scatter; narrow floats are bits on a CPU."""
    cache = KVCache.dense(batch, 2, 8, 4, dtype, num_layers=2)
    cache = jax.tree.map(lambda part: normal(*part.shape, seed=3).astype(part.dtype), cache)
    k, v = (normal(batch, 1, 2, 4, seed=seed) for seed in (4, 5))
    cotangent = jax.tree.map(lambda part: normal(*part.shape, seed=6), cache)

    def total(append: Callable[..., KVCache], floats: tuple[jax.Array, ...], lengths: jax.Array, layer: Any) -> Any:
        k, v, *parts = floats
        given = dataclasses.replace(cache, **dict(zip(("k", "v"), parts, strict=False)))
        updated = append(given, k, v, lengths, new_tokens=None, layer=layer)
        products = jax.tree.map(lambda part, factor: jnp.sum(part.astype(jnp.float32) * factor), updated, cotangent)
        return sum(jax.tree.leaves(products)), updated

    floats = (k, v) if dtype == "int8" else (k, v, cache.k, cache.v)
    page, form = (
        compiled(jax.value_and_grad(functools.partial(total, append), has_aux=True))
        for append in (appends.definition.append_kv, functools.partial(append_kv, backend="xla"))
    )
    for length, layer in ((5, 0), (8, 1), (0, 0), (9, 1), (3, 2), (3, -1)):
        lengths = jnp.arange(length, length + batch, dtype=jnp.int32)
        expected, found = (call(floats, lengths, jnp.int32(layer)) for call in (page, form))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)
        if batch == 1:
            assert (np.asarray(found[1][0]) != 0).any() == (layer in (0, 1) and 0 < length <= 8)
