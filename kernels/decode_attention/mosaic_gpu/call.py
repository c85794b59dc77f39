"""decode_attention on Hopper, in Mosaic GPU: TMA brings the cache, tensor cores multiply it as their left operand.

That is for a few query rows; many of them, as in prefill, are the left operand themselves (`many_rows.py`).

A program is one warpgroup. It has one KV head with a block of the query rows that share it (rows = q_len * group, query
major), and one slot: a share of the KV blocks that these rows see in one sequence (`shares.py`). It goes through them
in a ring of `num_stages` blocks that TMA fills, with an online softmax (`online_softmax.py`), all of it turned:

    S^T [block_kv, rows]  = K [block_kv, head_dim]   Q^T [head_dim, rows]
    O^T [head_dim, rows] += V^T [head_dim, block_kv] P^T [block_kv, rows]

wgmma has 64 rows in its left operand and any multiple of 8 columns in its right one. So keys and values are the left
operand as they lie in shared memory, and the few query rows of a step cost 8 columns, not 64 rows: a thread has four
logits of a block of 64 tokens. Weights pass through shared memory, 1 KiB a block; maxima of columns do, too.

Grid: (slots, KV heads, row blocks). With splits, parts are stored in float32 as they lie in registers, and merged in a
second launch (`merge.py`), or the programs of all splits are a cluster that merges them (`cluster_merge.py`).

    resident in registers       m, l, acc; of a block: logits, and codes that are converted
    resident in shared memory   q, the ring, weights

Codes of a one-byte cache are converted in the registers that wgmma takes its left operand from: keys to the dtype of
queries (`gpu_codes.py`), values to float16, turned on their way by ldmatrix (`turned_codes.py`), since tensor cores
turn 16-bit operands only. Scales of keys are folded into the softmax scale, those of values into the weights.

Bound by memory: each number of the cache is read once, for 2 * rows FLOPs. Two programs of a multiprocessor have 64 KiB
or more of the cache on their way while both compute; for 32 KiB of it, memory takes 1,640 cycles (an H200 at 4.3 TB/s).

What merging in a cluster costs and saves, by counts: one sequence of 8,192 tokens, 8 KV heads of 128 in bfloat16.

    merge                              launch, 32 splits       cluster, 8 splits
    programs                           256, two on each of     64, one on each of
                                       128 multiprocessors     64 multiprocessors
    on their way on each of these      2 x 96 KiB              192 KiB, 6 stages of 32 KiB
    ... and in all                     24 MiB                  12 MiB
    parts, written and read            1 MiB of memory         256 KiB of shared memory
    launches                           2                       1
    KV blocks of a multiprocessor      8                       16
    cycles for each, at 4.3 TB/s       1,640                   820
    bytes a cycle, at 4.3 TB/s         20                      40

So a cluster saves two passes of parts over memory and a launch: such a merge took Triton 1.8 us. For that, half of the
multiprocessors must read as much as all of them, and a program has half the cycles for a block, with no other program
beside it that computes while it waits. With 8 sequences and 4 splits, each multiprocessor has two programs with 96 KiB,
as with a launch. No chip has measured it: the heuristic takes the launch, the tuner tries both.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, gpu_interpreter
from palladion.kernels.decode_attention import shares
from palladion.kernels.decode_attention.mosaic_gpu import many_rows_call
from palladion.kernels.decode_attention.mosaic_gpu.cluster_merge import cluster_kernel
from palladion.kernels.decode_attention.mosaic_gpu.config import BLOCKS_KV, MAX_BLOCK_ROWS
from palladion.kernels.decode_attention.mosaic_gpu.config import Config as Config
from palladion.kernels.decode_attention.mosaic_gpu.kernel import Results, kernel
from palladion.kernels.decode_attention.mosaic_gpu.memory import (
    Refs,
    scratch_types,
    shared_bytes,
    sinks_by_rows,
    stage_bytes,
)
from palladion.kernels.decode_attention.mosaic_gpu.merge import Parts, merge_kernel
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.decode_attention.splits import splits_of, visible_blocks
from palladion.kernels.devices import gpu_to_plan_for, target_gpu
from palladion.kernels.gpu_cluster import MERGES, MOST_IN_CLUSTER
from palladion.kernels.integers import round_up
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret

HOPPER: Final = 90
"""Compute capability whose tensor cores have wgmma."""

HEAD_DIMS: Final = (64, 128, 192, 256)
"""Widths of a head: whole tiles of wgmma."""

TMA_TOKENS: Final = 8
"""Tokens of which a sequence's room and pages are multiples: TMA brings them in tiles of so many."""

