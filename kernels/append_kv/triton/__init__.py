"""The GPU kernel of append_kv, in Triton."""

from palladion.kernels.append_kv.row_blocks import Config

__all__ = ["Config"]
