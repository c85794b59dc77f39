"""Static examination: what the real compilers say of kernels, without a chip; estimates, no measurements."""

from palladion.benchmarks.static.examiner import Examination, Examiner
from palladion.benchmarks.static.gpu.report import GpuReport
from palladion.benchmarks.static.gpu.roofline import examine_for_gpu
from palladion.benchmarks.static.tpu.report import KernelReport, LoopReport
from palladion.benchmarks.static.tpu.roofline import examine
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