SCALED_TOKENS: Final = 32
"""The same for pages of a one-byte cache, whose scales TMA brings by 128 bytes."""

MOST_ROWS: Final = {64: 64, 128: 64, 192: 32, 256: 24}
"""Most query rows of a program for each width of a head: more sums spill."""

MOST_ROWS_OF_CODES: Final = {64: 64, 128: 40, 192: 24, 256: 16}
"""The same for a one-byte cache, whose codes take registers, too."""

MOST_LOGITS: Final = {1: 2048, 2: 4096}
"""Most logits of a block, by the bytes of a number of the cache, for the same reason."""

KEY_BYTES: Final = 16 * 2**10
"""Bytes of a block's keys; with values, 32 KiB are a stage of the ring."""

PROGRAMS: Final = 2
"""Programs of a multiprocessor at a time: one computes while the other waits."""

MOST_STAGES: Final = 6

MOST_BALANCED: Final = 32
"""Most sequences whose shares are balanced: every program looks at the lengths of all of them."""

MOST_SLOTS: Final = 65535
"""Most programs along the outermost axis of a grid."""

SPLITS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Splits that the tuner tries: those of a cluster, and others up to a factor of four from the heuristic's."""


def heuristic(problem: Problem) -> Config:
    """Returns block sizes for many rows where programs of so many fill the chip, otherwise those for a few rows."""
    return many_rows_call.heuristic(problem) or _for_few_rows(problem)


