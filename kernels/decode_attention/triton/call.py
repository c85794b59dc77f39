"""decode_attention on a GPU: attention of a few queries over a long cache, with the cache cut in shares (split-K).

A program has one KV head with a block of the query rows that share it (rows = q_len * group, query major), and one
slot: a share of the KV blocks that these rows see in one sequence (`shares.py`). It computes their online softmax
(`online_softmax.py`). The slots' outputs are merged, in float32, by their log-sum-exps (`merge.py`), in a second launch
or by the last program; a single slot for each sequence is the output itself.

Grid: (slots * KV heads * row blocks,), KV heads and row blocks innermost, so that slots without work come last. One
decode step has few sequences and heads, and a GPU has many multiprocessors, which splits keep busy. Triton's other axes
are left for `jax.vmap`. The loop runs over the KV blocks that are filled and, with a window, visible: its bounds are
read from `lengths` on the device. Page numbers are read as tokens are loaded, one iteration ahead; nothing is gathered
before the kernel.

Resident in registers: q, m, l, acc. Keys and values pass through shared memory in asynchronous copies of 16 bytes, of
which the compiler keeps `num_stages` blocks in flight. Rows are padded to a power of two of at least 16, the least that
tensor cores multiply; a head is cut into tiles (`tiles_of`). The layer of a stacked cache is an offset, except where
Pallas computes a wrong one (`offsets_wrap`): there the layer is copied first.

Bound by memory: each number of the cache is read once, for 2 * group * q_len FLOPs. The codes of a one-byte cache are
converted in registers (`products.py`), in up to 1.25 instructions each; scales are folded into logits and weights.
"""

from __future__ import annotations

from typing import Final, get_args

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, offsets_wrap
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.decode_attention.shares import is_balanced, slots_of
from palladion.kernels.decode_attention.splits import splits_of, visible_blocks
from palladion.kernels.decode_attention.triton.config import MIN_BLOCK, Merge
from palladion.kernels.decode_attention.triton.config import Config as Config
from palladion.kernels.decode_attention.triton.kernel import Operands, Results, kernel
from palladion.kernels.decode_attention.triton.merge import WIDTH, Attention, merge_kernel, merge_warps
from palladion.kernels.decode_attention.triton.products import PIECES, uses_tensor_cores
from palladion.kernels.decode_attention.triton.rows import tiles_of
from palladion.kernels.devices import Gpu, gpu_to_plan_for, target_gpu
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret

MAX_ROWS_TIMES_WIDTH: Final = 64 * 128
"""Most float32 sums of a program: with eight warps, no GPU spills them."""

MAX_BLOCK_KV: Final = 128
"""Most tokens of a KV block that the heuristic chooses."""

MAX_HEAD_DIM: Final = 256
"""Widest supported head."""

KV_BLOCK_BYTES: Final = 16 * 2**10
"""Bytes of a block's keys, as the cache stores them. With values, a block ahead and two programs on a multiprocessor,
64 KiB are in flight there, with which an H200 read a 16-bit cache at its whole bandwidth."""

LATENCY: Final = 1.75e-6
"""Seconds from a load to its data while memory is busy, on an H200: where one-byte blocks of 64 tokens had 33 KiB in
flight on a multiprocessor, each of them read 19 GB/s."""

MAX_BUFFERS: Final = 4
"""Most blocks that a program has in shared memory."""

PROGRAM_RESERVED_BYTES: Final = 1024
"""Shared memory that the GPU itself takes for each program."""

MAX_LOGITS: Final = 16
"""Most logits of a block for each thread, where codes are converted in registers."""

RESIDENT: Final = 4
"""Programs that are resident on a multiprocessor, given 128 threads with up to 128 registers each."""

SPLITS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Splits that the tuner tries, up to a factor of four from the heuristic's."""

FLOATS_FROM: Final = 100
"""Least compute capability where int8 keys become floats: a B300 multiplies integers at a thirtieth of the rate."""


def block_bytes(problem: Problem, block_kv: int) -> int:
    """Returns the bytes of shared memory that the keys and values of a block take, with their scales."""
    width = sum(tile.width for tile in tiles_of(problem.head_dim))
    scale_bytes = 4 if problem.has_scales else 0
    return 2 * block_kv * (width * jnp.dtype(problem.kv_dtype).itemsize + scale_bytes)


