"""The signature and contract of decode_attention, and the table of its implementations.

Sources: Attention Is All You Need (arXiv 1706.03762); online softmax (arXiv 1805.02867); soft-capping as in Gemma 2
(arXiv 2408.00118); sinks as in gpt-oss (arXiv 2508.10925).
"""

from __future__ import annotations

from typing import Any, Final, Literal, overload

import jax

from palladion.kernels.backend import dispatch
from palladion.kernels.checks import as_array, as_int32, as_lengths, check
from palladion.kernels.decode_attention.mosaic_gpu import call as mosaic_gpu
from palladion.kernels.decode_attention.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.decode_attention.triton import call as triton
from palladion.kernels.implementation import Implementation
from palladion.kernels.types import Interpret
from palladion.reference import decode_attention as reference


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Interpret) -> tuple[jax.Array, jax.Array]:
    """Runs the reference as an implementation, which has no block sizes and is never interpreted."""
    del config, interpret
    return reference(
        **inputs._asdict(),
        scale=problem.scale,
        sliding_window=problem.sliding_window,
        logits_soft_cap=problem.logits_soft_cap,
        batch_invariant=problem.batch_invariant,
    )


IMPLEMENTATIONS: Final = (
    Implementation(
        "mosaic_tpu",
        "tpu",
        mosaic_tpu.unsupported,
        mosaic_tpu.decode_attention,
        mosaic_tpu.Config,
        mosaic_tpu.heuristic,
        mosaic_tpu.space,
    ),
    Implementation(
        "triton",
        "gpu",
        triton.unsupported,
        triton.decode_attention,
        triton.Config,
        triton.heuristic,
        triton.space,
    ),
    Implementation(
        "mosaic_gpu",
        "gpu",
        mosaic_gpu.unsupported,
        mosaic_gpu.decode_attention,
        mosaic_gpu.Config,
        mosaic_gpu.heuristic,
        mosaic_gpu.space,
        mosaic_gpu.preferred,
    ),
    Implementation("xla", None, lambda _: None, _reference),
)
"""Every implementation takes a `Problem` and its `Inputs`, and returns out and lse."""


def _inputs(
    q: jax.Array, k: Any, v: Any, lengths: Any, page_table: Any, sinks: Any, k_scale: Any, v_scale: Any, layer: Any
) -> Inputs:
    """Returns the arguments as arrays; raises ValueError for one that is not an array."""

    def optional(name: str, x: Any) -> jax.Array | None:
        return None if x is None else as_array(name, x)

    return Inputs(
        q=q,
        k=as_array("k", k),
        v=as_array("v", v),
        lengths=as_lengths(lengths, q.shape[0]),
        page_table=None if page_table is None else as_int32("page_table", page_table),
        sinks=optional("sinks", sinks),
        k_scale=optional("k_scale", k_scale),
        v_scale=optional("v_scale", v_scale),
        layer=None if layer is None else as_array("layer", layer, "int32"),
    )


@overload
def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | int,
    *,
    page_table: jax.Array | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    batch_invariant: bool = False,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    config: Any = None,
    interpret: Interpret = None,
) -> jax.Array: ...
@overload
def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | int,
    *,
    page_table: jax.Array | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    batch_invariant: bool = False,
    return_lse: Literal[True],
    backend: str | None = None,
    config: Any = None,
    interpret: Interpret = None,
) -> tuple[jax.Array, jax.Array]: ...
def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | int,
    *,
    page_table: jax.Array | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    config: Any = None,
    interpret: Interpret = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention of each sequence's newest tokens over its KV cache; `lengths` count the new tokens.

    Attention is causal among the new tokens, which the cache already holds: call `append_kv` first, with the same
    lengths. Query i of q_len has position lengths - q_len + i and sees the tokens up to its own; a query with a
    negative position is padding. Accumulation and softmax are float32. Nothing at or past `lengths` reaches the result,
    NaN included. Lengths outside of 0 to max_len are an error where their values are known; under jit they are clamped.

    Sharded arrays: sequences and heads need no communication. Where a dense cache is sharded along max_len, every
    device attends to its part, and one all-gather brings the results and their log-sum-exps together. A cache is
    gathered where it is sharded along its pages, and along max_len with a sliding window or with more than 128 query
    heads for a KV head, those of all new tokens counted.

    Args:
      q: queries `[batch, q_heads, head_dim]` or `[batch, q_len, q_heads, head_dim]`; float32, bfloat16 or float16.
      k: cached keys `[batch, kv_heads, max_len, head_dim]`, or `[num_pages, kv_heads, page_size, head_dim]` with
        `page_table`; float32, bfloat16, float16, or int8, float8_e4m3fn, float8_e5m2 with `k_scale` and `v_scale`.
        q_heads is a multiple of kv_heads; query heads h * group to (h + 1) * group - 1 read KV head h.
      v: cached values, in shape and dtype like k.
      lengths: int32 `[batch]`, tokens in each sequence's cache, new ones included; a scalar for all sequences. 0 is
        allowed.
      page_table: int32 `[batch, pages_per_seq]`; entry i is the page of a sequence's tokens i * page_size to
        (i + 1) * page_size - 1. Entries past the last filled page may have any value; a page that does not exist is
        read as the nearest that does.
      scale: factor of the logits, a number known while tracing; None means 1 / sqrt(head_dim).
      sliding_window: number of tokens that a query sees, its own included; None means all.
      logits_soft_cap: bound c of the logits, which become c * tanh(logits / c); None means no bound.
      sinks: float `[q_heads]`, for each head a logit that takes part in the softmax and has no value.
      k_scale: float32, the shape of k without head_dim: factors of the codes of keys.
      v_scale: float32, the same for values.
      layer: int32 scalar from 0 to num_layers - 1, the layer to read where k, v and the scales have a leading
        `[num_layers]`; under jit, the result of other values is undefined.
      batch_invariant: whether a sequence's result has the same bits in every batch, whatever the other sequences are.
        Block sizes, splits and their order are then those of a batch of one, which may be slower; the reference
        computes one sequence at a time. A `config` must not depend on the batch.
      return_lse: whether to return the log-sum-exp of each softmax too, with which partial results over parts of a
        cache merge exactly (`merge_partials`).
      backend: one of `palladion.BACKENDS`; None means the default that `using_backend` sets, or "auto".
      config: block sizes, the `Config` of the kernel that `backend` names; None chooses them.
      interpret: whether the kernel is interpreted; None interprets it where backend="pallas" runs on a CPU.

    Returns:
      The output in the shape and dtype of q; zeros for a query that sees nothing. With `return_lse` also the
      log-sum-exp, float32 `[batch, (q_len,) q_heads]`; for a query that sees nothing it is -inf, or its head's sink.

    Raises:
      ValueError: an argument is wrong; the message names it, what was given and what is accepted.
      Unsupported: the chosen backend cannot run this call; or a kernel is differentiated, which only
        backend="xla" allows.
    """
    q = as_array("q", q)
    check(q.ndim in (3, 4), "q", f"shape {q.shape}", "[batch, (q_len,) q_heads, head_dim]")
    one_token = q.ndim == 3

    inputs = _inputs(q[:, None] if one_token else q, k, v, lengths, page_table, sinks, k_scale, v_scale, layer)
    problem = Problem.of(
        inputs,
        scale=scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        batch_invariant=batch_invariant,
    )
    out, lse = dispatch(
        "decode_attention", IMPLEMENTATIONS, problem, inputs, backend=backend, config=config, interpret=interpret
    )
    if one_token:
        out, lse = out[:, 0], lse[:, 0]
    return (out, lse) if return_lse else out
