"""What keeps compiling short, in which most tests of kernels spend their time."""

from __future__ import annotations

from typing import Any, Final

from palladion.kernels.compat import known_options

OF_OTHER_SIZES: Final = frozenset(
    {
        *(f"llama-3-8b-output-{scheme}" for scheme in ("1-int8", "1-int4-g32", "16-int4-g128-zeros")),
        *(f"llama-3-8b-qkv-{scheme}" for scheme in ("1-int4-g32", "16-int4-g128-zeros")),
        *(f"smollm2-{layer}-16" for layer in ("qkv", "gate-up", "down", "head")),
    }
)
"""Cases of quantized_matmul that differ in sizes alone from others that are compiled for accelerators."""

UNOPTIMIZED: Final[dict[str, Any]] = {"xla_backend_optimization_level": 0}

QUICKLY: Final[dict[str, Any]] = UNOPTIMIZED | known_options(xla_cpu_use_fusion_emitters=False)
"""Compiler options for interpreted kernels: XLA's older way to make loops, which takes it two thirds of the time."""


def options_for(backend: str) -> dict[str, Any]:
    """Those that suit an implementation; the reference is compiled as its users have it, but for the optimization."""
    return UNOPTIMIZED if backend == "xla" else QUICKLY
