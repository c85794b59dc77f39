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
from palladion.kernels.decode_attention import Inputs, cases, shares
from palladion.kernels.decode_attention.cases import Case
from palladion.kernels.decode_attention.triton import call as triton
from palladion.kernels.decode_attention.triton import products as gpu_products
from palladion.kernels.decode_attention.triton.rows import tiles_of
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
    inputs, reference, exact = expected(case) if inputs is None else (inputs, *judged(case, inputs))
    result = compiled("triton", **case.options, **options)(inputs)
    for name, *values in zip(("out", "lse"), result, reference, exact, strict=True):
        assert_right(*values, what=f"{case.name}: {name}")


@functools.cache
def expected(case: Case) -> tuple[Inputs, Any, Any]:
    """Returns a case's inputs, and the results of the reference and of the oracle."""
    inputs = cases.make_inputs(case)
    return inputs, *judged(case, inputs)


def judged(case: Case, inputs: Inputs) -> tuple[Any, Any]:
    """Returns the results of the reference and of the oracle, which takes a single layer."""
    arrays = inputs._asdict()
    layer = arrays.pop("layer")
    for part in () if layer is None else ("k", "v", "k_scale", "v_scale"):
        arrays[part] = None if arrays[part] is None else arrays[part][int(layer)]
    return compiled("xla", **case.options)(inputs), oracle.decode_attention(**arrays, **case.options)


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


