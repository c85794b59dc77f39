"""decode_attention: its signature and contract, and the table of what can run it."""

from __future__ import annotations

from typing import Any, Final, Literal, overload

import jax

from palladion.kernels.backend import Implementation, dispatch
from palladion.kernels.checks import as_array, check
from palladion.kernels.decode_attention.mosaic_tpu import call as mosaic_tpu
from palladion.kernels.decode_attention.problem import Inputs, Problem
from palladion.kernels.decode_attention.triton import call as triton
from palladion.reference import decode_attention as reference


def _reference(problem: Problem, inputs: Inputs, *, config: Any, interpret: Any) -> tuple[jax.Array, jax.Array]:
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
    Implementation("xla", None, lambda _: None, _reference),
)
"""Every implementation takes a `Problem` and its `Inputs`, and returns out and lse."""


@overload
def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
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
    interpret: Any = None,
) -> jax.Array: ...
@overload
def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
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
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]: ...
def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
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
    interpret: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of the newest tokens of each sequence over its KV cache, causal among the new ones.

    The cache already holds the new tokens (`append_kv` first). Query i of q_len stands at position
    lengths - q_len + i and sees what is there and before; a query whose position is negative is padding.
    Accumulation and softmax are float32. Nothing at or past `lengths` reaches the result, NaN included. Lengths outside
    of 0 to max_len are an error where their values are known; under jit they count as 0 or max_len.

    Args:
      q: queries `[batch, q_heads, head_dim]` or `[batch, q_len, q_heads, head_dim]`; float32, bfloat16 or float16.
      k: cached keys `[batch, kv_heads, max_len, head_dim]`, or `[num_pages, kv_heads, page_size, head_dim]` with
        `page_table`; float32, bfloat16, float16, or int8, float8_e4m3fn, float8_e5m2 with `k_scale` and `v_scale`.
        q_heads is a multiple of kv_heads; query heads h * group to (h + 1) * group - 1 read KV head h.
      v: cached values, in shape and dtype like k.
      lengths: int32 `[batch]`, tokens in each sequence's cache, new ones included; 0 is allowed.
      page_table: int32 `[batch, pages_per_seq]`, which page holds a sequence's tokens i * page_size and on. Entries
        past the last filled page may be anything; a page that does not exist is read as the nearest that does.
      scale: factor of the logits, a number known while tracing; None means 1 / sqrt(head_dim).
      sliding_window: a query sees only this many tokens, itself included; None means all.
      logits_soft_cap: bounds the logits to ±c by c * tanh(logits / c); None means no bound.
      sinks: float `[q_heads]`, a logit for each head that takes part in the softmax and carries no value.
      k_scale: float32, the shape of k without head_dim: what the codes of a key are multiplied by.
      v_scale: the same for values.
      layer: where k, v and the scales have a leading `[num_layers]`, which of them to read, an int32 scalar from 0 to
        num_layers - 1; what other values read is not defined under jit.
      batch_invariant: gives a sequence the same bits whatever else is in the batch, however large that is, and wherever
        the sequence stands: block sizes, splits and their order are those for a batch of one. It costs what they fall
        short of those for this batch; the reference goes through it one by one. A `config` must not follow the batch.
      return_lse: also returns the logarithm of each softmax's denominator, with which partial results over parts of a
        cache are merged exactly (`merge_partials`).
      backend: one of `palladion.BACKENDS`; None means what `using_backend` set, or "auto".
      config: block sizes for the kernel that is named by `backend`, one of its `Config`s; None chooses.
      interpret: whether a kernel is interpreted; None does so where backend="pallas" meets a CPU.

    Returns:
      The shape and dtype of q; zeros for a query that sees nothing. With `return_lse` also float32
      `[batch, (q_len,) q_heads]`: for a query that sees nothing -inf, or its head's sink where there are sinks.

    Raises:
      ValueError: shapes, dtypes or values do not go together; the message says which.
      Unsupported: the chosen backend does not cover this call.

    Source: Attention Is All You Need (arXiv 1706.03762); online softmax, arXiv 1805.02867; soft-capping, Gemma 2
    (arXiv 2408.00118); sinks as in gpt-oss (arXiv 2508.10925).
    """
    q = as_array("q", q)
    check(q.ndim in (3, 4), "q", f"shape {q.shape}", "[batch, (q_len,) q_heads, head_dim]")
    one_token = q.ndim == 3

    def optional(name: str, x: Any, dtype: Any = None) -> jax.Array | None:
        return None if x is None else as_array(name, x, dtype)

    inputs = Inputs(
        q=q[:, None] if one_token else q,
        k=as_array("k", k),
        v=as_array("v", v),
        lengths=as_array("lengths", lengths),
        page_table=optional("page_table", page_table),
        sinks=optional("sinks", sinks),
        k_scale=optional("k_scale", k_scale),
        v_scale=optional("v_scale", v_scale),
        layer=optional("layer", layer, "int32"),
    )
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
