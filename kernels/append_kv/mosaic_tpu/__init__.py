"""The TPU kernel of append_kv, in Mosaic."""

from palladion.kernels.append_kv.mosaic_tpu.call import Config

__all__ = ["Config"]
