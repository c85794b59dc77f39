"""The operations in float64 NumPy, loop by loop: the oracle that references and kernels are measured against.

The code is written to be checked by reading, not for speed: nothing is blocked, fused or shared with the references,
except the rounding of activations in `quantized_matmul`. Inputs keep the dtypes they are stored in (bfloat16, int8, …)
and are converted to float64 exactly.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from palladion.reference.e2m1 import E2M1_LEVELS
from palladion.reference.quantization import QuantizedArray, quantize_rows
from palladion.reference.scheme import INT4_ZERO, PACK_BLOCK

Array = np.ndarray


def to_float64(x: Any) -> Array:
    """Converts an array of any stored dtype to float64, exactly."""
    return np.asarray(x).astype(np.float64)


def decode_attention(
    q: Any,
    k: Any,
    v: Any,
    lengths: Any,
    *,
    page_table: Any = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> tuple[Array, Array]:
    """Computes `palladion.decode_attention`: out in the shape of q, lse in that shape without head_dim."""
    q, k, v = to_float64(q), np.asarray(k), np.asarray(v)
    squeeze = q.ndim == 3
    q = q[:, None] if squeeze else q
    batch, q_len, q_heads, head_dim = q.shape
    group = q_heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    max_len = k.shape[2] * (1 if page_table is None else np.shape(page_table)[1])
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)

    def token(part: Any, b: int, t: int, head: int) -> Array:
        part = np.asarray(part)
        if page_table is None:
            return to_float64(part[b, head, t])
        page_size = k.shape[2]
        page = int(np.asarray(page_table)[b, t // page_size])
        return to_float64(part[min(max(page, 0), len(part) - 1), head, t % page_size])

    for b, i, h in np.ndindex(batch, q_len, q_heads):
        head = h // group
        position = min(max(int(np.asarray(lengths)[b]), 0), max_len) - q_len + i
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        visible = range(first, position + 1)
        logits = np.array([q[b, i, h] @ token(k, b, t, head) for t in visible]) * scale
        if k_scale is not None:
            logits = logits * np.array([token(k_scale, b, t, head) for t in visible])
        if logits_soft_cap is not None:
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        # A sink takes part in the softmax and has no value.
        with_sink = logits if sinks is None else np.append(logits, to_float64(sinks)[h])
        if with_sink.size == 0:
            continue
        maximum = with_sink.max()
        total = np.exp(with_sink - maximum).sum()
        lse[b, i, h] = maximum + np.log(total)
        weights = np.exp(logits - maximum) / total
        for weight, t in zip(weights, visible, strict=True):
            value = token(v, b, t, head)
            if v_scale is not None:
                value = value * token(v_scale, b, t, head)
            out[b, i, h] += weight * value
    return (out[:, 0], lse[:, 0]) if squeeze else (out, lse)


def rotate(x: Any, cosine: Any, sine: Any) -> Array:
    """Rotates x `[batch, q_len, heads, head_dim]` by angles `[batch, q_len, rotary_dim / 2]`."""
    x, cosine, sine = to_float64(x), to_float64(cosine)[:, :, None], to_float64(sine)[:, :, None]
    pairs = cosine.shape[-1]
    rotated = x.copy()
    for i in range(pairs):
        first, second = x[..., i], x[..., i + pairs]
        rotated[..., i] = first * cosine[..., i] - second * sine[..., i]
        rotated[..., i + pairs] = second * cosine[..., i] + first * sine[..., i]
    return rotated


def dequantize(w: QuantizedArray) -> Array:
    """Returns the weights `[in, out]` of a QuantizedArray without leading dimensions."""

    def read(part: Any) -> Any:
        return np.asarray(part) if w.order == "in_out" else np.asarray(part).T

    stored, scales = read(w.values), read(w.scales)
    codes = np.zeros((w.in_features, w.out_features))
    for i in range(w.in_features):
        if w.scheme.packed:
            block, within = divmod(i, PACK_BLOCK)
            half = PACK_BLOCK // 2
            byte = stored[block * half + within % half]
            nibble = (byte >> 4) if within >= half else (byte & 15)
            if w.scheme.format == "mxfp4":
                levels = np.array([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)])
                codes[i] = levels[nibble]
            else:
                codes[i] = nibble
        else:
            codes[i] = to_float64(stored[i])
    group = w.in_features // scales.shape[0]
    zero = float(INT4_ZERO) if w.scheme.format == "int4" and w.scheme.offset == "none" else 0.0
    factor = np.repeat(to_float64(scales), group, axis=0)
    zeros = zero if w.zeros is None else np.repeat(to_float64(read(w.zeros)), group, axis=0)
    minimums = 0.0 if w.minimums is None else np.repeat(to_float64(read(w.minimums)), group, axis=0)
    return factor * (codes - zeros) + minimums


def quantized_matmul(
    x: Any,
    w: Any,
    *,
    bias: Any = None,
    activation: Any = None,
    gated: bool = False,
    norm: Any = None,
    norm_eps: float = 1e-5,
    residual: Any = None,
    quantize_x: str | None = None,
) -> Array:
    """Computes `palladion.quantized_matmul`, or `matmul` where w is an array; `activation` is a NumPy function."""
    x = to_float64(x)
    if norm is not None:
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm_eps) * to_float64(norm)
    if quantize_x is not None:
        # Codes are rounded in float32, as in the definition: in another precision a tie may round the other way.
        codes, scales = quantize_rows(jnp.asarray(x, jnp.float32), quantize_x)
        x = to_float64(codes) * to_float64(scales)[..., None]
    y = x @ (dequantize(w) if isinstance(w, QuantizedArray) else to_float64(w))
    if bias is not None:
        y = y + to_float64(bias)
    gate, up = np.split(y, 2, axis=-1) if gated else (y, 1.0)
    result = (gate if activation is None else activation(gate)) * up
    return result if residual is None else to_float64(residual) + result
