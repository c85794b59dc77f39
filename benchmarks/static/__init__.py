"""What the compilers say of kernels without the chip: estimates, no measurements."""

from palladion.benchmarks.static.examiner import Examination, Examiner
from palladion.benchmarks.static.gpu.roofline import GpuReport, examine_for_gpu
from palladion.benchmarks.static.tpu.roofline import KernelReport, LoopReport, examine
from palladion.benchmarks.static.workloads import WorkloadName

__all__ = [
    "Examination",
    "Examiner",
    "GpuReport",
    "KernelReport",
    "LoopReport",
    "WorkloadName",
    "examine",
    "examine_for_gpu",
]
