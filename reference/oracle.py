"""The same formulas in float64 NumPy, loop by loop, to judge references and kernels alike.

Written for the eye, not for speed: nothing is blocked, fused or shared with the references. Inputs are taken as they
are stored (bfloat16, int8, …) and widened exactly.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from palladion.reference.quantization import E2M1_LEVELS, INT4_ZERO, PACK_BLOCK, QuantizedArray, quantize_rows

Array = np.ndarray


def widen(x: Any) -> Array:
    """Any stored array to float64, exactly."""
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
    """`palladion.decode_attention` in float64; returns out and lse in the shape of q and q without head_dim."""
    q, k, v = widen(q), np.asarray(k), np.asarray(v)
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
            return widen(part[b, head, t])
        page_size = k.shape[2]
        page = int(np.asarray(page_table)[b, t // page_size])
        return widen(part[min(max(page, 0), len(part) - 1), head, t % page_size])

    for b in range(batch):
        length = min(max(int(np.asarray(lengths)[b]), 0), max_len)
        for i in range(q_len):
            position = length - q_len + i
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = range(first, position + 1)
            for h in range(q_heads):
                head = h // group
                logits = np.array([q[b, i, h] @ token(k, b, t, head) for t in seen]) * scale
                if k_scale is not None:
                    logits = logits * np.array([token(k_scale, b, t, head) for t in seen])
                if logits_soft_cap is not None:
                    logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
                # A sink takes part in the softmax and has no value.
                every = logits if sinks is None else np.append(logits, widen(sinks)[h])
                if every.size == 0:
                    continue
                maximum = every.max()
                total = np.exp(every - maximum).sum()
                lse[b, i, h] = maximum + np.log(total)
                weights = np.exp(logits - maximum) / total
                for weight, t in zip(weights, seen, strict=True):
                    value = token(v, b, t, head)
                    if v_scale is not None:
                        value = value * token(v_scale, b, t, head)
                    out[b, i, h] += weight * value
    return (out[:, 0], lse[:, 0]) if squeeze else (out, lse)


def rotate(x: Any, cosine: Any, sine: Any) -> Array:
    """Rotary positions in float64: x `[batch, q_len, heads, head_dim]` by angles `[batch, q_len, rotary_dim / 2]`."""
    x, cosine, sine = widen(x), widen(cosine)[:, :, None], widen(sine)[:, :, None]
    pairs = cosine.shape[-1]
    rotated = x.copy()
    for i in range(pairs):
        one, other = x[..., i], x[..., i + pairs]
        rotated[..., i] = one * cosine[..., i] - other * sine[..., i]
        rotated[..., i + pairs] = other * cosine[..., i] + one * sine[..., i]
    return rotated


def dequantize(w: QuantizedArray) -> Array:
    """The weights `[in, out]` that a QuantizedArray without leading dimensions stands for."""
    stored = np.asarray(w.values)
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
            codes[i] = widen(stored[i])
    group = w.in_features // w.scales.shape[0]
    scales = np.repeat(widen(w.scales), group, axis=0)
    zero = float(INT4_ZERO) if w.scheme.format == "int4" and w.scheme.offset == "none" else 0.0
    zeros = zero if w.zeros is None else np.repeat(widen(w.zeros), group, axis=0)
    minimums = 0.0 if w.minimums is None else np.repeat(widen(w.minimums), group, axis=0)
    return scales * (codes - zeros) + minimums


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
    """`palladion.quantized_matmul`, and `matmul`, in float64; `activation` is a NumPy function."""
    x = widen(x)
    if norm is not None:
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm_eps) * widen(norm)
    if quantize_x is not None:
        # Codes are found in float32, as the definition has it: a tie may round either way in another precision.
        codes, scales = quantize_rows(jnp.asarray(x, jnp.float32), quantize_x)
        x = widen(codes) * widen(scales)[..., None]
    y = x @ (dequantize(w) if isinstance(w, QuantizedArray) else widen(w))
    if bias is not None:
        y = y + widen(bias)
    gate, up = np.split(y, 2, axis=-1) if gated else (y, 1.0)
    result = (gate if activation is None else activation(gate)) * up
    return result if residual is None else widen(residual) + result
