"""append_kv: writes new tokens into a KV cache, in place if the cache is donated."""

from palladion.kernels.append_kv.api import IMPLEMENTATIONS, append_kv
from palladion.kernels.append_kv.problem import Inputs, Problem

__all__ = ["IMPLEMENTATIONS", "Inputs", "Problem", "append_kv"]
