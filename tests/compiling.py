"""Compiler options for what runs once or twice: a test of an interpreted kernel spends its time in compiling."""

from __future__ import annotations

from typing import Any, Final

from palladion.kernels.compat import known_options

UNOPTIMIZED: Final[dict[str, Any]] = {"xla_backend_optimization_level": 0}

QUICKLY: Final[dict[str, Any]] = UNOPTIMIZED | known_options(xla_cpu_use_fusion_emitters=False)
"""For interpreted kernels: XLA's older way to make loops, which takes it two thirds of the time."""


def options_for(backend: str) -> dict[str, Any]:
    """Those that suit an implementation; the reference is compiled as its users have it, but for the optimization."""
    return UNOPTIMIZED if backend == "xla" else QUICKLY
