"""How weights are quantized: a `Scheme` names the format of codes, the groups that share a scale, and the offset."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

WeightFormat = Literal["int8", "int4", "float8_e4m3fn", "float8_e5m2", "mxfp4"]
Offset = Literal["none", "zeros", "minimums"]

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


def largest_code(scheme: Scheme) -> float:
    """Returns the code that a symmetric scheme gives the absolute maximum of a group."""
    if scheme.format in INTEGER_RANGE:
        return float(INTEGER_RANGE[scheme.format][1])
    return float(jnp.finfo(CODE_DTYPE[scheme.format]).max)


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


def nearest_code(x: jax.Array, scheme: Scheme) -> jax.Array:
    """Returns the nearest codes of numbers within their range, ties to even, float32: `astype` does not round them.

    XLA leaves out a conversion to a narrow float that is followed by one to a wider float, with all of its rounding.

    Args:
      x: float32 of any shape.
      scheme: one whose codes are integers or 8-bit floats.
    """
    if scheme.format in INTEGER_RANGE:
        return jnp.round(x)
    info = jnp.finfo(CODE_DTYPE[scheme.format])
    step = float(info.smallest_subnormal)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    return jnp.where(jnp.abs(x) < float(info.tiny), jnp.round(x / step) * step, normal)
