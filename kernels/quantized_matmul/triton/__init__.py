"""The GPU kernel of quantized_matmul, in Triton."""

from palladion.kernels.quantized_matmul.triton.call import Config

__all__ = ["Config"]
