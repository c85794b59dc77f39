"""What the compilers say of kernels without the chip: estimates, no measurements."""

from palladion.benchmarks.static.roofline import KernelReport, LoopReport, examine

__all__ = ["KernelReport", "LoopReport", "examine"]
