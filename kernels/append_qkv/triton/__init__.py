"""The GPU kernel of append_qkv, in Triton."""

from palladion.kernels.append_qkv.triton.call import Config

__all__ = ["Config"]
