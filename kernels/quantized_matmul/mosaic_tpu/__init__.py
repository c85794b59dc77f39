"""The TPU kernel of quantized_matmul, in Mosaic."""

from palladion.kernels.quantized_matmul.mosaic_tpu.call import Config

__all__ = ["Config"]
