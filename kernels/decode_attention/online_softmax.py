"""Attention over a cache, block by block: what every kernel for GPUs computes, whatever moves its memory.

A program has query rows (row r is query r // group, of query head r % group of its KV head) and goes through a part of
what they see in blocks of tokens. Its state is what it has seen so far of the softmax:

    s = softcap(scale * q k^T) / ln b       [rows, tokens]
    m' = max(m, max s)                      l' = l b^(m - m') + sum b^(s - m')
    acc' = acc b^(m - m') + b^(s - m') v    at the end: out = acc / l, lse = m ln b + log l

All of it in float32, and in `jax.numpy`: nothing here knows of a backend. b is 2, which is what hardware raises to a
power; where results are float32 it is e, because the rounding of s / ln 2 would show in them.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.decode_attention.problem import Problem

LOG2_E: Final = math.log2(math.e)


def _per_unit(problem: Problem) -> float:
    """1 / ln b."""
    return 1.0 if problem.q_dtype == "float32" else LOG2_E


def _power(problem: Problem, x: jax.Array) -> jax.Array:
    return jnp.exp(x) if problem.q_dtype == "float32" else jnp.exp2(x)


def divide(a: Any, b: int) -> tuple[Any, Any]:
    """Quotient and remainder of numbers that are not negative; a power of two takes a shift and a mask."""
    if isinstance(a, int):
        return divmod(a, b)
    if b & (b - 1) == 0:
        return jax.lax.shift_right_logical(a, jnp.full_like(a, b.bit_length() - 1)), a & (b - 1)
    return jax.lax.div(a, jnp.full_like(a, b)), jax.lax.rem(a, jnp.full_like(a, b))


class Span(NamedTuple):
    """Tokens of a sequence that some rows see, and the blocks that hold them.

    Attributes:
      oldest: the first token that any of the rows sees.
      newest: the last one; -1 where they see none.
      begin: the first block of a program's share.
      end: the block after its last.
    """

    oldest: Any
    newest: Any
    begin: Any
    end: Any


def span_of(
    problem: Problem, length: Any, first_row: Any, last_row: Any, block_kv: int, split: Any, splits: int
) -> Span:
    """What rows `first_row` to `last_row` see of a sequence, and the share of it that falls to one of the splits.

    Every sequence cuts what its own rows see, in equal shares of whole blocks: a short one takes a short time.
    """
    p = problem
    first_query = length - p.q_len + divide(first_row, p.group)[0]
    last_query = length - p.q_len + divide(last_row, p.group)[0]
    newest = jnp.minimum(last_query, p.max_len - 1)
    oldest = jnp.int32(0)
    if p.sliding_window is not None:
        oldest = jnp.maximum(first_query - p.sliding_window + 1, 0)
    first_block = divide(oldest, block_kv)[0]
    blocks = divide(jnp.maximum(newest + block_kv, 0), block_kv)[0] - first_block
    share = divide(jnp.maximum(blocks, 0) + (splits - 1), splits)[0]
    begin = first_block + split * share
    return Span(oldest, newest, begin, jnp.minimum(begin + share, first_block + blocks))


def visible(problem: Problem, token: jax.Array, position: jax.Array) -> jax.Array:
    """Which tokens the queries at some positions see: `[rows, tokens]`."""
    token, position = token[None, :], position[:, None]
    seen = token <= jnp.minimum(position, problem.max_len - 1)
    if problem.sliding_window is not None:
        seen &= token > position - problem.sliding_window
    return seen


class State(NamedTuple):
    """The softmax of what was seen so far.

    Attributes:
      maximum: of the logits, `[rows]`; -inf where nothing was seen.
      total: sums of the weights, `[rows]`.
      values: sums of the weighted values, `[rows, width]` for each part of head_dim.
    """

    maximum: jax.Array
    total: jax.Array
    values: tuple[jax.Array, ...]


def start(problem: Problem, rows: int, widths: tuple[int, ...], sinks: jax.Array | None) -> State:
    """The state before the first block. A sink, `[rows]`, is a logit without a value; -inf is none."""
    values = tuple(jnp.zeros((rows, width), jnp.float32) for width in widths)
    if sinks is None:
        return State(jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), values)
    return State(sinks * _per_unit(problem), jnp.where(sinks == -jnp.inf, 0.0, 1.0), values)


def logits_of(problem: Problem, products: jax.Array, k_scale: jax.Array | None, seen: jax.Array) -> jax.Array:
    """Logits over ln b from the products of queries and codes, `[rows, tokens]`; -inf where nothing is seen.

    The scales of keys, `[tokens]`, take the place of the softmax scale: a quantized cache costs no multiplication.
    """
    cap = problem.logits_soft_cap
    factor = problem.scale * (_per_unit(problem) if cap is None else 1 / cap)
    s = products * (factor if k_scale is None else (k_scale * factor)[None, :])
    if cap is not None:
        s = jnp.tanh(s) * (cap * _per_unit(problem))
    return jnp.where(seen, s, -jnp.inf)


def weigh(problem: Problem, state: State, logits: jax.Array) -> tuple[jax.Array, jax.Array, State]:
    """Takes the logits of a block into the state, but for its values.

    Returns:
      The weights of the block's tokens, `[rows, tokens]`; what the values so far are to be multiplied by, `[rows]`; and
      the new state, whose values are still the old ones.
    """
    maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=1))
    # Of a row that has seen nothing yet: -inf - -inf is NaN.
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    weights = _power(problem, logits - shift[:, None])
    decay = _power(problem, state.maximum - shift)
    return weights, decay, State(maximum, state.total * decay + jnp.sum(weights, axis=1), state.values)


def finish(problem: Problem, state: State) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Outputs, `[rows, width]` for each part of head_dim, and the natural logarithm of the sums, `[rows]`."""
    total = jnp.where(state.total == 0.0, 1.0, state.total)[:, None]
    outs = tuple(values / total for values in state.values)
    return outs, state.maximum * (1 / _per_unit(problem)) + jnp.log(state.total)
