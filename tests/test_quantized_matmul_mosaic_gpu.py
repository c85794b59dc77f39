"""quantized_matmul's kernel in Mosaic GPU: its maths interpreted, its registers simulated, its code compiled.

jax's interpreter of Mosaic GPU runs the pipeline, the copies and the loads of a kernel, but has no registers: there the
kernel converts codes by the same recipes with jax.numpy, and multiplies with it. So the order of codes in registers is
proved apart, by executing `arrange` with the registers of 128 threads in NumPy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICKLY
from hopper_clusters import reads_of_others
from jax.experimental.pallas import mosaic_gpu as plgpu
from product_oracle import judge

from palladion import Unsupported, quantized_matmul
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.static.gpu.mosaic import MosaicKernel, compile_mosaic_kernels
from palladion.kernels import gpu_cluster
from palladion.kernels import gpu_codes as codes
from palladion.kernels.backend import record_choices
from palladion.kernels.compat import gpu_interpreter
from palladion.kernels.devices import gpus
from palladion.kernels.quantized_matmul import Inputs, cases
from palladion.kernels.quantized_matmul.cases import Case
from palladion.kernels.quantized_matmul.mosaic_gpu import block_sizes, call, cluster_merge
from palladion.reference.compare import assert_right
from palladion.reference.quantization import decode_codes, unpack_codes

needs_plugin = pytest.mark.skipif(not gpu_program.installed(), reason="jax-cuda12-plugin is not installed")


def case_of(scheme: str, rows: int, **changes: Any) -> Case:
    """Returns a small case: two blocks of 64 channels overlap, and the last block of 128 along `in` is cut."""
    sizes = {"in_features": 192, "out_features": 104, "order": "out_in"}
    return Case(**{"name": f"{scheme}-{rows}", "rows": rows, "scheme": scheme, **sizes, **changes})


def run(case: Case, config: call.Config, inputs: Inputs, interpret: Any = True) -> jax.Array:
    """Runs the kernel itself, with any number of rows."""
    problem = case.problem()
    function = functools.partial(call.quantized_matmul, problem, config=config, interpret=interpret)
    return jax.jit(function, compiler_options=QUICKLY)(inputs)


def check(case: Case, config: call.Config) -> None:
    inputs = cases.make_inputs(case)
    reference = quantized_matmul(**inputs._asdict(), **case.options, backend="xla")
    assert_right(run(case, config, inputs), reference, judge(case, inputs), f"{case} {config}")


on_blackwell = functools.partial(call.Config, block_out=128, block_in=128, tensor_memory=True)
"""Returns a config of the kernel for Blackwell, given its rows and others."""


RIGHT = [
    # One row and more, to the last of a block; splits, of which the last has less to do.
    (case_of("int8", 1, in_features=160), call.Config(8, block_in=64, splits=2)),
    (case_of("int8", 3, dtype="float16", bias=True), call.Config(8, block_in=128)),
    (case_of("int4", 8), call.Config(8, block_in=128)),
    (case_of("int4-g32", 17, out_dtype="float32"), call.Config(32, block_in=128, num_stages=1)),
    (case_of("int4-g32", 17), call.Config(16, block_in=64, splits=2)),
    (case_of("int8-g16", 64, dtype="float16"), call.Config(64, block_in=128)),
    # Groups longer than a block, groups that a block ends within, zero points and minimums.
    (case_of("int4-g128-zeros", 5, in_features=384), call.Config(8, block_in=64, splits=2)),
    (case_of("int8-g96-zeros", 5, in_features=288, dtype="float16"), call.Config(8, block_in=64)),
    (case_of("int8-zeros", 5), call.Config(8, block_in=256)),
    (case_of("int4-g32-minimums", 5), call.Config(8, block_in=128)),
    (case_of("int8-minimums", 5, dtype="float16", scale_dtype="float16"), call.Config(8, block_in=128)),
    (case_of("float8_e4m3fn", 5, scale_dtype="bfloat16"), call.Config(8, block_in=128)),
    # Gates, in the kernel and after splits; two tiles of channels; a layer; norm and residual; blocks of rows.
    (
        case_of("int4-g64", 9, out_features=272, gated=True, activation=jax.nn.silu, bias=True, num_layers=3),
        call.Config(16, block_out=128, block_in=128),
    ),
    (
        case_of("int8", 5, out_features=208, gated=True, activation=jax.nn.silu, bias=True),
        call.Config(8, block_in=128, splits=2),
    ),
    (case_of("int8", 5, out_features=72, norm=True, residual=True), call.Config(8, block_in=128)),
    (case_of("int4-g32", 70, out_features=64), call.Config(32, block_in=128)),
    (case_of("mxfp4", 5, scale_dtype="float8_e8m0fnu"), call.Config(8, block_in=128)),
    # Quantized rows: stored codes and codes from registers, scales and zero points of channels and of groups.
    (case_of("int8", 9, quantize_x="int8", bias=True), call.Config(16, block_in=128)),
    (case_of("int8", 3, quantize_x="int8", dtype="float32"), call.Config(8, block_in=128)),
    (case_of("int8-g32-zeros", 9, quantize_x="int8"), call.Config(16, block_in=128, splits=2)),
    (case_of("int4", 9, quantize_x="int8"), call.Config(16, block_in=64)),
    (case_of("int4-g64-minimums", 9, quantize_x="int8"), call.Config(16, block_in=128)),
    (case_of("int4-zeros", 9, quantize_x="int8", out_dtype="float32"), call.Config(16, block_in=128)),
    (case_of("float8_e4m3fn", 9, quantize_x="float8_e4m3fn"), call.Config(16, block_in=128)),
    # Splits merged in a cluster, in units of 2, 4 and 8 rows: more splits than units, splits that do not divide units;
    # gates with a residual, whole sums of quantized rows, two tiles of channels, an activation that is not compiled.
    (case_of("int8", 1, in_features=160), call.Config(8, block_in=64, splits=3, merge="cluster")),
    (case_of("int4-g32", 7, bias=True), call.Config(8, block_in=64, splits=2, merge="cluster")),
    (
        case_of("int8", 21, in_features=320, out_features=128, gated=True, activation=jax.nn.silu, residual=True),
        call.Config(8, block_in=64, splits=5, merge="cluster"),
    ),
    (
        case_of("int8", 9, quantize_x="int8", out_features=136, bias=True),
        call.Config(16, block_out=128, block_in=64, splits=3, merge="cluster"),
    ),
    (case_of("int4-g32-minimums", 33, out_features=64), call.Config(32, block_in=64, splits=3, merge="cluster")),
    (case_of("int8", 5, activation=jax.nn.relu), call.Config(8, block_in=64, splits=3, merge="cluster")),
    # Many rows: two warpgroups with half of the channels each; the last block of rows is cut.
    (
        case_of("int8", 130, in_features=160, out_features=128, bias=True, residual=True),
        call.Config(128, 128, 64, num_stages=2),
    ),
    (case_of("int4-g32", 70, in_features=128, out_features=128), call.Config(128, 128, block_in=64)),
    (case_of("int4-g64-zeros", 70, in_features=128, out_features=256, gated=True), call.Config(128, 128, 64, splits=2)),
    (case_of("int8", 70, out_features=128, quantize_x="int8"), call.Config(128, 128, block_in=128)),
    (case_of("int4", 70, out_features=128, quantize_x="int8"), call.Config(128, 128, block_in=128)),
    # Blackwell: 16 rows and more, scales of sums and of weights, gates in tiles of their own, cut blocks everywhere.
    (case_of("int8", 1, in_features=160, out_features=200), on_blackwell(16, block_in=64, splits=2)),
    (case_of("int8-zeros", 33, out_features=128, dtype="float16", bias=True), on_blackwell(64, block_in=256)),
    (case_of("int4", 17, out_features=136, out_dtype="float32"), on_blackwell(32, num_stages=2)),
    (case_of("int4-g64-zeros", 5, in_features=448, out_features=200), on_blackwell(16, splits=2)),
    (
        case_of("int8-g16", 9, out_features=200, dtype="float16", scale_dtype="float16", residual=True, norm=True),
        on_blackwell(16, block_in=64, num_stages=2),
    ),
    (case_of("int8-minimums", 5, out_features=200), on_blackwell(16)),
    (
        case_of("int4-g32-minimums", 70, out_features=272, gated=True, activation=jax.nn.silu, bias=True, num_layers=3),
        on_blackwell(64, block_in=64),
    ),
    (case_of("float8_e4m3fn", 40, out_features=128, quantize_x="float8_e4m3fn"), on_blackwell(64)),
    (case_of("mxfp4", 130, out_features=200, scale_dtype="float8_e8m0fnu"), on_blackwell(128)),
]


@pytest.mark.parametrize(("case", "config"), RIGHT, ids=lambda value: getattr(value, "name", None))
def test_the_kernel_is_right(case: Case, config: call.Config):
    check(case, config)


@pytest.mark.parametrize("config", [call.Config(8, block_in=128, num_stages=3), on_blackwell(16, num_stages=2)])
def test_memory_is_awaited_before_it_is_read(config: call.Config):
    """Shared memory is NaN until something arrives; sizes divide blocks, since what TMA fills with zeros is NaN too."""
    case = case_of("int4-g32", config.block_rows, in_features=512, out_features=128)
    inputs = cases.make_inputs(case)
    interpret = dataclasses.replace(gpu_interpreter(True), uninitialized_memory="nan")
    reference = quantized_matmul(**inputs._asdict(), backend="xla")
    assert_right(run(case, config, inputs, interpret), reference, judge(case, inputs), "NaN")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax's interpreter of GPU kernels finds races from 0.11 on")
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (case_of("int4-g32", 8, in_features=256, out_features=64), call.Config(8, block_in=64, num_stages=2)),
        (case_of("int8", 8, out_features=64, quantize_x="int8"), call.Config(8, block_in=64, num_stages=2)),
        (case_of("int8", 70, out_features=128, residual=True), call.Config(128, 128, block_in=64, num_stages=2)),
        (case_of("int4-g32", 70, out_features=256), call.Config(128, 128, block_in=64, num_stages=2, multicast=2)),
        (case_of("int8", 16, out_features=128, in_features=320), on_blackwell(16, block_in=64, num_stages=2)),
        (case_of("int4", 16, out_features=256, gated=True), on_blackwell(16, block_in=64, num_stages=2)),
    ],
    ids=["few-rows", "stored", "many-rows", "multicast", "tensor-memory", "tensor-memory-gated"],
)
def test_blocks_are_read_without_races(case: Case, config: call.Config):
    """Blocks of the ring are written more than once; jax 0.11 counts races, 0.12 raises at the first."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    interpret, inputs = dataclasses.replace(gpu_interpreter(True), detect_races=True), cases.make_inputs(case)
    reference = quantized_matmul(**inputs._asdict(), **case.options, backend="xla")
    assert_right(run(case, config, inputs, interpret), reference, judge(case, inputs), f"{case} {config}")
    assert gpu_callbacks.get_races().races_found is False


