"""x @ w with a dense w, and what stands around it in a model."""

from palladion.kernels.linear import Inputs
from palladion.kernels.matmul.api import IMPLEMENTATIONS, matmul
from palladion.kernels.matmul.problem import Problem

__all__ = ["IMPLEMENTATIONS", "Inputs", "Problem", "matmul"]
