"""append_qkv: rotates the queries and keys of a joined projection and writes keys and values into a KV cache."""

from palladion.kernels.append_qkv.api import IMPLEMENTATIONS, append_qkv
from palladion.kernels.append_qkv.problem import Inputs, Problem

__all__ = ["IMPLEMENTATIONS", "Inputs", "Problem", "append_qkv"]