def test_rows_have_the_same_bits_in_every_batch():
    case = case_of("int8-g32", 70, in_features=128, out_features=64)
    inputs = cases.make_inputs(case)
    multiply = jax.jit(
        functools.partial(quantized_matmul, w=inputs.w, batch_invariant=True, backend="mosaic_gpu", interpret=True)
    )
    together = np.asarray(multiply(inputs.x), np.float32)
    for rows in ([0], [69, 3, 64]):
        np.testing.assert_array_equal(np.asarray(multiply(inputs.x[jnp.array(rows)]), np.float32), together[rows])


# ------------------------------------------------------------------------------------------------------- registers


def in_threads(array: np.ndarray, layout: Any) -> np.ndarray:
    """Returns what 128 threads hold of an array of 64 or 128 rows: `[128, *registers, numbers of a register]`.

    A layout cuts an array into tiles, the tiles into smaller ones, and so on; warps and lanes are dimensions of that.
    """
    for tile in layout.tiling.tiles:
        head, tail = array.shape[: -len(tile)], array.shape[-len(tile) :]
        array = array.reshape(
            *head, *(part for size, step in zip(tail, tile, strict=True) for part in (size // step, step))
        )
        cut = range(len(head), array.ndim)
        array = array.transpose(*range(len(head)), *cut[::2], *cut[1::2])
    rank = layout.tiled_tiling_rank
    skip = array.ndim - rank
    threads = []
    for thread in range(128):
        place: list[Any] = [slice(None)] * array.ndim
        for dims, rest in ((layout.warp_dims, thread // 32), (layout.lane_dims, thread % 32)):
            for dim in reversed(dims):
                rest, index = divmod(rest, array.shape[skip + rank + dim])
                place[skip + rank + dim] = slice(index, index + 1)
        threads.append(array[tuple(place)])
    return np.stack(threads)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_neighbours_read_neighbouring_sums(rows: int):
    """Threads read `[rows, 64]` of another program's shared memory in order, each number once."""
    places = np.arange(rows * 64).reshape(rows, 64)
    found = in_threads(places.T, gpu_cluster.LAYOUTS[rows].to_mgpu())
    np.testing.assert_array_equal(found.reshape(128, -1), places.reshape(128, -1))


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        *itertools.product(["int8", "int4", "float8_e4m3fn", "float8_e5m2", "mxfp4"], ["bfloat16", "float16"]),
        ("int4", "int8"),
        ("int4-zeros", "int8"),
    ],
)
def test_codes_reach_their_registers(scheme: str, dtype: str):
    """Random codes, exchanged between threads and converted as the kernel does it, lie where wgmma expects them."""
    scales = "float8_e8m0fnu" if scheme == "mxfp4" else "float32"
    case = case_of(scheme, 8, in_features=256, out_features=64, scale_dtype=scales)
    w = cases.make_inputs(case, seed=3).w
    exact = np.asarray(decode_codes(unpack_codes(w), w.scheme), np.float64).T
    if w.scheme.implied_zero and dtype != "int8":
        exact = exact + w.scheme.implied_zero
    read, multiplied = plgpu.Layout.WGMMA_UPCAST_2X, plgpu.Layout.WGMMA
    if dtype == "int8":
        read = multiplied = plgpu.Layout.WGMMA_8BIT
    loaded = in_threads(np.asarray(w.values).view(np.uint8), read.to_mgpu())
    registers = loaded.shape[1:-1]
    words = np.empty(registers, dtype=object)
    for index in np.ndindex(registers):
        words[index] = np.ascontiguousarray(loaded[(slice(None), *index)]).view(np.uint32)[:, 0]

    def exchange(word: np.ndarray) -> np.ndarray:
        both = np.stack([word, word[np.arange(128) ^ 1]], axis=1).view(np.uint8)  # its own bytes, then the neighbour's
        chosen = np.array([[selector >> 4 * byte & 0xF for byte in range(4)] for selector in codes.OWN_COLUMNS])
        return np.take_along_axis(both, chosen[np.arange(128) % 2], axis=1).view(np.uint32)[:, 0]

    layout = multiplied.to_mgpu()
    expected = in_threads(exact, layout)

    def numbers(make: Any) -> np.ndarray:
        if dtype == "int8":
            arranged = codes.arrange(words, lambda word: word, make, codes.NIBBLES)
        else:
            arranged = codes.arrange(words, exchange, make, codes.SHIFTS[w.scheme.packed])
        arranged = arranged.reshape(expected.shape[1:-1])
        found = np.empty(expected.shape)
        for index in np.ndindex(arranged.shape):
            several = np.ascontiguousarray(arranged[index].astype(np.uint32)[:, None]).view(jnp.dtype(dtype))
            found[(slice(None), *index)] = several.astype(np.float64)
        return found

    if dtype == "int8":
        np.testing.assert_array_equal(numbers(codes.less_zero(w.scheme.implied_zero)), expected)
        return
    how = codes.recipe(w.scheme.format, dtype)
    found = numbers(how.bits) - (0 if how.less is None else numbers(how.less))
    np.testing.assert_array_equal((found - how.offset) * how.factor, expected)


@pytest.mark.parametrize("scheme", ["int8", "int4", "float8_e4m3fn", "float8_e5m2", "mxfp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_reach_the_registers_of_tensor_memory(scheme: str, dtype: str):
    """Random codes, converted as the kernel does it, lie two by two in the thread that has their row."""
    scales = "float8_e8m0fnu" if scheme == "mxfp4" else "float32"
    w = cases.make_inputs(case_of(scheme, 8, out_features=128, scale_dtype=scales), seed=3).w
    exact = np.asarray(decode_codes(unpack_codes(w), w.scheme), np.float64).T + w.scheme.implied_zero
    expected = in_threads(exact, codes.ROWS.to_mgpu()).reshape(128, -1, 2)
    loaded = in_threads(np.asarray(w.values).view(np.uint8), codes.READ_ROWS.to_mgpu()).reshape(128, -1, 4, 4)
    words = np.empty(loaded.shape[1:3], dtype=object)
    for index in np.ndindex(words.shape):
        words[index] = np.ascontiguousarray(loaded[(slice(None), *index)])
    swapped = [codes.SWAPPED >> 4 * byte & 0xF for byte in range(4)]

    def numbers(make: Any) -> np.ndarray:
        arranged = codes.arrange_rows(
            words, lambda word: word[:, swapped].copy().view(np.uint32)[:, 0], make, codes.SHIFTS[w.scheme.packed]
        )
        return np.stack(
            [pair.astype(np.uint32)[:, None].view(jnp.dtype(dtype)).astype(np.float64) for pair in arranged], axis=1
        )

    how = codes.recipe(w.scheme.format, dtype)
    found = numbers(how.bits) - (0 if how.less is None else numbers(how.less))
    np.testing.assert_array_equal((found - how.offset) * how.factor, expected)


# ------------------------------------------------------------------------------------------------------ block sizes

LAYERS = [
    dataclasses.replace(case, order="out_in", rows=rows, gated="gate-up" in case.name, activation=None)
    for case in cases.SHAPES
    if case.quantize_x is None and case.scheme != "mxfp4" and case.rows == 8 and "8b" in case.name
    for rows in (1, 16, 64, 256)
]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: f"{case.name}-{case.rows}")
@pytest.mark.parametrize("arch", [90, 100])
def test_the_heuristic_suits_every_layer(case: Case, arch: int):
    """Block sizes are in the tuner's space; a multiprocessor has room for two programs; none of the splits is empty."""
    with gpu_compiler.tracing_for(arch):
        problem = case.problem()
        config, space = block_sizes.heuristic(problem), block_sizes.space(problem)
        assert call.unsupported(problem) is None
        assert config in space, config
    assert config.tensor_memory == (arch == 100)
    blocks = -(-problem.in_features // config.block_in)
    assert (config.splits - 1) * -(-blocks // config.splits) < blocks
    used = config.num_stages * block_sizes.block_bytes(problem, config) + block_sizes.staged_bytes(problem, config)
    programs = 1 if config.block_rows * (problem.parts if config.tensor_memory else 1) > 64 else 2
    assert programs * used <= gpus()["h200"].shared_bytes
    columns = problem.parts * config.block_rows + config.block_in
    assert not config.tensor_memory or programs * 2 ** math.ceil(math.log2(columns)) <= 512
    assert list(space.neighbours(config))


@pytest.mark.parametrize(
    ("layer", "best"),
    [
        ("qkv", call.Config(8, 64, 128, splits=4, num_stages=6)),
        ("output", call.Config(8, 64, 256, splits=4, num_stages=5)),
        ("down", call.Config(8, 64, 256, splits=4, num_stages=5)),
    ],
)
def test_the_heuristic_agrees_with_what_was_measured(layer: str, best: call.Config):
    in_features, out_features = cases.LAYERS[f"llama-3-8b-{layer}"]
    problem = case_of("int8", 8, in_features=in_features, out_features=out_features).problem()
    assert block_sizes.heuristic(problem) == best


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"order": "in_out"}, r"w must be stored in the order 'out_in'.*with_order"),
        ({"dtype": "float32"}, "x must be bfloat16 or float16, or quantized .quantize_x=., got float32"),
        ({"quantize_x": "int8"}, "groups must be multiples of 64 for int8 operands, got 32"),
        ({"scheme": "int8-g16", "quantize_x": "int8"}, "groups must be multiples of 32 for int8 operands, got 16"),
        ({"out_features": 112, "gated": True}, "channels of the result must be a multiple of 8, at least 64, got 56"),
        ({"out_features": 100}, "channels of the result must be a multiple of 8, at least 64, got 100"),
        ({"in_features": 176, "scheme": "int8"}, "in must be a multiple of 32, got 176"),
    ],
)
def test_what_is_not_covered_says_why(changes: dict[str, Any], reason: str):
    case = case_of(**{"scheme": "int4-g32", "rows": 8} | changes)
    with pytest.raises(Unsupported, match=f"mosaic_gpu: .*{reason}.*backend='xla' covers it"):
        jax.eval_shape(
            lambda inputs: quantized_matmul(**inputs._asdict(), **case.options, backend="mosaic_gpu", interpret=True),
            case.shapes(),
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantize_x": "int8"}, "quantize_x='int8' on sm_100, .*backend='triton' takes it"),
        ({"out_features": 120}, "channels of the result must be at least 128 on sm_100, got 120"),
        ({"scheme": "int4-g32", "out_dtype": "float32"}, "scaled in 16 bits on sm_100, .*backend='triton'"),
        (
            {"scheme": "int8-minimums", "dtype": "float16"},
            "float16 operands need float16 scales on sm_100, got float32",
        ),
    ],
)
def test_what_blackwell_does_not_cover_says_why(changes: dict[str, Any], reason: str):
    """The Hopper kernel takes all of it, and this one if it is asked for by its block sizes, elsewhere."""
    case = case_of(**{"scheme": "int8", "rows": 8, "out_features": 128} | changes)

    def shape(config: call.Config | None = None) -> Any:
        options: dict[str, Any] = {"backend": "mosaic_gpu", "interpret": True, "config": config}
        return jax.eval_shape(
            lambda inputs: quantized_matmul(**inputs._asdict(), **case.options, **options), case.shapes()
        )

    shape()
    if case.out_features >= 128:
        with pytest.raises(ValueError, match=f"config.tensor_memory: got True; accepted: False: .*{reason}"):
            shape(on_blackwell(16))
    with gpu_compiler.tracing_for(100), pytest.raises(Unsupported, match=f"mosaic_gpu: .*{reason}"):
        shape()


