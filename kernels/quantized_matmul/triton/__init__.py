"""The GPU kernel of quantized_matmul, in Triton."""

from palladion.kernels.quantized_matmul.triton.config import Config

__all__ = ["Config"]