def operand_bytes(problem: Problem, block_rows: int, block_kv: int) -> int:
    """Returns the bytes of shared memory that operands of tensor cores take: queries, weights, converted values."""
    width = sum(tile.width for tile in tiles_of(problem.head_dim))
    weights = 2 * block_rows * block_kv
    if not problem.has_scales:
        return weights + 2 * block_rows * width
    return weights + PIECES * block_rows * width + 2 * block_kv * width


def buffers_of(problem: Problem, num_stages: int) -> int:
    """Returns the blocks in shared memory: page numbers are loaded as many iterations ahead as tokens."""
    return max((num_stages - 1) // (1 if problem.page_size is None else 2), 1)


def loaded_bytes(problem: Problem, config: Config) -> int:
    """Returns the bytes of shared memory that loads take at least."""
    return buffers_of(problem, config.num_stages) * block_bytes(problem, config.block_kv)


def heuristic(problem: Problem) -> Config:
    """Returns blocks that fit into registers and shared memory, and splits that keep all multiprocessors busy."""
    p, gpu = problem, gpu_to_plan_for()
    rows = p.q_len * p.group
    width = sum(tile.width for tile in tiles_of(p.head_dim))
    if uses_tensor_cores(p):
        most_rows = max(MAX_ROWS_TIMES_WIDTH // pl.next_power_of_2(width), MIN_BLOCK)
        block_rows = min(max(pl.next_power_of_2(rows), MIN_BLOCK), most_rows)
        block_kv = KV_BLOCK_BYTES // (width * jnp.dtype(p.kv_dtype).itemsize)
        num_warps = 4 if block_rows * width <= MAX_ROWS_TIMES_WIDTH // 2 else 8
        if p.has_scales:
            block_kv = min(block_kv, MAX_LOGITS * 32 * num_warps // block_rows)
    else:
        # Operands are kept in registers, where large blocks would spill.
        block_rows, block_kv, num_warps = MIN_BLOCK, KV_BLOCK_BYTES // 2 // (width * 4), 8
    block_kv = min(max(1 << (block_kv.bit_length() - 1), MIN_BLOCK), MAX_BLOCK_KV)
    programs = p.batch * p.kv_heads * pl.cdiv(rows, block_rows)
    splits = splits_of(p, programs, block_kv, gpu, RESIDENT)
    # With a window, sequences see equally much; where a program has one block, there is nothing to share out. Several
    # blocks of rows keep the chip busy without splits, whose results in float32 would be as large as the cache.
    one_block_of_rows = rows <= block_rows
    balanced = p.batch > 1 and p.sliding_window is None and one_block_of_rows and pl.cdiv(p.max_len, block_kv) > splits
    return Config(
        block_kv,
        block_rows,
        splits,
        num_warps=num_warps,
        num_stages=stages_of(p, programs, splits, block_rows, block_kv, gpu),
        integers=gpu.compute_capability < FLOATS_FROM,
        balanced=balanced,
    )


def stages_of(problem: Problem, programs: int, splits: int, block_rows: int, block_kv: int, gpu: Gpu) -> int:
    """Returns the pipeline stages with which loads keep the memory busy, as far as shared memory allows.

    A program computes on one buffer while the others are loaded; a single one is loaded half of the time.

    Args:
      problem: the call.
      programs: programs without splits.
      splits: splits of each.
      block_rows: query rows of a program.
      block_kv: tokens of a KV block.
      gpu: the device.
    """
    p = problem
    resident = min(pl.cdiv(programs * splits, gpu.multiprocessors), RESIDENT)
    block, buffers = block_bytes(p, block_kv), 1
    if uses_tensor_cores(p):  # without them, operands are in registers, of which more loads would take too many
        needed = LATENCY * (gpu.hbm_bytes_per_second or 0) / gpu.multiprocessors
        room = min(gpu.shared_bytes // resident - PROGRAM_RESERVED_BYTES, gpu.program_shared_bytes)
        room -= operand_bytes(p, block_rows, block_kv)
        most = max(min(room // block, pl.cdiv(visible_blocks(p, block_kv), splits), MAX_BUFFERS), 1)
        enough = (n for n in range(1, most) if resident * block * max(n - 1, 0.5) >= needed)
        buffers = next(enough, most)
    return 1 + buffers * (1 if p.page_size is None else 2)


def space(problem: Problem) -> Space:
    """Returns what the tuner may try: KV block sizes, splits, how they are shared and merged, warps and stages."""
    start, most = heuristic(problem), gpu_to_plan_for().program_shared_bytes
    return Space(
        start,
        {
            "splits": [splits for splits in SPLITS if start.splits <= 4 * splits <= 16 * start.splits],
            "block_kv": [size for size in (start.block_kv // 2, 2 * start.block_kv) if size >= MIN_BLOCK],
            "num_warps": (2, 4, 8),
            "num_stages": (2, 3, 4, 5),
            "balanced": (False, True) if problem.batch > 1 else (),
            "merge": get_args(Merge),
        },
        lambda config: loaded_bytes(problem, config) <= most,
    )


def unsupported(problem: Problem) -> str | None:
    """Returns why this kernel cannot run a problem, or None."""
    p, gpu = problem, target_gpu()
    if p.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {p.head_dim}"
    if p.kv_dtype.startswith("float8") and gpu is not None and not gpu.float8:
        return (
            f"a {p.kv_dtype} cache needs a GPU that converts it, sm_89 or newer, got sm_{gpu.compute_capability} "
            f"({gpu.device_kind}); an int8 cache is as small"
        )
    if p.has_scales and offsets_wrap(p.layer_size):
        return f"a layer of a {p.kv_dtype} cache must take up to 2 GiB, or more than 4, got {p.layer_size} bytes"
    return None


def decode_attention(
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; see `palladion.decode_attention` for the contract.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    p, q, slots = problem, inputs.q, slots_of(problem, config)
    merges = slots > p.batch
    row_blocks = pl.cdiv(p.q_len * p.group, config.block_rows)
    operands = _operands(p, inputs)
    results = Results(
        # Splits stay in float32 until they are merged.
        partial=_results(p, slots, jnp.float32 if merges else q.dtype),
        merged=_results(p, p.batch, q.dtype) if merges and config.merge == "last" else None,
        counters=None,
    )
    counters, aliases = None, {}
    if results.merged is not None:
        counters = jnp.zeros((p.batch, p.kv_heads, row_blocks), jnp.int32)
        results = results._replace(counters=jax.ShapeDtypeStruct(counters.shape, counters.dtype))
        aliases = {len(jax.tree.leaves(operands)): len(jax.tree.leaves(results)) - 1}
    (written,) = pl.pallas_call(
        fresh_kernel(kernel, problem=p, config=config, row_blocks=row_blocks, native=not interpret),
        grid=(p.kv_heads * row_blocks * slots,),
        out_shape=(results,),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=pl.CostEstimate(
            flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=p.flops() // (4 * p.head_dim)
        ),
        interpret=interpret,
        name=f"decode_attention_r{config.block_rows}_kv{config.block_kv}_s{config.splits}"
        + ("_balanced" if is_balanced(p, config) else ""),
    )(operands, counters)
    if not merges:
        return written.partial
    if written.merged is not None:
        return written.merged
    (merged,) = pl.pallas_call(
        fresh_kernel(merge_kernel, problem=p, config=config),
        grid=(p.batch * p.q_len * p.q_heads, pl.cdiv(p.head_dim, WIDTH)),
        out_shape=(_results(p, p.batch, q.dtype),),
        compiler_params=plgpu.CompilerParams(num_warps=merge_warps(p, config), num_stages=1),
        interpret=interpret,
        name=f"decode_attention_merge_s{config.splits}",
    )(inputs.lengths, written.partial)
    return merged


def _results(problem: Problem, parts: int, dtype: DTypeLike) -> Attention:
    """Returns shapes and dtypes of results of sequences or slots."""
    shape = (parts, problem.q_len, problem.q_heads)
    return Attention(jax.ShapeDtypeStruct((*shape, problem.head_dim), dtype), jax.ShapeDtypeStruct(shape, jnp.float32))


def _operands(problem: Problem, inputs: Inputs) -> Operands:
    """Returns the arrays that the kernel takes; the cache and its scales have a leading `[num_layers]`."""
    cache, layer = (inputs.k, inputs.v, inputs.k_scale, inputs.v_scale), inputs.layer
    if layer is None:
        cache = jax.tree.map(lambda x: x[None], cache)
    elif problem.has_scales and offsets_wrap(inputs.k.size):
        cache = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=True), cache)
        layer = None
    k, v, k_scale, v_scale = cache
    return Operands(
        layer=(jnp.int32(0) if layer is None else layer)[None],
        lengths=inputs.lengths,
        q=inputs.q,
        k=k,
        v=v,
        k_scale=k_scale,
        v_scale=v_scale,
        page_table=inputs.page_table,
        sinks=None if inputs.sinks is None else inputs.sinks.astype(jnp.float32),
    )
