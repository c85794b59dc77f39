"""Palladion: Pallas kernels for LLM decoding, their pure-XLA references, and a minimal LLM that runs on either.

Operations, each with `backend=`:
  decode_attention    attention of the newest tokens over a dense or paged KV cache
  append_kv           writes new tokens into a KV cache, in place
  append_qkv          splits a joined projection, rotates queries and keys, and appends keys and values
  quantized_matmul    x @ w with w in 8 or 4 bits, scales applied inside the kernel
  matmul              x @ w with a dense w
  merge_partials      one result from attention over parts of a cache
  dot_product_attention
                      `jax.nn.dot_product_attention` in a decode loop, computed by decode_attention

Data:
  KVCache             a dense or paged cache, plain or quantized; `quantize_kv` makes codes and scales for one
  QuantizedArray      a weight matrix in 8 or 4 bits; `quantize` makes it, `dequantize` undoes it, a `Scheme` names its format
  quantize_tree       quantizes the matrices of a model; its `QuantizationReport` says what became of each array
  save_tree           saves nested dicts of arrays and QuantizedArrays as safetensors; `load_tree` loads them
  TransposedWeight    a QuantizedArray for code that computes w @ x: `w.T`

Choice of the implementation: `BACKENDS`, `using_backend`, `record_choices` (a `Choice` for each call), `tracing_for`,
`Unsupported`.
The model is in `palladion.model`, the benchmarks are in `palladion.benchmarks`; the command `palladion` runs both.
"""

from palladion.frameworks.attention import dot_product_attention
from palladion.kernels.append_kv import append_kv
from palladion.kernels.append_qkv import append_qkv
from palladion.kernels.backend import BACKENDS, Choice, record_choices, using_backend
from palladion.kernels.decode_attention import decode_attention
from palladion.kernels.devices import tracing_for
from palladion.kernels.implementation import Unsupported
from palladion.kernels.matmul import matmul
from palladion.kernels.quantized_matmul import quantized_matmul
from palladion.reference import (
    KVCache,
    QuantizationReport,
    QuantizedArray,
    Scheme,
    TransposedWeight,
    dequantize,
    load_tree,
    merge_partials,
    quantize,
    quantize_kv,
    quantize_tree,
    save_tree,
)

__all__ = [
    "BACKENDS",
    "Choice",
    "KVCache",
    "QuantizationReport",
    "QuantizedArray",
    "Scheme",
    "TransposedWeight",
    "Unsupported",
    "append_kv",
    "append_qkv",
    "decode_attention",
    "dequantize",
    "dot_product_attention",
    "load_tree",
    "matmul",
    "merge_partials",
    "quantize",
    "quantize_kv",
    "quantize_tree",
    "quantized_matmul",
    "record_choices",
    "save_tree",
    "tracing_for",
    "using_backend",
]

__version__ = "0.1.0"
