"""Compiler options and case lists that keep compiling short: tests of kernels spend most of their time there."""

from __future__ import annotations

from typing import Any, Final

from palladion.kernels.compat import known_options

SAME_BUT_FOR_SIZES: Final = frozenset(
    {
        *(f"llama-3-8b-output-{scheme}" for scheme in ("1-int8", "1-int4-g32", "16-int4-g128-zeros")),
        *(f"llama-3-8b-qkv-{scheme}" for scheme in ("1-int4-g32", "16-int4-g128-zeros")),
        *(f"smollm2-{layer}-16" for layer in ("qkv", "gate-up", "down", "head")),
    }
)
"""Cases of quantized_matmul that are not compiled for accelerators: they differ only in sizes from cases that are."""

UNOPTIMIZED: Final[dict[str, Any]] = {"xla_backend_optimization_level": 0}

QUICKLY: Final[dict[str, Any]] = UNOPTIMIZED | known_options(xla_cpu_use_fusion_emitters=False)
"""Compiler options for interpreted kernels: XLA's older loop emitter compiles them in two thirds of the time."""


def options_for(backend: str) -> dict[str, Any]:
    """Returns the compiler options for a backend; the reference has its users' options, except for optimization."""
    return UNOPTIMIZED if backend == "xla" else QUICKLY
