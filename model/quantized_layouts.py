"""How published checkpoints store the parts of a quantized weight: GPTQ, AWQ, compressed-tensors and fp8.

GPTQ               qweight int32 [in / n, out], a word holds n = 32 / bits codes along `in`, the first in its lowest
                   bits; qzeros int32 [groups, out / n], packed along `out`, less one in the first version of the
                   format; scales [groups, out]; g_idx int32 [in], the group of each row
AWQ                qweight int32 [in, out / 8] and qzeros int32 [groups, out / 8], packed along `out` in the order
                   0 2 4 6 1 3 5 7; scales [groups, out]
compressed-tensors weight_packed int32 [out, in / n], codes plus 2^(bits - 1), along `in`; weight_scale
                   [out, groups]; weight_zero_point int32 [out / n, groups], packed along `out`, or int8; or weight
                   int8 or float8 [out, in] with weight_scale [out, groups], [out, 1] or [1]; mxfp4 has uint8
                   [out, in / 2], two neighbours a byte, and weight_scale uint8 exponents [out, in / 32]
fp8                weight float8 [out, in] with weight_scale or weight_scale_inv, of one number, of one a channel,
                   or of one a block of weight_block_size; both are factors of the codes
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_files import CheckpointError, shorten
from palladion.model.quantized_codes import CodedWeight, Codes
from palladion.reference.scheme import MXFP4_GROUP, WeightFormat

AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output channel, in a run of eight, of each nibble of AWQ's words, the lowest first."""

FLOAT8: Final[Mapping[str, WeightFormat]] = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""Formats of codes by safetensors' names of types."""

SCALE_TYPES: Final = ("F32", "F16", "BF16")

IN_ACTIVATION_ORDER: Final = " in activation order"
"""Added to the names of formats whose groups are not of neighbouring rows, which no scheme has."""