@pytest.mark.parametrize("arch", [90, 100])
def test_block_sizes_of_another_architecture_are_wrong(arch: int):
    case, config = case_of("int8", 8, out_features=128), on_blackwell(16) if arch == 90 else call.Config(8)
    with gpu_compiler.tracing_for(arch), pytest.raises(ValueError, match=r"config\.tensor_memory: got"):
        jax.eval_shape(lambda inputs: run(case, config, inputs, interpret=False), case.shapes())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_rows": 8, "tensor_memory": True}, "config.block_rows: got 8; accepted: 16, 32, 64, 128, 256"),
        ({"block_rows": 16, "tensor_memory": True}, "config.block_out: got 64; accepted: 128"),
        ({"block_rows": 16, "tensor_memory": True, "block_out": 128, "num_stages": 1}, "config.num_stages: got 1"),
        ({"block_rows": 24}, "config.block_rows: got 24; accepted: 8, 16, 32, 64, 128, 256"),
        ({"block_out": 96}, "config.block_out: got 96; accepted: a multiple of 64, at most 256"),
        ({"block_in": 32}, "config.block_in: got 32; accepted: a power of two of at least 64"),
        ({"splits": 0}, "config.splits: got 0; accepted: at least 1"),
        ({"multicast": 2}, "config.multicast: got 2; accepted: 1"),
        ({"block_rows": 128}, "config.block_out: got 64; accepted: a multiple of 128, at most 256"),
        ({"merge": "last"}, "config.merge: got last; accepted: 'launch' or 'cluster'"),
        ({"merge": "cluster", "splits": 9}, "config.splits: got 9; accepted: up to 8 for merge='cluster'"),
        (
            {"merge": "cluster", "block_rows": 128, "block_out": 128},
            "config.merge: got cluster; accepted: 'launch' for more than 64 rows",
        ),
        ({"block_out": 128}, "config.block_out: got 128; accepted: up to 104"),
    ],
)
def test_wrong_block_sizes(wrong: dict[str, Any], message: str):
    case = case_of("int8", 8)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda inputs: run(case, call.Config(**{"block_rows": 8} | wrong), inputs), case.shapes())


