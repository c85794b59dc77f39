"""Small GPU kernels of known size, for tests of the static analysis.

Listings of the kernel `sums` are checked in. This command writes them again, with the installed triton:

    PYTHONPATH=src:tests python -m static_gpu_kernels
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import triton as plgpu

from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.reference.platforms import target_platform

GOLDEN: Final = Path(__file__).parent / "golden"

Workload = tuple[Any, tuple[Any, ...]]
"""A function and its arguments."""

TRITON: Final = plgpu.CompilerParams()
"""Compiler parameters that make pallas_call use Triton; without them it uses another backend."""

LENGTHS: Final = (0, 1, 33, 1024)
"""Lengths of the sequences that `sums` reads, in blocks of 32 rows: 0 + 1 + 2 + 32 trips."""

BLOCK: Final = (32, 128)
BLOCK_BYTES: Final = 32 * 128 * 4


def sums(lengths: Any = LENGTHS, *, num_stages: int = 2) -> Workload:
    """Returns a kernel that sums each sequence's rows, float32 `[4, 1024, 128]`, in blocks of 32 rows."""

    def kernel(lengths_ref: Any, x_ref: Any, o_ref: Any) -> None:
        b = pl.program_id(0)
        length = lengths_ref[b]
        row = jnp.arange(BLOCK[0], dtype=jnp.int32)
        column = jnp.arange(BLOCK[1], dtype=jnp.int32)

        def step(block: Any, total: Any) -> Any:
            place = block * BLOCK[0] + row
            x = plgpu.load(x_ref.at[b, place[:, None], column[None, :]], mask=(place < length)[:, None], other=0.0)
            return total + jnp.sum(x, axis=0)

        blocks = jax.lax.div(length + BLOCK[0] - 1, jnp.int32(BLOCK[0]))
        o_ref[b, :] = jax.lax.fori_loop(0, blocks, step, jnp.zeros(BLOCK[1], jnp.float32))

    def call(lengths: Any, x: Any) -> Any:
        return pl.pallas_call(
            kernel,
            grid=(4,),
            out_shape=jax.ShapeDtypeStruct((4, BLOCK[1]), jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=num_stages),
            name="sums",
        )(lengths, x)

    known = jax.ShapeDtypeStruct((4,), jnp.int32) if lengths is None else np.asarray(lengths, np.int32)
    return call, (known, jax.ShapeDtypeStruct((4, 1024, BLOCK[1]), jnp.float32))


def sums_of_unknown_lengths() -> Workload:
    """Returns `sums` with lengths that are known only at run time."""
    return sums(None)


def decided_by_data() -> Workload:
    """Returns a kernel with a loop whose bound is computed from data."""

    def kernel(x_ref: Any, o_ref: Any) -> None:
        column = jnp.arange(128, dtype=jnp.int32)
        most = jnp.max(plgpu.load(x_ref.at[column]))
        o_ref[column] = jax.lax.fori_loop(0, most, lambda n, total: total + jnp.sin(total + n), jnp.zeros(128))

    shape = jax.ShapeDtypeStruct((128,), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, compiler_params=TRITON, name="decided_by_data")
    return call, (jax.ShapeDtypeStruct((128,), jnp.int32),)


