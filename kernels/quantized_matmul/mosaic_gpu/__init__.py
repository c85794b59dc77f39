"""The kernels of quantized_matmul for Hopper and Blackwell, in Mosaic GPU."""

from palladion.kernels.quantized_matmul.mosaic_gpu.block_sizes import Config

__all__ = ["Config"]
