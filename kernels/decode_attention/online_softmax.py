"""Attention over a cache, KV block by KV block: what GPU kernels compute, however they move memory.

A program has query rows (row r is query r // group, of query head r % group of its KV head) and goes through some of
the KV blocks that they see. Its state is the online softmax so far:

    s = softcap(scale * q k^T) / ln b           [rows, tokens]
    m_next = max(m_prev, max s)                 alpha = b^(m_prev - m_next)
    p = b^(s - m_next)                          l = alpha l + sum p
    acc = alpha acc + p v                       at the end: out = acc / l, lse = m ln b + log l

Everything is float32 and plain `jax.numpy`, so that GPU backends can share it. The base b is 2, whose powers the
hardware computes; where results are float32 it is e, because the rounding of s / ln 2 would show in them.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.decode_attention.problem import Problem
from palladion.kernels.integers import divide_with_remainder

LOG2_E: Final = math.log2(math.e)


def _inverse_ln_base(problem: Problem) -> float:
    """Returns 1 / ln b."""
    return 1.0 if problem.q_dtype == "float32" else LOG2_E


def _power(problem: Problem, x: jax.Array) -> jax.Array:
    """Returns b^x."""
    return jnp.exp(x) if problem.q_dtype == "float32" else jnp.exp2(x)


class VisibleSpan(NamedTuple):
    """The tokens that some rows see, and one split of the KV blocks that hold them.

    Attributes:
      first_token: the first token that any of the rows sees.
      last_token: the last token that any of the rows sees; -1 where they see none.
      begin: the first KV block of the split.
      end: the KV block after its last.
    """

    first_token: Any
    last_token: Any
    begin: Any
    end: Any


def visible_span(
    problem: Problem, length: Any, first_row: Any, last_row: Any, block_kv: int, split: Any, splits: int
) -> VisibleSpan:
    """Returns the tokens that rows `first_row` to `last_row` see, and the KV blocks of one split.

    Splits are equal shares, in whole KV blocks, of what these rows see: a short sequence takes a short time.
    """
    p = problem
    first_query = length - p.q_len + divide_with_remainder(first_row, p.group)[0]
    last_query = length - p.q_len + divide_with_remainder(last_row, p.group)[0]
    last_token = jnp.minimum(last_query, p.max_len - 1)
    first_token = jnp.int32(0)
    if p.sliding_window is not None:
        first_token = jnp.maximum(first_query - p.sliding_window + 1, 0)
    first_block = divide_with_remainder(first_token, block_kv)[0]
    blocks = divide_with_remainder(jnp.maximum(last_token + block_kv, 0), block_kv)[0] - first_block
    share = divide_with_remainder(jnp.maximum(blocks, 0) + (splits - 1), splits)[0]
    begin = first_block + split * share
    return VisibleSpan(first_token, last_token, begin, jnp.minimum(begin + share, first_block + blocks))


def visible_mask(problem: Problem, token: jax.Array, position: jax.Array) -> jax.Array:
    """Returns which tokens the queries at `position` see, `[rows, tokens]`."""
    token, position = token[None, :], position[:, None]
    visible = token <= jnp.minimum(position, problem.max_len - 1)
    if problem.sliding_window is not None:
        visible &= token > position - problem.sliding_window
    return visible


class State(NamedTuple):
    """The online softmax of the tokens so far.

    Attributes:
      m: maxima of the logits, `[rows]`; -inf where nothing was visible.
      l: sums of the weights, `[rows]`.
      acc: sums of the weighted values, `[rows, width]` for each tile of head_dim.
    """

    m: jax.Array
    l: jax.Array  # noqa: E741, the usual name
    acc: tuple[jax.Array, ...]


def initial_state(problem: Problem, rows: int, widths: tuple[int, ...], sinks: jax.Array | None) -> State:
    """Returns the state before the first KV block.

    Args:
      problem: the call.
      rows: query rows.
      widths: widths of the tiles of head_dim.
      sinks: `[rows]` or None; a sink is a logit without a value, and -inf is no sink.
    """
    acc = tuple(jnp.zeros((rows, width), jnp.float32) for width in widths)
    if sinks is None:
        return State(jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), acc)
    return State(sinks * _inverse_ln_base(problem), jnp.where(sinks == -jnp.inf, 0.0, 1.0), acc)


def masked_logits(problem: Problem, products: jax.Array, k_scale: jax.Array | None, visible: jax.Array) -> jax.Array:
    """Returns logits divided by ln b, `[rows, tokens]`, from products of queries and keys; -inf where not visible.

    The scales of keys, `[tokens]`, are folded into the softmax scale: a quantized cache costs no multiplication.
    """
    cap = problem.logits_soft_cap
    factor = problem.scale * (_inverse_ln_base(problem) if cap is None else 1 / cap)
    s = products * (factor if k_scale is None else (k_scale * factor)[None, :])
    if cap is not None:
        s = jnp.tanh(s) * (cap * _inverse_ln_base(problem))
    return jnp.where(visible, s, -jnp.inf)


def update(problem: Problem, state: State, s: jax.Array) -> tuple[jax.Array, jax.Array, State]:
    """Adds the logits s of a KV block to m and l.

    Returns:
      The weights p of the block's tokens, `[rows, tokens]`; alpha, `[rows]`, by which acc must be multiplied; and the
      new state, whose acc is still the old one.
    """
    m_next = jnp.maximum(state.m, jnp.max(s, axis=1))
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN.
    shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)
    p = _power(problem, s - shift[:, None])
    alpha = _power(problem, state.m - shift)
    return p, alpha, State(m_next, state.l * alpha + jnp.sum(p, axis=1), state.acc)


def finish(problem: Problem, state: State) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns the outputs, `[rows, width]` for each tile of head_dim, and the log-sum-exp in base e, `[rows]`."""
    total = jnp.where(state.l == 0.0, 1.0, state.l)[:, None]
    outs = tuple(acc / total for acc in state.acc)
    return outs, state.m * (1 / _inverse_ln_base(problem)) + jnp.log(state.l)
