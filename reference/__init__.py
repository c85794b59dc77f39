"""The references: what every operation means, in plain jax.numpy and lax, without Pallas.

An operation is a file that defines it, or a folder: `definition.py` reads as the formula, the files beside it compute
the same faster on some platform, and `__init__.py` chooses between them. `oracle.py` states the formulas a second time
in float64 NumPy, so that a mistake in a reference shows. `compare.py` has the rule by which a result counts as right.
"""

from palladion.reference.append_kv import append_kv
from palladion.reference.append_qkv import append_qkv
from palladion.reference.caches import KVCache, quantize_kv
from palladion.reference.decode_attention import decode_attention, merge_partials
from palladion.reference.quantization import QuantizedArray, dequantize
from palladion.reference.quantized_matmul import matmul, quantized_matmul
from palladion.reference.quantized_trees import QuantizationReport, quantize_tree
from palladion.reference.quantizers import quantize
from palladion.reference.rms_norm import rms_norm
from palladion.reference.rotary import rotate
from palladion.reference.saving import load_tree, save_tree
from palladion.reference.scheme import Scheme
from palladion.reference.transposed import TransposedWeight

__all__ = [
    "KVCache",
    "QuantizationReport",
    "QuantizedArray",
    "Scheme",
    "TransposedWeight",
    "append_kv",
    "append_qkv",
    "decode_attention",
    "dequantize",
    "load_tree",
    "matmul",
    "merge_partials",
    "quantize",
    "quantize_kv",
    "quantize_tree",
    "quantized_matmul",
    "rms_norm",
    "rotate",
    "save_tree",
]
