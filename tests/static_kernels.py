"""Small TPU kernels of known size, for tests of the static analysis.

Listings of the kernel `ring` are checked in. This command writes them again, with the installed libtpu:

    PYTHONPATH=src:tests python -m static_kernels
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.devices import tpu_chips

GOLDEN: Final = Path(__file__).parent / "golden"

Workload = tuple[Any, tuple[Any, ...]]
"""A function and its arguments."""

LENGTHS: Final = (0, 1, 129, 1024)
"""Lengths of the sequences that `ring` reads, 128 rows at a time: 0 + 1 + 2 + 8 transfers."""

TABLE_SUM: Final = 14
"""Sum of the table that `table` reads."""


def blocks(rows: int = 1024, block: int = 128, *, work: int = 1, semantics: str = "arbitrary") -> Workload:
    """Returns a kernel that applies tanh `work` times to `[rows, 256]`, in blocks of rows."""

    def kernel(x_ref: Any, o_ref: Any) -> None:
        x = x_ref[...]
        for _ in range(work):
            x = jnp.tanh(x)
        o_ref[...] = x

    spec = pl.BlockSpec((block, 256), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    call = pl.pallas_call(
        kernel,
        grid=(rows // block,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        name="blocks",
    )
    return call, (shape,)


def ring(lengths: Any = LENGTHS) -> Workload:
    """Returns a kernel that takes the maximum of each sequence's rows and copies them itself, 128 at a time."""
    batch, rows, width = 4, 1024, 256

    def kernel(lengths_ref: Any, x_ref: Any, o_ref: Any, buffers: Any, arrived: Any) -> None:
        b = pl.program_id(0)
        units = (lengths_ref[b] + 127) // 128

        def copy(unit: Any) -> Any:
            source = x_ref.at[b, pl.ds(unit * 128, 128)]
            return pltpu.make_async_copy(source, buffers.at[unit & 1], arrived.at[unit & 1])

        o_ref[...] = jnp.full(o_ref.shape, -jnp.inf)
        pl.when(units > 0)(lambda: copy(0).start())

        def step(unit: Any, carry: int) -> int:
            pl.when(unit + 1 < units)(lambda: copy(unit + 1).start())
            copy(unit).wait()
            o_ref[0] = jnp.maximum(o_ref[0], jnp.max(buffers[unit & 1], axis=0, keepdims=True))
            return carry

        jax.lax.fori_loop(0, units, step, 0)

    def call(lengths: Any, x: Any) -> jax.Array:
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch,),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                out_specs=pl.BlockSpec((1, 1, width), lambda b, _: (b, 0, 0)),
                scratch_shapes=[pltpu.VMEM((2, 128, width), jnp.float32), pltpu.SemaphoreType.DMA((2,))],
            ),
            out_shape=jax.ShapeDtypeStruct((batch, 1, width), jnp.float32),
            name="ring",
        )(lengths, x)

    given = jax.ShapeDtypeStruct((batch,), jnp.int32) if lengths is None else np.asarray(lengths, np.int32)
    return call, (given, jax.ShapeDtypeStruct((batch, rows, width), jnp.float32))


ring_of_unknown_lengths = functools.partial(ring, None)


def ring_of_wide_lengths() -> Workload:
    """Returns `ring` with lengths in int64, NumPy's default for Python numbers."""
    call, (lengths, x) = ring()
    return call, (lengths.astype(np.int64), x)


def table() -> Workload:
    """Returns a kernel that applies tanh as often as the sum of a table's row says: `TABLE_SUM` times in all."""
    given = np.zeros((10, 300), np.int32)
    given[3, 299], given[9, 130], given[0, 1] = 5, 7, 2

    def kernel(table_ref: Any, x_ref: Any, o_ref: Any) -> None:
        i = pl.program_id(0)
        total = jax.lax.fori_loop(0, given.shape[1], lambda j, sum_: sum_ + table_ref[i, j], 0)
        o_ref[...] = x_ref[...]

        def step(_: Any, carry: int) -> int:
            o_ref[...] = jnp.tanh(o_ref[...])
            return carry

        jax.lax.fori_loop(0, total, step, 0)

    def call(table: Any, x: Any) -> jax.Array:
        spec = pl.BlockSpec((8, 128), lambda i, _: (i, 0))
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(10,), in_specs=[spec], out_specs=spec),
            out_shape=jax.ShapeDtypeStruct((80, 128), jnp.float32),
            name="table",
        )(table, x)

    assert given.sum() == TABLE_SUM
    return call, (given, jax.ShapeDtypeStruct((80, 128), jnp.float32))


