"""Splits the blocks of GGUF's quantized tensor types into codes, scales and minimums, without loss.

A row of weights is a sequence of blocks of 32 or 256 weights. Where a type has a scale for the block and small integers
that multiply it for parts of the block, their product is exact in float32: 11 bits of a float16 times at most 8 bits.

    type      weights a scale   bits a weight    scheme                  bits a weight then
    Q4_0      32                4.5              int4-g32                4.5
    Q4_1      32                5                int4-g32-minimums       5
    Q5_0      32                5.5              int8-g32                8.5
    Q5_1      32                6                int8-g32-minimums       9
    Q8_0      32                8.5              int8-g32                8.5
    Q2_K      16                2.6              int4-g16-minimums       8
    Q3_K      16                3.4              int4-g16                6
    Q4_K      32                4.5              int4-g32-minimums       6
    Q5_K      32                5.5              int8-g32-minimums       10
    Q6_K      16                6.6              int8-g16                10
    IQ4_NL    32                4.5              int8-g32                8.5
    IQ4_XS    32                4.25             int8-g32                9
    MXFP4     32                4.25             mxfp4                   4.25
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np

from palladion.model.quantized_codes import pack_codes
from palladion.reference.scheme import Scheme

IQ4_LEVELS: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Weights, in units of the scale, of the 16 codes of IQ4_NL and IQ4_XS."""


class Split(NamedTuple):
    """The parts of some blocks `[rows, blocks, bytes]`.

    Attributes:
      values: codes `[rows, blocks, n]`; 4-bit codes are packed as in a `QuantizedArray`.
      scales: `[rows, blocks, groups]`.
      minimums: like scales, or None.
    """

    values: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A tensor type that a `QuantizedArray` holds without loss.

    Attributes:
      scheme: the scheme of the `QuantizedArray`.
      weights: weights per block.
      split: splits blocks of bytes, uint8 `[rows, blocks, bytes]`.
    """

    scheme: Scheme
    weights: int
    split: Callable[[np.ndarray], Split]


def _float16(blocks: np.ndarray, start: int) -> np.ndarray:
    """Returns the float16 numbers, one a block, at a byte: `[rows, blocks, 1]`."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)


