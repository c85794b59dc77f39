"""decode_attention's kernel in Mosaic GPU: its maths and transfers interpreted, its code compiled.

jax's interpreter of Mosaic GPU runs the transfers, the barriers and the shared memory of a kernel, but has no registers
and no tensor cores: products are those of jax.numpy there. It is slow, so each case has several things at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICKLY
from hopper_attention import case_of, check, run
from hopper_clusters import reads_of_others

from palladion import Unsupported, decode_attention
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.static.gpu.mosaic import compile_mosaic_kernels
from palladion.benchmarks.static.gpu.sass import by_loop, parse
from palladion.kernels import gpu_codes
from palladion.kernels.backend import record_choices
from palladion.kernels.compat import gpu_interpreter
from palladion.kernels.decode_attention import cases, shares
from palladion.kernels.decode_attention.cases import Case
from palladion.kernels.decode_attention.mosaic_gpu import balance, call, turned_codes
from palladion.kernels.decode_attention.mosaic_gpu.call import Config
from palladion.kernels.decode_attention.mosaic_gpu.memory import shared_bytes, stage_bytes, swizzle_of
from palladion.kernels.devices import gpus

needs_plugin = pytest.mark.skipif(not gpu_program.installed(), reason="jax-cuda12-plugin is not installed")

MODELS = {case.name: case for case in cases.MODELS}


RIGHT = [
    # A length of zero, one that ends with a block, and one that ends within; dead tokens are NaN.
    (case_of("gqa", batch=3, max_len=304, head_dim=128, lengths=(0, 128, 299)), Config(64, 8, 2, num_stages=2)),
    (
        case_of("window", dtype="float16", sliding_window=70, sinks=True, logits_soft_cap=5.0, lengths=(190, 9)),
        Config(64, 8, 1, num_stages=1),
    ),
    (
        case_of("balanced", batch=4, sinks=True, lengths=(190, 0, 13, 150)),
        Config(64, 8, 2, num_stages=3, balanced=True),
    ),
    # Rows that fill no tile, two blocks of them, and queries before a sequence's first token.
    (
        case_of("q-len-5", q_len=5, q_heads=6, lengths=(3, 150), num_layers=2),
        Config(128, 8, 2, num_stages=1, balanced=True),
    ),
    (case_of("prefill", q_len=30, head_dim=192, q_heads=2, kv_heads=1), Config(64, 24, 1)),
    # Several pages in a block, where the table has entries that name no page; several blocks in a page.
    (case_of("pages-of-16", page_size=16, lengths=(17, 190), sliding_window=90), Config(128, 8, 2, num_stages=2)),
    (
        case_of("pages-of-128", page_size=128, max_len=256, num_layers=2, lengths=(65, 250)),
        Config(64, 8, 2, num_stages=2, balanced=True),
    ),
    (case_of("int8", kv_dtype="int8", q_len=3, sliding_window=100), Config(64, 8, 2, num_stages=2)),
    (
        case_of("int8-pages", dtype="float16", kv_dtype="int8", page_size=32, num_layers=2, head_dim=128),
        Config(64, 8, 2, num_stages=2),
    ),
    (case_of("float8-e4m3fn", kv_dtype="float8_e4m3fn", lengths=(130, 2)), Config(128, 8, 1, num_stages=2)),
    (
        case_of("float8-e5m2", dtype="float16", kv_dtype="float8_e5m2", logits_soft_cap=9.0, head_dim=256),
        Config(64, 8, 2, num_stages=1),
    ),
    # Splits merged in a cluster. A split without a unit, splits without blocks, sequences of 0, 1 and all tokens.
    (
        case_of("cluster", batch=4, head_dim=128, sinks=True, lengths=(0, 192, 1, 130)),
        Config(64, 8, 3, num_stages=2, merge="cluster"),
    ),
    # Rows that end within a unit of 8, within one of 4 where splits have two units, and within one of 2.
    (
        case_of("cluster-pages", kv_dtype="int8", page_size=32, num_layers=2, head_dim=256),
        Config(64, 8, 2, num_stages=1, merge="cluster"),
    ),
    (
        case_of("cluster-rows", q_len=5, q_heads=6, kv_dtype="float8_e4m3fn", sinks=True, lengths=(3, 150)),
        Config(64, 16, 3, num_stages=2, merge="cluster"),
    ),
    (
        case_of("cluster-window", dtype="float16", q_len=3, q_heads=2, sliding_window=70, logits_soft_cap=5.0),
        Config(64, 8, 2, num_stages=1, merge="cluster"),
    ),
    # Two blocks of rows, of which the last is written whole.
    (case_of("cluster-blocks", q_len=5, lengths=(150, 4)), Config(64, 8, 4, num_stages=1, merge="cluster")),
]


@pytest.mark.parametrize(("case", "config"), RIGHT, ids=lambda value: getattr(value, "name", ""))
def test_the_kernel_is_right(case: Case, config: Config):
    check(case, config)


@pytest.mark.parametrize("merge", ["launch", "cluster"])
def test_memory_is_awaited_before_it_is_read(merge: Any):
    """Shared memory is NaN until something arrives, with sizes that divide blocks."""
    case = case_of("awaited", q_heads=16, lengths=(192, 128))
    interpret = dataclasses.replace(gpu_interpreter(True), uninitialized_memory="nan")
    check(case, Config(64, 8, 2, num_stages=2, merge=merge), interpret=interpret)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax's interpreter of GPU kernels finds races from 0.11 on")
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (case_of("dense", lengths=(190, 64)), Config(64, 8, 1, num_stages=2)),
        (case_of("int8", kv_dtype="int8", lengths=(190, 64)), Config(64, 8, 1, num_stages=2)),
        (case_of("pages", page_size=32, max_len=256, lengths=(250, 65)), Config(64, 8, 2, num_stages=2)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_blocks_are_read_without_races(case: Case, config: Config):
    """Blocks of the ring are written more than once; jax 0.11 counts races, 0.12 raises at the first."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    check(case, config, interpret=dataclasses.replace(gpu_interpreter(True), detect_races=True))
    assert gpu_callbacks.get_races().races_found is False


