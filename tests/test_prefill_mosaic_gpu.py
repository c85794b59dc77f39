"""decode_attention's Mosaic GPU kernel for many query rows: its maths and transfers interpreted, its code compiled.

jax's interpreter compiles each warpgroup of each program by itself, so cases have one or two programs. Warpgroups that
wait hold a thread of XLA's pool, which on two cores has too few for those of 192 rows unless NPROC names more: none
are interpreted here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hopper_attention import case_of, check

from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import mosaic
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.static.gpu.sass import by_loop
from palladion.kernels.compat import gpu_interpreter
from palladion.kernels.decode_attention import cases
from palladion.kernels.decode_attention.cases import Case
from palladion.kernels.decode_attention.mosaic_gpu import call, many_rows, many_rows_call
from palladion.kernels.decode_attention.mosaic_gpu.call import Config

MODELS = {case.name: case for case in cases.MODELS}


def chunk_of(name: str = "chunk", **changes: Any) -> Case:
    """Returns a case of 128 rows: 64 queries of two heads, of one sequence unless lengths say otherwise."""
    options = {"q_len": 64, "q_heads": 2, "kv_heads": 1, "lengths": (150,)} | changes
    return case_of(name, batch=len(options["lengths"]), **options)


RIGHT = [
    # Two heads that share a KV head, each with a program, and a length that ends within a block; dead tokens are NaN.
    (chunk_of("heads-apart", q_len=128), Config(64, 128, num_stages=2, ping_pong=True, overlaps=True)),
    # Another block of rows, of which few exist, and the other order of heads.
    (chunk_of("row-blocks", q_heads=1, q_len=136, max_len=304, lengths=(290,)), Config(128, 128, num_stages=2)),
    # Queries before a sequence's first token, and of an empty sequence.
    (chunk_of("ragged", lengths=(0, 1, 192)), Config(64, 128, num_stages=2, overlaps=True)),
    # The second split has one KV block of three, and no sink.
    (chunk_of("splits", lengths=(190,), sinks=True), Config(64, 128, splits=2, num_stages=2, ping_pong=True)),
    # Rows of a head that are not neighbours, and a window, whose first block holds dead tokens as the last one does.
    (
        chunk_of(
            "group-of-3", q_len=42, q_heads=3, dtype="float16", sliding_window=70, sinks=True, logits_soft_cap=5.0
        ),
        Config(64, 128, num_stages=2),
    ),
    (
        chunk_of("pages", page_size=16, num_layers=2, head_dim=128, sliding_window=30, scale=-0.1),
        Config(128, 128, num_stages=1, ping_pong=True),
    ),
]


@pytest.mark.parametrize(("case", "config"), RIGHT, ids=lambda value: getattr(value, "name", ""))
def test_the_kernel_is_right(case: Case, config: Config):
    check(case, config)


def test_memory_is_awaited_before_it_is_read():
    """Shared memory is NaN until something arrives, with sizes that divide blocks."""
    interpret = dataclasses.replace(gpu_interpreter(True), uninitialized_memory="nan")
    check(chunk_of("awaited", lengths=(192,)), Config(64, 128, num_stages=2), interpret=interpret)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax's interpreter of GPU kernels finds races from 0.11 on")
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (chunk_of("turns", lengths=(190,)), Config(64, 128, num_stages=2, ping_pong=True)),
        (chunk_of("overlaps", lengths=(190,)), Config(64, 128, num_stages=2, ping_pong=True, overlaps=True)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_blocks_are_read_without_races(case: Case, config: Config):
    """Blocks of the ring are written more than once, and values of the last one are cleared by one warpgroup."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    check(case, config, interpret=dataclasses.replace(gpu_interpreter(True), detect_races=True))
    assert gpu_callbacks.get_races().races_found is False


def test_tanh_is_exact_enough():
    """A soft-cap of 50 keeps its logits to 0.00002."""
    x = np.concatenate([np.linspace(-30, 30, 4001), [-1e30, 1e30, 0]]).astype(np.float32)
    np.testing.assert_allclose(many_rows.tanh(x), np.tanh(x.astype(np.float64)), rtol=0, atol=4e-7)


# ------------------------------------------------------------------------------------------------------ block sizes


