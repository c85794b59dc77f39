"""Multiplies activations by a quantized weight, with the scales applied inside the kernel."""

from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.api import IMPLEMENTATIONS, quantized_matmul
from palladion.kernels.quantized_matmul.problem import Problem

__all__ = ["IMPLEMENTATIONS", "Inputs", "Problem", "quantized_matmul"]
