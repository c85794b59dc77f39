"""Compiler options and case lists that keep compiling short: tests of kernels spend most of their time there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Final

import jax

from palladion.benchmarks.static.gpu.compiler import CompiledKernel
from palladion.benchmarks.static.gpu.sass import Instruction, by_loop, parse

SAME_BUT_FOR_SIZES: Final = frozenset(
    {
        *(f"llama-3-8b-output-{scheme}" for scheme in ("1-int8", "1-int4-g32", "16-int4-g128-zeros")),
        *(f"llama-3-8b-qkv-{scheme}" for scheme in ("1-int4-g32", "16-int4-g128-zeros")),
        *(f"smollm2-{layer}-16" for layer in ("qkv", "gate-up", "down", "head")),
    }
)
"""Cases of quantized_matmul that are not compiled for accelerators: they differ only in sizes from cases that are."""


def known_options(**options: Any) -> dict[str, Any]:
    """Returns the compiler options that the installed XLA accepts.

    `jax.jit` raises an error for an option that XLA does not know and for a value that it does not accept, and XLA
    renames and drops options between versions. Each option is therefore tried once on an empty program.
    """
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        # The caller may be tracing for a device that is absent; this program is compiled for a device that is present.
        with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True


@contextlib.contextmanager
def unoptimized() -> Iterator[None]:
    """Compiles everything in a `with` block without the optimizations of LLVM, for programs that run for a moment.

    XLA's own passes, fusion and the assignment of buffers among them, stay as they are.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


UNOPTIMIZED: Final[dict[str, Any]] = {"xla_backend_optimization_level": 0}

QUICKLY: Final[dict[str, Any]] = UNOPTIMIZED | known_options(xla_cpu_use_fusion_emitters=False)
"""Compiler options for interpreted kernels: XLA's older loop emitter compiles them in two thirds of the time."""


def options_for(backend: str) -> dict[str, Any]:
    """Returns the compiler options for a backend; the reference has its users' options, except for optimization."""
    return UNOPTIMIZED if backend == "xla" else QUICKLY


def hot_loop(kernel: CompiledKernel) -> list[Instruction]:
    """Returns the instructions of a GPU kernel's longest loop."""
    return max((list(instructions) for loop, instructions in by_loop(parse(kernel.code)) if loop), key=len)
