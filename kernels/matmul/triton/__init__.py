"""The GPU kernel of matmul, in Triton."""

from palladion.kernels.matmul.triton.call import Config

__all__ = ["Config"]
