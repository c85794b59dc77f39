"""Signature and contract of append_kv, and the table of its implementations."""

from __future__ import annotations

from typing import Any, Final

import jax

from palladion.kernels.append_kv.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.append_kv.problem import Inputs, Problem
from palladion.kernels.append_kv.triton import call as triton
from palladion.kernels.backend import dispatch
from palladion.kernels.checks import as_array, as_int32, as_lengths, check
from palladion.kernels.implementation import Implementation
from palladion.kernels.types import Interpret
from palladion.reference import append_kv as reference
from palladion.reference.caches import KVCache


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Interpret) -> KVCache:
    del problem, config, interpret
    return reference(**inputs._asdict())


IMPLEMENTATIONS: Final = (
    Implementation(
        "mosaic_tpu",
        "tpu",
        mosaic_tpu.unsupported,
        mosaic_tpu.append_kv,
        mosaic_tpu.Config,
        mosaic_tpu.heuristic,
        mosaic_tpu.space,
    ),
    Implementation(
        "triton",
        "gpu",
        triton.unsupported,
        triton.append_kv,
        triton.Config,
        triton.heuristic,
        triton.space,
    ),
    Implementation("xla", None, lambda _: None, _reference),
)
"""Implementations of append_kv; each takes a `Problem` and its `Inputs` and returns the new cache."""


def append_kv(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | int,
    *,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    backend: str | None = None,
    config: Any = None,
    interpret: Interpret = None,
) -> KVCache:
    """Writes the newest tokens of each sequence into its cache; `lengths` count the new tokens.

    Token i of q_len goes to position lengths - q_len + i: a sequence with 10 cached tokens and a new one has length 11,
    here and in the call of `decode_attention` that follows. Prompts of different lengths are padded in front: tokens
    at positions below 0 are not written. Lengths outside 0 to max_len, and lengths with which nothing would be written,
    are an error if their values are known; under jit, a token whose position, page or layer does not exist is not
    written, and nothing else changes. A quantized cache takes its tokens quantized. The cache is updated in place if it
    is donated. A page may take new tokens of one sequence only.

    Sharded caches: every device writes what belongs into its part, without communication: of a dense cache that is
    sharded along batch, kv_heads or max_len, of a paged one along num_pages or kv_heads.

    Args:
      cache: dense or paged; see `KVCache`.
      k: new keys, `[batch, kv_heads, head_dim]` or `[batch, q_len, kv_heads, head_dim]`; float32, bfloat16 or float16.
      v: new values, with the shape and dtype of k.
      lengths: int32 `[batch]`, tokens in the cache of each sequence, new ones included; a scalar for all sequences.
      new_tokens: int32 `[batch]`, number of real tokens among each sequence's q_len, the last ones; None means all.
      layer: int32 scalar, the layer to write if the cache's arrays have a leading `[num_layers]`.
      backend: one of `palladion.BACKENDS`; None means the backend of `using_backend`, or "auto".
      config: block sizes of the kernel that `backend` names, of its class `Config`; None chooses.
      interpret: whether the kernel is interpreted; None interprets if backend="pallas" and the platform is a CPU.

    Returns:
      The cache with the new tokens.

    Raises:
      ValueError: shapes, dtypes or lengths do not fit together; the message names the argument.
      Unsupported: the chosen backend does not support this call; or a kernel is differentiated, which only
        backend="xla" allows.

    """
    check(isinstance(cache, KVCache), "cache", type(cache).__name__, "a KVCache")
    k, v = as_array("k", k), as_array("v", v)
    check(k.ndim in (3, 4), "k", f"shape {k.shape}", "[batch, (q_len,) kv_heads, head_dim]")
    check(v.ndim == k.ndim, "v", f"shape {v.shape}", f"{k.shape}, the shape of k")
    inputs = Inputs(
        cache=cache,
        k=k[:, None] if k.ndim == 3 else k,
        v=v[:, None] if v.ndim == 3 else v,
        lengths=as_lengths(lengths, k.shape[0]),
        new_tokens=None if new_tokens is None else as_int32("new_tokens", new_tokens),
        layer=None if layer is None else as_array("layer", layer, "int32"),
    )
    problem = Problem.of(inputs)
    result: KVCache = dispatch(
        "append_kv", IMPLEMENTATIONS, problem, inputs, backend=backend, config=config, interpret=interpret
    )
    return result
