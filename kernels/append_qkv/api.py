"""Signature and contract of append_qkv, and the table of its implementations."""

from __future__ import annotations

from typing import Any, Final

import jax

from palladion.kernels.append_qkv.problem import Inputs, Problem
from palladion.kernels.append_qkv.triton import call as triton
from palladion.kernels.append_qkv.xla_rotation import RotationInXla
from palladion.kernels.backend import dispatch
from palladion.kernels.checks import as_array, as_int32, as_lengths, check
from palladion.kernels.implementation import Implementation
from palladion.kernels.types import Interpret
from palladion.reference import KVCache
from palladion.reference.append_qkv import append_qkv as reference


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Interpret) -> tuple[jax.Array, KVCache]:
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
"""Implementations of append_qkv; each takes a `Problem` and its `Inputs` and returns the queries and the new cache."""


def append_qkv(
    cache: KVCache,
    qkv: jax.Array,
    lengths: jax.Array | int,
    cosine: jax.Array,
    sine: jax.Array,
    *,
    new_tokens: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    backend: str | None = None,
    config: Any = None,
    interpret: Interpret = None,
) -> tuple[jax.Array, KVCache]:
    """Rotates queries and keys of the newest tokens, and writes keys and values; `lengths` count the new tokens.

    This is everything between a joined projection and attention: rotary positions (halves of a head paired), then
    `append_kv`, whose contract holds for the cache, `lengths`, `new_tokens` and `layer`. Every device has all heads of
    qkv, and writes those of its part of a sharded cache.

    Args:
      cache: dense or paged; see `KVCache`.
      qkv: queries, then keys, then values, `[batch, (q_len,) q_heads + 2 * kv_heads, head_dim]`; float32, bfloat16 or
        float16.
      lengths: int32 `[batch]`, tokens in the cache of each sequence, new ones included; a scalar for all sequences.
      cosine: cosines of each new token's position times the frequencies, float32 `[batch, (q_len,) rotary_dim / 2]`.
        Feature i of a head is paired with feature i + rotary_dim / 2; features from rotary_dim on stay unchanged.
      sine: sines, like cosine.
      new_tokens: int32 `[batch]`, number of real tokens among each sequence's q_len, the last ones; None means all.
      layer: int32 scalar, the layer to write if the cache's arrays have a leading `[num_layers]`.
      backend: one of `palladion.BACKENDS`; None means the backend of `using_backend`, or "auto".
      config: block sizes of the kernel that `backend` names, of its class `Config`; None chooses.
      interpret: whether the kernel is interpreted; None interprets if backend="pallas" and the platform is a CPU.

    Returns:
      The queries `[batch, (q_len,) q_heads, head_dim]`, as `decode_attention` takes them, in qkv's dtype; and the cache
      with the new tokens.

    Raises:
      ValueError: shapes, dtypes or lengths do not fit together; the message names the argument.
      Unsupported: the chosen backend does not support this call; or a kernel is differentiated, which only
        backend="xla" allows.

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
        lengths=as_lengths(lengths, qkv.shape[0]),
        cosine=cosine[:, None] if one else cosine,
        sine=sine[:, None] if one else sine,
        new_tokens=None if new_tokens is None else as_int32("new_tokens", new_tokens),
        layer=None if layer is None else as_array("layer", layer, "int32"),
    )
    problem = Problem.of(inputs)
    q, written = dispatch(
        "append_qkv", IMPLEMENTATIONS, problem, inputs, backend=backend, config=config, interpret=interpret
    )
    return (q[:, 0] if one else q), written
