"""Attention over a cache, KV block by KV block: what GPU kernels compute, however they move memory.

A program has query rows (row r is query r // group, of query head r % group of its KV head) and goes through some of
the KV blocks that they see. Its state is the online softmax so far:

    s = softcap(scale * q k^T) / ln b           [rows, tokens]
    m_next = max(m_prev, max s)                 alpha = b^(m_prev - m_next)
    p = b^(s - m_next)                          l = alpha l + p
    acc = alpha acc + p v                       at the end: out = acc / sum l, lse = m ln b + log sum l

l is kept for each token of a block, or for fewer of them, and added up at the end: a sum over all tokens passes between
threads, and one maximum in each block is enough of that.

Everything is float32 and plain `jax.numpy`, so that GPU backends can share it.
Matrices are `[rows, tokens]`, or `[tokens, rows]` where `tokens`, their axis of tokens, is 0; acc is turned like them.
The base b is 2, whose powers the hardware computes; where results are float32 it is e, because the rounding of s / ln 2
would show in them.

Scales of values: p v_scale are the weights of a block's codes. Where they become float16, m is the maximum of
s + log2 v_scale instead, rounded up to the next power of two: no weight is above 1, and the largest is near it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """The tokens that some rows of a sequence see, and the KV blocks that hold them.

    Attributes:
      first_token: the first token that any of the rows sees.
      last_token: the last token that any of the rows sees; -1 or less where they see none.
      first_block: the KV block of the first token.
      blocks: number of KV blocks.
    """

    first_token: Any
    last_token: Any
    first_block: Any
    blocks: Any


def visible_span(problem: Problem, length: Any, first_row: Any, last_row: Any, block_kv: int) -> VisibleSpan:
    """Returns the tokens and KV blocks that rows `first_row` to `last_row` see, for a length or an array of lengths."""
    p = problem
    first_query = length - p.q_len + divide_with_remainder(first_row, p.group)[0]
    last_query = length - p.q_len + divide_with_remainder(last_row, p.group)[0]
    last_token = jnp.minimum(last_query, p.max_len - 1)
    first_token = jnp.zeros_like(length)
    if p.sliding_window is not None:
        first_token = jnp.maximum(first_query - p.sliding_window + 1, 0)
    first_block = divide_with_remainder(first_token, block_kv)[0]
    end = divide_with_remainder(jnp.maximum(last_token + block_kv, 0), block_kv)[0]
    return VisibleSpan(first_token, last_token, first_block, jnp.maximum(end - first_block, 0))


def visible_mask(problem: Problem, token: jax.Array, position: jax.Array) -> jax.Array:
    """Returns which tokens the queries at `position` see; indices and positions are broadcast."""
    visible = token <= jnp.minimum(position, problem.max_len - 1)
    if problem.sliding_window is not None:
        visible &= token > position - problem.sliding_window
    return visible


class State(NamedTuple):
    """The online softmax of the tokens so far.

    Attributes:
      m: maxima of the logits, `[rows]`; -inf where nothing was visible.
      l: sums of the weights of every nth token, `[rows, n]`, where n divides block_kv.
      acc: sums of the weighted values, `[rows, width]` for each tile of head_dim.
    """

    m: jax.Array
    l: jax.Array  # noqa: E741, the usual name
    acc: tuple[jax.Array, ...]


def initial_state(rows: int, block_kv: int, widths: tuple[int, ...]) -> State:
    """Returns the state before the first KV block; `widths` are those of the tiles of head_dim."""
    return State(
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros((rows, block_kv), jnp.float32),
        tuple(jnp.zeros((rows, width), jnp.float32) for width in widths),
    )


def _spread(x: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """Returns a vector along one axis of a matrix, repeated along the other."""
    return jax.lax.broadcast_in_dim(x, like.shape, (axis,))


def scale_of_products(problem: Problem) -> float:
    """Returns the factor by which products of queries and keys become logits divided by ln b, without a soft-cap."""
    return problem.scale * _inverse_ln_base(problem)


def logits(
    problem: Problem,
    products: jax.Array,
    k_scale: jax.Array | None = None,
    tokens: int = 1,
    tanh: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> jax.Array:
    """Returns logits divided by ln b, from products of queries and keys.

    The scales of keys, `[tokens]`, are folded into the softmax scale: a quantized cache costs no multiplication.
    """
    cap = problem.logits_soft_cap
    factor = scale_of_products(problem) if cap is None else problem.scale / cap
    s = products * (factor if k_scale is None else _spread(k_scale * factor, products, tokens))
    return s if cap is None else tanh(s) * (cap * _inverse_ln_base(problem))


def masked_logits(
    problem: Problem, products: jax.Array, k_scale: jax.Array | None, visible: jax.Array, tokens: int = 1
) -> jax.Array:
    """Returns logits divided by ln b, from products of queries and keys; -inf where not visible."""
    return jnp.where(visible, logits(problem, products, k_scale, tokens), -jnp.inf)


def update(
    problem: Problem,
    state: State,
    s: jax.Array,
    v_scale: jax.Array | None,
    tokens: int = 1,
    factor: float | None = None,
) -> tuple[jax.Array, jax.Array, State]:
    """Adds the logits s of a KV block to m and l.

    Args:
      problem: the call.
      state: the state before the block.
      s: logits from `masked_logits`.
      v_scale: scales of the block's values, `[tokens]`, whose products with p must not exceed 1; or None.
      tokens: the axis of tokens.
      factor: by which s must still be multiplied, a positive number: in one instruction with a subtraction; or None.

    Returns:
      The weights p of the block's tokens, shaped like s; alpha, `[rows]`, by which acc must be multiplied; and the
      new state, whose acc is still the old one.
    """
    bound = s if v_scale is None else s + _spread(_exponent_above(v_scale), s, tokens)
    largest = jnp.max(bound, axis=tokens)
    m_next = jnp.maximum(state.m, largest if factor is None else largest * factor)
    shift = _finite(m_next)
    p = _power(problem, (s if factor is None else s * factor) - _spread(shift, s, 1 - tokens))
    alpha = _power(problem, state.m - shift)
    l_next, size = state.l * _spread(alpha, state.l, 1 - tokens), state.l.shape[tokens]
    if size == p.shape[tokens]:
        return p, alpha, State(m_next, l_next + p, state.acc)
    for start in range(0, p.shape[tokens], size):
        l_next = l_next + (p[:, start : start + size] if tokens == 1 else p[start : start + size])
    return p, alpha, State(m_next, l_next, state.acc)


def _finite(m: jax.Array) -> jax.Array:
    """Returns maxima to subtract: a row that has seen nothing yet has -inf, and -inf - -inf is NaN."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def _exponent_above(x: jax.Array) -> jax.Array:
    """Returns the least e with |x| < 2^e, float32, within bounds that keep powers of 2 representable."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return jnp.clip((bits >> 23) - 126, -60, 100).astype(jnp.float32)


def finish(
    problem: Problem, state: State, sinks: jax.Array | None, tokens: int = 1
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns the outputs, `[rows, width]` for each tile of head_dim, and the log-sum-exp in base e, `[rows]`.

    Args:
      problem: the call.
      state: the state after the last KV block.
      sinks: `[rows]` or None; a sink is a logit without a value, and -inf is no sink.
      tokens: the axis of tokens.
    """
    m, total, acc = state.m, jnp.sum(state.l, axis=tokens), state.acc
    if sinks is not None:
        sinks = sinks * _inverse_ln_base(problem)
        m = jnp.maximum(state.m, sinks)
        alpha = _power(problem, state.m - _finite(m))
        total = total * alpha + _power(problem, sinks - _finite(m))
        acc = tuple(part * _spread(alpha, part, 1 - tokens) for part in acc)
    divisor = jnp.where(total == 0.0, 1.0, total)
    return tuple(part / _spread(divisor, part, 1 - tokens) for part in acc), _log_sum_exp(problem, m, total)


def _log_sum_exp(problem: Problem, m: jax.Array, total: jax.Array) -> jax.Array:
    """Returns m ln b + log total.

    Scales of values may move m away from the logits, and total the other way: their powers of two are added first,
    which cancels them without a rounding.
    """
    if problem.q_dtype == "float32":
        return m + jnp.log(total)
    bits = jax.lax.bitcast_convert_type(total, jnp.int32)
    power = jnp.maximum(bits & 0x7F800000, 0x00800000)  # of a normal number; infinity for NaN
    mantissa = total / jax.lax.bitcast_convert_type(power, jnp.float32)
    return (m + ((power >> 23) - 127).astype(jnp.float32)) * (1 / _inverse_ln_base(problem)) + jnp.log(mantissa)
