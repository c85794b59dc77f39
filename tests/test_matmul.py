"""matmul: every implementation on every case, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import options_for
from product_oracle import judge

from palladion import Unsupported, matmul, quantized_matmul, record_choices
from palladion.kernels.gpu_rows import MAX_ROWS
from palladion.kernels.implementation import Implementation
from palladion.kernels.linear import Inputs
from palladion.kernels.matmul import IMPLEMENTATIONS, XlaProduct, cases
from palladion.kernels.matmul.cases import Case
from palladion.kernels.matmul.triton import call as triton
from palladion.reference.compare import assert_right

TESTS = {case.name: case for case in cases.TESTS}
ROWS = {row.name: row for row in IMPLEMENTATIONS}
KERNELS = [row for row in IMPLEMENTATIONS if row.platform is not None]

# The cases that each backend refuses; any other refusal fails.
REFUSED: dict[str, set[str]] = {}


def order_of(backend: str) -> str:
    return "out_in" if backend == "triton" else "in_out"


def multiply(case: Case, inputs: Inputs, backend: str, **options: Any) -> jax.Array:
    given = case.options | {"order": order_of(backend)} | inputs._asdict() | options
    if given["order"] == "out_in":
        given["w"] = jnp.swapaxes(inputs.w, -1, -2)
    arrays = {name: given.pop(name) for name in Inputs._fields}
    call = functools.partial(matmul, **given, backend=backend, interpret=backend != "xla")
    return jax.jit(call, compiler_options=options_for(backend))(**arrays)


@functools.cache
def expected(case: Case) -> tuple[Inputs, jax.Array, np.ndarray]:
    inputs = cases.make_inputs(case)
    return inputs, multiply(case, inputs, "xla"), judge(case, inputs)


@pytest.mark.parametrize(
    ("backend", "name"),
    [(row.name, name) for row in KERNELS for name in TESTS if name not in REFUSED.get(row.name, ())],
)
def test_kernels_are_right(backend: str, name: str):
    inputs, reference, exact = expected(TESTS[name])
    assert_right(multiply(TESTS[name], inputs, backend), reference, exact, f"{backend} {name}")


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_kernels_refuse_only_what_is_known(row: Implementation):
    every = [dataclasses.replace(case, order=order_of(row.name)) for case in (*cases.TESTS, *cases.MODELS)]
    refused = {case.name for case in every if row.unsupported(case.problem()) is not None}
    assert refused == REFUSED.get(row.name, set())


@pytest.mark.parametrize("name", TESTS)
def test_the_reference_is_right(name: str):
    """The reference's error is within the bounds of float32 sums and the roundings of x and the result."""
    case, (_, result, exact) = TESTS[name], expected(TESTS[name])
    # A normalized x is rounded to its own dtype, the result to its.
    eps = float(jnp.finfo(result.dtype).eps) + (float(jnp.finfo(case.dtype).eps) if case.norm else 0)
    error = np.abs(np.asarray(result, np.float64) - exact).max() / np.abs(exact).max()
    assert error <= 4 * np.sqrt(case.in_features) * float(jnp.finfo(jnp.float32).eps) + eps


