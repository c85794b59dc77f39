"""What the compilers say of kernels without the chip: estimates, no measurements."""

from palladion.benchmarks.static.examiner import Examiner, Row
from palladion.benchmarks.static.gpu.roofline import GpuReport, examine_for_gpu
from palladion.benchmarks.static.tpu.roofline import KernelReport, LoopReport, examine
from palladion.benchmarks.static.workloads import Reference

__all__ = ["Examiner", "GpuReport", "KernelReport", "LoopReport", "Reference", "Row", "examine", "examine_for_gpu"]