@pytest.mark.parametrize("gpu", ["h200", "b200"])
@pytest.mark.parametrize(
    ("rows", "right", "backend"),
    [
        (8, [], "triton"),
        (1, ["quantized_matmul"], "triton"),
        (8, ["quantized_matmul"], "mosaic_gpu"),
        (256, ["quantized_matmul"], "mosaic_gpu"),
        (257, ["quantized_matmul"], "triton"),
    ],
)
def test_auto_takes_it_for_rows_that_it_was_right_and_fast_with(
    rows: int, right: list[str], backend: str, gpu: str, monkeypatch: pytest.MonkeyPatch
):
    known = dataclasses.replace(gpus()[gpu], mosaic_gpu=tuple(right))
    monkeypatch.setitem(gpus(), gpu, known)
    case = case_of("int8", rows, out_features=128)
    with gpu_compiler.tracing_for(known.compute_capability), record_choices() as choices:
        jax.eval_shape(lambda inputs: quantized_matmul(**inputs._asdict()), case.shapes())
    assert choices[0].backend == backend


def test_other_gpus_have_no_wgmma():
    case, reason = case_of("int8", 8), "needs wgmma or tcgen05, which sm_90 and sm_100 have, got sm_80"
    with gpu_compiler.tracing_for(80), pytest.raises(Unsupported, match=reason):
        jax.eval_shape(lambda inputs: quantized_matmul(**inputs._asdict(), backend="mosaic_gpu"), case.shapes())