@pytest.mark.parametrize("name", ["norm-gated", "odd-both", "norm-residual"])
@pytest.mark.parametrize("config", [triton.Config(1, 1), triton.Config(8, 4), triton.Config(32, 2)], ids=str)
def test_explicit_blocks(name: str, config: triton.Config):
    inputs, reference, exact = expected(TESTS[name])
    assert_right(multiply(TESTS[name], inputs, "triton", config=config), reference, exact, f"{name} {config}")


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_shape(data: st.DataObject):
    draw = data.draw
    gated = draw(st.booleans())
    case = Case(
        name="any",
        rows=draw(st.integers(1, MAX_ROWS)),
        in_features=draw(st.integers(1, 150)),
        out_features=draw(st.integers(1, 100)) * (2 if gated else 1),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        gated=gated,
        norm=draw(st.booleans()),
        residual=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    inputs = cases.make_inputs(case)
    assert_right(multiply(case, inputs, "triton"), multiply(case, inputs, "xla"), judge(case, inputs), str(case))


def test_a_row_of_zeros_is_zero():
    case = dataclasses.replace(TESTS["wider-result"], rows=2)
    inputs = cases.make_inputs(case)
    inputs = inputs._replace(x=inputs.x.at[0].set(0))
    for backend in ROWS:
        result = np.asarray(multiply(case, inputs, backend))
        assert (result[0] == 0).all()
        assert np.isfinite(result).all()


def test_leading_dimensions_and_batches():
    inputs, reference, exact = expected(TESTS["norm-residual"])
    inputs = inputs._replace(w=jnp.swapaxes(inputs.w, -1, -2))
    given = inputs._asdict() | {"x": inputs.x[:, None], "residual": inputs.residual[:, None]}
    call = functools.partial(matmul, order="out_in", backend="triton", interpret=True)
    flat, nested = (call(**one) for one in (inputs._asdict(), given))
    np.testing.assert_array_equal(np.asarray(nested[:, 0]), np.asarray(flat))
    one_by_one = functools.partial(call, w=inputs.w, layer=inputs.layer, norm=inputs.norm)
    mapped = jax.vmap(lambda x, residual: one_by_one(x, residual=residual))(inputs.x, inputs.residual)
    assert_right(mapped, reference, exact)


@contextlib.contextmanager
def traced_for(platform: str, kind: str) -> Iterator[None]:
    """Traces for an accelerator that is not here."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.mark.parametrize("rows", [1, 4, 5, 128])
@pytest.mark.parametrize(
    ("platform", "kind", "row"), [("tpu", "TPU v6 lite", "mosaic_tpu"), ("gpu", "NVIDIA H100 80GB HBM3", "triton")]
)
def test_which_rows_run_a_kernel(platform: str, kind: str, row: str, rows: int):
    """ "pallas" and the backend's name take the platform's row; only a few rows on a GPU run a kernel."""
    order = order_of(row)
    x = jax.ShapeDtypeStruct((rows, 64), "bfloat16")
    w = jax.ShapeDtypeStruct((64, 32) if order == "in_out" else (32, 64), "bfloat16")
    for backend in ("pallas", row):
        with traced_for(platform, kind), record_choices() as choices:
            traced = jax.make_jaxpr(functools.partial(matmul, order=order, backend=backend))(x, w)
        (choice,) = choices
        by_kernel = ROWS[row].has_kernel and (platform == "tpu" or rows <= MAX_ROWS)
        assert choice.backend == row
        assert isinstance(choice.config, XlaProduct) != by_kernel
        assert ("pallas_call" in str(traced)) == by_kernel


@pytest.mark.parametrize("order", ["in_out", "out_in"])
def test_what_was_not_measured_is_xlas_product(order: str):
    """ "auto" takes the kernel of a GPU only where measurements say that it is faster."""
    x = jax.ShapeDtypeStruct((1, 64), "bfloat16")
    w = jax.ShapeDtypeStruct((64, 32) if order == "in_out" else (32, 64), "bfloat16")
    with traced_for("gpu", "NVIDIA H100 80GB HBM3"), record_choices() as choices:
        traced = jax.make_jaxpr(functools.partial(matmul, order=order))(x, w)
    assert [choice.backend for choice in choices] == ["xla"]
    assert "pallas_call" not in str(traced)


def test_the_kernel_of_a_gpu_reads_one_order():
    message = "triton: w must be stored in the order 'out_in', got 'in_out'"
    with pytest.raises(Unsupported, match=re.escape(message)):
        matmul(jnp.ones((1, 64)), jnp.ones((64, 32)), backend="triton", interpret=True)


def test_many_rows_are_xlas_product():
    """A row gives what XLA gives, bit for bit, where it has no kernel or its kernel does not run."""
    case = dataclasses.replace(TESTS["norm-residual"], rows=5)
    inputs = cases.make_inputs(case)
    for backend in ("triton", *(row.name for row in KERNELS if not row.has_kernel)):
        with record_choices() as choices:
            result = multiply(case, inputs, backend)
        reference = multiply(case, inputs, "xla", order=order_of(backend))
        assert [choice.config for choice in choices] == [XlaProduct()]
        np.testing.assert_array_equal(np.asarray(result), np.asarray(reference))
    message = "config: got Config(block_out=32, num_warps=4); accepted: None: with more than 4 rows XLA's product runs"
    with pytest.raises(ValueError, match=re.escape(message)):
        multiply(case, inputs, "triton", config=triton.Config(32))


def test_the_tuner_has_nothing_to_try_for_xlas_product():
    few = TESTS["bfloat16"].problem()
    many = dataclasses.replace(few, rows=5)
    assert ROWS["triton"].space(few).axes
    assert not list(ROWS["triton"].space(many).neighbours(XlaProduct()))
    assert triton.Config(32) not in ROWS["triton"].space(many)
    assert all(row.has_kernel == (row.space is not None) for row in IMPLEMENTATIONS)


def test_named_backends_need_their_platform():
    with pytest.raises(Unsupported, match=re.escape("runs on gpu, not on cpu (interpret=True runs it anywhere)")):
        matmul(jnp.ones((5, 64)), jnp.ones((64, 32)), backend="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": jnp.ones((3, 64, 32))}, "w: got shape (3, 64, 32); accepted: [in, out]; with a leading dimension"),
        ({"w": jnp.ones((64, 32)), "layer": 0}, "w: got shape (64, 32); accepted: [num_layers, in, out] with layer="),
        ({"w": jnp.ones((3, 64, 32)), "layer": 3}, "layer: got 3; accepted: 0 to 2"),
        ({"w": jnp.ones((64, 32), jnp.int8)}, "w: got int8; accepted: float32, bfloat16, float16; quantized_matmul"),
        ({"x": jnp.ones((2, 63))}, "x: got shape (2, 63); accepted: [..., in] with in = 64, that of w"),
        ({"norm": jnp.ones(32)}, "norm: got shape (32,); accepted: (64,), [in]"),
        ({"norm": jnp.ones(64, jnp.int32)}, "norm: got int32; accepted: a float dtype"),
        ({"norm": jnp.ones(64), "norm_eps": -1.0}, "norm_eps: got -1.0; accepted: a finite number, 0 or more"),
        ({"residual": jnp.ones((2, 64))}, "residual: got shape (2, 64); accepted: (2, 32), that of the result"),
        ({"residual": jnp.ones((1, 32))}, "residual: got shape (1, 32); accepted: (2, '...'), as of x"),
        ({"residual": jnp.ones((2, 32), jnp.int32)}, "residual: got int32; accepted: float32"),
        ({"bias": jnp.ones(31)}, "bias: got shape (31,); accepted: (32,), [out]"),
        ({"w": jnp.ones((64, 31)), "gated": True}, "gated: got 31 channels; accepted: an even number"),
        ({"out_dtype": "int8"}, "out_dtype: got int8; accepted: None, float32"),
        (
            {"w": jnp.ones((32, 64)), "order": "out_in", "backend": "triton", "interpret": True, "config": 3},
            "config: got 3; accepted: triton.Config",
        ),
        ({"backend": "mosaic_tpu", "interpret": True, "config": 3}, "config: got 3; accepted: "),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else None,
)
def test_wrong_calls(changes: dict[str, Any], message: str):
    given = {"x": jnp.ones((2, 64)), "w": jnp.ones((64, 32))} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        matmul(**given)


def test_quantized_weights_are_somebody_elses():
    with pytest.raises(ValueError, match=re.escape("w: got Array")):
        quantized_matmul(jnp.ones((1, 64)), jnp.ones((64, 32)))  # type: ignore[arg-type]


def test_wrong_blocks():
    with pytest.raises(ValueError, match=re.escape("config.block_out: got 24; accepted: a power of two")):
        triton.Config(24)
    with pytest.raises(ValueError, match=re.escape("config.num_warps: got 3")):
        triton.Config(32, 3)


def test_bytes_and_flops():
    problem = Case(name="", rows=2, in_features=8, out_features=12, gated=True, norm=True, residual=True).problem()
    assert problem.bytes_moved() == 8 * 12 * 2 + 2 * 8 * 2 + 8 * 4 + 2 * (2 * 6 * 2)
    assert problem.flops() == 2 * 2 * 8 * 12
