"""The GPU kernel of decode_attention, in Triton."""

from palladion.kernels.decode_attention.triton.config import Config

__all__ = ["Config"]