more_work = functools.partial(blocks, work=32)
twice_more_work = functools.partial(blocks, work=64)
large_blocks = functools.partial(blocks, 8192, 1024)
small_blocks = functools.partial(blocks, 8192, 16)
one_core = functools.partial(blocks, 8192)
two_cores = functools.partial(blocks, 8192, semantics="parallel")
odd_grid = functools.partial(blocks, 7 * 128, semantics="parallel")
compute_bound = functools.partial(blocks, 8192, 512, work=64)


def odd_grid_of_two() -> Workload:
    """Returns a kernel that computes tanh over a grid of 3 x 3, both axes parallel."""

    def kernel(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = jnp.tanh(x_ref[...])

    spec = pl.BlockSpec((8, 128), lambda i, j: (i, j))
    shape = jax.ShapeDtypeStruct((24, 384), jnp.float32)
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"))
    call = pl.pallas_call(
        kernel, grid=(3, 3), in_specs=[spec], out_specs=spec, out_shape=shape, compiler_params=parallel, name="tanh"
    )
    return call, (shape,)


def revisits() -> Workload:
    """Returns a kernel that accumulates a table and sums of the rows of x `[40, 128]`.

    A block of 16 rows of x stays for two steps, the table for all steps.
    """

    def kernel(x_ref: Any, table_ref: Any, o_ref: Any) -> None:
        total = jnp.sum(x_ref[...], axis=0, keepdims=True)
        first = (pl.program_id(1) == 0) & (pl.program_id(2) == 0)
        o_ref[...] = jnp.where(first, 0.0, o_ref[...]) + total + table_ref[...]

    call = pl.pallas_call(
        kernel,
        grid=(2, 3, 2),
        in_specs=[
            pl.BlockSpec((16, 128), lambda _, row, __: (row, 0)),
            pl.BlockSpec((8, 128), lambda *_: (0, 0)),
        ],
        out_specs=pl.BlockSpec((8, 128), lambda column, *_: (column, 0)),
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name="revisits",
    )
    return call, (jax.ShapeDtypeStruct((40, 128), jnp.float32), jax.ShapeDtypeStruct((8, 128), jnp.float32))


def decided_by_data() -> Workload:
    """Returns a kernel that applies tanh as often as its largest element says, which is known only at run time."""

    def kernel(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...]
        rounds = jnp.max(x_ref[...]).astype(jnp.int32)

        def step(_: Any, carry: int) -> int:
            o_ref[...] = jnp.tanh(o_ref[...])
            return carry

        jax.lax.fori_loop(0, rounds, step, 0)

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, name="decided_by_data"), (shape,)


def with_bytes() -> tuple[Any, tuple[Any, ...], int]:
    """Returns `ring` and a number of bytes that it supposedly needs."""
    return *ring(), 12345


def refused() -> Workload:
    """Returns a kernel that the compiler refuses."""

    def kernel(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = jax.lax.sort(x_ref[...])

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape), (shape,)


def no_kernel() -> tuple[Any, Any]:
    """Returns a function without a kernel."""
    return jnp.sin, jax.ShapeDtypeStruct((8, 128), jnp.float32)


def crashes() -> Workload:
    """Returns a function that aborts its process while it is compiled, as compilers may."""

    def function(_: Any) -> None:
        print("F0101 Check failed: this and that", flush=True)
        os.abort()

    return function, (jax.ShapeDtypeStruct((8, 128), jnp.float32),)


def nonsense() -> int:
    """Returns something that is not a workload."""
    return 5


def two_kernels() -> Workload:
    """Returns a function with two kernels, one of them called three times in a loop, as in a user's file."""
    small, (shape,) = blocks(256, 64)
    large, _ = blocks(256, 128)
    return lambda x: jax.lax.fori_loop(0, 3, lambda _, x: small(x), large(x) + 1), (shape,)


def two_kernels_with_bytes() -> tuple[Any, tuple[Any, ...], int]:
    """Returns two kernels and one number of bytes, which cannot be attributed to either."""
    return *two_kernels(), 5


def _write() -> None:
    tpu_compiler.keep_listings()
    GOLDEN.mkdir(exist_ok=True)
    for chip in tpu_chips():
        function, arguments = ring()
        _, (listing,) = tpu_compiler.list_kernels(function, *arguments, chip=chip)
        (GOLDEN / f"ring_{chip}_bundles.txt").write_text(listing.bundles)
        (GOLDEN / f"ring_{chip}_utilization.txt").write_text(listing.utilization)
        if chip == "v6e":
            data = listing.vmem_report.partition("const DATA =")[2].lstrip()
            _, end = json.JSONDecoder().raw_decode(data)
            (GOLDEN / f"ring_{chip}_vmem_report.html").write_text(f"<script>\nconst DATA ={data[:end]};\n</script>\n")


if __name__ == "__main__":
    _write()