class StoredPart(Protocol):
    """Describes a tensor in a file."""

    @property
    def file(self) -> Path:
        """Path of the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def kind(self) -> str:
        """Type of its numbers, as safetensors names it."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of one weight.

    Attributes:
      module: name of the linear layer.
      stored: where each part is.
      read: reads a part, unchanged.
    """

    module: str
    stored: Mapping[str, StoredPart]
    read: Callable[[str], np.ndarray]

    def fail(self, part: str, problem: str) -> CheckpointError:
        """Returns the error about a part, which may be missing."""
        file = self.stored.get(part, next(iter(self.stored.values()))).file
        return CheckpointError(f"{file}: tensor {shorten(f'{self.module}.{part}')} {problem}; take the original files")

    def shape(self, part: str, dims: int, kinds: tuple[str, ...]) -> tuple[int, ...]:
        """Returns the shape of a part that must have some type and number of dimensions."""
        if part not in self.stored:
            raise self.fail(part, "is missing")
        stored = self.stored[part]
        if stored.kind not in kinds:
            raise self.fail(part, f"has type {stored.kind}, but the format asks for {' or '.join(kinds)}")
        if len(stored.shape) != dims or 0 in stored.shape:
            raise self.fail(part, f"has shape {list(stored.shape)}, but the format asks for {dims} dimensions")
        return stored.shape

    def expect(self, part: str, shape: tuple[int, ...], kinds: tuple[str, ...]) -> None:
        """Checks that a part has a type and a shape."""
        given = self.shape(part, len(shape), kinds)
        if given != shape:
            raise self.fail(part, f"has shape {list(given)}, but the other parts and the config ask for {list(shape)}")


class Layout(Protocol):
    """A way to store a quantized weight."""

    def open(self, parts: Parts) -> CodedWeight:
        """Checks the shapes of a weight's parts; raises CheckpointError that names the one that is wrong."""


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unpacks the codes of int32 words along an axis, the lowest bits first: uint8."""
    bytes_of = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint8)  # files are little-endian
    if bits == 4:
        bytes_of = np.stack([bytes_of & 15, bytes_of >> 4], axis=-1).reshape(*bytes_of.shape[:-1], -1)
    return np.moveaxis(bytes_of, -1, axis)


def _contiguous_groups(in_features: int, group_size: int) -> np.ndarray:
    return np.arange(in_features) // group_size


def _checked_groups(parts: Parts, name: str, groups: int) -> np.ndarray:
    """Reads the group of each row."""
    given = parts.read(name)
    if given.min() < 0 or given.max() >= groups:
        raise parts.fail(name, f"has groups {given.min()} to {given.max()}, but the scales have 0 to {groups - 1}")
    return given


def _coded(format_: WeightFormat, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Codes:
    """Returns unsigned codes and zero points in the dtype of their format."""
    if format_ == "int4":
        return Codes(codes, scales, zeros)
    # Codes from 0 to 255 become those from -128 to 127.
    return Codes((codes ^ 128).view(np.int8), scales, (zeros ^ 128).view(np.int8))


def _integers(bits: int) -> WeightFormat:
    return "int4" if bits == 4 else "int8"


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Weights of GPTQ.

    Attributes:
      bits: 4 or 8.
      group_size: weights of a channel that share a scale; -1 means all.
      first_version: whether zero points are stored less one.
    """

    bits: int
    group_size: int
    first_version: bool

    def open(self, parts: Parts) -> CodedWeight:
        """Implements `Layout.open`."""
        words, out = parts.shape("qweight", 2, ("I32",))
        in_features = words * 32 // self.bits
        size = in_features if self.group_size == -1 else self.group_size
        groups = math.ceil(in_features / size)
        parts.expect("scales", (groups, out), SCALE_TYPES)
        parts.expect("qzeros", (groups, out * self.bits // 32), ("I32",))
        of_rows = _contiguous_groups(in_features, size)
        label = f"GPTQ {self.bits}-bit"
        if "g_idx" in parts.stored:
            parts.expect("g_idx", (in_features,), ("I32",))
            given = _checked_groups(parts, "g_idx", groups)
            label += "" if (given == of_rows).all() else IN_ACTIVATION_ORDER
            of_rows = given

        def read() -> Codes:
            codes = np.ascontiguousarray(unpack(parts.read("qweight"), self.bits, 0).T)
            zeros = np.ascontiguousarray(unpack(parts.read("qzeros"), self.bits, 1).T)
            zeros = (zeros + np.uint8(self.first_version)) & np.uint8(2**self.bits - 1)
            return _coded(_integers(self.bits), codes, np.ascontiguousarray(parts.read("scales").T), zeros)

        return CodedWeight(label, (out, in_features), _integers(self.bits), of_rows, read)


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Weights of AWQ in 4 bits, in the layout of its matrix products.

    Attributes:
      group_size: weights of a channel that share a scale; -1 means all.
    """

    group_size: int

    def open(self, parts: Parts) -> CodedWeight:
        """Implements `Layout.open`."""
        in_features, words = parts.shape("qweight", 2, ("I32",))
        size = in_features if self.group_size == -1 else self.group_size
        groups = math.ceil(in_features / size)
        parts.expect("scales", (groups, words * 8), SCALE_TYPES)
        parts.expect("qzeros", (groups, words), ("I32",))
        # Channel c of a run is in nibble position[c].
        position = np.argsort(AWQ_ORDER)

        def channels(part: str) -> np.ndarray:
            codes = unpack(parts.read(part), 4, 1)  # [rows, out]
            runs = codes.reshape(len(codes), -1, 8)[..., position]
            return np.ascontiguousarray(runs.reshape(codes.shape).T)

        def read() -> Codes:
            return Codes(channels("qweight"), np.ascontiguousarray(parts.read("scales").T), channels("qzeros"))

        return CodedWeight("AWQ", (words * 8, in_features), "int4", _contiguous_groups(in_features, size), read)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Integers of compressed-tensors, packed in words.

    Attributes:
      bits: 4 or 8.
      group_size: weights of a channel that share a scale; None means all.
    """

    bits: int
    group_size: int | None

    def open(self, parts: Parts) -> CodedWeight:
        """Implements `Layout.open`."""
        parts.expect("weight_shape", (2,), ("I64", "I32"))
        out, in_features = (int(size) for size in parts.read("weight_shape"))
        if out < 1 or in_features < 1 or max(out, in_features) > 2**31:
            raise parts.fail("weight_shape", f"holds {out} and {in_features}, which is no shape")
        codes_a_word = 32 // self.bits
        parts.expect("weight_packed", (out, math.ceil(in_features / codes_a_word)), ("I32",))
        size = self.group_size or in_features
        groups = math.ceil(in_features / size)
        parts.expect("weight_scale", (out, groups), SCALE_TYPES)
        of_rows = _contiguous_groups(in_features, size)
        label = f"compressed-tensors int{self.bits}"
        if "weight_g_idx" in parts.stored:
            parts.expect("weight_g_idx", (in_features,), ("I32", "I64"))
            given = _checked_groups(parts, "weight_g_idx", groups)
            label += "" if (given == of_rows).all() else IN_ACTIVATION_ORDER
            of_rows = given
        zero_type = self._check_zeros(parts, out, groups)

        def read() -> Codes:
            codes = np.ascontiguousarray(unpack(parts.read("weight_packed"), self.bits, 1)[:, :in_features])
            middle = np.uint8(2 ** (self.bits - 1))
            zeros = np.full((out, groups), middle)
            if zero_type == "I32":
                zeros = np.ascontiguousarray(unpack(parts.read("weight_zero_point"), self.bits, 0)[:out])
            elif zero_type is not None:
                zeros = parts.read("weight_zero_point").view(np.uint8) + middle  # signed numbers
            return _coded(_integers(self.bits), codes, parts.read("weight_scale"), zeros)

        return CodedWeight(label, (out, in_features), _integers(self.bits), of_rows, read)

    def _check_zeros(self, parts: Parts, out: int, groups: int) -> str | None:
        """Returns the type of zero points, None where there are none."""
        if "weight_zero_point" not in parts.stored:
            return None
        kind = parts.stored["weight_zero_point"].kind
        rows = math.ceil(out * self.bits / 32) if kind == "I32" else out
        parts.expect("weight_zero_point", (rows, groups), ("I32", "I8"))
        return kind


@dataclasses.dataclass(frozen=True)
class PackedMXFP4:
    """The 4-bit floats of compressed-tensors, with powers of two as scales."""

    def open(self, parts: Parts) -> CodedWeight:
        """Implements `Layout.open`."""
        out, half = parts.shape("weight_packed", 2, ("U8",))
        in_features = 2 * half
        parts.expect("weight_scale", (out, math.ceil(in_features / MXFP4_GROUP)), ("U8", "F8_E8M0"))

        def read() -> Codes:
            pairs = parts.read("weight_packed")
            codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(out, in_features)
            return Codes(codes, parts.read("weight_scale").view(jnp.float8_e8m0fnu))

        groups = _contiguous_groups(in_features, MXFP4_GROUP)
        return CodedWeight("mxfp4", (out, in_features), "mxfp4", groups, read)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Codes of a byte each, in a weight of the usual name and shape.

    Attributes:
      kinds: types of codes, as safetensors names them.
      block: rows and columns of the blocks that share a scale; None where scales are those of channels or groups.
    """

    kinds: tuple[str, ...]
    block: tuple[int, int] | None = None

    def open(self, parts: Parts) -> CodedWeight:
        """Implements `Layout.open`."""
        out, in_features = parts.shape("weight", 2, self.kinds)
        format_ = FLOAT8.get(parts.stored["weight"].kind, "int8")
        name = "weight_scale_inv" if "weight_scale_inv" in parts.stored else "weight_scale"
        if name not in parts.stored:
            raise parts.fail(name, "or weight_scale_inv is missing")
        blocks, size = self._scales(parts, name, out, in_features)
        if "weight_zero_point" in parts.stored:
            parts.expect("weight_zero_point", parts.stored[name].shape, ("I8",))
        across = self.block[0] if self.block else math.ceil(out / blocks[0])

        def spread(array: np.ndarray) -> np.ndarray:
            """Repeats numbers of blocks for each channel and group."""
            rows = np.repeat(array.reshape(blocks), across, axis=0)[:out]
            groups = _contiguous_groups(in_features, size)[:: self._group(size, in_features)]
            return np.ascontiguousarray(rows[:, groups])

        def read() -> Codes:
            zeros = spread(parts.read("weight_zero_point")) if "weight_zero_point" in parts.stored else None
            return Codes(parts.read("weight"), spread(parts.read(name)), zeros)

        groups = _contiguous_groups(in_features, self._group(size, in_features))
        blocked = f" in blocks of {self.block[0]} x {self.block[1]}" if self.block else ""
        return CodedWeight(f"{format_}{blocked}", (out, in_features), format_, groups, read)

    def _scales(self, parts: Parts, name: str, out: int, in_features: int) -> tuple[tuple[int, int], int]:
        """Returns the shape `[blocks of out, blocks of in]` of scales, and the columns of a block."""
        if self.block is not None:
            shape = (math.ceil(out / self.block[0]), math.ceil(in_features / self.block[1]))
            parts.expect(name, shape, SCALE_TYPES)
            return shape, self.block[1]
        given = parts.stored[name].shape
        parts.shape(name, len(given), SCALE_TYPES)
        if math.prod(given) == 1:
            return (1, 1), in_features
        if given in ((out,), (out, 1)):
            return (out, 1), in_features
        if len(given) == 2 and given[0] == out and in_features % given[1] == 0:
            return (out, given[1]), in_features // given[1]
        raise parts.fail(
            name, f"has shape {list(given)}, but a weight of {[out, in_features]} has scales [1], [{out}, 1] or groups"
        )

    @staticmethod
    def _group(size: int, in_features: int) -> int:
        """Returns the size of groups for columns of blocks, of which the last may be narrower."""
        return size if in_features % size == 0 else math.gcd(size, in_features)