# ---------------------------------------------------------------------------------------------------------- compiled

COMPILED = [
    # Sizes that divide no block, and rows that are no multiple of 8, which XLA pads.
    case_of("int8", 5, in_features=160),
    case_of("int4-g32", 17, in_features=576),
    case_of("int8-g16", 9, in_features=96, out_features=72),
    case_of("int8", 8, in_features=4096, out_features=6144, num_layers=2),
    case_of("int8", 16, in_features=4096, out_features=28672, gated=True, activation=jax.nn.silu),
    case_of("int4-g128", 16, in_features=14336, out_features=4096, residual=True, scale_dtype="bfloat16"),
    case_of(
        "int4-g32-minimums", 64, in_features=4096, out_features=28672, gated=True, activation=jax.nn.gelu, bias=True
    ),
    case_of("int4-g64-zeros", 32, in_features=4096, out_features=10240, dtype="float16"),
    case_of("float8_e4m3fn", 64, in_features=4096, out_features=6144),
    case_of("mxfp4", 8, in_features=4096, out_features=6144, scale_dtype="float8_e8m0fnu"),
    case_of("int8", 8, in_features=4096, out_features=6144, quantize_x="int8"),
    case_of("int4-g128", 8, in_features=4096, out_features=6144, quantize_x="int8"),
    case_of("int4-g128", 256, in_features=4096, out_features=6144, residual=True),
    case_of("int8", 4096, in_features=4096, out_features=28672, gated=True, activation=jax.nn.silu),
    case_of("int8", 4096, in_features=4096, out_features=6144, quantize_x="int8"),
]


