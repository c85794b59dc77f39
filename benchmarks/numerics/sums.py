"""Errors of sums, dot products and the online softmax in few bits, and how they depend on the order.

Errors are relative to the root of the sum of squares of the terms, which is the expected size of a sum with random
signs.
"""

from __future__ import annotations

import random
from typing import Any, Final

import numpy as np

from palladion.benchmarks.numerics.rounding import Array, methods, rounded

LENGTH: Final = 10_000
"""Terms of a sum."""

SHUFFLES: Final = 32
"""Random orders of each sum."""

DOT_LENGTHS: Final = tuple(2**power for power in range(7, 15))
"""Lengths of dot products."""

PAIRS: Final = 64
"""Dot products of each length."""


def sines() -> Array:
    """Returns sin(0) to sin(9999) in float32; their sum is 1.9395, and that of their magnitudes 6366."""
    return np.sin(np.arange(LENGTH, dtype=np.float32))


def shuffled_sines() -> Array:
    """Returns the same sines, shuffled by Python's generator with seed 0."""
    order = list(range(LENGTH))
    random.Random(0).shuffle(order)
    return sines()[order]


def study_sums(vectors: dict[str, Array]) -> list[dict[str, Any]]:
    """Sums every vector by every method, in its own order and in random ones.

    Args:
      vectors: float32 `[n]` by name.

    Returns:
      A record for each vector and method: the sum in the given order, its error, the root mean square error over random
      orders and the standard deviation between them, all relative; and the sums themselves.
    """
    records = []
    for name, vector in vectors.items():
        exact = float(vector.astype(np.float64).sum())
        scale = float(np.sqrt((vector.astype(np.float64) ** 2).sum()))
        generator = np.random.default_rng(0)
        orders = np.stack([vector, *(generator.permutation(vector) for _ in range(SHUFFLES))])
        for method in methods():
            sums = method.sum(orders).astype(np.float64)
            errors = (sums - exact) / scale
            records.append(
                {
                    "vector": name,
                    "inputs": method.inputs,
                    "accumulator": method.accumulator,
                    "order": method.order,
                    "exact": exact,
                    "sum": sums[0],
                    "error": errors[0],
                    "rms_error": np.sqrt((errors[1:] ** 2).mean()),
                    "spread": errors[1:].std(),
                    "shuffled": sums[1:].tolist(),
                }
            )
    return records


def study_dots(pairs: dict[str, tuple[Array, Array]]) -> list[dict[str, Any]]:
    """Computes dot products of growing length by every method.

    Args:
      pairs: by name, activations and weights `[PAIRS, longest]` float32.

    Returns:
      A record for each pair, length and method: root mean square error, relative to |x| |w|.
    """
    records = []
    for name, (x, w) in pairs.items():
        for length in DOT_LENGTHS:
            a, b = x[:, :length], w[:, :length]
            wide = a.astype(np.float64), b.astype(np.float64)
            exact = (wide[0] * wide[1]).sum(axis=1)
            scale = np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)
            for method in methods():
                error = (method.dot(a, b) - exact) / scale
                records.append(
                    {
                        "pair": name,
                        "length": length,
                        "inputs": method.inputs,
                        "accumulator": method.accumulator,
                        "order": method.order,
                        "rms_error": np.sqrt((error**2).mean()),
                    }
                )
    return records


def normal_pairs() -> tuple[Array, Array]:
    """Returns normal-distributed activations and weights."""
    generator = np.random.default_rng(1)
    x, w = generator.standard_normal((2, PAIRS, DOT_LENGTHS[-1]), np.float32)
    return x, w


CONTEXT: Final = 4096
"""Tokens of the cache in the study of attention."""

HEADS: Final = 16
HEAD_DIM: Final = 128


def study_attention() -> list[dict[str, Any]]:
    """Studies the online softmax of decode attention: block size, splits, and the precision of accumulators.

    Keys, values and queries are normal-distributed bfloat16 numbers, so that all errors are those of the arithmetic.

    Returns:
      A record for each combination: the largest and the root mean square error of the output, relative to its root
      mean square.
    """
    generator = np.random.default_rng(2)
    q = rounded(generator.standard_normal((HEADS, HEAD_DIM), np.float32), "bfloat16")
    k, v = (rounded(part, "bfloat16") for part in generator.standard_normal((2, HEADS, CONTEXT, HEAD_DIM), np.float32))
    logits = np.einsum("hd,htd->ht", q.astype(np.float64), k) * HEAD_DIM**-0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact = np.einsum("ht,htd->hd", weights / weights.sum(axis=1, keepdims=True), v.astype(np.float64))
    scale = np.sqrt((exact**2).mean())
    records = []
    for accumulator, operand in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        for block in (16, 64, 128, 512, CONTEXT):
            for splits in (1, 4, 16):
                if block * splits > CONTEXT:
                    continue
                out = _attend(q, k, v, block, splits, accumulator, operand)
                error = (out - exact) / scale
                records.append(
                    {
                        "accumulator": accumulator,
                        "weights": operand,
                        "block": block,
                        "splits": splits,
                        "error": np.abs(error).max(),
                        "rms_error": np.sqrt((error**2).mean()),
                    }
                )
    return records


def _attend(q: Array, k: Array, v: Array, block: int, splits: int, accumulator: str, operand: str) -> Array:
    """Returns attention `[heads, head_dim]`, computed block by block, with splits merged in float32.

    Args:
      q: `[heads, head_dim]`.
      k: `[heads, tokens, head_dim]`.
      v: like k.
      block: tokens of a block.
      splits: number of equal splits of the tokens.
      accumulator: dtype that the sum of weights and the weighted values are rounded to after every block.
      operand: dtype that weights are rounded to before they are multiplied by values.
    """
    outs, lses = [], []
    for keys, values in zip(np.split(k, splits, axis=1), np.split(v, splits, axis=1), strict=True):
        maximum = np.full(len(q), -np.inf, np.float32)
        total = np.zeros(len(q), np.float32)
        acc = np.zeros(q.shape, np.float32)
        for start in range(0, keys.shape[1], block):
            part = slice(start, start + block)
            logits = np.einsum("hd,htd->ht", q, keys[:, part]) * np.float32(HEAD_DIM**-0.5)
            new = np.maximum(maximum, logits.max(axis=1))
            decay = np.exp(maximum - new)
            weights = np.exp(logits - new[:, None])
            total = rounded(total * decay + weights.sum(axis=1), accumulator)
            update = np.einsum("ht,htd->hd", rounded(weights, operand), values[:, part])
            acc = rounded(acc * decay[:, None] + update, accumulator)
            maximum = new
        outs.append(acc / total[:, None])
        lses.append(maximum + np.log(total))
    shares = np.exp(np.stack(lses) - np.max(lses, axis=0))
    return (shares[..., None] * np.stack(outs)).sum(axis=0) / shares.sum(axis=0)[:, None]
