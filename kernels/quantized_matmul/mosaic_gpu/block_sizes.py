"""Block sizes of quantized_matmul's kernels: how a call is multiplied, what fits, and what the heuristic takes.

For a few rows the heuristic takes the block sizes that were the best of a prototype on an H200, without scales, for
int8 and 8 rows:

    layers of Llama-3-8B                          µs    others
    qkv       128 weights, 6 blocks, 4 splits    9.5    256 weights, 4 blocks: 10.7 (2 splits), 11.3 (4 splits)
    output    256 weights, 4 blocks, 4 splits    7.1
    gate-up   256 weights, 4 blocks, 1 split    35.6    128 weights, 6 blocks: 43.2
    down      256 weights, 4 blocks, 4 splits   17.7    2 splits: 20.0; 7 splits: 21.0; 128 weights, 6 blocks: 17.8

They have in common that programs fill the multiprocessors evenly, two or three on each; what does not fit at first runs
alone at the end. Other rows, formats and groups have not been measured. For many rows it takes what `_cycles` counts to
be the fastest, which no GPU has confirmed.

On Blackwell nothing was measured: blocks have as many rows as tensor memory has room for, and splits fill the
multiprocessors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Final

import jax.numpy as jnp
from jax.experimental import pallas as pl

from palladion.kernels.checks import check, check_power_of_two
from palladion.kernels.compat import LAUNCHES_OVERLAP
from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.gpu_cluster import MERGES, MOST_IN_CLUSTER, Merge
from palladion.kernels.quantized_matmul.mosaic_gpu.activations import compiles
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.search_space import Space

CHANNELS: Final = 64
"""Channels of a wgmma."""

BLACKWELL: Final = 100
"""Compute capability whose tensor cores have tensor memory (tcgen05)."""

TENSOR_COLUMNS: Final = 512
"""Columns of the tensor memory of a multiprocessor, of 128 words each."""

SWIZZLES: Final = (128, 64, 32)
"""Bytes that TMA permutes in shared memory so that reads do not collide; an array's rows must be multiples of them."""

THREADS: Final = 128
"""Threads of a warpgroup."""

FEW_ROWS: Final = (8, 16, 32, 64)
"""Rows of x in a block, columns of a wgmma, whose products are scaled in registers."""

MANY_ROWS: Final = (128, 256)
"""Rows of a block whose sums the tensor cores keep, in two warpgroups."""

TENSOR_ROWS: Final = (*FEW_ROWS[1:], *MANY_ROWS)
"""Rows of a block on Blackwell, columns of a tcgen05.mma: for 128 channels it takes multiples of 16.

Mosaic GPU and NVIDIA's assembler let 8 pass, which the hardware does not take.
"""

BLOCKS_IN: Final = (512, 256, 128, 64)
"""Weights along `in` of a block, the best first."""

BLOCK_BYTES: Final = 256
"""Bytes of codes of a channel in the best block that was measured."""

LEAST_STAGES: Final = {8: 4, 16: 4, 32: 3, 64: 3}
"""Blocks in the ring, by rows of x, below which too few bytes are on their way; those of more rows are larger."""

MOST_STAGES: Final = 6

REGISTERS: Final = 168
"""Registers of a thread, of 255, that sums, converted codes and factors may take; with 192 some are spilled."""

OTHER_REGISTERS: Final = 48
"""Registers of a thread for all else, where they must leave room for other programs."""

PROGRAMS: Final = (2, 3, 4)
"""Programs of a multiprocessor at a time: one multiplies while others wait, and their blocks are on the way."""

EVEN: Final = 0.9
"""Share of the programs that multiprocessors have room for, at which more of them are not tried."""

PRODUCTS: Final = {"bfloat16": 2048, "float16": 2048, "int8": 4096}
"""Multiply-adds of a multiprocessor in a cycle, by dtype of the operands."""

L2_BYTES: Final = 24
"""Bytes a cycle that a multiprocessor reads from the L2 cache while all do: 5.7 TB/s, published measurements."""

