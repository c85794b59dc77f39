"""The parts of the GPU kernel of decode_attention: visible spans, tiles of heads, operands, splits, refusals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import options_for
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from palladion import Unsupported, decode_attention
from palladion.kernels.compat import offsets_wrap
from palladion.kernels.decode_attention import Inputs, cases
from palladion.kernels.decode_attention.cases import Case
from palladion.kernels.decode_attention.online_softmax import visible_span
from palladion.kernels.decode_attention.triton import call as triton
from palladion.kernels.decode_attention.triton import products as gpu_products
from palladion.kernels.decode_attention.triton.kernel import tiles_of
from palladion.kernels.devices import gpus
from palladion.reference import oracle
from palladion.reference.compare import assert_right

TESTS = {case.name: case for case in cases.TESTS}
MODELS = {case.name: case for case in cases.MODELS}

quickly = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def small(**changes: Any) -> Case:
    base = Case(name="case", batch=2, q_heads=4, kv_heads=2, head_dim=32, max_len=128, dtype="bfloat16")
    return dataclasses.replace(base, **changes)


@functools.cache
def compiled(backend: str, **options: Any) -> Any:
    call = functools.partial(decode_attention, return_lse=True, backend=backend, interpret=backend != "xla", **options)
    return jax.jit(lambda inputs: call(**inputs._asdict()), compiler_options=options_for(backend))


def assert_kernel_right(case: Case, inputs: Inputs | None = None, **options: Any) -> None:
    inputs = cases.make_inputs(case) if inputs is None else inputs
    arrays = inputs._asdict()
    del arrays["layer"]
    exact = oracle.decode_attention(**arrays, **case.options)
    reference = compiled("xla", **case.options)(inputs)
    result = compiled("triton", **case.options, **options)(inputs)
    for name, *values in zip(("out", "lse"), result, reference, exact, strict=True):
        assert_right(*values, what=f"{case.name}: {name}")


@pytest.mark.parametrize(
    ("name", "changes", "config"),
    [
        ("int8", {"dtype": "bfloat16"}, triton.Config(32, 16, splits=5)),
        ("int8", {"dtype": "bfloat16"}, triton.Config(32, 16, splits=5, integers=False)),
        ("int8", {"dtype": "float16"}, triton.Config(64, 16, splits=1)),
        ("int8", {"dtype": "float16"}, triton.Config(64, 16, splits=1, integers=False)),
        ("int8-window", {"dtype": "bfloat16", "head_dim": 80}, triton.Config(16, 16, splits=3)),
        ("float8-e4m3fn", {"dtype": "float16"}, triton.Config(32, 16, splits=2)),
        ("float8-e5m2", {"dtype": "bfloat16"}, triton.Config(32, 16, splits=2)),
        ("paged", {"dtype": "bfloat16"}, triton.Config(16, 16, splits=2)),  # a block on one page
        ("paged", {"dtype": "bfloat16"}, triton.Config(64, 16, splits=2)),  # four pages in a block
        ("paged", {"dtype": "bfloat16", "page_size": 40}, triton.Config(32, 16, splits=3)),  # blocks across pages
        ("paged", {"page_size": 1, "max_len": 33, "lengths": (0, 1, 17, 33)}, triton.Config(16, 16, splits=1)),
    ],
    ids=str,
)
def test_ways_to_read_a_cache(name: str, changes: dict[str, Any], config: triton.Config):
    assert_kernel_right(dataclasses.replace(TESTS[name], **changes), config=config)


@pytest.mark.parametrize("block_kv", [16, 32])
def test_dead_pages_are_not_read(block_kv: int):
    # Where dead entries name a page of NaN, a value of it would be seen: 0 * NaN is NaN.
    case = small(max_len=96, page_size=16, lengths=(5, 40), sliding_window=20)
    inputs = cases.make_inputs(case)
    table = np.asarray(inputs.page_table)
    pages = np.asarray(inputs.k, np.float32)
    (poison,) = (np.flatnonzero(np.isnan(pages).all(axis=(1, 2, 3)))[:1],)
    poisoned = inputs._replace(page_table=jnp.asarray(np.where(table == cases.DEAD_PAGE, poison, table), jnp.int32))
    config = triton.Config(block_kv, 16, splits=2)
    for one, other in zip(
        *(compiled("triton", config=config, **case.options)(x) for x in (inputs, poisoned)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(np.asarray(one, np.float32)).all()


@quickly
@hypothesis.given(
    length=st.integers(0, 300),
    q_len=st.integers(1, 9),
    group=st.integers(1, 5),
    window=st.none() | st.integers(1, 80),
    block_kv=st.sampled_from([16, 32, 64]),
    splits=st.integers(1, 9),
    block_rows=st.sampled_from([16, 32]),
)
def test_splits_read_what_is_seen_and_nothing_else(
    length: int, q_len: int, group: int, window: int | None, block_kv: int, splits: int, block_rows: int
):
    case = small(q_len=q_len, q_heads=2 * group, max_len=300, sliding_window=window)
    problem = case.problem()
    rows = q_len * group
    for first_row in range(0, rows, block_rows):
        last_row = min(first_row + block_rows, rows) - 1
        spans = [
            visible_span(problem, jnp.int32(length), first_row, last_row, block_kv, split, splits)
            for split in range(splits)
        ]
        read = [block for span in spans for block in range(int(span.begin), int(span.end))]
        seen = set()
        for row in (first_row, last_row):
            position = length - q_len + row // group
            first = 0 if window is None else max(position - window + 1, 0)
            seen |= set(range(first, position + 1))
        blocks = sorted({token // block_kv for token in seen})
        # Between the first row and the last one, other rows see what lies between.
        expected = list(range(blocks[0], blocks[-1] + 1)) if blocks else []
        assert read == expected
        assert max((int(span.end) - int(span.begin) for span in spans), default=0) <= -(-len(expected) // splits)


@pytest.mark.parametrize("head_dim", range(1, triton.MAX_HEAD_DIM + 1))
def test_tiles_of_a_head(head_dim: int):
    tiles = tiles_of(head_dim)
    assert [tile.first for tile in tiles] == [sum(tile.width for tile in tiles[:n]) for n in range(len(tiles))]
    width = sum(tile.width for tile in tiles)
    assert head_dim <= width < max(head_dim * 4 / 3, head_dim + 32)
    assert all(tile.width & (tile.width - 1) == 0 for tile in tiles)


@quickly
@hypothesis.given(seed=st.integers(0, 999), size=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e4]))
@pytest.mark.parametrize(
    ("kv_dtype", "q_dtype"), [("int8", "bfloat16"), ("int8", "float16"), ("float8_e5m2", "bfloat16")]
)
def test_queries_as_operands(kv_dtype: str, q_dtype: str, seed: int, size: float):
    rng = np.random.default_rng(seed)
    parts = [jnp.asarray(rng.standard_normal((16, width)) * size, q_dtype) for width in (64, 32)]
    problem = dataclasses.replace(small().problem(), kv_dtype=kv_dtype, q_dtype=q_dtype)
    queries = gpu_products.prepare_queries(problem, parts, integers=True)
    assert queries.unit is not None
    largest = np.max([np.abs(np.asarray(part, np.float64)).max(axis=1) for part in parts], axis=0)[:, None]
    for part, pieces in zip(parts, queries.operands, strict=True):
        assert {piece.dtype for piece in pieces} == {jnp.dtype("int8" if kv_dtype == "int8" else "float16")}
        steps = [gpu_products.STEP ** (len(pieces) - 1 - n) for n in range(len(pieces))]
        back = sum(np.asarray(piece, np.float64) * step for piece, step in zip(pieces, steps, strict=True))
        back = back * np.asarray(queries.unit, np.float64)[:, None]
        assert (np.abs(back - np.asarray(part, np.float64)) <= largest * 2.0**-21).all()


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e5m2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_queries_keep_bad_numbers(kv_dtype: str, bad: float):
    problem = dataclasses.replace(small().problem(), kv_dtype=kv_dtype)
    part = jnp.ones((16, 32), jnp.bfloat16).at[3, 7].set(bad)
    prepare = functools.partial(gpu_products.prepare_queries, problem, integers=True)
    unit = prepare([part]).unit
    assert unit is not None
    np.testing.assert_array_equal(np.isfinite(unit), np.arange(16) != 3)
    # Pallas has the maximum of floats leave out NaN on a GPU, an interpreter has not.
    maxima = [eqn for eqn in jax.make_jaxpr(prepare)([part]).eqns if eqn.primitive.name in ("max", "reduce_max")]
    assert maxima
    assert all(eqn.invars[0].aval.dtype == jnp.int32 for eqn in maxima)


def test_codes_are_operands_exactly():
    codes = np.arange(256, dtype=np.uint8)
    for dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
        stored = jnp.asarray(codes.view(jnp.dtype(dtype)))
        for operand in (jnp.bfloat16, jnp.float16, jnp.float32):
            became = np.asarray(gpu_products.to_operand(stored, operand), np.float64)
            np.testing.assert_array_equal(became, np.asarray(stored, np.float64))


# --- What is chosen for a GPU ---


@pytest.mark.parametrize("gpu", gpus())
@pytest.mark.parametrize("name", MODELS)
def test_heuristics_fit_every_gpu(name: str, gpu: str, monkeypatch: pytest.MonkeyPatch):
    chip = gpus()[gpu]
    monkeypatch.setattr(triton, "gpu_to_plan_for", lambda: chip)
    problem = MODELS[name].problem()
    config = triton.heuristic(problem)
    width = sum(tile.width for tile in tiles_of(problem.head_dim))
    item = jnp.dtype(problem.kv_dtype).itemsize
    stages = (config.num_stages - 1) * 2 * config.block_kv * width * item
    assert (
        stages + config.block_kv * width * 2 + config.block_rows * (width + config.block_kv) * 2
        <= chip.program_shared_bytes
    )
    row_blocks = -(-problem.q_len * problem.group // config.block_rows)
    programs = problem.batch * problem.kv_heads * row_blocks
    assert config.splits == 1 or programs * config.splits <= triton.RESIDENT * chip.multiprocessors


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200", "l4", "rtx-4090"])
@pytest.mark.parametrize("max_len", [8192, 32768])
def test_one_sequence_fills_the_chip(gpu: str, max_len: int, monkeypatch: pytest.MonkeyPatch):
    chip = gpus()[gpu]
    monkeypatch.setattr(triton, "gpu_to_plan_for", lambda: chip)
    config = triton.heuristic(dataclasses.replace(MODELS["llama-3-8b-32k"], max_len=max_len).problem())
    # Eight KV heads: as many programs as multiprocessors at least, and of all there is no more than a third left idle.
    programs = 8 * config.splits
    blocks = -(-max_len // config.block_kv)
    busiest = -(-programs // chip.multiprocessors) * -(-blocks // config.splits)
    assert programs >= chip.multiprocessors * 0.95
    assert 8 * blocks / chip.multiprocessors / busiest > 2 / 3


def target(kind: str) -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("_",), abstract_device=device))


def lower(case: Case, **options: Any) -> None:
    call = functools.partial(decode_attention, **case.options, **options)
    jax.eval_shape(lambda inputs: call(**inputs._asdict()), case.shapes())


def test_float8_needs_a_gpu_that_converts_it():
    case = small(kv_dtype="float8_e4m3fn")
    with (
        target("NVIDIA A100-SXM4-80GB"),
        pytest.raises(Unsupported, match=r"sm_89 or newer, got sm_80 .*an int8 cache"),
    ):
        lower(case, backend="pallas")
    with target("NVIDIA A100-SXM4-80GB"):
        lower(case)  # "auto" takes the reference
    with target("NVIDIA H200"):
        lower(case, backend="pallas")


def test_one_byte_caches_that_pallas_miscounts():
    assert [offsets_wrap(gib * 2**30) for gib in (1, 2, 3, 4, 5)] == [False, False, True, True, False]
    case = small(kv_dtype="int8", kv_heads=8, q_heads=8, head_dim=128, max_len=2**20)
    wrong = dataclasses.replace(case, batch=3)
    with pytest.raises(
        Unsupported, match="a layer of a int8 cache must take up to 2 GiB, or more than 4, got 3221225472"
    ):
        lower(wrong, backend="triton", interpret=True)
    for fine in (case, dataclasses.replace(case, batch=5), dataclasses.replace(wrong, kv_dtype=None)):
        lower(fine, backend="triton", interpret=True)
    # Of a stack that is too large in all, the layer is taken out before.
    stacked = dataclasses.replace(wrong, batch=1, num_layers=3)
    operands = jax.eval_shape(lambda inputs: triton._operands(stacked.problem(), inputs), stacked.shapes())
    assert operands.k.shape == (1, 1, 8, 2**20, 128)
    assert operands.k_scale.shape == (1, 1, 8, 2**20)