BLACKWELL = [
    case_of("int8", 5, in_features=160, out_features=200),
    case_of("int4-g32", 17, in_features=576, out_features=136),
    case_of("int8", 1, in_features=4096, out_features=6144, num_layers=2),
    case_of("int8", 1, in_features=4096, out_features=28672, gated=True, activation=jax.nn.gelu),
    case_of("int4", 16, in_features=4096, out_features=6144),
    case_of("int4-g128", 64, in_features=14336, out_features=4096, residual=True, scale_dtype="bfloat16"),
    case_of("int4-g32-zeros", 256, in_features=4096, out_features=6144, bias=True),
    case_of(
        "int4-g32-minimums", 256, in_features=4096, out_features=28672, gated=True, activation=jax.nn.gelu, bias=True
    ),
    case_of("float8_e4m3fn", 64, in_features=4096, out_features=6144, quantize_x="float8_e4m3fn"),
    case_of("mxfp4", 1, in_features=4096, out_features=6144, scale_dtype="float8_e8m0fnu"),
    case_of("int8-g16", 1024, in_features=4096, out_features=28672, dtype="float16", scale_dtype="float16"),
]

CLUSTERS = [
    (case_of("int8", 1, in_features=4096, out_features=6144), call.Config(8, 64, 128, 4, 6, merge="cluster")),
    (
        case_of("int4-g128", 16, in_features=14336, out_features=4096, residual=True, scale_dtype="bfloat16"),
        call.Config(16, 64, 512, 5, 4, overlaps=True, merge="cluster"),
    ),
    (
        case_of("int8", 64, in_features=4096, out_features=28672, gated=True, activation=jax.nn.silu, bias=True),
        call.Config(64, 64, 64, 2, 3, merge="cluster"),
    ),
    (
        case_of("int8", 9, in_features=4096, out_features=6144, quantize_x="int8", bias=True),
        call.Config(16, 64, 128, 3, 6, merge="cluster"),
    ),
]


