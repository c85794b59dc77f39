"""Quantized weights: the schemes, the array that holds them, and `dequantize`; `quantize` is in `quantizers.py`.

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
import re
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax.export import register_pytree_node_serialization
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from palladion.reference.e2m1 import decode_e2m1
from palladion.reference.mesh import check_pieces, padded
from palladion.reference.platforms import target_platform

WeightFormat = Literal["int8", "int4", "float8_e4m3fn", "float8_e5m2", "mxfp4"]
Offset = Literal["none", "zeros", "minimums"]
Order = Literal["in_out", "out_in"]
"""Storage order of a weight, the contiguous axis last."""

ORDERS: Final = ("in_out", "out_in")

PACK_BLOCK: Final = 32
"""Elements along `in` of a block of packed 4-bit codes."""

MXFP4_GROUP: Final = 32
"""Elements that share a power-of-two scale in the microscaling formats (OCP MX specification 1.0)."""

INT4_ZERO: Final = 8
"""Code of 0 in a symmetric int4 scheme."""

CODE_DTYPE: Final[dict[str, Any]] = {
    "int8": jnp.int8,
    "int4": jnp.uint8,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "mxfp4": jnp.uint8,
}
"""Dtype that stores the codes of a format; 4-bit formats store two codes in each uint8."""

PACKED_FORMATS: Final = ("int4", "mxfp4")
INTEGER_RANGE: Final = {"int8": (-127, 127), "int4": (-7, 7)}
"""Range of symmetric codes, before the implied zero of 8 is added to an int4 code."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Describes how a weight is quantized.

    Attributes:
      format: format of a code: "int8", "int4", "float8_e4m3fn", "float8_e5m2" or "mxfp4" (e2m1 with e8m0 scales).
      group_size: elements along `in` that share a scale; None means one scale per output channel. mxfp4 has 32.
      offset: "none" (symmetric), "zeros" (integer zero points in code units) or "minimums" (a float added to every
        weight of the group). Integer formats only.

    Raises:
      ValueError: the combination does not exist; the message says what is accepted.
    """

    format: WeightFormat
    group_size: int | None = None
    offset: Offset = "none"

    def __post_init__(self) -> None:
        if self.format not in CODE_DTYPE:
            raise ValueError(f"Scheme.format: got {self.format!r}; known formats: {', '.join(CODE_DTYPE)}")
        if self.offset not in ("none", "zeros", "minimums"):
            raise ValueError(f"Scheme.offset: got {self.offset!r}; accepted: 'none', 'zeros', 'minimums'")
        if self.offset != "none" and self.format not in INTEGER_RANGE:
            raise ValueError(f"Scheme.offset: {self.format} is symmetric, got {self.offset!r}; use int8 or int4")
        if self.format == "mxfp4":
            if self.group_size not in (None, MXFP4_GROUP):
                raise ValueError(f"Scheme.group_size: mxfp4 has groups of {MXFP4_GROUP}, got {self.group_size}")
            object.__setattr__(self, "group_size", MXFP4_GROUP)
        if self.group_size is not None and (self.group_size < 16 or self.group_size % 16):
            raise ValueError(f"Scheme.group_size: got {self.group_size}; accepted: None or a positive multiple of 16")

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Parses the name of a scheme, the inverse of `str`: "int8", "int4-g32", "int4-g128-zeros", "mxfp4", …

        Raises:
          ValueError: the text is not the name of a scheme.
        """
        if isinstance(text, Scheme):
            return text
        match = re.fullmatch(r"(?P<format>[a-z0-9_]+?)(-g(?P<group>\d+))?(-(?P<offset>zeros|minimums))?", text)
        aliases = {"float8": "float8_e4m3fn", "fp8": "float8_e4m3fn"}
        name = aliases.get(match["format"], match["format"]) if match else ""
        if match is None or name not in CODE_DTYPE:
            raise ValueError(
                f"scheme: got {text!r}; a scheme is FORMAT[-gGROUP][-zeros|-minimums] with FORMAT one of "
                f"{', '.join(CODE_DTYPE)}, for example 'int8', 'int4-g32' or 'int4-g32-minimums'"
            )
        group = int(match["group"]) if match["group"] else None
        return cls(name, group, match["offset"] or "none")  # type: ignore[arg-type]  # checked above

    def __str__(self) -> str:
        group = f"-g{self.group_size}" if self.group_size and self.format != "mxfp4" else ""
        return self.format + group + (f"-{self.offset}" if self.offset != "none" else "")

    @property
    def packed(self) -> bool:
        """Whether a byte stores two codes."""
        return self.format in PACKED_FORMATS

    @property
    def implied_zero(self) -> int:
        """Code of 0 where no zero points are stored."""
        return INT4_ZERO if self.format == "int4" and self.offset == "none" else 0

    def groups(self, in_features: int) -> int:
        """Returns the number of scales of an output channel of `in_features` weights."""
        return 1 if self.group_size is None else in_features // self.group_size

    def nbytes(self, in_features: int, out_features: int, scale_dtype: Any = jnp.bfloat16) -> int:
        """Returns the bytes of a weight `[in_features, out_features]`: codes, scales, zeros and minimums.

        Args:
          in_features: weights of an output channel.
          out_features: output channels.
          scale_dtype: dtype of scales and minimums; mxfp4 always has one-byte e8m0 scales.
        """
        codes = in_features * out_features // (2 if self.packed else 1)
        scale = 1 if self.format == "mxfp4" else jnp.dtype(scale_dtype).itemsize
        per_group = scale + {"none": 0, "zeros": 1, "minimums": scale}[self.offset]
        return codes + self.groups(in_features) * out_features * per_group


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "zeros", "minimums"],
    meta_fields=["scheme", "order"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight matrix, logically `[in, out]`, stored in few bits. A pytree; `scheme` is static.

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
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and minimums."""
        parts = (self.values, self.scales, self.zeros, self.minimums)
        return sum(part.size * part.dtype.itemsize for part in parts if part is not None)

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


def largest_code(scheme: Scheme) -> float:
    """Returns the code that a symmetric scheme gives the absolute maximum of a group."""
    if scheme.format in INTEGER_RANGE:
        return float(INTEGER_RANGE[scheme.format][1])
    return float(jnp.finfo(CODE_DTYPE[scheme.format]).max)


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
    codes = (jnp.round(scaled) if scheme.format in INTEGER_RANGE else scaled).astype(dtype)
    return codes, jnp.where(finite, scales, jnp.nan)


def flush_subnormals(x: jax.Array) -> jax.Array:
    """Replaces subnormal numbers by 0, as some platforms do anyway, so that all compute the same."""
    return jnp.where(jnp.abs(x) < jnp.finfo(x.dtype).tiny, 0.0, x)


def reciprocal_or_zero(x: jax.Array) -> jax.Array:
    """Returns 1 / x, or 0 where x is 0: a group of zeros then quantizes to zeros, not to NaN."""
    return jnp.where(x == 0, 0.0, 1.0 / jnp.where(x == 0, 1.0, x))


def check_in_features(in_features: int, scheme: Scheme) -> None:
    """Raises ValueError where `in` is not a multiple of the scheme's group size and packing block."""
    if scheme.group_size is not None and in_features % scheme.group_size:
        divisors = [size for size in (128, 64, 32, 16) if in_features % size == 0]
        way_out = f"group sizes that divide it: {divisors}" if divisors else "use a per-channel scheme"
        raise ValueError(f"{scheme}: in = {in_features} is not a multiple of group_size; {way_out}")
    if scheme.packed and in_features % PACK_BLOCK:
        raise ValueError(
            f"{scheme}: 4-bit codes are packed in blocks of {PACK_BLOCK}, got in = {in_features}; pad `in` or use int8"
        )