def doubles(rows: int = 64) -> Workload:
    """Returns a kernel without a loop: it doubles float32 `[rows, 256]`, one row in each program."""

    def kernel(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = 2 * x_ref[...]

    spec = pl.BlockSpec((1, 256), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    call = pl.pallas_call(
        kernel,
        grid=(rows,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=shape,
        compiler_params=TRITON,
        name="doubles",
    )
    return call, (shape,)


def columns(width: int = 8) -> Workload:
    """Returns a kernel that sums the columns of an int32 matrix `[512, 32768]`, `width` of them in each program."""
    rows = 1024 // width

    def kernel(x_ref: Any, o_ref: Any) -> None:
        column = pl.program_id(0) * width + jnp.arange(width, dtype=jnp.int32)

        def step(block: Any, total: Any) -> Any:
            row = block * rows + jnp.arange(rows, dtype=jnp.int32)
            return total + plgpu.load(x_ref.at[row[:, None], column[None, :]])

        total = jax.lax.fori_loop(0, 512 // rows, step, jnp.zeros((rows, width), jnp.int32))
        plgpu.store(o_ref.at[column], jnp.sum(total, axis=0))

    call = pl.pallas_call(
        kernel,
        grid=(2**15 // width,),
        out_shape=jax.ShapeDtypeStruct((2**15,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=8),
        name="columns",
    )
    return call, (jax.ShapeDtypeStruct((512, 2**15), jnp.int32),)


def wide_columns() -> Workload:
    """Returns `columns` of 128 columns in each program."""
    return columns(128)


def with_bytes() -> tuple[Any, ...]:
    """Returns `doubles` and a number of bytes that it supposedly needs."""
    return *doubles(), 12345


def two_kernels() -> Workload:
    """Returns a function that calls one kernel, then another three times."""
    first, (x,) = doubles(64)
    second, _ = doubles(32)

    def call(x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, y: second(y), first(x)[:32])

    return call, (x,)


def both_backends() -> Workload:
    """Returns a function that calls `doubles`, then three times a Mosaic GPU kernel that copies by TMA."""
    rows, width = 64, 128

    def copies(x_ref: Any, o_ref: Any, block_ref: Any, barrier: Any) -> None:
        block = x_ref.at[pl.ds(jax.lax.axis_index("block") * rows, rows)]
        mosaic_gpu.copy_gmem_to_smem(block, block_ref, barrier)
        mosaic_gpu.barrier_wait(barrier)
        mosaic_gpu.copy_smem_to_gmem(block_ref, o_ref.at[pl.ds(jax.lax.axis_index("block") * rows, rows)])
        mosaic_gpu.wait_smem_to_gmem(0)

    second = mosaic_gpu.kernel(
        copies,
        out_shape=jax.ShapeDtypeStruct((2 * rows, width), jnp.float32),
        scratch_shapes=[mosaic_gpu.SMEM((rows, width), jnp.float32), mosaic_gpu.Barrier()],
        grid=(2,),
        grid_names=("block",),
        kernel_name="copies",
    )
    first, (x,) = doubles()

    def call(x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, y: second(y), first(x).reshape(2 * rows, width))

    return call, (x,)


def nested() -> Workload:
    """Returns a kernel that computes `sums` three times, in nested loops."""

    def kernel(lengths_ref: Any, x_ref: Any, o_ref: Any) -> None:
        b = pl.program_id(0)
        row = jnp.arange(BLOCK[0], dtype=jnp.int32)
        column = jnp.arange(BLOCK[1], dtype=jnp.int32)
        blocks = jax.lax.div(lengths_ref[b] + BLOCK[0] - 1, jnp.int32(BLOCK[0]))

        def inner(block: Any, total: Any) -> Any:
            x = plgpu.load(x_ref.at[b, (block * BLOCK[0] + row)[:, None], column[None, :]])
            return total * 0.5 + jnp.sum(x, axis=0)

        def outer(_: Any, total: Any) -> Any:
            return jax.lax.fori_loop(0, blocks, inner, total) * 0.25

        o_ref[b, :] = jax.lax.fori_loop(0, lengths_ref[4], outer, jnp.zeros(BLOCK[1], jnp.float32))

    shape = jax.ShapeDtypeStruct((4, BLOCK[1]), jnp.float32)
    call = pl.pallas_call(kernel, grid=(4,), out_shape=shape, compiler_params=TRITON, name="nested")
    return call, (np.asarray([*LENGTHS, 3], np.int32), jax.ShapeDtypeStruct((4, 1024, BLOCK[1]), jnp.float32))


def made_for_a_gpu() -> Workload:
    """Returns `doubles`, if it is made for a GPU."""
    assert target_platform() == "gpu"
    return doubles()


def refused() -> Workload:
    """Returns a kernel that Pallas cannot lower to Triton."""

    def kernel(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = jnp.sort(x_ref[...])

    shape = jax.ShapeDtypeStruct((128,), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, compiler_params=TRITON, name="refused"), (shape,)


def no_kernel() -> Workload:
    """Returns a function without a kernel."""
    return jnp.sin, (jax.ShapeDtypeStruct((8,), jnp.float32),)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    function, arguments = sums()
    for arch in gpu_compiler.ARCHITECTURES:
        (compiled,) = gpu_compiler.compile_for_gpu(function, *arguments, arch=arch)
        (GOLDEN / f"sums_sm_{arch}.sass").write_text(compiled.code)
        (GOLDEN / f"sums_sm_{arch}.ptx").write_text(compiled.ptx)