@pytest.mark.parametrize(
    ("q_len", "heads", "block_rows", "rows"),
    [
        (512, (32, 8), 128, 512),
        (520, (32, 8), 128, 520),  # 160 programs, where 136 would do if heads were packed, which costs copies
        (16, (32, 4), 128, 128),
        (43, (3, 1), 192, 129),
        (16, (71, 1), 128, 16 * 71),
    ],
)
def test_heads_are_packed_where_that_saves_programs(q_len: int, heads: tuple[int, int], block_rows: int, rows: int):
    q_heads, kv_heads = heads
    problem = case_of(batch=1, lengths=None, q_len=q_len, q_heads=q_heads, kv_heads=kv_heads, max_len=1024).problem()
    found = many_rows_call.rows_as_heads(problem, block_rows)
    assert found.q_len * found.group == rows
    assert found.kv_heads in heads


@pytest.mark.parametrize(
    ("changes", "many", "splits"),
    [
        ({}, True, 1),
        ({"q_len": 64}, True, 8),  # 16 programs
        ({"q_len": 31}, False, None),
        ({"kv_dtype": "int8"}, False, None),
        ({"head_dim": 256}, True, 1),
    ],
)
def test_the_heuristic_takes_many_rows_and_fills_the_chip(changes: dict[str, Any], many: bool, splits: int | None):
    problem = dataclasses.replace(MODELS["llama-3-8b-prefill"], **changes).problem()
    with gpu_compiler.tracing_for(90):
        config, space = call.heuristic(problem), call.space(problem)
        assert config in space
        assert all((other.warpgroups > 1) is many for other in space.neighbours(config))
    assert (config.warpgroups > 1) is many
    assert splits in (None, config.splits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_kv": 256}, "config.block_kv: got 256; accepted: 64, 128"),
        ({"balanced": True}, "config.balanced: got True; accepted: False for many rows"),
        ({"ping_pong": True}, "config.ping_pong: got True; accepted: False, except for 128 rows"),
        ({"overlaps": True, "block_rows": 64}, "config.overlaps: got True; accepted: False, except for many rows"),
        ({"overlaps": True, "num_stages": 1}, "config.num_stages: got 1; accepted: at least 2"),
    ],
)
def test_wrong_block_sizes(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Config(**{"block_kv": 64, "block_rows": 192} | wrong)


def test_codes_are_no_right_operand():
    problem = chunk_of(kv_dtype="int8").problem()
    with pytest.raises(ValueError, match=r"config\.block_rows: got 128; accepted: up to 64 for"):
        call.decode_attention(problem, None, config=Config(64, 128), interpret=True)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.skipif(not gpu_program.installed(), reason="jax-cuda12-plugin is not installed")
@pytest.mark.skipif(not gpu_compiler.installed(), reason="triton, which has NVIDIA's tools, is not installed")
@pytest.mark.parametrize(
    ("changes", "config", "most"),
    [
        ({}, None, 1150),
        ({"head_dim": 256, "sliding_window": 1024, "logits_soft_cap": 30.0}, None, 1500),
        ({"head_dim": 64, "page_size": 64, "sinks": True}, Config(64, 192, splits=2, num_stages=4), 700),
    ],
    ids=("prefill", "soft-cap", "three-warpgroups"),
)
def test_compiles_for_hopper_without_spills(changes: dict[str, Any], config: Config | None, most: int):
    """A block of 128 tokens takes the tensor cores 1,024 cycles for the 64 rows of a warpgroup.

    Instructions of masks and of values that are cleared, which most blocks skip, are counted too.
    """
    case = dataclasses.replace(MODELS["llama-3-8b-prefill"], **changes)
    with gpu_compiler.tracing_for(90):
        problem, shapes = case.problem(), case.shapes()

    def attend(inputs: Any) -> Any:
        return call.decode_attention(problem, inputs, config=config, interpret=False)

    _, (kernel,) = mosaic.compile_mosaic_kernels(attend, shapes)
    assert kernel.spilled == 0
    print(kernel.longest_product_loop)
    assert kernel.longest_product_loop <= most
    (products,) = (
        [one.opcode for one in instructions]
        for loop, instructions in by_loop(kernel.code)
        if loop is not None and any("HGMMA" in one.opcode for one in instructions)
    )
    waits = [place for place, opcode in enumerate(products) if opcode.startswith("WARPGROUP.DEPBAR")]
    powers = [place for place, opcode in enumerate(products) if opcode == "MUFU.EX2"]
    assert len(waits) == 2
    if problem.head_dim == 128:  # overlaps: all but those of alpha come before the wait for the second product
        assert sum(waits[0] < place < waits[1] for place in powers) >= len(powers) - 4
    assert kernel.count("UTMALDG") > 0
    assert (kernel.count("UTMASTG") > 0) is (config is None)  # parts of a split go from registers to memory