@pytest.mark.parametrize(
    ("changes", "right", "backend"),
    [
        ({}, ["decode_attention"], "mosaic_gpu"),
        ({}, ["quantized_matmul"], "triton"),
        ({"q_len": 40}, ["decode_attention"], "triton"),
        ({"batch": 1, "lengths": (9,)}, ["decode_attention"], "triton"),
        ({"batch": 1, "lengths": (9,), "kv_dtype": "int8"}, ["decode_attention"], "mosaic_gpu"),
    ],
)
def test_auto_takes_it_for_a_few_rows_with_which_it_was_right_and_fast(
    changes: dict[str, Any], right: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(gpus(), "h200", dataclasses.replace(gpus()["h200"], mosaic_gpu=tuple(right)))
    with gpu_compiler.tracing_for(90), record_choices() as choices:
        jax.eval_shape(lambda inputs: decode_attention(**inputs._asdict()), case_of(**changes).shapes())
    assert choices[0].backend == backend


def test_dead_pages_are_not_read():
    """Where dead entries of the page table name a page of NaN, a value of it would be seen: 0 * NaN is NaN."""
    case = case_of("dead", max_len=96, page_size=16, lengths=(5, 40), sliding_window=20)
    inputs = cases.make_inputs(case)
    table, pages = np.asarray(inputs.page_table), np.asarray(inputs.k, np.float32)
    poison = np.flatnonzero(np.isnan(pages).all(axis=(1, 2, 3)))[0]
    poisoned = inputs._replace(page_table=jnp.asarray(np.where(table == cases.DEAD_PAGE, poison, table), jnp.int32))
    found = run(case, Config(64, 8, 1, num_stages=1), poisoned)
    for one, other in zip(found, run(case, Config(64, 8, 1, num_stages=1), inputs), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(np.asarray(one, np.float32)).all()


def test_scales_of_values_may_be_far_apart():
    """Weights and their scales become one float16 number, which must not overflow or vanish."""
    case = case_of("scales", kv_dtype="int8")
    inputs = cases.make_inputs(case)
    power = np.random.default_rng(0).integers(-40, 41, inputs.v_scale.shape)
    check(case, Config(64, 8, 1, num_stages=2), inputs._replace(v_scale=inputs.v_scale * 2.0**power))


def test_a_sequence_has_the_same_bits_in_every_batch():
    inputs = cases.make_inputs(case_of(lengths=(192, 5)))
    config = Config(64, 8, 2, num_stages=1, balanced=True)
    options: dict[str, Any] = {"backend": "mosaic_gpu", "interpret": True, "config": config, "batch_invariant": True}
    attend = jax.jit(lambda inputs: decode_attention(**inputs._asdict(), **options), compiler_options=QUICKLY)
    alone = inputs._replace(**{part: getattr(inputs, part)[:1] for part in ("q", "k", "v", "lengths")})
    np.testing.assert_array_equal(*(np.asarray(attend(one)[0], np.float32) for one in (inputs, alone)))


@pytest.mark.parametrize("window", [None, 90])
def test_balanced_shares_are_found_one_by_one(window: int | None):
    """A program finds what `shares.Balance` computes of all slots."""
    problem = case_of(batch=5, q_len=3, q_heads=6, lengths=None, sliding_window=window).problem()
    lengths, config = jnp.array([192, 0, 70, 1, 130], jnp.int32), Config(64, 8, 2, balanced=True)
    slots = jnp.arange(shares.slots_of(problem, config), dtype=jnp.int32)
    sequences = jnp.arange(5, dtype=jnp.int32)

    def find(row_block: jax.Array) -> Any:
        share = jax.vmap(lambda slot: balance.find_share(problem, config, lengths, row_block, slot))(slots)
        return share, jax.vmap(lambda one: balance.find_slots(problem, config, lengths, row_block, one))(sequences)

    def compute(row_block: jax.Array) -> Any:
        whole = shares.Balance.of(problem, config, lengths, row_block)
        return jax.vmap(whole.share)(slots), jax.vmap(whole.slots)(sequences)

    blocks_of_rows = jnp.arange(2, dtype=jnp.int32)
    found, expected = (jax.jit(jax.vmap(function))(blocks_of_rows) for function in (find, compute))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.broadcast_to(one, other.shape), other)


# -------------------------------------------------------------------------------------------- registers of the values

LANE = np.arange(128) % 32
GROUP, THREAD = LANE // 4, LANE % 4
WARP = np.arange(128) // 32


def turn(memory: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """Executes `ldmatrix.m8n8.x4.trans.b16` of four warps, `[4, 128]`: what each thread gets of each matrix."""
    rows = memory[addresses[:, None] + np.arange(16)].view(np.uint16).reshape(4, 4, 8, 8)  # [warp, matrix, row, column]
    first, second = (rows[WARP, :, 2 * THREAD + place, GROUP].astype(np.uint32) for place in (0, 1))
    return (first | second << 16).T


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("head_dim", call.HEAD_DIMS)
def test_values_reach_their_registers(head_dim: int, kv_dtype: str, dtype: str):
    """Codes that TMA has permuted, turned and converted as the kernel does it, lie where wgmma expects them."""
    tokens, swizzle, start = 64, swizzle_of(head_dim), 4096
    codes = cases.make_inputs(case_of(kv_dtype=kv_dtype, batch=1, lengths=None, head_dim=head_dim)).v[0, 0, :tokens]
    chunks = np.asarray(codes).view(np.uint8).reshape(tokens, head_dim // 16, 16)
    memory = np.zeros(start + tokens * head_dim, np.uint8)
    for token, chunk in np.ndindex(chunks.shape[:2]):
        tile, column = divmod(16 * chunk, swizzle)
        row = (token // 8 * (head_dim // swizzle) + tile) * 8 * swizzle + token % 8 * swizzle
        permuted = column // 16 ^ (token % 8 >> (0 if swizzle == 128 else 1))
        memory[start + row + 16 * permuted :][:16] = chunks[token, chunk]

    words = np.empty((head_dim // 64, tokens // 8), object)
    first = start + turned_codes.first_row(np.arange(128), head_dim, swizzle)
    for tile, step in np.ndindex(head_dim // 64, tokens // 32):
        address = turned_codes.swizzled(first + turned_codes.further(tile, step, head_dim, swizzle), swizzle)
        words[tile, 4 * step : 4 * step + 4] = list(turn(memory, address))
    how, numbers = gpu_codes.recipe(kv_dtype, dtype), np.asarray(codes, np.float64)

    def floats(make: Any, word: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(make(word).astype(np.uint32)[:, None]).view(jnp.dtype(dtype)).astype(np.float64)

    for tile, block, half in np.ndindex(*words.shape, 2):
        register = turned_codes.arrange(words, lambda word: word)[tile, block, half]
        found = floats(how.bits, register) - (0 if how.less is None else floats(how.less, register))
        feature = 64 * tile + 16 * WARP + 2 * GROUP + half  # of row GROUP + 8 half of 16
        token = 8 * block + 2 * THREAD
        expected = np.stack([numbers[token, feature], numbers[token + 1, feature]], axis=1)
        np.testing.assert_array_equal((found - how.offset) * how.factor, expected)


def test_features_are_put_in_order():
    of_row = np.array([2 * row if row < 8 else 2 * row - 15 for row in range(16)])
    held = of_row.reshape(2, 8)[:, GROUP[:32]]  # by each lane, in rows g and g + 8
    *lanes, row = turned_codes.sources(np.arange(32))
    for half, lane in enumerate(lanes):
        np.testing.assert_array_equal(held[row, lane], GROUP[:32] + 8 * half)
        np.testing.assert_array_equal(lane % 4, THREAD[:32])  # which has the same query rows


# ------------------------------------------------------------------------------------------------------ block sizes


@pytest.mark.parametrize("name", MODELS)
def test_the_heuristic_suits_every_model(name: str):
    """Block sizes are in the tuner's space, and 48 KiB of the cache are on their way at least, unless there is less."""
    chip = gpus()["h200"]
    with gpu_compiler.tracing_for(90):
        problem = MODELS[name].problem()
        if call.unsupported(problem) is not None:
            return
        config, space = call.heuristic(problem), call.space(problem)
    assert config in space
    assert list(space.neighbours(config))
    row_blocks = -(-problem.q_len * problem.group // config.block_rows)
    programs = problem.batch * problem.kv_heads * row_blocks * config.splits
    resident = min(
        -(-programs // chip.multiprocessors), call.PROGRAMS, chip.shared_bytes // shared_bytes(problem, config)
    )
    assert resident * (shared_bytes(problem, config) + 1024) <= chip.shared_bytes
    blocks = -(-problem.max_len // config.block_kv // config.splits)
    if problem.sliding_window is None:
        ahead = (config.num_stages - 0.5) * stage_bytes(problem, config.block_kv) * resident
        assert ahead >= 48 * 1024 or config.num_stages >= blocks, (config, resident)


@pytest.mark.parametrize("changes", [{"batch": 1}, {"batch": 8}], ids=str)
def test_the_tuner_tries_clusters_of_all_sizes(changes: dict[str, int]):
    """Splits that a launch merges stay near the heuristic's, however few a cluster may have."""
    with gpu_compiler.tracing_for(90):
        problem = dataclasses.replace(MODELS["llama-3-8b-layers"], **changes, lengths=None).problem()
        start, space = call.heuristic(problem), call.space(problem)
    assert start.merge == "launch"
    tried = list(space.spread())
    assert {config.merge for config in tried[:2]} == {"launch", "cluster"}
    assert {config.splits for config in tried if config.merge == "cluster"} == {2, 3, 4, 6, 8}
    assert min(config.splits for config in tried if config.merge == "launch") * 4 >= start.splits


def test_what_is_not_covered_says_so():
    """The cases that the kernel refuses; others fall to Triton."""
    refused = {case.name for case in cases.MODELS if call.unsupported(case.problem()) is not None}
    assert refused == {"llama-3-8b-float32", "phi-3-mini", "phi-2", "head-dim-112"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "q must be bfloat16 or float16, got float32"),
        ({"kv_dtype": "float16"}, "the cache must be bfloat16 like q, int8 or float8, got float16"),
        ({"head_dim": 96}, "head_dim must be 64, 128, 192, 256, got 96"),
        ({"max_len": 300}, "max_len must be a multiple of 8, got 300"),
        ({"page_size": 4}, "pages of a bfloat16 cache must be multiples of 8 tokens, got 4"),
        ({"page_size": 16, "kv_dtype": "int8"}, "pages of a int8 cache must be multiples of 32 tokens, got 16"),
    ],
)
def test_what_is_not_covered_says_why(changes: dict[str, Any], reason: str):
    case = case_of(**changes)
    with pytest.raises(Unsupported, match=f"mosaic_gpu: {reason}. backend='xla' covers it"):
        lower(case, interpret=True)


def lower(case: Case, **options: Any) -> None:
    attend = functools.partial(decode_attention, backend="mosaic_gpu", **options)
    jax.eval_shape(lambda inputs: attend(**inputs._asdict()), case.shapes())


@pytest.mark.parametrize("arch", [80, 100])
def test_other_gpus_have_no_wgmma(arch: int):
    with gpu_compiler.tracing_for(arch), pytest.raises(Unsupported, match=f"which sm_90 has, got sm_{arch}"):
        lower(case_of())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_kv": 96}, "config.block_kv: got 96; accepted: 64, 128, 256"),
        ({"block_rows": 12}, "config.block_rows: got 12; accepted: a multiple of 8, at most 64, or 128 or 192"),
        ({"splits": 0}, "config.splits: got 0; accepted: 1 to 256"),
        ({"num_stages": 0}, "config.num_stages: got 0; accepted: at least 1"),
        ({"merge": "last"}, "config.merge: got last; accepted: 'launch' or 'cluster'"),
        ({"merge": "cluster", "splits": 9}, "config.splits: got 9; accepted: up to 8 for merge='cluster'"),
        ({"merge": "cluster", "balanced": True}, "config.balanced: got True; accepted: False for merge='cluster'"),
        ({"merge": "cluster", "block_rows": 128}, "config.merge: got cluster; accepted: 'launch' for more than 64"),
    ],
)
def test_wrong_block_sizes(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Config(**{"block_kv": 64, "block_rows": 8, "splits": 1} | wrong)


# ---------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("config", [None, Config(64, 8, 2, merge="cluster")], ids=["launch", "cluster"])
def test_lowers_for_hopper(config: Config | None):
    """Compiles as far as it goes without XLA's compiler for GPUs, in every version of jax."""
    case = case_of(kv_dtype="int8", page_size=32, q_len=2, sinks=True, num_layers=2)
    attend = functools.partial(decode_attention, backend="mosaic_gpu", config=config)
    text = gpu_compiler.lowered_for_gpu(lambda inputs: attend(**inputs._asdict()), case.shapes()).as_text()
    assert "mosaic_gpu" in text


def compile_and_dump(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Returns what a call launches, and what NVIDIA's assembler says of each kernel; their PTX is in the folder."""
    for what in ("TO", "PTXAS", "PTX"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", str(folder) if what == "TO" else "1")
    attend = functools.partial(decode_attention, **case.options, backend="mosaic_gpu")
    program = gpu_program.compile_program(lambda inputs: attend(**inputs._asdict()), case.shapes())
    return [launch.name for launch in program.launches], [path.read_text() for path in folder.glob("*.ptxas")]


def instructions_of_a_block(ptx: str, folder: Path) -> int:
    """Returns the instructions of the loop over KV blocks, in machine code."""
    import triton

    tools, binary, source = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", folder / "b", folder / "ptx"
    source.write_text(ptx)
    subprocess.run([tools / "ptxas-blackwell", "-arch=sm_90a", source, "-o", binary], check=True)
    code = subprocess.run([tools / "nvdisasm", "-c", binary], check=True, capture_output=True, text=True).stdout
    loops = [loop for _, loop in by_loop(parse(code)) if any(one.opcode.startswith("HGMMA") for one in loop)]
    return max(map(len, loops))


@needs_plugin
@pytest.mark.skipif(not gpu_compiler.installed(), reason="triton, which has NVIDIA's tools, is not installed")
@pytest.mark.parametrize(
    ("name", "changes", "columns", "most"),
    [
        ("llama-3-8b-layers", {}, 8, 510),
        ("llama-3-8b-paged-int8", {}, 8, 1150),
        ("llama-3-8b-verify", {"head_dim": 256, "q_len": 6}, 24, 1640),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compiles_for_hopper_without_spills(
    name: str, changes: dict[str, Any], columns: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An H200 has time for 1,640 instructions in each warp while it reads the 32 KiB of a block; a wide head has more.

    Those that clear values at the end of a sequence, which most blocks skip, are counted too.
    """
    case = dataclasses.replace(MODELS[name], **changes)
    names, reports = compile_and_dump(case, tmp_path, monkeypatch)
    if case.q_len == 1:
        assert len(names) == 2, names  # attention, and the merge of its splits
    for report in reports:
        assert re.findall(r"(\d+) bytes spill stores", report) == ["0"], report
    (ptx,) = (text for path in tmp_path.glob("*.ptx") if "wgmma" in (text := path.read_text()))
    assert f"wgmma.mma_async.sync.aligned.m64n{columns}k16" in ptx
    assert "cp.async.bulk.tensor" in ptx
    count = instructions_of_a_block(ptx, tmp_path)
    print(f"{name}: {count} instructions")
    assert count <= most


@needs_plugin
@pytest.mark.parametrize(
    ("name", "changes", "config", "vectors"),
    [
        ("llama-3-8b-layers", {"batch": 1}, Config(64, 8, 8, 6, merge="cluster"), {""}),
        ("llama-3-8b-paged-int8", {"q_heads": 40}, Config(128, 8, 2, 3, merge="cluster"), {"", ".v4"}),
        (
            "llama-3-8b-verify",
            {"head_dim": 256, "q_len": 6, "sinks": True},
            Config(64, 24, 8, 2, merge="cluster"),
            {"", ".v4"},
        ),
        ("llama-3-8b-layers", {"head_dim": 64}, Config(128, 8, 3, 4, merge="cluster"), {""}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cluster_merges_splits_in_one_launch(name: str, changes: dict[str, Any], config: Config, vectors: set[str]):
    """A unit is read as fast as its rows allow, and its lse by single numbers."""
    case = dataclasses.replace(MODELS[name], **changes, lengths=None)
    attend = functools.partial(decode_attention, **case.options, backend="mosaic_gpu", config=config)
    program, (kernel,) = compile_mosaic_kernels(lambda inputs: attend(**inputs._asdict()), case.shapes())
    if case.q_len == 1:
        assert [launch.name for launch in program.launches] == ["kCustomCall"]
    assert "_cluster" in kernel.name
    assert kernel.spilled == 0
    found = reads_of_others(kernel.ptx, config.splits)
    assert found == {f"ld.shared::cluster{vector}.b32" for vector in vectors}
