"""append_qkv: its signature and contract, and the table of what can run it."""

from __future__ import annotations

from typing import Any, Final

import jax

from palladion.kernels.append_qkv.problem import Inputs, Problem
from palladion.kernels.append_qkv.triton import call as triton
from palladion.kernels.append_qkv.xla_rotation import RotationInXla
from palladion.kernels.backend import Implementation, dispatch
from palladion.kernels.checks import as_array, check
from palladion.reference import KVCache
from palladion.reference.append_qkv import append_qkv as reference


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Any) -> tuple[jax.Array, KVCache]:
    del problem, config, interpret
    return reference(**inputs._asdict())


IMPLEMENTATIONS: Final = (
    # XLA rotates: on a TPU its launches are part of one program and cost next to nothing.
    RotationInXla("mosaic_tpu").implementation(),
    Implementation(
        "triton",
        "gpu",
        triton.unsupported,
        triton.append_qkv,
        triton.Config,
        triton.heuristic,
        triton.space,
    ),
    Implementation("xla", None, lambda _: None, _reference),
)
"""Every implementation takes a `Problem` and its `Inputs`, and returns the queries and the new cache."""


def append_qkv(
    cache: KVCache,
    qkv: jax.Array,
    lengths: jax.Array,
    cosine: jax.Array,
    sine: jax.Array,
    *,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    backend: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> tuple[jax.Array, KVCache]:
    """Rotates the queries and keys of the newest tokens, and writes keys and values into each sequence's cache.

    What stands between a joined projection and attention, at once: rotary positions (the halves of a head paired) and
    `append_kv`, to whose contract the cache, `lengths`, `new_tokens` and `layer` keep.

    Args:
      cache: dense or paged; see `KVCache`.
      qkv: `[batch, (q_len,) q_heads + 2 * kv_heads, head_dim]`: queries, then keys, then values; float32, bfloat16 or
        float16.
      lengths: int32 `[batch]`, tokens in each sequence's cache, new ones included.
      cosine: float32 `[batch, (q_len,) rotary_dim / 2]`, of each new token's position times the frequencies. Feature i
        of a head is paired with feature i + rotary_dim / 2; features from rotary_dim on stay as they are.
      sine: like cosine.
      new_tokens: int32 `[batch]`, how many of a sequence's q_len tokens are real, the last ones; None means all.
      layer: where the cache's arrays have a leading `[num_layers]`, which of them to write, an int32 scalar.
      backend: one of `palladion.BACKENDS`; None means what `using_backend` set, or "auto".
      config: block sizes for the kernel that is named by `backend`, one of its `Config`s; None chooses.
      interpret: whether a kernel is interpreted; None does so where backend="pallas" meets a CPU.

    Returns:
      The queries `[batch, (q_len,) q_heads, head_dim]`, as `decode_attention` takes them, in qkv's dtype; and the cache
      with the new tokens.

    Raises:
      ValueError: shapes, dtypes or lengths do not go together; the message says which.
      Unsupported: the chosen backend does not cover this call.

    Source: RoFormer (arXiv 2104.09864).
    """
    check(isinstance(cache, KVCache), "cache", type(cache).__name__, "a KVCache")
    qkv, cosine, sine = as_array("qkv", qkv), as_array("cosine", cosine), as_array("sine", sine)
    accepted = "[batch, (q_len,) q_heads + 2 * kv_heads, head_dim]"
    check(qkv.ndim in (3, 4), "qkv", f"shape {qkv.shape}", accepted)
    for name, angles in (("cosine", cosine), ("sine", sine)):
        check(angles.ndim == qkv.ndim - 1, name, f"shape {angles.shape}", "[batch, (q_len,) rotary_dim / 2], as of qkv")
    one = qkv.ndim == 3
    inputs = Inputs(
        cache=cache,
        qkv=qkv[:, None] if one else qkv,
        lengths=as_array("lengths", lengths),
        cosine=cosine[:, None] if one else cosine,
        sine=sine[:, None] if one else sine,
        new_tokens=None if new_tokens is None else as_array("new_tokens", new_tokens),
        layer=None if layer is None else as_array("layer", layer, "int32"),
    )
    problem = Problem.of(inputs)
    q, written = dispatch(
        "append_qkv", IMPLEMENTATIONS, problem, inputs, backend=backend, config=config, interpret=interpret
    )
    return (q[:, 0] if one else q), written
