"""Attention of the newest tokens over a dense or paged KV cache."""

from palladion.kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention
from palladion.kernels.decode_attention.problem import Inputs, Problem

__all__ = ["IMPLEMENTATIONS", "Inputs", "Problem", "decode_attention"]
