"""quantized_matmul for a few rows on Hopper: TMA brings codes, tensor cores take them out of registers.

`heuristic` takes the block sizes that were the best of a prototype on an H200, without scales, for int8 and 8 rows:

    layers of Llama-3-8B                          µs    others
    qkv       128 weights, 6 blocks, 4 splits    9.5    256 weights, 4 blocks: 10.7 (2 splits), 11.3 (4 splits)
    output    256 weights, 4 blocks, 4 splits    7.1
    gate-up   256 weights, 4 blocks, 1 split    35.6    128 weights, 6 blocks: 43.2
    down      256 weights, 4 blocks, 4 splits   17.7    2 splits: 20.0; 7 splits: 21.0; 128 weights, 6 blocks: 17.8

They have in common that programs fill the multiprocessors evenly, two or three on each; what does not fit at first runs
alone at the end. Other rows, formats and groups have not been measured.

Splits write float32 sums, which XLA adds up, together with bias, activation and gate; where there is one split, the
kernel does all of it. x is normalized in a launch of its own (`gpu_norm.py`), and XLA adds the residual.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels import gpu_norm
from palladion.kernels.checks import check, check_power_of_two
from palladion.kernels.compat import fresh_kernel, gpu_interpreter
from palladion.kernels.devices import gpu_to_plan_for, target_gpu
from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.mosaic_gpu.kernel import CHANNELS, SWIZZLES, Refs, kernel, unit_of
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.search_space import Space
from palladion.kernels.types import Interpret

THREADS: Final = 128
"""Threads of a program: a warpgroup."""

HOPPER: Final = 90
"""Compute capability whose tensor cores take the left operand out of registers, by wgmma."""

BLOCK_ROWS: Final = (8, 16, 32, 64)
"""Rows of x in a block: columns of a wgmma."""

MOST_ROWS: Final = 64
"""Rows up to which each code is converted once."""

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

TMA_ROWS: Final = 8
"""Rows that TMA reads together: channels, and rows of x beyond these, must be multiples of them."""

ELEMENTWISE: Final = frozenset(
    "add sub mul div max min neg abs exp logistic tanh rsqrt integer_pow square".split()  # noqa: SIM905
)
"""Primitives that Mosaic GPU compiles in registers, in all versions of jax."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the kernel.

    Attributes:
      block_rows: rows of x in a program: 8, 16, 32 or 64.
      block_out: output channels of a program, of gates and of ups alike: a multiple of 64, at most 256.
      block_in: weights along `in` of a block, a power of two of at least 64.
      splits: shares that `in` is cut into.
      num_stages: blocks in the ring: one is multiplied, the others are on their way.
    """

    block_rows: int
    block_out: int = CHANNELS
    block_in: int = 256
    splits: int = 1
    num_stages: int = 4

    def __post_init__(self) -> None:
        check(self.block_rows in BLOCK_ROWS, "config.block_rows", self.block_rows, ", ".join(map(str, BLOCK_ROWS)))
        multiple = self.block_out in range(CHANNELS, 256 + 1, CHANNELS)
        check(multiple, "config.block_out", self.block_out, f"a multiple of {CHANNELS}, at most 256")
        check_power_of_two("config.block_in", self.block_in, least=64)
        for name in ("splits", "num_stages"):
            check(getattr(self, name) >= 1, f"config.{name}", getattr(self, name), "at least 1")


def heuristic(problem: Problem) -> Config:
    """Returns the widest blocks with which programs fill the multiprocessors evenly, two on each or more."""
    p = problem
    rows = next(size for size in BLOCK_ROWS if size >= min(p.rows, MOST_ROWS))
    fewer = max(rows // 2, BLOCK_ROWS[0])  # where registers do not suffice for all rows
    found = _fitting(p, rows) or _fitting(p, fewer) or [(PROGRAMS[0], Config(fewer, block_in=BLOCKS_IN[-1]))]
    shares = [_filled(p, config, count) for count, config in found]
    best = next((place for place, share in enumerate(shares) if share >= EVEN), shares.index(max(shares)))
    return found[best][1]


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
    return pl.cdiv(problem.rows, config.block_rows) * pl.cdiv(problem.result_features, config.block_out)


def _filled(problem: Problem, config: Config, count: int) -> float:
    """Returns the share of places for programs that are taken, `count` on each multiprocessor, until all have run."""
    programs, places = config.splits * _programs(problem, config), count * gpu_to_plan_for().multiprocessors
    return programs / (pl.cdiv(programs, places) * places)


def registers(problem: Problem, config: Config) -> int:
    """Returns the registers of a thread for sums of units and of all of `in`, converted codes, and factors, twice."""
    units = config.block_in // unit_of(problem, config.block_in)
    tiles = problem.parts * config.block_out // CHANNELS
    factors = 0 if problem.scheme.group_size is None else 1 + (problem.scheme.offset != "none")
    return config.block_rows // 2 * (units + tiles) + config.block_in // 4 + 4 * units * tiles * factors


def block_bytes(problem: Problem, config: Config) -> int:
    """Returns the shared memory of a block of codes and x."""
    codes = problem.parts * config.block_out * config.block_in // (2 if problem.scheme.packed else 1)
    return codes + config.block_rows * config.block_in * 2


def staged_bytes(problem: Problem, config: Config) -> int:
    """Returns the shared memory of what is written, of barriers, and of what every program has."""
    return problem.parts * config.block_rows * config.block_out * 4 + 2048


def space(problem: Problem) -> Space:
    """Returns the block sizes that the tuner may try; more rows than there are only waste time."""
    p, most = problem, gpu_to_plan_for().program_shared_bytes
    blocks = pl.cdiv(p.in_features, CHANNELS)
    axes = {
        "block_out": [size for size in (64, 128, 256) if size <= p.result_features],
        "block_in": BLOCKS_IN[::-1],
        "splits": [splits for splits in (1, 2, 3, 4, 6, 8, 16) if splits <= blocks],
        "num_stages": (2, 3, 4, 6, 8),
    }

    def fits(config: Config) -> bool:
        shared = config.num_stages * block_bytes(p, config) + staged_bytes(p, config)
        return shared <= most and registers(p, config) <= REGISTERS

    return Space(heuristic(p), axes, fits)


def unsupported(problem: Problem) -> str | None:
    """Returns why this backend cannot run the problem, or None."""
    p, gpu = problem, target_gpu()
    if gpu is not None and gpu.compute_capability != HOPPER:
        return f"needs wgmma, which sm_{HOPPER} has, got sm_{gpu.compute_capability}"
    if (reason := p.order_unsupported("out_in")) is not None:
        return reason
    if p.quantize_x is not None or p.x_dtype == "float32":
        return f"x must be bfloat16 or float16, not quantized, got {p.quantize_x or p.x_dtype}"
    if p.scheme.format == "mxfp4":
        return "codes must be int8, int4 or float8, got mxfp4"
    if p.scale_dtype not in ("float32", "bfloat16", "float16"):
        return f"scales must be float32, bfloat16 or float16, got {p.scale_dtype}"
    if p.rows > MOST_ROWS and not p.batch_invariant:
        return f"x must have up to {MOST_ROWS} rows unless batch_invariant, got {p.rows}"
    if p.result_features < CHANNELS or p.result_features % TMA_ROWS:
        return f"channels of the result must be a multiple of {TMA_ROWS}, at least {CHANNELS}, got {p.result_features}"
    unit = SWIZZLES[-1] * (2 if p.scheme.packed else 1)
    if p.in_features % unit:
        return f"in must be a multiple of {unit}, got {p.in_features}: rows of codes are read by {SWIZZLES[-1]} bytes"
    return None


def quantized_matmul(problem: Problem, inputs: Inputs, *, config: Config | None, interpret: Interpret) -> jax.Array:
    """Runs the kernel; see `palladion.quantized_matmul` for the contract. Returns `[rows, result_features]`."""
    check(config is None or isinstance(config, Config), "config", config, "mosaic_gpu.Config or None")
    config = config or heuristic(problem.planned())
    residual = inputs.residual
    p, inputs = problem.plain(inputs, functools.partial(gpu_norm.rms_norm, interpret=bool(interpret)))
    check(config.block_out <= p.result_features, "config.block_out", config.block_out, f"up to {p.result_features}")
    if p.rows > TMA_ROWS and p.rows % TMA_ROWS:
        inputs = inputs._replace(x=jnp.pad(inputs.x, ((0, -p.rows % TMA_ROWS), (0, 0))))
    whole, rows = finishes(p, config), p.rows
    row_blocks = pl.cdiv(rows, config.block_rows)
    if interpret:
        rows = row_blocks * config.block_rows  # the interpreter writes nothing of a block that reaches over the end
    if whole:
        result = jax.ShapeDtypeStruct((rows, p.result_features), p.out_dtype)
    else:
        result = jax.ShapeDtypeStruct((config.splits, p.parts, rows, p.result_features), jnp.float32)
    staged = plgpu.SMEM((1 if whole else p.parts, config.block_rows, config.block_out), result.dtype)
    out = plgpu.kernel(
        fresh_kernel(kernel, problem=p, config=config, whole=whole, interpret=bool(interpret)),
        out_type=result,
        scratch_types=[staged],
        grid=(pl.cdiv(p.result_features, config.block_out), config.splits, row_blocks),
        grid_names=("out", "split", "row"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=gpu_interpreter(interpret or False),
        kernel_name=_name(p, config),
    )(_refs(inputs, with_bias=whole))
    if whole:
        return p.add(residual, out[: p.rows])
    products = [jnp.sum(out[:, part, : p.rows], axis=0) for part in range(p.parts)]
    if inputs.bias is not None:
        biases = jnp.split(inputs.bias.astype(jnp.float32)[None], p.parts, axis=1)
        products = [product + bias for product, bias in zip(products, biases, strict=True)]
    return p.add(residual, p.finish(products))


def _refs(inputs: Inputs, with_bias: bool) -> Refs:
    """Returns the inputs as the kernel takes them, the parts of the weight `[num_layers, out, ...]`."""
    w, layer = inputs.w, inputs.layer
    stacked = w if layer is not None else jax.tree.map(lambda part: part[None], w)
    return Refs(
        layer=None if layer is None else layer[None],
        x=inputs.x,
        codes=stacked.values,
        scales=stacked.scales,
        zeros=stacked.zeros,
        minimums=stacked.minimums,
        bias=inputs.bias if with_bias else None,
    )


def finishes(problem: Problem, config: Config) -> bool:
    """Returns whether the kernel itself adds the bias, activates, gates and writes the result."""
    return config.splits == 1 and (problem.activation is None or _compiles(problem.activation))


def _compiles(activation: Callable[[jax.Array], jax.Array]) -> bool:
    """Whether Mosaic GPU compiles all operations of a function, so far as is known."""

    def primitives(jaxpr: Any) -> set[str]:
        inner = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name == "jit"]
        return set().union({eqn.primitive.name for eqn in jaxpr.eqns} - {"jit"}, *map(primitives, inner))

    traced = jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((CHANNELS, 8), jnp.float32))
    return not traced.consts and primitives(traced.jaxpr) <= ELEMENTWISE


def _name(problem: Problem, config: Config) -> str:
    blocks = f"r{config.block_rows}_o{config.block_out}_i{config.block_in}_s{config.splits}"
    return f"quantized_matmul_{problem.scheme}_{blocks}".replace("-", "_")
