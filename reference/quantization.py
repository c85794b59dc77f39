"""Quantized weights: the array that holds them, its transpose, and `dequantize`; `quantize` is in `quantizers.py`.

All schemes share a formula. A weight is stored as a *code* of few bits; along `in`, a group of codes shares a scale:

    weight[i, o] = scales[g, o] * (code[i, o] - zero[g, o]) + minimum[g, o]        g = i // group_size

An asymmetric scheme has either `zero` or `minimum`; a symmetric one has neither. A symmetric int4 code is stored with
an implied zero of 8, so that every 4-bit code is an unsigned nibble.

A weight is logically `[in, out]`, and stored in one of two orders:

    "in_out"   `out` contiguous. Each vector lane of a TPU or CPU holds an output channel, a row of codes is multiplied
               by one activation, and no sum runs across lanes
    "out_in"   `in` contiguous. A GPU reads whole cache lines of one channel, words of codes meet words of activations,
               and tensor cores take the weights as their left operand as they lie

The second is the first with the last two axes of every part swapped, and nothing else. 4-bit codes are packed two to a
byte along `in`, in blocks of 32: byte j of a block holds element j in its low and element j + 16 in its high nibble.
GGUF's Q4_0, Q4_1 and MXFP4 blocks have the same order, so their codes are copied unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, Final, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import register_pytree_node_serialization
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from palladion.reference.e2m1 import decode_e2m1
from palladion.reference.leading import MatrixStack
from palladion.reference.mesh import check_pieces, padded
from palladion.reference.platforms import target_platform
from palladion.reference.scheme import (
    CODE_DTYPE,
    PACK_BLOCK,
    Scheme,
    check_in_features,
    largest_code,
    nearest_code,
)
from palladion.reference.transposed import TransposedWeight

Order = Literal["in_out", "out_in"]
"""Storage order of a weight, the contiguous axis last."""

ORDERS: Final = ("in_out", "out_in")

Product = Callable[[Any, "QuantizedArray"], jax.Array]
"""Computes x @ w."""

_product: Product


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "zeros", "minimums"],
    meta_fields=["scheme", "order"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray(MatrixStack):
    """A weight matrix, logically `[in, out]`, stored in few bits. A pytree; `scheme` and `order` are static.

    It behaves as an array where it can:

    - `shape`, `ndim`, `dtype`, `size` and `nbytes` are those of the weights `[..., in, out]`.
    - `x @ w` is `palladion.quantized_matmul(x, w)`; `w.T @ x` is the same for code that has weights as `[out, in]`.
    - `w[i]` is a matrix of a stack, as a copy (`quantized_matmul(x, w, layer=i)` makes none); `for` loops over a stack.
    - `==` is one bool: scheme, order, shapes, dtypes and all numbers are the same, NaN equal to NaN.

    Attributes:
      values: the codes, `[..., in, out]` in the scheme's dtype, or `[..., in / 2, out]` uint8 for packed 4-bit codes.
        The NaN and infinite codes of float8 have no meaning: a group of NaN has a scale of NaN.
      scales: `[..., groups, out]`, a float dtype (float8_e8m0fnu for mxfp4); groups = 1 for per-channel schemes.
      zeros: `[..., groups, out]` zero points in code units (int8 for int8 codes, uint8 for int4), or None.
      minimums: `[..., groups, out]` floats added to every weight of a group, or None.
      scheme: the `Scheme` that the other attributes are to be read by.
      order: storage order of all parts. The shapes above are those of "in_out"; in "out_in" their last two axes are
        swapped, so that `in` and groups are contiguous.

    Leading dimensions are those of stacked weights, over which `scan` and `vmap` may run.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    minimums: jax.Array | None
    scheme: Scheme
    order: Order = "in_out"

    @property
    def in_features(self) -> int:
        """Weights of an output channel, packed or not."""
        return self.values.shape[in_axis(self.order)] * (2 if self.scheme.packed else 1)

    @property
    def out_features(self) -> int:
        """Number of output channels."""
        return self.values.shape[out_axis(self.order)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, `(..., in, out)`."""
        return (*self.values.shape[:-2], self.in_features, self.out_features)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype that the weights count as: that of the scales, float32 for mxfp4."""
        return jnp.dtype(jnp.float32 if self.scheme.format == "mxfp4" else self.scales.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and minimums."""
        # A framework's printed form of an array has no `size`.
        return sum(math.prod(part.shape) * jnp.dtype(part.dtype).itemsize for part in jax.tree.leaves(self))

    @property
    def mT(self) -> TransposedWeight:  # noqa: N802
        """The matrices as `[..., out, in]`: `w.mT @ x` and `w.mT.mT`, without a copy."""
        return TransposedWeight(self)

    @property
    def T(self) -> TransposedWeight:  # noqa: N802
        """The matrix as `[out, in]`: `w.T @ x` and `w.T.T`, without a copy. A stack has `mT` only."""
        self.check_is_matrix()
        return self.mT

    def select(self, key: tuple[Any, ...]) -> QuantizedArray:
        """Returns the matrices that an index of leading dimensions selects; `w[key]` checks the index first."""
        return jax.tree.map(lambda part: part[key], self)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Computes `palladion.quantized_matmul(x, w)`."""
        return _product(x, self)

    def __matmul__(self, x: Any) -> NoReturn:
        raise TypeError(
            f"w @ x: a QuantizedArray is [in, out], here {self.shape}, and stands on the right: x @ w; w.T @ x "
            "multiplies by weights that a model has as [out, in]"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizedArray):
            return NotImplemented
        mine, theirs = jax.tree.leaves(self), jax.tree.leaves(other)
        same_form = (self.scheme, self.order, len(mine)) == (other.scheme, other.order, len(theirs))
        return same_form and all(map(_is_same, mine, theirs))

    def __repr__(self) -> str:
        if all(hasattr(part, "shape") and hasattr(part, "dtype") for part in jax.tree.leaves(self)):
            held = f"{list(self.shape)}, {self.scales.dtype.name} scales, {self.nbytes} bytes"
        else:  # PartitionSpecs, shardings, or whatever a pytree of this structure holds
            parts = {name: getattr(self, name) for name in ("values", "scales", "zeros", "minimums")}
            held = ", ".join(f"{name}={part!r}" for name, part in parts.items() if part is not None)
        return f"QuantizedArray({self.scheme}, {self.order}, {held})"

    def with_order(self, order: Order) -> QuantizedArray:
        """Returns the same weights in another storage order: all parts transposed, or this array if it has the order.

        Args:
          order: "in_out" or "out_in"; `order_of_platform` names the one that a platform's kernels read.

        Raises:
          ValueError: the order is neither of them.
        """
        check_order(order)
        if order == self.order:
            return self
        return dataclasses.replace(jax.tree.map(lambda part: jnp.swapaxes(part, -1, -2), self), order=order)

    def specs(self, spec: PartitionSpec, mesh: Mesh | AbstractMesh | None = None) -> QuantizedArray:
        """Returns a QuantizedArray that holds the PartitionSpec of each part, for `in_specs`, `NamedSharding`s and jit.

        A device has whole groups then, and whole blocks of packed codes. Scales per channel have one group, which every
        device has where `in` is sharded.

        Args:
          spec: PartitionSpec of the logical shape `(..., in, out)`, whatever the storage order.
          mesh: mesh whose axes the spec names; None takes the current one, and checks nothing where there is none.

        Raises:
          ValueError: the spec has too many dimensions, or the mesh does not divide the shape into whole groups.
        """
        *lead, over_in, over_out = padded(spec, self.shape)
        piece = math.lcm(self.scheme.group_size or 1, PACK_BLOCK if self.scheme.packed else 1)
        check_pieces("in", self.in_features, piece, over_in, mesh)
        check_pieces("out", self.out_features, 1, over_out, mesh)
        over_groups = None if self.scheme.groups(self.in_features) == 1 else over_in

        def stored(along_in: Any) -> PartitionSpec:
            axes = (along_in, over_out) if self.order == "in_out" else (over_out, along_in)
            return PartitionSpec(*lead, *axes)

        parts = jax.tree.map(lambda _: stored(over_groups), self)
        return dataclasses.replace(parts, values=stored(over_in))

    def with_scale_dtype(self, dtype: Any) -> QuantizedArray:
        """Returns the same array with scales and minimums in another float dtype, rounded to it.

        Raises:
          ValueError: the scheme is mxfp4, whose scales have one dtype.
        """
        if self.scheme.format == "mxfp4":
            given = jnp.dtype(dtype).name
            raise ValueError(
                f"with_scale_dtype: dtype: got {given}; accepted: any dtype for other schemes, none for mxfp4: the "
                f"scales of mxfp4 are powers of two in float8_e8m0fnu"
            )
        minimums = None if self.minimums is None else self.minimums.astype(dtype)
        return dataclasses.replace(self, scales=self.scales.astype(dtype), minimums=minimums)


register_pytree_node_serialization(
    QuantizedArray,
    serialized_name="palladion.QuantizedArray",
    serialize_auxdata=lambda static: json.dumps([str(static[0]), static[1]]).encode(),
    deserialize_auxdata=lambda text: (Scheme.parse(json.loads(text)[0]), json.loads(text)[1]),
    from_children=lambda static, parts: QuantizedArray(*parts, *static),
)


def register_product(product: Product) -> None:
    """Sets the function that computes `x @ w`; the operation calls it, which is on a floor above."""
    global _product
    _product = product


def _is_same(part: Any, other: Any) -> bool:
    """Returns whether two parts of weights are the same: arrays by their numbers, others as they compare."""
    if part is other or not isinstance(part, jax.Array | np.ndarray):
        return part is other or bool(part == other)
    if (part.shape, part.dtype) != (getattr(other, "shape", None), getattr(other, "dtype", None)):
        return False
    return isinstance(other, jax.Array | np.ndarray) and np.array_equal(part, other, equal_nan=True)


def check_parts(w: QuantizedArray) -> None:
    """Raises ValueError where the arrays of a QuantizedArray, or stack of them, do not agree with scheme and order."""
    code_dtype = jnp.dtype(CODE_DTYPE[w.scheme.format])
    if w.values.dtype != code_dtype:
        raise ValueError(f"w.values: got {w.values.dtype}; accepted: {code_dtype.name}")
    if w.values.ndim < 2:
        raise ValueError(f"w.values: got shape {w.values.shape}; accepted: two or more dimensions")
    scale_dtype = jnp.float8_e8m0fnu if w.scheme.format == "mxfp4" else jnp.floating
    if not jnp.issubdtype(w.scales.dtype, scale_dtype):
        raise ValueError(f"w.scales: got {w.scales.dtype}; accepted: {scale_dtype.__name__} for {w.scheme}")
    *leading, in_features, out_features = w.shape
    check_in_features(in_features, w.scheme)
    groups = w.scheme.groups(in_features)
    shape = (*leading, groups, out_features) if w.order == "in_out" else (*leading, out_features, groups)
    parts = (("scales", True), ("zeros", w.scheme.offset == "zeros"), ("minimums", w.scheme.offset == "minimums"))
    for name, needed in parts:
        part: jax.Array | None = getattr(w, name)
        if (part is not None) != needed:
            raise ValueError(f"w.{name}: got {part is not None}; accepted: {needed} for {w.scheme}")
        if part is not None and part.shape != shape:
            accepted = f"{shape}, groups and out in the order of {w.order!r}"
            raise ValueError(f"w.{name}: got shape {part.shape}; accepted: {accepted}")


def in_axis(order: Order) -> int:
    """Returns the axis of a stored weight along which `in` and groups run, counted from the end."""
    return -2 if order == "in_out" else -1


def out_axis(order: Order) -> int:
    """Returns the axis of a stored weight along which `out` runs, counted from the end."""
    return -1 if order == "in_out" else -2


def order_of_platform(platform: str | None = None) -> Order:
    """Returns the storage order that the kernels of a platform read: "out_in" for "gpu", "in_out" for others.

    None means the platform that is being traced for.
    """
    return "out_in" if (platform or target_platform()) == "gpu" else "in_out"


def check_order(order: str) -> None:
    """Raises ValueError where a storage order is not one of `ORDERS`."""
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}; accepted: {', '.join(map(repr, ORDERS))}")


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Packs 4-bit codes `[..., in, out]` (0 to 15, any integer dtype) to uint8 `[..., in / 2, out]` by blocks of 32."""
    *lead, in_features, out_features = codes.shape
    halves = codes.astype(jnp.uint8).reshape(*lead, in_features // PACK_BLOCK, 2, PACK_BLOCK // 2, out_features)
    packed = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return packed.reshape(*lead, in_features // 2, out_features)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """Inverse of `pack_nibbles`: uint8 `[..., in / 2, out]` to 4-bit codes in uint8 `[..., in, out]`."""
    *lead, half, out_features = packed.shape
    blocks = packed.reshape(*lead, half * 2 // PACK_BLOCK, PACK_BLOCK // 2, out_features)
    return jnp.concatenate([blocks & 0xF, blocks >> 4], axis=-2).reshape(*lead, half * 2, out_features)


def unpack_codes(w: QuantizedArray) -> jax.Array:
    """Returns the codes of a QuantizedArray, unpacked: `[..., in, out]`; an implied zero is not subtracted."""
    values = w.with_order("in_out").values
    return unpack_nibbles(values) if w.scheme.packed else values


def decode_codes(codes: jax.Array, scheme: Scheme, zeros: jax.Array | None = None) -> jax.Array:
    """Converts codes to float32, exactly, and subtracts zero points; `zeros` broadcasts against `codes`."""
    if scheme.format == "mxfp4":
        return decode_e2m1(codes)
    decoded = codes.astype(jnp.float32)
    if zeros is not None:
        return decoded - zeros.astype(jnp.float32)
    return decoded - scheme.implied_zero if scheme.implied_zero else decoded


def dequantize(w: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
    """Computes the weights of a `QuantizedArray`.

    Args:
      w: the quantized weights, of logical shape `[..., in, out]`.
      dtype: dtype of the result; the arithmetic is float32.

    Returns:
      `[..., in, out]` in `dtype`.
    """
    w = w.with_order("in_out")
    codes = unpack_codes(w)
    *lead, _, out_features = codes.shape
    grouped = codes.reshape(*lead, w.scales.shape[-2], -1, out_features)  # [..., groups, group, out]
    weights = decode_codes(grouped, w.scheme, None if w.zeros is None else w.zeros[..., None, :])
    weights = weights * w.scales.astype(jnp.float32)[..., None, :]
    if w.minimums is not None:
        weights = weights + w.minimums.astype(jnp.float32)[..., None, :]
    return weights.reshape(codes.shape).astype(dtype)


def quantize_rows(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Quantizes each row by its absolute maximum: activations per token, cache entries per token and head.

    Args:
      x: `[..., n]`, float.
      dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
      codes `[..., n]` in `dtype` and float32 scales `[...]`, with `x ≈ codes * scales`. A row of zeros has scale 0; a
      row with a NaN or an infinity has scale NaN and codes of 0. Subnormal numbers and scales count as 0.
    """
    scheme = Scheme(jnp.dtype(dtype).name)  # Scheme rejects other dtypes
    x = x.astype(jnp.float32)
    largest = largest_code(scheme)
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    x = jnp.where(finite[..., None], flush_subnormals(x), 0.0)
    scales = flush_subnormals(jnp.max(jnp.abs(x), axis=-1) / largest)
    scaled = jnp.clip(x * reciprocal_or_zero(scales)[..., None], -largest, largest)
    codes = nearest_code(scaled, scheme).astype(dtype)
    return codes, jnp.where(finite, scales, jnp.nan)


def flush_subnormals(x: jax.Array) -> jax.Array:
    """Replaces subnormal numbers by 0, as some platforms do anyway, so that all compute the same."""
    return jnp.where(jnp.abs(x) < jnp.finfo(x.dtype).tiny, 0.0, x)


def reciprocal_or_zero(x: jax.Array) -> jax.Array:
    """Returns 1 / x, or 0 where x is 0: a group of zeros then quantizes to zeros, not to NaN."""
    return jnp.where(x == 0, 0.0, 1.0 / jnp.where(x == 0, 1.0, x))
