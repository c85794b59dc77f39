"""`quantize`: converts weights to codes, and the methods that choose scales.

A scheme defines what codes mean; the choice of each group's scale decides how much precision is lost:

    absmax   maps the extremes of a group to the extremes of the codes: nothing is clipped, but one outlier makes the
             steps of the whole group coarse
    mse      shrinks the extremes by the factor in `SHRINKS` with the least squared error, and clips weights beyond.
             Weighted by `importance`, that is the error of the product with typical activations
    hqq      half-quadratic quantization (Badri & Shaji, mobiusml.github.io/hqq_blog, 2023): keeps the steps of absmax
             and moves the minimum to where sum |error|**0.7 is least, a norm that tolerates a few large errors

Bad input is handled the same way on every platform:

    NaN, infinity   make the whole group NaN: its scale is NaN and its codes are those of 0, so every product shows it
    out of range    a group whose scale or minimum `scale_dtype` cannot represent becomes NaN, too
    subnormal       weights and scales below the smallest normal float32 count as 0
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from palladion.reference.e2m1 import encode_e2m1
from palladion.reference.modes import usual_modes
from palladion.reference.quantization import (
    Order,
    QuantizedArray,
    check_order,
    decode_codes,
    flush_subnormals,
    order_of_platform,
    pack_nibbles,
    reciprocal_or_zero,
)
from palladion.reference.scheme import CODE_DTYPE, Scheme, check_in_features, largest_code, nearest_code

Method = Literal["absmax", "mse", "hqq"]

SHRINKS: Final = np.linspace(1.0, 0.4, 16, dtype=np.float32)
"""Factors of the extremes that "mse" tries. The first is that of absmax, so no group is worse than with absmax."""

MXFP4_STEPS: Final = np.array([0, 1, -1], np.int32)
"""Steps of the exponent that "mse" tries for mxfp4, whose scales are powers of two, from that of absmax on."""

MXFP4_LARGEST_EXPONENT: Final = 2
"""Exponent of the largest e2m1 number, 6 = 1.5 * 2**2."""

HQQ_NORM: Final = 0.7
"""Exponent of the norm that "hqq" minimizes."""

HQQ_BETA: Final = 10.0
"""Weight of the quadratic term in the first iteration; residuals are in units of a code."""

HQQ_KAPPA: Final = 1.01
"""Growth of that weight from one iteration to the next."""

HQQ_ITERATIONS: Final = 20
"""Iterations of "hqq"."""


class _Factors(NamedTuple):
    """Factors that turn codes into weights: `[..., groups, 1, out]`, float32 rounded as stored; None where absent."""

    scales: Any
    zeros: Any
    minimums: Any


class _Extremes(NamedTuple):
    """Least, greatest and largest absolute weight of each group, `[..., groups, 1, out]`; low and high enclose 0."""

    low: jax.Array
    high: jax.Array
    absmax: jax.Array


def quantize(
    weight: jax.Array,
    scheme: str | Scheme,
    *,
    method: Method = "absmax",
    importance: jax.Array | None = None,
    scale_dtype: Any = jnp.float32,
    order: Order | None = None,
    in_axes: int | None = None,
    stack_axes: int = 0,
) -> QuantizedArray:
    """Quantizes a weight matrix.

    Args:
      weight: `[..., in, out]`, float. A NaN or an infinity makes its whole group NaN; subnormals count as 0. Leading
        dimensions are a stack of matrices, unless `in_axes` says that the axes belong to one matrix.
      scheme: a `Scheme` or its name, for example "int8", "int4-g32", "int4-g128-zeros", "float8_e4m3fn", "mxfp4".
      method: how scales are chosen. "absmax": by the extremes of each group. "mse": by the clipping with the least
        squared error, some fifteen times the work. "hqq": as absmax, with minimums moved by half-quadratic splitting;
        for schemes with minimums.
      importance: `[in]` or `[..., in]`, float, at least 0: weight of the errors, for "mse" and "hqq". With the mean
        square of each activation, "mse" minimizes the error of the product. None means 1 for all.
      scale_dtype: dtype of scales and minimums (mxfp4 has its own). Codes are computed with the rounded scale. A group
        whose scale is out of its range becomes NaN; one whose scale rounds to 0 becomes zeros.
      order: storage order of the result, "in_out" or "out_in"; None means that of the platform's kernels, "out_in" on
        GPUs. `QuantizedArray.with_order` converts.
      in_axes: number of axes that are `in`, all that follow are `out`: 1 for a Flax kernel `[in, heads, head_dim]`,
        which becomes `[in, heads * head_dim]`, and 2 for `[heads, head_dim, out]`. None: the last two axes are `in`
        and `out`.
      stack_axes: number of axes before `in` that are a stack of matrices, where `in_axes` is given.

    Returns:
      A `QuantizedArray` of logical shape `[..., in, out]`. A group of zeros has scale 0 and dequantizes to zeros.

    Raises:
      ValueError: `weight` has fewer than two dimensions or too few for `in_axes`, `in` is not a multiple of the
        scheme's group or packing, or `method`, `importance` or `order` is not valid.

    Source: absmax as in LLM.int8() (arXiv 2208.07339); mxfp4 as in the OCP Microscaling Formats specification 1.0;
      weighted clipping after the diagonal of the Hessian in Optimal Brain Compression (arXiv 2208.11580).
    """
    scheme = Scheme.parse(scheme)
    weight = jnp.asarray(weight)
    weight = weight.reshape(matrix_shape(weight.shape, in_axes, stack_axes))
    order = order_of_platform() if order is None else order
    check_order(order)
    _check(weight, scheme, method, importance)
    return _quantize(weight, importance, scheme, method, jnp.dtype(scale_dtype), order)


def matrix_shape(shape: tuple[int, ...], in_axes: int | None, stack_axes: int) -> tuple[int, ...]:
    """Returns the shape `[..., in, out]` of a weight whose `in` and `out` may be several axes each; see `quantize`."""
    if in_axes is None:
        if stack_axes:
            raise ValueError(f"quantize: stack_axes: got {stack_axes} without in_axes; accepted: with in_axes only")
        return shape
    most = len(shape) - 1 - stack_axes
    if stack_axes < 0 or not 1 <= in_axes <= most:
        raise ValueError(
            f"quantize: in_axes: got {in_axes}, with stack_axes = {stack_axes}, for a weight of shape {shape}; "
            f"accepted: 1 to {max(most, 1)}, and at least one axis after them"
        )
    stack, rest = shape[:stack_axes], shape[stack_axes:]
    return (*stack, math.prod(rest[:in_axes]), math.prod(rest[in_axes:]))


@functools.partial(jax.jit, static_argnames=("scheme", "method", "scale_dtype", "order"))
@usual_modes()
def _quantize(
    weight: jax.Array, importance: jax.Array | None, scheme: Scheme, method: Method, scale_dtype: Any, order: Order
) -> QuantizedArray:
    """Quantizes with valid arguments, in one program, so that few float32 copies of a weight exist at a time."""
    *lead, in_features, out_features = weight.shape
    groups = scheme.groups(in_features)
    size = in_features // groups
    grouped = weight.astype(jnp.float32).reshape(*lead, groups, size, out_features)
    finite = jnp.all(jnp.isfinite(grouped), axis=-2, keepdims=True)
    grouped = jnp.where(finite, flush_subnormals(grouped), 0.0)
    weighting: jax.Array | float = 1.0
    if importance is not None:
        weighting = importance.astype(jnp.float32).reshape(*importance.shape[:-1], groups, size, 1)
    if method == "absmax":
        factors = _fit(_extremes(grouped), scheme, scale_dtype)
    elif method == "mse":
        factors = _least_squared_error(grouped, scheme, scale_dtype, weighting)
    else:
        factors = _half_quadratic(grouped, scheme, scale_dtype, weighting)

    bad = ~finite | ~jnp.isfinite(factors.scales)
    if factors.minimums is not None:
        bad |= ~jnp.isfinite(factors.minimums)
    # A bad group gets the codes of zeros, because converting NaN to integers is not defined, and a scale of NaN.
    factors = jax.tree.map(lambda factor: jnp.where(bad, 0.0, factor), factors)
    codes = _encode(jnp.where(bad, 0.0, grouped), factors, scheme) + scheme.implied_zero
    if scheme.format == "mxfp4":
        # e8m0 holds the biased exponent in its eight bits, and 255 is its NaN.
        exponent = jnp.frexp(factors.scales)[1] - 1
        bits = jnp.where(bad, 255, jnp.clip(exponent, -126, 127) + 127).astype(jnp.uint8)
        scales, codes = jax.lax.bitcast_convert_type(bits, jnp.float8_e8m0fnu), encode_e2m1(codes)
    else:
        scales = jnp.where(bad, jnp.nan, factors.scales).astype(scale_dtype)
    codes = codes.astype(CODE_DTYPE[scheme.format]).reshape(weight.shape)
    squeeze = functools.partial(jnp.squeeze, axis=-2)
    return QuantizedArray(
        pack_nibbles(codes) if scheme.packed else codes,
        squeeze(scales),
        None if factors.zeros is None else squeeze(factors.zeros).astype(CODE_DTYPE[scheme.format]),
        None if factors.minimums is None else squeeze(factors.minimums).astype(scale_dtype),
        scheme,
    ).with_order(order)


def _check(weight: jax.Array, scheme: Scheme, method: str, importance: jax.Array | None) -> None:
    """Raises ValueError where the arguments of `quantize` are not valid."""
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"quantize: weight: got {weight.dtype}; accepted: a float dtype")
    if weight.ndim < 2:
        raise ValueError(f"quantize: weight must be [..., in, out], got shape {weight.shape}")
    check_in_features(weight.shape[-2], scheme)
    if method not in get_args(Method):
        raise ValueError(f"quantize: method: got {method!r}; accepted: {', '.join(get_args(Method))}")
    if method == "hqq" and scheme.offset != "minimums":
        raise ValueError(f"quantize: method 'hqq' moves minimums, {scheme} has none; use {scheme.format}-…-minimums")
    if importance is None:
        return
    if method == "absmax":
        raise ValueError("quantize: importance: method 'absmax' has no use for it; use 'mse' or 'hqq', or pass None")
    shapes = (weight.shape[-2:-1], weight.shape[:-1])
    if importance.shape not in shapes:
        raise ValueError(f"quantize: importance: got shape {importance.shape}; accepted: {shapes[0]} or {shapes[1]}")


def _extremes(grouped: jax.Array) -> _Extremes:
    """Returns the extremes of groups `[..., groups, size, out]`; they enclose 0, so that every zero point is a code."""
    low = jnp.minimum(jnp.min(grouped, axis=-2, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(grouped, axis=-2, keepdims=True), 0.0)
    return _Extremes(low, high, jnp.max(jnp.abs(grouped), axis=-2, keepdims=True))


def _code_range(scheme: Scheme) -> tuple[int, int]:
    """Returns the lowest and the highest code of an asymmetric scheme."""
    return (0, 15) if scheme.format == "int4" else (-128, 127)


def _fit(extremes: _Extremes, scheme: Scheme, scale_dtype: Any, shrink: Any = None) -> _Factors:
    """Returns the factors that map the shrunk extremes onto the extremes of the codes.

    Args:
      extremes: extremes of the groups.
      scheme: the scheme of the codes.
      scale_dtype: dtype that scales and minimums will be stored in.
      shrink: one of `SHRINKS`, or of `MXFP4_STEPS` for mxfp4; None for absmax.
    """
    low, high, absmax = extremes
    if scheme.format == "mxfp4":
        # The exponent of frexp is floor(log2) + 1, exactly; a logarithm may round up next to a power of two.
        exponent = jnp.frexp(absmax)[1] - 1 - MXFP4_LARGEST_EXPONENT + (0 if shrink is None else shrink)
        exponent = jnp.clip(jnp.where(absmax > 0, exponent, -126), -126, 127)
        return _Factors(jnp.ldexp(jnp.ones_like(absmax), exponent), None, None)
    if shrink is not None:
        low, high, absmax = low * shrink, high * shrink, absmax * shrink

    def stored(factor: jax.Array) -> jax.Array:
        return factor.astype(scale_dtype).astype(jnp.float32)

    if scheme.offset == "none":
        return _Factors(flush_subnormals(stored(absmax / largest_code(scheme))), None, None)
    lowest, highest = _code_range(scheme)
    scales = flush_subnormals(stored((high - low) / (highest - lowest)))
    if scheme.offset == "zeros":
        zeros = jnp.clip(jnp.round(lowest - low * reciprocal_or_zero(scales)), lowest, highest)
        return _Factors(scales, zeros, None)
    return _Factors(scales, None, stored(low - lowest * scales))


def _encode(grouped: jax.Array, factors: _Factors, scheme: Scheme) -> jax.Array:
    """Returns codes in float32 before the implied zero is added; those of float formats are not rounded yet."""
    inverse = reciprocal_or_zero(factors.scales)
    if scheme.format == "mxfp4":
        return grouped * inverse
    if scheme.offset == "none":
        largest = largest_code(scheme)
        return nearest_code(jnp.clip(grouped * inverse, -largest, largest), scheme)
    lowest, highest = _code_range(scheme)
    if factors.minimums is not None:
        return jnp.clip(jnp.round((grouped - factors.minimums) * inverse), lowest, highest)
    return jnp.clip(jnp.round(grouped * inverse) + factors.zeros, lowest, highest)


def _decode(codes: jax.Array, factors: _Factors, scheme: Scheme) -> jax.Array:
    """Returns the weights that the codes of `_encode` will dequantize to."""
    if scheme.format == "mxfp4":
        numbers = decode_codes(encode_e2m1(codes), scheme)
    else:
        numbers = codes if factors.zeros is None else codes - factors.zeros
    weights = numbers * factors.scales
    return weights if factors.minimums is None else weights + factors.minimums


def _least_squared_error(
    grouped: jax.Array, scheme: Scheme, scale_dtype: Any, weighting: jax.Array | float
) -> _Factors:
    """Returns, for each group, the factors with the least weighted squared error among all shrunk extremes."""
    extremes = _extremes(grouped)
    row = jnp.broadcast_to(weighting, (*grouped.shape[:-1], 1)).swapaxes(-1, -2)  # [..., groups, 1, size]
    candidates = jnp.asarray(MXFP4_STEPS if scheme.format == "mxfp4" else SHRINKS)

    def attempt(index: Any) -> tuple[jax.Array, _Factors]:
        factors = _fit(extremes, scheme, scale_dtype, candidates[index])
        error = _decode(_encode(grouped, factors, scheme), factors, scheme) - grouped
        # A matmul, because XLA on a CPU would fuse a sum with the computation of the error and not vectorize it.
        return jnp.matmul(row, error * error, precision=jax.lax.Precision.HIGHEST), factors

    def improve(index: Any, best: tuple[jax.Array, _Factors]) -> tuple[jax.Array, _Factors]:
        new = attempt(index)
        return jax.tree.map(functools.partial(jnp.where, new[0] < best[0]), new, best)

    return jax.lax.fori_loop(1, len(candidates), improve, attempt(0))[1]


def _half_quadratic(grouped: jax.Array, scheme: Scheme, scale_dtype: Any, weighting: jax.Array | float) -> _Factors:
    """Alternates between splitting outliers off the residual and fitting the minimum to the rest."""
    start = _fit(_extremes(grouped), scheme, scale_dtype)
    inverse = reciprocal_or_zero(start.scales)
    total = jnp.sum(jnp.broadcast_to(weighting, grouped.shape), axis=-2, keepdims=True)

    def residual(factors: _Factors) -> tuple[jax.Array, jax.Array]:
        """Returns the residual in units of a code, and its norm for each group."""
        error = (grouped - _decode(_encode(grouped, factors, scheme), factors, scheme)) * inverse
        return error, jnp.sum(weighting * jnp.abs(error) ** HQQ_NORM, axis=-2, keepdims=True)

    def improve(iteration: Any, carry: tuple[_Factors, _Factors, jax.Array]) -> tuple[Any, ...]:
        factors, best, least = carry
        error, _ = residual(factors)
        beta = HQQ_BETA * HQQ_KAPPA**iteration
        magnitude = jnp.abs(error)
        # The proximal operator of the norm: 0 for small residuals, nearly the residual itself for large ones.
        outliers = jnp.sign(error) * jnp.maximum(
            magnitude - jnp.where(magnitude > 0, magnitude, 1.0) ** (HQQ_NORM - 1) / beta, 0.0
        )
        rest = weighting * (error - outliers)
        shift = jnp.sum(rest, axis=-2, keepdims=True) * reciprocal_or_zero(total) * factors.scales
        minimums = (factors.minimums + shift).astype(scale_dtype).astype(jnp.float32)
        factors = factors._replace(minimums=minimums)
        _, norm = residual(factors)
        best = jax.tree.map(functools.partial(jnp.where, norm < least), factors, best)
        return factors, best, jnp.minimum(norm, least)

    _, best, _ = jax.lax.fori_loop(0, HQQ_ITERATIONS, improve, (start, start, residual(start)[1]))
    return best
