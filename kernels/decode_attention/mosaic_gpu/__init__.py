"""The Hopper kernel of decode_attention, in Mosaic GPU."""

from palladion.kernels.decode_attention.mosaic_gpu.config import Config

__all__ = ["Config"]
