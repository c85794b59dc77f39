"""The TPU kernel of matmul."""

from palladion.kernels.matmul.mosaic_tpu.call import Config

__all__ = ["Config"]
