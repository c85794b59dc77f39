"""append_kv: its signature and contract, and the table of what can run it."""

from __future__ import annotations

from typing import Any, Final

import jax

from palladion.kernels.append_kv.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.append_kv.problem import Inputs, Problem
from palladion.kernels.append_kv.triton import call as triton
from palladion.kernels.backend import Implementation, dispatch
from palladion.kernels.checks import as_array, check
from palladion.reference import append_kv as reference
from palladion.reference.caches import KVCache


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Any) -> KVCache:
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
"""Every implementation takes a `Problem` and its `Inputs`, and returns the new cache."""


def append_kv(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    backend: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> KVCache:
    """Writes the newest tokens of each sequence into its cache, quantizing them where the cache is quantized.

    Token i of q_len goes to position lengths - q_len + i: `lengths` are the tokens in the cache once this call is done,
    as for `decode_attention` after it. Prompts of different lengths are padded in front: what would go to a position
    below 0 is not written. Lengths outside of 0 to max_len are an error where their values are known; under jit, a
    token whose position, page or layer does not exist is not written, and nothing else is touched. The cache is updated
    in place where it is donated. No page may take new tokens of two sequences.

    Args:
      cache: dense or paged; see `KVCache`.
      k: new keys `[batch, kv_heads, head_dim]` or `[batch, q_len, kv_heads, head_dim]`; float32, bfloat16 or float16.
      v: new values, in shape and dtype like k.
      lengths: int32 `[batch]`, tokens in each sequence's cache, new ones included.
      new_tokens: int32 `[batch]`, how many of a sequence's q_len tokens are real, the last ones; None means all.
      layer: where the cache's arrays have a leading `[num_layers]`, which of them to write, an int32 scalar.
      backend: one of `palladion.BACKENDS`; None means what `using_backend` set, or "auto".
      config: block sizes for the kernel that is named by `backend`, one of its `Config`s; None chooses.
      interpret: whether a kernel is interpreted; None does so where backend="pallas" meets a CPU.

    Returns:
      The cache with the new tokens.

    Raises:
      ValueError: shapes, dtypes or lengths do not go together; the message says which.
      Unsupported: the chosen backend does not cover this call.

    """
    check(isinstance(cache, KVCache), "cache", type(cache).__name__, "a KVCache")
    k, v = as_array("k", k), as_array("v", v)
    check(k.ndim in (3, 4), "k", f"shape {k.shape}", "[batch, (q_len,) kv_heads, head_dim]")
    check(v.ndim == k.ndim, "v", f"shape {v.shape}", f"{k.shape}, the shape of k")
    inputs = Inputs(
        cache=cache,
        k=k[:, None] if k.ndim == 3 else k,
        v=v[:, None] if v.ndim == 3 else v,
        lengths=as_array("lengths", lengths),
        new_tokens=None if new_tokens is None else as_array("new_tokens", new_tokens),
        layer=None if layer is None else as_array("layer", layer, "int32"),
    )
    problem = Problem.of(inputs)
    result: KVCache = dispatch(
        "append_kv", IMPLEMENTATIONS, problem, inputs, backend=backend, config=config, interpret=interpret
    )
    return result
