"""The GPU kernel of decode_attention, in Triton."""

from palladion.kernels.decode_attention.triton.call import Config

__all__ = ["Config"]
