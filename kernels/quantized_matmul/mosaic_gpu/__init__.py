"""The Hopper kernel of quantized_matmul, in Mosaic GPU."""

from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import Config

__all__ = ["Config"]
