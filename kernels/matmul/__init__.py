"""x @ w for a dense weight, with the norm, bias, activation and residual around it."""

from palladion.kernels.linear import Inputs
from palladion.kernels.matmul.api import IMPLEMENTATIONS, XlaProduct, matmul
from palladion.kernels.matmul.problem import Problem

__all__ = ["IMPLEMENTATIONS", "Inputs", "Problem", "XlaProduct", "matmul"]