def _planes(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Unpacks codes of few bits: each run of bytes holds a run of codes in its lowest bits, the next run above them."""
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(*packed.shape[:-1], -1)


def _split_4(blocks: np.ndarray) -> Split:
    return Split(blocks[..., 2:], _float16(blocks, 0))


def _split_4_minimums(blocks: np.ndarray) -> Split:
    return Split(blocks[..., 4:], _float16(blocks, 0), _float16(blocks, 2))


def _split_8(blocks: np.ndarray) -> Split:
    return Split(blocks[..., 2:].view(np.int8), _float16(blocks, 0))


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """Returns codes of 5 bits: 4 bytes with a bit of each, then their low four bits."""
    high = np.unpackbits(blocks[..., start : start + 4], axis=-1, bitorder="little")
    return _planes(blocks[..., start + 4 :], 4, 16) | (high << 4)


def _split_5(blocks: np.ndarray) -> Split:
    return Split(_fifth_bits(blocks, 2).view(np.int8) - np.int8(16), _float16(blocks, 0))


def _split_5_minimums(blocks: np.ndarray) -> Split:
    return Split(_fifth_bits(blocks, 4).view(np.int8), _float16(blocks, 0), _float16(blocks, 2))


def _split_mxfp4(blocks: np.ndarray) -> Split:
    # The file's e2m1 numbers are doubled and its scales halved, which the codes do not show.
    return Split(blocks[..., 1:], np.ascontiguousarray(blocks[..., :1]).view(jnp.float8_e8m0fnu))


def _iq4_codes(packed: np.ndarray) -> np.ndarray:
    return np.array(IQ4_LEVELS, np.int8)[_planes(packed, 4, 16)]


def _split_iq4_nl(blocks: np.ndarray) -> Split:
    return Split(_iq4_codes(blocks[..., 2:]), _float16(blocks, 0))


def _split_iq4_xs(blocks: np.ndarray) -> Split:
    """Splits: scale; two high bits of eight factors; their four low bits; codes."""
    high = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    factors = _planes(blocks[..., 4:8, None], 4, 1).reshape(*blocks.shape[:-1], 8)
    factors = factors | ((high & 3).astype(np.uint8) << 4)
    return Split(_iq4_codes(blocks[..., 8:]), _scaled(blocks, 0, factors.view(np.int8) - np.int8(32)))


def _scaled(blocks: np.ndarray, start: int, factors: np.ndarray) -> np.ndarray:
    """Returns factors times the float16 numbers at a byte, in float32, exactly."""
    return _float16(blocks, start).astype(np.float32) * factors.astype(np.float32)


def _split_2_k(blocks: np.ndarray) -> Split:
    """Splits: 16 bytes, a factor of scales in the low and of minimums in the high nibble; codes; two scales."""
    factors = blocks[..., :16]
    scales, minimums = _scaled(blocks, 80, factors & 15), -_scaled(blocks, 82, factors >> 4)
    return Split(pack_codes(_planes(blocks[..., 16:80], 2, 32)), scales, minimums)


def _split_3_k(blocks: np.ndarray) -> Split:
    """Splits: third bits of codes; their low two bits; 16 factors of 6 bits; the scale."""
    high, low = _planes(blocks[..., :32], 1, 32), _planes(blocks[..., 32:96], 2, 32)
    # 8 bytes have the factors' low four bits, 4 bytes the high two.
    factors = _planes(blocks[..., 96:104], 4, 8) | (_planes(blocks[..., 104:108], 2, 4) << 4)
    # A code counts from -4, and an implied zero is 8.
    return Split(pack_codes(low + high * 4 + 4), _scaled(blocks, 108, factors.view(np.int8) - np.int8(32)))


def _factors_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns scales and minimums of Q4_K and Q5_K, `[rows, blocks, 8]`: products of two float16 with 6-bit factors.

    Bytes 4 to 8 have the first four factors of scales, and bytes 8 to 12 of minimums, in six bits. Their upper two bits
    are those of the other four factors, whose lower bits are the nibbles of bytes 12 to 16.
    """
    first, last = blocks[..., 4:12], blocks[..., 12:16]
    upper = (first >> 2) & 0x30
    scales = np.concatenate([first[..., :4] & 63, upper[..., :4] | (last & 15)], axis=-1)
    minimums = np.concatenate([first[..., 4:] & 63, upper[..., 4:] | (last >> 4)], axis=-1)
    return _scaled(blocks, 0, scales), -_scaled(blocks, 2, minimums)


def _split_4_k(blocks: np.ndarray) -> Split:
    return Split(pack_codes(_planes(blocks[..., 16:], 4, 32)), *_factors_k(blocks))


def _split_5_k(blocks: np.ndarray) -> Split:
    codes = _planes(blocks[..., 48:], 4, 32) | (_planes(blocks[..., 16:48], 1, 32) << 4)
    return Split(codes.view(np.int8), *_factors_k(blocks))


def _split_6_k(blocks: np.ndarray) -> Split:
    """Splits: low four bits of codes; high two bits; 16 factors of 8 bits; the scale."""
    codes = _planes(blocks[..., :128], 4, 64) | (_planes(blocks[..., 128:192], 2, 32) << 4)
    return Split(codes.view(np.int8) - np.int8(32), _scaled(blocks, 208, blocks[..., 192:208].view(np.int8)))


BLOCK_FORMATS: Final[Mapping[str, BlockFormat]] = {
    "Q4_0": BlockFormat(Scheme("int4", 32), 32, _split_4),
    "Q4_1": BlockFormat(Scheme("int4", 32, "minimums"), 32, _split_4_minimums),
    "Q5_0": BlockFormat(Scheme("int8", 32), 32, _split_5),
    "Q5_1": BlockFormat(Scheme("int8", 32, "minimums"), 32, _split_5_minimums),
    "Q8_0": BlockFormat(Scheme("int8", 32), 32, _split_8),
    "Q2_K": BlockFormat(Scheme("int4", 16, "minimums"), 256, _split_2_k),
    "Q3_K": BlockFormat(Scheme("int4", 16), 256, _split_3_k),
    "Q4_K": BlockFormat(Scheme("int4", 32, "minimums"), 256, _split_4_k),
    "Q5_K": BlockFormat(Scheme("int8", 32, "minimums"), 256, _split_5_k),
    "Q6_K": BlockFormat(Scheme("int8", 16), 256, _split_6_k),
    "IQ4_NL": BlockFormat(Scheme("int8", 32), 32, _split_iq4_nl),
    "IQ4_XS": BlockFormat(Scheme("int8", 32), 256, _split_iq4_xs),
    "MXFP4": BlockFormat(Scheme("mxfp4"), 32, _split_mxfp4),
}
"""The types by their names in GGUF."""


def split_rows(rows: np.ndarray, in_features: int, block_format: BlockFormat, at_once: int) -> Split:
    """Splits rows of a type, some at a time, which bounds the memory needed beside the result.

    Args:
      rows: uint8 `[out, bytes]`.
      in_features: weights of a row.
      block_format: the rows' type.
      at_once: weights split at a time.

    Returns:
      The parts `[out, n]` and `[out, groups]` of a `QuantizedArray` in the order "out_in".
    """
    blocks = rows.reshape(len(rows), in_features // block_format.weights, -1)
    step = max(1, at_once // in_features)
    pieces = [block_format.split(blocks[start : start + step]) for start in range(0, len(rows), step)]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([part.reshape(len(part), -1) for part in parts])

    values, scales, minimums = zip(*pieces, strict=True)
    return Split(join(values), join(scales), None if minimums[0] is None else join(minimums))
