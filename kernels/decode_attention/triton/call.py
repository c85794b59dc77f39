"""decode_attention on a GPU: attention of a few queries over a long cache, cut along the cache (split-K).

A program takes one sequence, one KV head with a block of the query rows that share it (rows = q_len * group, query
major), and one of several equal shares of the blocks of tokens that these rows see. It keeps an online softmax over
them (`online_softmax.py`); a second, small kernel weighs the shares' outputs, in float32, by their log-sum-exps. A
single share is the output itself.

Grid: (batch, KV heads * row blocks * splits). One decode step has few sequences and heads and many multiprocessors:
the splits are what fills them. Two axes leave the third that Triton has for `jax.vmap`. The loop runs over the blocks
that are filled and, with a window, in sight: its bounds are read from `lengths` on the chip. Pages are looked up where
their tokens are loaded, a trip ahead; nothing is gathered before.

Resident in registers: q, m, l, acc. K and V blocks pass through shared memory, 16 bytes at a time and asynchronously,
where the compiler keeps `num_stages` of them in flight. Rows are padded to a power of two of at least 16, which is what
tensor cores multiply; a head is cut into powers of two (`parts_of`). The layer of a stacked cache is an offset, but
where Pallas miscounts it (`offsets_wrap`): there the layer is copied first.

Bound by memory: each number of the cache is read once, for 2 * group * q_len FLOPs. Codes of a one-byte cache become
operands in registers (`products.py`), at up to 2 instructions each; their scales meet logits and weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.checks import check
from palladion.kernels.compat import fresh_kernel, offsets_wrap
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.decode_attention.triton.kernel import kernel, merge_kernel, parts_of
from palladion.kernels.decode_attention.triton.products import uses_tensor_cores
from palladion.kernels.devices import Gpu, gpu_to_plan_for, target_gpu
from palladion.kernels.tuning import Space

MIN_BLOCK: Final = 16
"""The smallest side of a matrix that tensor cores multiply."""

MAX_ROWS_TIMES_WIDTH: Final = 64 * 128
"""Of the sums in registers: a program of eight warps spills nothing yet, on any GPU."""

MAX_BLOCK_KV: Final = 128
MAX_HEAD_DIM: Final = 256

KV_BLOCK_BYTES: Final = 16 * 2**10
"""Keys of a block. With the values, and four programs on a multiprocessor, 128 KiB are in flight on each: three times
what an H200 needs to be busy for the 1 µs that its memory takes to answer."""

MAX_SPLITS: Final = 256
"""Partial results that are merged at a time."""

RESIDENT: Final = 4
"""Programs on a multiprocessor that registers (128 threads of up to 128) and shared memory allow."""

HIDDEN_FROM: Final = 2
"""Programs on a multiprocessor from which on one computes while another one waits for memory."""

START: Final = 1
"""What a program takes for queries, first block and result, in blocks of its loop."""

MERGE: Final = 2
"""What it takes to merge the splits, in the same unit."""

FLOATS_FROM: Final = 100
"""Compute capability from which on int8 keys become floats: a B300 multiplies integers at a thirtieth of the rate."""

MERGE_WIDTH: Final = 32
"""Features that a program merges: of 256 splits they fit into registers."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes.

    Attributes:
      block_kv: cached tokens of a trip, a power of two of at least 16.
      block_rows: query rows of a program, a power of two of at least 16.
      splits: shares that the cache is cut into.
      num_warps: warps of a program.
      num_stages: blocks that are loaded ahead.
      integers: whether 16-bit queries meet int8 keys between integers; else keys become floats.
    """

    block_kv: int
    block_rows: int
    splits: int
    num_warps: int = 4
    num_stages: int = 2
    integers: bool = True

    def __post_init__(self) -> None:
        for name in ("block_kv", "block_rows"):
            value = getattr(self, name)
            power = value >= MIN_BLOCK and value & (value - 1) == 0
            check(power, f"config.{name}", value, f"a power of two of at least {MIN_BLOCK}")
        check(1 <= self.splits <= MAX_SPLITS, "config.splits", self.splits, f"1 to {MAX_SPLITS}")
        check(self.num_stages >= 1, "config.num_stages", self.num_stages, "at least 1")
        check(self.num_warps in (1, 2, 4, 8, 16), "config.num_warps", self.num_warps, "1, 2, 4, 8 or 16")


def block_bytes(problem: Problem, block_kv: int) -> int:
    """Shared memory that a block of keys and its values take on their way."""
    width = sum(part.width for part in parts_of(problem.head_dim))
    return 2 * block_kv * width * jnp.dtype(problem.kv_dtype).itemsize


def loaded_bytes(problem: Problem, config: Config) -> int:
    """Shared memory that what is loaded ahead takes, at least: a block for each stage but the one at work."""
    return (config.num_stages - 1) * block_bytes(problem, config.block_kv)


def heuristic(problem: Problem) -> Config:
    """Blocks that fit into registers and shared memory, and splits that keep every multiprocessor busy to the end."""
    p, gpu = problem, gpu_to_plan_for()
    rows = p.q_len * p.group
    width = sum(part.width for part in parts_of(p.head_dim))
    if uses_tensor_cores(p):
        most_rows = max(MAX_ROWS_TIMES_WIDTH // pl.next_power_of_2(width), MIN_BLOCK)
        block_rows = min(max(pl.next_power_of_2(rows), MIN_BLOCK), most_rows)
        # One-byte values also lie in shared memory as bfloat16.
        block_kv = KV_BLOCK_BYTES // (width * 2)
        num_warps = 4 if block_rows * width <= MAX_ROWS_TIMES_WIDTH // 2 else 8
    else:
        # Operands are held in registers, and large blocks would be spilled.
        block_rows, block_kv, num_warps = MIN_BLOCK, KV_BLOCK_BYTES // 2 // (width * 4), 8
    block_kv = min(max(1 << (block_kv.bit_length() - 1), MIN_BLOCK), MAX_BLOCK_KV)
    programs = p.batch * p.kv_heads * pl.cdiv(rows, block_rows)
    splits = splits_of(p, programs, block_kv, gpu)
    # Where few programs share a multiprocessor, each loads two blocks ahead; of a paged cache, one and the next page.
    resident = pl.cdiv(programs * splits, gpu.multiprocessors)
    stage_bytes = block_bytes(p, block_kv)
    operands = 2 * (block_kv * width + block_rows * (width + block_kv))  # of products, on their way to tensor cores
    deep = (
        uses_tensor_cores(p)
        and resident * (2 * stage_bytes + 2 * KV_BLOCK_BYTES) <= gpu.shared_bytes
        and 2 * stage_bytes + operands <= gpu.program_shared_bytes
    )
    integers = gpu.compute_capability < FLOATS_FROM
    # Pages are looked up a trip ahead; where codes of both keys and values become floats, no register is left for it.
    paged = p.page_size is not None
    ahead = (deep or paged) and (integers or not (paged and p.has_scales))
    return Config(
        block_kv,
        block_rows,
        splits,
        num_warps=num_warps,
        num_stages=3 if ahead else 2,
        integers=integers,
    )


def splits_of(problem: Problem, programs: int, block_kv: int, gpu: Gpu) -> int:
    """Shares of a cache: what lets the busiest multiprocessor finish first, if the caches are full.

    A multiprocessor that has `programs` of one share each goes through their blocks at the rate of its memory, as long
    as there are `HIDDEN_FROM` of them. More programs than run at a time would leave most of the chip idle in the end.

    Args:
      problem: what is computed.
      programs: that there are without a split.
      block_kv: tokens of a block.
      gpu: which one.
    """
    p = problem
    seen = p.max_len if p.sliding_window is None else min(p.max_len, p.sliding_window + p.q_len - 1)
    blocks = pl.cdiv(seen, block_kv)

    def busiest(splits: int) -> int:
        resident = pl.cdiv(programs * splits, gpu.multiprocessors)
        time = max(resident, HIDDEN_FROM) * pl.cdiv(blocks, splits) + resident * START
        return time + (MERGE if splits > 1 else 0)

    most = min(blocks, MAX_SPLITS, max(RESIDENT * gpu.multiprocessors // programs, 1))
    return min(range(1, most + 1), key=busiest)


def space(problem: Problem) -> Space:
    """Blocks of tokens, splits of the cache, how much is loaded ahead, and how a program is run."""
    start, most = heuristic(problem), gpu_to_plan_for().program_shared_bytes
    blocks = -(-problem.max_len // start.block_kv)
    return Space(
        start,
        {
            "splits": [1 << n for n in range(8) if 1 << n <= blocks],
            "block_kv": (16, 32, 64, 128, 256),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4, 5),
        },
        lambda config: loaded_bytes(problem, config) <= most,
    )


def unsupported(problem: Problem) -> str | None:
    """What of a problem this kernel does not cover, or None."""
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
    problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; see `palladion.decode_attention` for the contract.

    Returns:
      out `[batch, q_len, q_heads, head_dim]` in q's dtype, and lse `[batch, q_len, q_heads]` in float32.
    """
    check(config is None or isinstance(config, Config), "config", config, "triton.Config or None")
    config = config or heuristic(problem)
    p, splits = problem, config.splits
    q = inputs.q
    row_blocks = pl.cdiv(p.q_len * p.group, config.block_rows)
    arrays = _operands(p, inputs)
    out, lse = pl.pallas_call(
        fresh_kernel(kernel, names=(*arrays, "out", "lse"), problem=p, config=config, row_blocks=row_blocks),
        grid=(p.batch, p.kv_heads * row_blocks * splits),
        out_shape=[
            # What is still to be merged stays in float32.
            jax.ShapeDtypeStruct((splits, *q.shape), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, *q.shape[:3]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=pl.CostEstimate(
            flops=p.flops(), bytes_accessed=p.bytes_moved(), transcendentals=p.flops() // (4 * p.head_dim)
        ),
        interpret=interpret,
        name=f"decode_attention_r{config.block_rows}_kv{config.block_kv}_s{splits}",
    )(*arrays.values())
    if splits == 1:
        return out[0], lse[0]
    merged: tuple[jax.Array, jax.Array] = pl.pallas_call(
        fresh_kernel(merge_kernel, problem=p, splits=splits, width=MERGE_WIDTH),
        grid=(p.batch * p.q_len * p.q_heads, pl.cdiv(p.head_dim, MERGE_WIDTH)),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=1 if splits <= MIN_BLOCK else 4, num_stages=1),
        interpret=interpret,
        name=f"decode_attention_merge_s{splits}",
    )(out, lse)
    return merged


def _operands(problem: Problem, inputs: Inputs) -> dict[str, jax.Array]:
    """The arrays that there are, by the names of `triton_kernel.Refs`; those of the cache with layers in front."""
    cache = {name: getattr(inputs, name) for name in ("k", "v", "k_scale", "v_scale")}
    cache = {name: array for name, array in cache.items() if array is not None}
    layer = inputs.layer
    if layer is not None and problem.has_scales and offsets_wrap(inputs.k.size):
        cache = {name: jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=True) for name, array in cache.items()}
        layer = jnp.int32(0)
    elif layer is None:
        cache = {name: array[None] for name, array in cache.items()}
        layer = jnp.int32(0)
    arrays = {"layer": layer[None], "lengths": inputs.lengths, "q": inputs.q, **cache}
    if inputs.page_table is not None:
        arrays["page_table"] = inputs.page_table
    if inputs.sinks is not None:
        arrays["sinks"] = inputs.sinks.astype(jnp.float32)
    return arrays