HBM_BYTES: Final = 17
"""Bytes a cycle that a multiprocessor reads from memory while all do: 4.1 TB/s, measured."""

LAUNCH_CYCLES: Final = 4000
"""Cycles of one launch more, for sums of splits: 2.2 µs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the kernels.

    Attributes:
      block_rows: rows of x in a program: up to 64 for a few rows, 128 or 256 for many.
      block_out: output channels of a program, of gates and of ups alike: a multiple of 64, at most 256; for many rows
        a multiple of 128.
      block_in: weights along `in` of a block, a power of two of at least 64.
      splits: shares that `in` is cut into.
      num_stages: blocks in the ring: one is multiplied, the others are on their way.
      overlaps: whether the kernel starts while the one before it ends, and reads its first codes into the L2 cache
        before it waits for that one (docs/gpu.md); jax ignores it before 0.11.
      multicast: programs of neighbouring channels that share what they read of x: 1, or 2 for many rows.
      merge: how splits are added up: by XLA, in a "launch" of its own, or for a few rows by the programs of the splits,
        which are a "cluster" and read each other's shared memory; also in a launch where Mosaic GPU does not compile
        the activation.
      tensor_memory: whether products are added up in tensor memory, which is Blackwell's way: blocks have 128 channels
        and any of these rows, and two stages or more.
    """

    block_rows: int
    block_out: int = CHANNELS
    block_in: int = 256
    splits: int = 1
    num_stages: int = 4
    overlaps: bool = False
    multicast: int = 1
    merge: Merge = "launch"
    tensor_memory: bool = False

    def __post_init__(self) -> None:
        accepted = TENSOR_ROWS if self.tensor_memory else (*FEW_ROWS, *MANY_ROWS)
        check(self.block_rows in accepted, "config.block_rows", self.block_rows, ", ".join(map(str, accepted)))
        if self.tensor_memory:
            check(self.block_out == 2 * CHANNELS, "config.block_out", self.block_out, f"{2 * CHANNELS}")
            check(self.num_stages >= 2, "config.num_stages", self.num_stages, "at least 2")
            check(self.merge == "launch", "config.merge", self.merge, "launch")
        step = CHANNELS * self.warpgroups
        multiple = self.block_out in range(step, 256 + 1, step)
        check(multiple, "config.block_out", self.block_out, f"a multiple of {step}, at most 256")
        check_power_of_two("config.block_in", self.block_in, least=64)
        sharing = range(1, self.warpgroups + 1)
        check(self.multicast in sharing, "config.multicast", self.multicast, " or ".join(map(str, sharing)))
        for name in ("splits", "num_stages"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")
        check(self.merge in MERGES, "config.merge", self.merge, " or ".join(map(repr, MERGES)))
        if self.merge == "cluster":
            check(self.warpgroups == 1, "config.merge", self.merge, f"'launch' for more than {FEW_ROWS[-1]} rows")
            few = self.splits <= MOST_IN_CLUSTER
            check(few, "config.splits", self.splits, f"up to {MOST_IN_CLUSTER} for merge='cluster'")

    @property
    def warpgroups(self) -> int:
        """Warpgroups that multiply, each some of the channels."""
        return 2 if self.block_rows in MANY_ROWS and not self.tensor_memory else 1


def on_blackwell() -> bool:
    """Returns whether kernels are for a GPU with tensor memory."""
    return gpu_to_plan_for().compute_capability == BLACKWELL


def operand_dtype(problem: Problem) -> str:
    """Returns the dtype that weights and x are multiplied in.

    float16 has float8 numbers exactly. Tensor cores would take float8 as well, twice as fast, but add its products up
    with some 14 bits.
    """
    return {None: problem.x_dtype, "int8": "int8"}.get(problem.quantize_x, "float16")


def is_stored(problem: Problem) -> bool:
    """Returns whether codes are multiplied as they are stored, out of shared memory."""
    return problem.scheme.format == operand_dtype(problem)


def scales_last(problem: Problem) -> bool:
    """Returns whether sums over all of `in` are scaled, instead of what is added up."""
    return problem.scheme.group_size is None and problem.scheme.offset != "minimums"


def unit_of(problem: Problem, block_in: int) -> int:
    """Returns the weights along `in` whose products are scaled together."""
    return block_in if problem.scheme.group_size is None else math.gcd(problem.scheme.group_size, block_in)


def least_unit(problem: Problem) -> int:
    """Returns the weights of which `in` and groups must be multiples.

    Rows of codes and of x are read by 32 bytes, by 64 where bytes for int8 rows come from registers.
    """
    if operand_dtype(problem) != "int8":
        return SWIZZLES[-1] // 2
    return SWIZZLES[-1] if is_stored(problem) else SWIZZLES[-2]


def takes_many_rows(problem: Problem) -> bool:
    """Returns whether the tensor cores may add up all of `in`: 16 bits show nothing of how weights are scaled."""
    p = problem
    if scales_last(p):
        return operand_dtype(p) != "int8" or p.scheme.offset == "none"
    # A float16 has the range of other scales neither by itself nor in a product.
    in_range = operand_dtype(p) == "bfloat16" or (operand_dtype(p) == "float16" and p.scale_dtype == "float16")
    return p.scheme.offset != "minimums" and in_range and p.out_dtype != "float32"


def heuristic(problem: Problem) -> Config:
    """Returns the fastest block sizes by count for many rows, and those that fill the multiprocessors for a few."""
    if on_blackwell():
        return _for_tensor_memory(problem)
    return _for_many_rows(problem) or _for_few_rows(problem)


def _for_many_rows(problem: Problem) -> Config | None:
    """Returns the block sizes with the least of `_cycles`, or None where there are few rows or few channels."""
    p = problem
    if p.rows <= FEW_ROWS[-1] or p.result_features < 2 * CHANNELS or not takes_many_rows(p):
        return None
    found = []
    sizes = itertools.product(MANY_ROWS, (256, 128), (128, 64), (1, 2, 4), (1, 2))
    for block_rows, block_out, block_in, splits, multicast in sizes:
        config = Config(block_rows, block_out, block_in, splits, multicast=multicast)
        stages = (gpu_to_plan_for().program_shared_bytes - staged_bytes(p, config)) // block_bytes(p, config)
        config = dataclasses.replace(config, num_stages=max(min(stages, MOST_STAGES), 1))
        if stages >= LEAST_STAGES[FEW_ROWS[-1]] and fits(p, config) and splits <= pl.cdiv(p.in_features, block_in):
            found.append(config)
    return min(found, key=lambda config: _cycles(p, config), default=None)


def _cycles(problem: Problem, config: Config) -> float:
    """Returns the cycles that tensor cores or the L2 cache take for many rows, and those of the sum of splits."""
    p, multiprocessors = problem, gpu_to_plan_for().multiprocessors
    programs, share = config.splits * _programs(p, config), p.in_features / config.splits
    waves = pl.cdiv(programs, multiprocessors)
    products = waves * p.parts * config.block_out * config.block_rows * share / PRODUCTS[operand_dtype(p)]
    shared = config.block_rows * jnp.dtype(operand_dtype(p)).itemsize * (1 - 1 / config.multicast)
    reads = programs * share * (block_bytes(p, config) / config.block_in - shared) / (multiprocessors * L2_BYTES)
    if config.splits == 1:
        return max(products, reads)
    sums = 2 * config.splits * p.rows * p.out_features * 4 / (multiprocessors * HBM_BYTES)
    return max(products, reads) + sums + LAUNCH_CYCLES


def _for_few_rows(problem: Problem) -> Config:
    """Returns the widest blocks with which programs fill the multiprocessors evenly, two on each or more.

    Splits make the programs of 132 multiprocessors even. qkv of Llama-3-8B has 96 blocks of 64 channels: with two
    programs at a time, 264 places, 2 splits take 192 of them; with three, 4 splits take 384 of 396, and the
    multiprocessors that have most do 3 shares where the mean is 2.9. 5 or 6 splits would be 480 and 576 programs, 4 and
    5 shares where the mean is 3.6 and 4.4. output and down have 64 blocks: 4 splits take 256 of 264 places.

    XLA adds up splits until a chip has said that a cluster does it faster: by count a cluster saves a launch, but each
    of its programs waits for the slowest, and all must find places in one GPC: with 16 multiprocessors of three places
    12 clusters of 4, with 18 of them 13, where 54 places are 13.5.
    """
    p = problem
    rows = next(size for size in FEW_ROWS if size >= min(p.rows, FEW_ROWS[-1]))
    fewer = max(rows // 2, FEW_ROWS[0])  # where registers do not suffice for all rows
    found = _fitting(p, rows) or _fitting(p, fewer) or [(PROGRAMS[0], Config(fewer, block_in=BLOCKS_IN[-1]))]
    shares = [_filled(p, config, count) for count, config in found]
    best = next((place for place, share in enumerate(shares) if share >= EVEN), shares.index(max(shares)))
    return found[best][1]


def _for_tensor_memory(problem: Problem) -> Config:
    """Returns as many splits and stages as a multiprocessor has room for, with two programs where rows are few."""
    p, gpu = problem, gpu_to_plan_for()
    rows = next(size for size in TENSOR_ROWS if size >= min(p.rows, TENSOR_ROWS[-1] // p.parts))
    config = Config(rows, 2 * CHANNELS, 128 if rows <= 128 else 64, tensor_memory=True)
    count = PROGRAMS[0] if p.parts * rows <= FEW_ROWS[-1] else 1
    blocks = pl.cdiv(p.in_features, config.block_in)
    splits = max(min(count * gpu.multiprocessors // _programs(p, config), blocks // LEAST_STAGES[FEW_ROWS[0]]), 1)
    config = dataclasses.replace(config, splits=pl.cdiv(blocks, pl.cdiv(blocks, splits)))  # none of them empty
    shared = min(gpu.shared_bytes // count, gpu.program_shared_bytes) - staged_bytes(p, config)
    return dataclasses.replace(config, num_stages=max(min(shared // block_bytes(p, config), MOST_STAGES), 2))


def _fitting(problem: Problem, block_rows: int) -> list[tuple[int, Config]]:
    """Returns numbers of programs of a multiprocessor, and block sizes with which it has room for them."""
    p, gpu, least, found = problem, gpu_to_plan_for(), LEAST_STAGES[block_rows], []
    # Every program reads its rows of x: where they are many, more channels share them.
    share = block_rows >= 32 and p.parts == 1 and p.result_features >= 2 * CHANNELS
    block_outs = (2 * CHANNELS, CHANNELS) if share else (CHANNELS,)
    blocks_in = [size for size in BLOCKS_IN if size <= BLOCK_BYTES * (2 if p.scheme.packed else 1)]
    for count, block_out, block_in in itertools.product(PROGRAMS, block_outs, blocks_in):
        config = Config(block_rows, block_out, block_in)
        most = min(REGISTERS, gpu.registers // (THREADS * count) - OTHER_REGISTERS)
        stages = (gpu.shared_bytes // count - staged_bytes(p, config)) // block_bytes(p, config)
        if registers(p, config) > most or stages < least:
            continue
        blocks = pl.cdiv(p.in_features, block_in)
        splits = max(min(count * gpu.multiprocessors // _programs(p, config), blocks // least), 1)
        splits = pl.cdiv(blocks, pl.cdiv(blocks, splits))  # none of them empty
        found.append((count, dataclasses.replace(config, splits=splits, num_stages=min(stages, MOST_STAGES))))
    return found


def _programs(problem: Problem, config: Config) -> int:
    """Returns the programs of a split."""
    together = pl.cdiv(problem.result_features, config.block_out * config.multicast)
    return pl.cdiv(problem.rows, config.block_rows) * together * config.multicast


def _filled(problem: Problem, config: Config, count: int) -> float:
    """Returns the share of places for programs that are taken, `count` on each multiprocessor, until all have run."""
    programs, places = config.splits * _programs(problem, config), count * gpu_to_plan_for().multiprocessors
    return programs / (pl.cdiv(programs, places) * places)


def finishes(problem: Problem, config: Config) -> bool:
    """Returns whether the kernel itself adds the bias, activates, gates and writes the result."""
    one_launch = config.splits == 1 or config.merge == "cluster"
    return one_launch and (problem.activation is None or compiles(problem.activation))


def merges(problem: Problem, config: Config) -> bool:
    """Returns whether the kernel itself adds up splits."""
    return config.splits > 1 and finishes(problem, config)


def total_dtype(problem: Problem) -> Any:
    """Returns the dtype of a program's sums for a few rows: whole numbers stay whole if they are scaled at the end."""
    return jnp.int32 if operand_dtype(problem) == "int8" and scales_last(problem) else jnp.float32


def registers(problem: Problem, config: Config) -> int:
    """Returns the registers of a thread for sums, converted codes, and factors, twice.

    Sums are those of units and of all of `in` for a few rows, only the latter for many.
    """
    units = config.block_in // unit_of(problem, config.block_in)
    tiles = problem.parts * config.block_out // CHANNELS // config.warpgroups
    factors = 0 if problem.scheme.group_size is None else 1 + (problem.scheme.offset != "none")
    sums = config.block_rows // 2 * (tiles + (units if config.warpgroups == 1 else 0))
    converted = 0 if is_stored(problem) else config.block_in * jnp.dtype(operand_dtype(problem)).itemsize // 8
    return sums + converted + 4 * units * tiles * factors


def block_bytes(problem: Problem, config: Config) -> int:
    """Returns the shared memory of a block of codes and x."""
    codes = problem.parts * config.block_out * config.block_in // (2 if problem.scheme.packed else 1)
    return codes + config.block_rows * config.block_in * jnp.dtype(operand_dtype(problem)).itemsize


def staged_bytes(problem: Problem, config: Config) -> int:
    """Returns the shared memory of what is written, of barriers, and of what every program has."""
    result, sums = jnp.dtype(problem.out_dtype).itemsize, 4 * problem.parts
    if merges(problem, config):
        size = sums + result
    else:
        size = result if (config.warpgroups == 2 or config.tensor_memory) and finishes(problem, config) else sums
    return config.block_rows * config.block_out * size + 2048


def fits(problem: Problem, config: Config) -> bool:
    """Returns whether a program has the registers and the shared memory that block sizes take."""
    p = problem
    if config.warpgroups == 2 and not takes_many_rows(p):
        return False
    shared = config.num_stages * block_bytes(p, config) + staged_bytes(p, config)
    if config.tensor_memory:
        columns = p.parts * config.block_rows + config.block_in  # of sums, and of two places for weights of 16 bits
        return columns <= TENSOR_COLUMNS and shared <= gpu_to_plan_for().program_shared_bytes
    return shared <= gpu_to_plan_for().program_shared_bytes and registers(p, config) <= REGISTERS


def space(problem: Problem) -> Space:
    """Returns the block sizes that the tuner may try; more rows than there are only waste time."""
    p = problem
    start = heuristic(p)
    hopper = not start.tensor_memory
    blocks = pl.cdiv(p.in_features, CHANNELS)
    axes = {
        "block_rows": [start.block_rows] if p.rows <= 64 else [size for size in (64, *MANY_ROWS) if size < 2 * p.rows],
        "block_out": [size for size in (64, 128, 256) if size <= p.result_features] if hopper else [start.block_out],
        "block_in": BLOCKS_IN[::-1],
        "splits": [splits for splits in (1, 2, 3, 4, 5, 6, 8, 16) if splits <= blocks],
        "num_stages": (2, 3, 4, 6, 8),
        "overlaps": (False, True) if LAUNCHES_OVERLAP else (False,),
        "multicast": (1, 2) if hopper and p.rows > FEW_ROWS[-1] else (1,),
        "merge": MERGES if hopper else (start.merge,),
    }

    def worth_trying(config: Config) -> bool:
        return fits(p, config) and (config.merge == start.merge or merges(p, config))

    return Space(start, axes, worth_trying)
