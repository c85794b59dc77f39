"""The TPU kernel of decode_attention, in Mosaic."""

from palladion.kernels.decode_attention.mosaic_tpu.call import Config

__all__ = ["Config"]