LOWERED = [
    *((case, None, 90) for case in (*COMPILED[:2], *COMPILED[-6:])),
    *((case, config, 90) for case, config in CLUSTERS),
    *((case, None, 100) for case in BLACKWELL[-4:]),
]


@pytest.mark.parametrize(("case", "config", "arch"), LOWERED, ids=lambda value: getattr(value, "name", None))
def test_lowers(case: Case, config: call.Config | None, arch: int):
    """Compiles as far as it goes without XLA's compiler for GPUs, in every version of jax."""
    multiply = functools.partial(quantized_matmul, **case.options, backend="mosaic_gpu", config=config)
    text = gpu_compiler.lowered_for_gpu(lambda inputs: multiply(**inputs._asdict()), case.shapes(), arch=arch).as_text()
    assert "mosaic_gpu" in text


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """Provides another process, because jaxlib compiles these kernels for one architecture only in each."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def compiled_for(arch: int, case: Case, process: ProcessPoolExecutor) -> tuple[list[str], MosaicKernel]:
    """Returns what `compiled` does, for Hopper in this process."""
    return compiled(case) if arch == 90 else process.submit(compiled, case, arch=arch).result()


def compiled(case: Case, config: call.Config | None = None, arch: int = 90) -> tuple[list[str], MosaicKernel]:
    """Returns the names of what a call launches, and its kernel."""
    function = functools.partial(quantized_matmul, **case.options, backend="mosaic_gpu", config=config)
    program, (kernel,) = compile_mosaic_kernels(lambda inputs: function(**inputs._asdict()), case.shapes(), arch=arch)
    return [launch.name for launch in program.launches], kernel


PRODUCTS = {90: "wgmma.mma_async.sync.aligned.m64n", 100: "tcgen05.mma.cta_group::1.kind::f16"}


@needs_plugin
@pytest.mark.parametrize(
    ("case", "arch"),
    [(case, 90) for case in COMPILED] + [(case, 100) for case in BLACKWELL],
    ids=lambda value: getattr(value, "name", value),
)
def test_compiles_without_spills(case: Case, arch: int, process: ProcessPoolExecutor):
    names, kernel = compiled_for(arch, case, process)
    names = [name for name in names if not name.startswith(("loop_", "input_reduce_"))]
    assert len(names) == 1, names  # beside XLA's: rows are padded and quantized, splits are added up
    assert kernel.spilled == 0
    assert PRODUCTS[arch] in kernel.ptx
    assert "cp.async.bulk.tensor" in kernel.ptx


@needs_plugin
@pytest.mark.parametrize(("case", "config"), CLUSTERS, ids=lambda value: getattr(value, "name", None))
def test_a_cluster_merges_splits_in_one_launch(case: Case, config: call.Config):
    """Sums of all splits are read after one barrier of the cluster and before another; the interpreter sees neither."""
    names, kernel = compiled(case, config)
    assert [name for name in names if not name.startswith(("loop_pad", "input_reduce_"))] == ["kCustomCall"]
    assert kernel.spilled == 0
    vector = {2: "", 4: ".v2", 8: ".v4"}[cluster_merge.rows_of_unit(config)]
    assert reads_of_others(kernel.ptx, config.splits) == {f"ld.shared::cluster{vector}.b32"}


@needs_plugin
def test_sums_of_splits_are_not_written_past_their_rows():
    """A copy of what lies contiguously in device memory is cut only at the end of the array, not of a split's rows."""
    _, kernel = compiled(case_of("int8", 12, in_features=4096, out_features=64), call.Config(8, 64, 128, splits=4))
    (copy,) = re.findall(r"cp\.async\.bulk\S*global\.shared", kernel.ptx)
    assert copy.startswith("cp.async.bulk.tensor")


