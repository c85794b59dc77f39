"""Validation that operations share. Each message names the argument, what was given and what is accepted."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check(right: bool, argument: str, given: Any, accepted: str) -> None:
    """Raises ValueError unless an argument is right."""
    if not right:
        raise ValueError(f"{argument}: got {given}; accepted: {accepted}")


def has_entries(array: jax.Array) -> bool:
    """Returns whether no size of an array is 0; a symbolic size is at least 1."""
    return all(size >= 1 for size in array.shape)


def check_shape(argument: str, array: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless an array has this shape."""
    check(array.shape == shape, argument, f"shape {array.shape}", f"{shape}, {meaning}")


def check_number(argument: str, value: Any, right: Callable[[Any], bool], accepted: str) -> None:
    """Raises ValueError unless an option is None or a number, known while tracing, that satisfies `right`."""
    if isinstance(value, jax.core.Tracer):
        known = "a number that is known while tracing: close over it, or make it a static argument"
        check(False, argument, "a traced value", known)
    is_number = isinstance(value, numbers.Real | np.ndarray | jax.Array) and getattr(value, "ndim", 0) == 0
    check(value is None or (is_number and bool(right(value))), argument, repr(value), accepted)


def check_power_of_two(argument: str, value: int, least: int = 1) -> None:
    """Raises ValueError unless a number is a power of two of at least `least`."""
    accepted = "a power of two" if least == 1 else f"a power of two of at least {least}"
    check(value >= least and value & (value - 1) == 0, argument, value, accepted)


def check_num_warps(argument: str, value: int) -> None:
    """Raises ValueError unless a program of a Triton kernel can have that many warps."""
    check(value in (1, 2, 4, 8, 16), argument, value, "1, 2, 4, 8 or 16")


def is_integer(value: Any) -> bool:
    """Returns whether the type of a number is an integer type."""
    if isinstance(value, np.ndarray | jax.Array):
        return value.dtype.kind in "iu"
    return isinstance(value, numbers.Integral)


def check_lengths(lengths: jax.Array, batch: int, max_len: int) -> None:
    """Raises ValueError unless lengths are int32 `[batch]` and, where their values are known, in 0 to max_len."""
    check_shape("lengths", lengths, (batch,), "[batch], or a scalar for all sequences")
    check(lengths.dtype == jnp.int32, "lengths", lengths.dtype, "int32")
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        outside = values[(values < 0) | (values > max_len)]
        check(outside.size == 0, "lengths", outside.tolist(), f"0 to {max_len}, the tokens that the cache has room for")


def check_written(lengths: jax.Array, new_tokens: jax.Array | None) -> None:
    """Raises ValueError where an append is known to write nothing although it has new tokens.

    Args:
      lengths: `[batch]`.
      new_tokens: `[batch]`; None means that all are new.
    """
    if isinstance(lengths, jax.core.Tracer) or isinstance(new_tokens, jax.core.Tracer):
        return
    has_new = new_tokens is None or bool(np.any(np.asarray(new_tokens) > 0))
    accepted = (
        "tokens in the cache after this call, the new ones included: with no length above 0 nothing would be written"
    )
    check(not has_new or bool(np.any(np.asarray(lengths) > 0)), "lengths", np.asarray(lengths).tolist(), accepted)


def swapped_layout(name: str, shape: tuple[int, ...], are_kv_heads: Callable[[int], bool], paged: bool) -> str:
    """Returns the end of a message about heads that do not fit: that tokens and heads of the cache were swapped.

    Args:
      name: the caller's name of the cache's keys.
      shape: `[..., kv_heads, max_len or page_size, head_dim]`, as given.
      are_kv_heads: whether a number of KV heads fits the other arguments.
      paged: whether the cache has pages.

    Returns:
      The end of the message; empty where swapping would not help either.
    """
    if not are_kv_heads(shape[-2]):
        return ""
    slabs, tokens = ("num_pages", "page_size") if paged else ("batch", "max_len")
    return (
        f". {name} of shape {shape} is probably [{slabs}, {tokens}, kv_heads, head_dim], but [{slabs}, kv_heads, "
        f"{tokens}, head_dim] is meant: jnp.swapaxes({name}, -3, -2), and so for the values, makes it that"
    )


def check_layer(layer: jax.Array, num_layers: int) -> None:
    """Raises ValueError unless a layer is an int32 scalar and, where its value is known, one of num_layers."""
    check(layer.shape == () and layer.dtype == jnp.int32, "layer", layer.aval, "an int32 scalar")
    if not isinstance(layer, jax.core.Tracer):
        check(0 <= int(layer) < num_layers, "layer", int(layer), f"0 to {num_layers - 1}")


def dtype_name(array: jax.Array) -> str:
    """Returns the name of an array's dtype, for example "bfloat16"."""
    return jnp.dtype(array.dtype).name


def as_int32(argument: str, x: Any) -> jax.Array:
    """Returns numbers as a jax.Array, and 64-bit integers, which are Python's with x64, as int32; see `as_array`."""
    array = as_array(argument, x)
    with jax.ensure_compile_time_eval():  # known values stay known
        return array.astype(jnp.int32) if array.dtype == jnp.int64 else array


def as_lengths(lengths: Any, batch: int) -> jax.Array:
    """Returns lengths as a jax.Array; one length is that of each sequence of the batch."""
    array = as_int32("lengths", lengths)
    with jax.ensure_compile_time_eval():
        return jnp.broadcast_to(array, (batch,)) if array.ndim == 0 else array


def as_array(argument: str, x: Any, dtype: Any = None) -> jax.Array:
    """Returns an array or nested list as a jax.Array; raises ValueError for anything else."""
    try:
        return jnp.asarray(x, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: got {type(x).__name__}; accepted: an array") from error
