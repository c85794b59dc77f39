"""The GPU kernel of append_kv, in Triton."""

from palladion.kernels.append_kv.triton.call import Config

__all__ = ["Config"]