@needs_plugin
def test_a_launch_that_overlaps_reads_nothing_but_codes_before_it_waits():
    case = case_of("int8", 8, in_features=4096, out_features=4096)
    _, kernel = compiled(case, dataclasses.replace(block_sizes.heuristic(case.problem()), overlaps=True))
    before, _, after = kernel.ptx.partition("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before
    assert "cp.async.bulk.prefetch.tensor" in before
    assert "ld.global" not in before
    assert "cp.async.bulk.tensor" not in before
    assert "cp.async.bulk.tensor" in after


@needs_plugin
@pytest.mark.skipif(not gpu_compiler.installed(), reason="triton, which has NVIDIA's tools, is not installed")
@pytest.mark.parametrize(
    ("scheme", "arch", "most"),
    [
        ("int8", 90, 4.1),
        ("int4-g128", 90, 5.9),
        ("int4-g32", 90, 8.5),
        ("int8", 100, 3.8),
        ("int4-g128", 100, 7.5),
    ],
)
def test_codes_are_multiplied_in_few_instructions(scheme: str, arch: int, most: float, process: ProcessPoolExecutor):
    """Memory leaves time for 7.2 instructions a byte on an H200, 4.4 on a B200; 4-bit codes take more on both."""
    case = case_of(scheme, 8, in_features=14336, out_features=4096, scale_dtype="bfloat16")
    _, kernel = compiled_for(arch, case, process)
    with gpu_compiler.tracing_for(arch):
        config = block_sizes.heuristic(case.problem())
    codes_of_a_thread = block_sizes.block_bytes(case.problem(), config) - config.block_rows * config.block_in * 2
    per_byte = kernel.longest_product_loop / (codes_of_a_thread / 128)
    print(f"{per_byte:.2f} instructions a byte")
    assert per_byte <= most
    assert kernel.tensor_instructions > 0
    assert kernel.count("UTMALDG") > 0


@needs_plugin
def test_xla_records_the_kernel_in_a_cuda_graph(tmp_path: Path):
    """A step of a loop is launched whole; a kernel that is not recorded costs the host two launches more."""
    case = case_of("int8", 8, in_features=4096, out_features=4096)

    def loop(inputs: Inputs) -> jax.Array:
        multiply = functools.partial(quantized_matmul, w=inputs.w, backend="mosaic_gpu")
        return jax.lax.fori_loop(0, 9, lambda _, x: jnp.tanh(multiply(jnp.tanh(multiply(x)))), inputs.x)

    sharding = jax.sharding.SingleDeviceSharding(gpu_program.device(90))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), case.shapes())
    gpu_compiler.lowered_for_gpu(loop, shapes).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    (listing,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    _, _, body = listing.read_text().partition("body:")
    graph, *calls = [line for line in body.splitlines() if "kCommandBuffer" in line or "kCustomCall" in line]
    assert "kCommandBuffer" in graph
    assert len(calls) == 2, body
    assert all("kCustomCall" in call for call in calls), body