def _for_few_rows(problem: Problem) -> Config:
    """Returns blocks that fill the shared memory, and splits that keep all multiprocessors busy."""
    p, gpu = problem, gpu_to_plan_for()
    most_rows = (MOST_ROWS_OF_CODES if p.has_scales else MOST_ROWS)[p.head_dim]
    row_blocks = pl.cdiv(p.q_len * p.group, most_rows)
    block_rows = round_up(pl.cdiv(p.q_len * p.group, row_blocks), 8)
    size = jnp.dtype(p.kv_dtype).itemsize
    most = max(min(KEY_BYTES // (p.head_dim * size), MOST_LOGITS[size] // block_rows), BLOCKS_KV[0])
    block_kv = max(block for block in BLOCKS_KV if block <= most)
    programs = p.batch * p.kv_heads * row_blocks
    for most_resident in (PROGRAMS, 1):
        splits = splits_of(p, programs, block_kv, gpu, most_resident)
        config = Config(block_kv, block_rows, splits, num_stages=1)
        resident = min(pl.cdiv(programs * splits, gpu.multiprocessors), most_resident)
        room = min(gpu.shared_bytes // resident - 1024, gpu.program_shared_bytes) - shared_bytes(p, config)
        stages = 1 + room // stage_bytes(p, block_kv)
        if stages > 1:
            break
    blocks = pl.cdiv(visible_blocks(p, block_kv), splits)
    # With a window, sequences see equally much; where a program has one block, there is nothing to share out. Several
    # blocks of rows keep the chip busy without splits, whose results in float32 would be as large as the cache.
    balanced = 1 < p.batch <= MOST_BALANCED and p.sliding_window is None and row_blocks == 1 and blocks > 1
    return dataclasses.replace(config, num_stages=max(min(stages, MOST_STAGES, blocks), 1), balanced=balanced)


def preferred(problem: Problem) -> bool:
    """Returns whether a few query rows are computed on a GPU on whose like the kernel was right, unless it was slower.

    On an H200, Triton took 8 % less time for one sequence in bfloat16, as long for eight, and 10 to 40 % longer for
    one-byte caches (docs/gpu.md).
    """
    p, gpu = problem, target_gpu()
    fast = p.q_len * p.group <= MAX_BLOCK_ROWS and (p.has_scales or p.batch > 1)
    return fast and gpu is not None and "decode_attention" in gpu.mosaic_gpu


def space(problem: Problem) -> Space:
    """Returns what the tuner may try: KV block sizes, stages, and splits and how they are shared, or blocks of rows."""
    start, most = heuristic(problem), gpu_to_plan_for().program_shared_bytes
    if start.warpgroups > 1:
        return many_rows_call.space(problem, start)
    near = [splits for splits in SPLITS if start.splits <= 4 * splits <= 16 * start.splits]
    axes = {
        "splits": sorted({*near, *(splits for splits in SPLITS if splits <= MOST_IN_CLUSTER)}),
        "block_kv": BLOCKS_KV,
        "num_stages": (2, 3, 4, 5, 6, 8),
        "balanced": (False, True) if 1 < problem.batch <= MOST_BALANCED else (),
        "merge": MERGES,
    }

    def worth_trying(config: Config) -> bool:
        sensible = config.splits > 1 if config.merge == "cluster" else config.splits in (start.splits, *near)
        return sensible and shared_bytes(problem, config) <= most

    return Space(start, axes, worth_trying)


def unsupported(problem: Problem) -> str | None:
    """Returns why this kernel cannot run a problem, or None."""
    p, gpu = problem, target_gpu()
    if gpu is not None and gpu.compute_capability != HOPPER:
        return f"needs wgmma, which sm_{HOPPER} has, got sm_{gpu.compute_capability}"
    if p.batch > MOST_SLOTS:
        return f"batch must be at most {MOST_SLOTS}, got {p.batch}"
    if p.q_dtype == "float32":
        return "q must be bfloat16 or float16, got float32"
    if not p.has_scales and p.kv_dtype != p.q_dtype:
        return f"the cache must be {p.q_dtype} like q, int8 or float8, got {p.kv_dtype}"
    if p.head_dim not in HEAD_DIMS:
        return f"head_dim must be {', '.join(map(str, HEAD_DIMS))}, got {p.head_dim}"
    if p.page_size is None and p.max_len % TMA_TOKENS:
        return f"max_len must be a multiple of {TMA_TOKENS}, got {p.max_len}"
    if p.page_size is not None and p.page_size % (least := SCALED_TOKENS if p.has_scales else TMA_TOKENS):
        return f"pages of a {p.kv_dtype} cache must be multiples of {least} tokens, got {p.page_size}"
    return None


def decode_attention(
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; see `palladion.decode_attention` for the contract.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    check(config is None or isinstance(config, Config), "config", config, "mosaic_gpu.Config or None")
    config = config or heuristic(problem)
    if problem.batch > MOST_BALANCED:
        config = dataclasses.replace(config, balanced=False)
    p, slots = problem, shares.slots_of(problem, config)
    check(slots <= MOST_SLOTS, "config.splits", config.splits, f"up to {MOST_SLOTS} for all {p.batch} sequences")
    if config.warpgroups > 1:
        check(not p.has_scales, "config.block_rows", config.block_rows, f"up to 64 for {p}")
        return many_rows_call.decode_attention(p, inputs, config, interpret)
    rows, row_blocks = p.q_len * p.group, pl.cdiv(p.q_len * p.group, config.block_rows)
    all_rows = row_blocks * config.block_rows
    # Blocks are written whole, except an only one.
    out_rows = rows if row_blocks == 1 else all_rows
    results = Results(
        jax.ShapeDtypeStruct((p.batch, p.kv_heads, out_rows, p.head_dim), jnp.dtype(p.q_dtype)),
        jax.ShapeDtypeStruct((p.batch, p.kv_heads, all_rows), jnp.float32),
    )
    parts = Results(
        jax.ShapeDtypeStruct((slots, p.kv_heads, row_blocks, p.head_dim, config.block_rows), jnp.float32),
        jax.ShapeDtypeStruct((slots, p.kv_heads, all_rows), jnp.float32),
    )
    sinks = sinks_by_rows(p, inputs.sinks, all_rows)
    whole = slots == p.batch
    call = _Call(p, config, bool(interpret), gpu_interpreter(interpret or False))
    refs = _refs(p, inputs, sinks if whole or config.in_cluster else None)
    scratch = scratch_types(p, config, whole, call.interpret)
    places = {"head": p.kv_heads, "row": row_blocks}
    by_slots, by_sequences = {"slot": slots, **places}, {"sequence": p.batch, **places}
    if config.in_cluster:
        found = call(cluster_kernel, by_sequences, results, scratch, refs)
    else:
        found = call(kernel, by_slots, results if whole else parts, scratch, refs)
        if not whole:
            staged = plgpu.SMEM((config.block_rows, p.head_dim), jnp.dtype(p.q_dtype))
            merged, most = Parts(found, inputs.lengths, sinks), shares.most_slots(p, config)
            found = call(merge_kernel, by_sequences, results, staged, merged, most_slots=most)
    shape = (p.batch, p.kv_heads, p.q_len, p.group)
    out = found.out[:, :, :rows].reshape(*shape, p.head_dim).swapaxes(1, 2)
    lse = found.lse[:, :, :rows].reshape(shape).swapaxes(1, 2)
    return out.reshape(inputs.q.shape), lse.reshape(inputs.q.shape[:-1])


@dataclasses.dataclass(frozen=True)
class _Call:
    """Launches the kernels of a call.

    Attributes:
      problem: the call.
      config: block sizes.
      interpret: whether kernels are interpreted.
      interpreter: how.
    """

    problem: Problem
    config: Config
    interpret: bool
    interpreter: Any

    def __call__(
        self, body: Any, grid: dict[str, int], results: Results, scratch: Any, refs: Any, **options: Any
    ) -> Results:
        """Runs a kernel on a grid, given by the names and sizes of its axes."""
        c = self.config
        cluster = {"split": c.splits} if c.in_cluster and not self.interpret else {}
        kind = "_balanced" if shares.is_balanced(self.problem, c) else "_cluster" if c.in_cluster else ""
        (found,) = plgpu.kernel(
            fresh_kernel(body, problem=self.problem, config=c, interpret=self.interpret, **options),
            out_type=(results,),
            scratch_types=[scratch],
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            cluster=tuple(cluster.values()),
            cluster_names=tuple(cluster),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=self.interpreter,
            kernel_name=f"decode_attention{'_merge' if body is merge_kernel else ''}_r{c.block_rows}_kv{c.block_kv}"
            f"_s{c.splits}{kind}",
        )(refs)
        return Results(*found)


def _refs(problem: Problem, inputs: Inputs, sinks: jax.Array | None) -> Refs:
    """Returns the inputs as the kernel takes them; without a copy for one new token of up to 8 heads a KV head."""
    p, rows = problem, problem.q_len * problem.group
    q = inputs.q.reshape(p.batch, p.q_len, p.kv_heads, p.group, p.head_dim).swapaxes(1, 2)
    q = q.reshape(p.batch, p.kv_heads, rows, p.head_dim)
    if rows > 8 and rows % 8:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, -rows % 8), (0, 0)))
    cache, layer = (inputs.k, inputs.v, inputs.k_scale, inputs.v_scale), inputs.layer
    if layer is None:
        cache = jax.tree.map(lambda x: x[None], cache)
    layer = None if layer is None else layer[None]
    return Refs(layer, inputs.lengths, q, *cache, page_table=inputs.page_table, sinks=sinks)