@pytest.mark.parametrize("form", ["launch balanced", "last balanced", "last"])
@pytest.mark.parametrize(
    ("name", "changes", "config"),
    [
        ("sinks", {"dtype": "bfloat16", "lengths": (0, 1, 300)}, triton.Config(16, 16, splits=3)),
        ("q-len-5", {"dtype": "bfloat16", "lengths": (3, 300, 0)}, triton.Config(32, 16, splits=1)),
        ("window-sinks-soft-cap", {"lengths": (300, 3)}, triton.Config(16, 16, splits=2)),
        ("paged-layers", {"lengths": (4, 512)}, triton.Config(32, 16, splits=4)),
        ("int8-paged-layers", {"lengths": (0, 320)}, triton.Config(16, 16, splits=5)),
        ("gqa", {"head_dim": 192, "dtype": "bfloat16"}, triton.Config(16, 16, splits=9)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ways_to_share_and_merge(name: str, changes: dict[str, Any], config: triton.Config, form: str):
    merge, *balanced = form.split()
    config = dataclasses.replace(config, merge=merge, balanced=bool(balanced))
    assert_kernel_right(dataclasses.replace(TESTS[name], **changes), config=config)


@pytest.mark.parametrize("merge", ["launch", "last"])
def test_a_batch_larger_than_a_warp(merge: str):
    lengths = tuple(np.random.default_rng(0).integers(0, 65, 70).tolist())
    case = small(batch=70, kv_heads=1, q_heads=2, max_len=64, lengths=lengths)
    assert_kernel_right(case, config=triton.Config(16, 16, splits=1, balanced=True, merge=merge))


def test_batches_of_batches():
    config = triton.Config(16, 16, splits=2, balanced=True, merge="last")
    inputs = [cases.make_inputs(small(lengths=lengths), seed) for seed, lengths in enumerate([(100, 3), (0, 77)])]
    attend = compiled("triton", config=config)
    together = jax.vmap(attend)(jax.tree.map(lambda *parts: jnp.stack(parts), *inputs))
    for number, one in enumerate(inputs):
        for whole, part in zip(together, attend(one), strict=True):
            np.testing.assert_allclose(whole[number], part, rtol=1e-6)


def test_a_batch_invariant_call_is_not_balanced():
    """A config that balances would let a sequence's splits depend on the other sequences."""
    inputs = cases.make_inputs(small(lengths=(128, 5)))
    config = triton.Config(16, 16, splits=3, balanced=True)
    alone = inputs._replace(**{part: getattr(inputs, part)[:1] for part in ("q", "k", "v", "lengths")})
    bits = [compiled("triton", config=config, batch_invariant=True)(x)[0][0] for x in (inputs, alone)]
    np.testing.assert_array_equal(*bits)
    assert (bits[0] != compiled("triton", config=config)(inputs)[0][0]).any()


def test_scales_of_values_may_be_far_apart():
    """Weights and their scales become one float16 number, which must not overflow or vanish."""
    case = small(kv_dtype="int8", lengths=(100, 128))
    inputs = cases.make_inputs(case)
    assert inputs.v_scale is not None
    power = np.random.default_rng(0).integers(-40, 41, inputs.v_scale.shape)
    for changed in (inputs.v_scale * 2.0**power, inputs.v_scale * 2.0**60, inputs.v_scale * 2.0**-50):
        assert_kernel_right(case, inputs._replace(v_scale=changed), config=triton.Config(32, 16, splits=2))


@quickly
@hypothesis.given(
    lengths=st.lists(st.integers(0, 300), min_size=2, max_size=7),
    q_len=st.integers(1, 9),
    group=st.integers(1, 5),
    window=st.none() | st.integers(1, 80),
    config=st.builds(
        triton.Config,
        block_kv=st.sampled_from([16, 32, 64]),
        block_rows=st.sampled_from([16, 32]),
        splits=st.integers(1, 9),
        balanced=st.booleans(),
    ),
)
def test_shares_cover_what_is_seen_and_nothing_else(
    lengths: list[int], q_len: int, group: int, window: int | None, config: triton.Config
):
    case = small(batch=len(lengths), q_len=q_len, q_heads=2 * group, max_len=300, sliding_window=window)
    problem, rows = case.problem(), q_len * group
    for row_block in range(-(-rows // config.block_rows)):
        first_row, last_row = row_block * config.block_rows, min((row_block + 1) * config.block_rows, rows) - 1
        found = shares_of_all_slots(problem, config, lengths, row_block)
        read: list[list[int]] = [[] for _ in lengths]
        for slot, share in enumerate(found):
            if share.works:
                assert share.slots.first + share.split == slot
                assert share.slots.number <= shares.most_slots(problem, config)
                read[share.sequence] += range(share.begin, share.end)
            else:
                assert share.begin >= share.end
        seen = []
        for length in lengths:
            first_query, last_query = (length - q_len + row // group for row in (first_row, last_row))
            first = 0 if window is None else max(first_query - window + 1, 0)
            # Between the first row and the last one, other rows see what lies between.
            end = last_query // config.block_kv + 1 if last_query >= 0 else 0
            seen.append(list(range(first // config.block_kv, end)))
        assert read == seen
        total = sum(map(len, seen)) if config.balanced else max(map(len, seen)) * len(lengths)
        size = max(share.end - share.begin for share in found)
        assert size <= max(-(-total // (len(lengths) * config.splits)), 1)


def shares_of_all_slots(problem: Any, config: triton.Config, lengths: list[int], row_block: int) -> list[shares.Share]:
    """Returns what each slot works on."""
    padded = jnp.array(lengths + [-1] * (8 - len(lengths)), jnp.int32)
    if shares.is_balanced(problem, config):
        share = shares.Balance.of(problem, config, padded, row_block).share
    else:
        share = functools.partial(shares.share_of, problem, config, padded, row_block)
    found = jax.vmap(share)(jnp.arange(128, dtype=jnp.int32))  # the same shapes for all
    leaves, tree = jax.tree.flatten(found)
    columns = [np.broadcast_to(leaf, 128).tolist() for leaf in leaves]
    rows = zip(*columns, strict=True)
    return [
        jax.tree.unflatten(tree, row) for row, _ in zip(rows, range(shares.slots_of(problem, config)), strict=False)
    ]


def test_balanced_shares_even_out_the_work():
    problem = small(batch=8, max_len=4096).problem()
    lengths = [4096, 100, 100, 100, 100, 100, 100, 100]
    longest = [
        max(
            share.end - share.begin
            for share in shares_of_all_slots(problem, triton.Config(64, 16, splits=4, balanced=balanced), lengths, 0)
        )
        for balanced in (False, True)
    ]
    assert longest == [16, 3]


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
            became = np.asarray(gpu_products.to_operand(stored, operand, native=False), np.float64)
            np.testing.assert_array_equal(became, np.asarray(stored, np.float64))


def test_the_ptx_that_converts_int8_is_exact():
    """Evaluates the instructions of PTX, which only compiled kernels execute, for every code."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8)
    registers: dict[str, Any] = {"$2": codes.view(np.uint32)}  # four codes in each word
    for line in gpu_products.INT8_TO_FLOAT16.strip("{} \n").split(";"):
        name, _, rest = line.strip().partition(" ")
        result, *operands = rest.split(", ")
        values = [registers[one] if one in registers else np.uint32(int(one, 0)) for one in operands if name[0] != "."]
        if name == "xor.b32":
            registers[result] = values[0] ^ values[1]
        elif name == "mov.b32":
            registers[result] = np.full(64, values[0])
        elif name == "prmt.b32":
            words = np.stack(np.broadcast_arrays(*values[:2]), axis=1).astype(np.uint32).view(np.uint8)  # [64, 8]
            chosen = [int(values[2]) >> (4 * digit) & 7 for digit in range(4)]
            registers[result] = np.ascontiguousarray(words[:, chosen]).view(np.uint32)[:, 0]
        elif name == "sub.f16x2":
            first, second = (np.ascontiguousarray(value).view(np.float16) for value in values)
            registers[result] = (first - second).view(np.uint32)
        else:
            assert name in ("", ".reg"), name
    pairs = [registers[result].view(np.float16).reshape(64, 2) for result in ("$0", "$1")]
    np.testing.assert_array_equal(np.concatenate(pairs, axis=1).reshape(256), codes)


# --- What is chosen for a GPU ---


@pytest.mark.parametrize("gpu", gpus())
@pytest.mark.parametrize("name", MODELS)
def test_heuristics_fit_every_gpu(name: str, gpu: str, monkeypatch: pytest.MonkeyPatch):
    chip = gpus()[gpu]
    monkeypatch.setattr(triton, "gpu_to_plan_for", lambda: chip)
    problem = MODELS[name].problem()
    config = triton.heuristic(problem)
    operands = triton.operand_bytes(problem, config.block_rows, config.block_kv)
    assert triton.loaded_bytes(problem, config) + operands <= chip.program_shared_bytes
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


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-3-8b", {"max_len": 8192}),
        ("llama-3-8b-32k", {"max_len": 8192}),
        ("llama-3-8b-paged", {}),
        ("llama-3-8b-int8", {}),
        ("llama-3-8b-float8", {}),
        ("llama-3-8b-paged-int8", {}),
    ],
)
def test_memory_is_kept_busy(name: str, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    """Two programs, and 64 KiB in flight, are chosen for every cache: they reached an H200's bandwidth at 16 bits."""
    chip = gpus()["h200"]
    monkeypatch.setattr(triton, "gpu_to_plan_for", lambda: chip)
    problem: Any = dataclasses.replace(MODELS[name], **changes).problem()
    config = triton.heuristic(problem)
    programs = problem.batch * problem.kv_heads * config.splits / chip.multiprocessors
    assert 1.9 < programs <= 2
    ahead = triton.buffers_of(problem, config.num_stages) - 1
    assert 2 * ahead * triton.block_bytes(problem, config.block_kv) >= 64 * 1024
    operands = triton.operand_bytes(problem, config.block_rows, config.block_kv)
    assert 2 * (triton.loaded_bytes(problem, config) + operands + 1024) <= chip.shared_bytes
    # Sequences differ in length, as a rule. A single one, and windows, leave nothing to balance; prompts gain little.
    assert config.balanced == (problem.batch > 1)
    for changed in ({"sliding_window": 1024}, {"q_len": 512}):
        assert not triton.heuristic(dataclasses.replace(problem, **changed)).balanced


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
