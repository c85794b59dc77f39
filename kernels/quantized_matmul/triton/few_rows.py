"""The form for one to four rows: a quantized weight `[out, in]` as threads read and multiply it.

`gpu_rows.py` draws the kernel: how work is cut into a grid, what is resident where, what bounds it. A thread's 16 bytes
of a channel are 16 weights of 8 bits, or the 32 of a packing block; `byte_products.py` multiplies them. Scales, zeros
and minimums of a group meet the sum of a segment, the weights of a thread that lie in one group: all of them, but where
4-bit codes have groups of 16, or of no multiple of 32. There the two nibbles of a byte are two segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from palladion.kernels import gpu_rows
from palladion.kernels.gpu_ptx import Ptx
from palladion.kernels.gpu_rows import MAX_ROWS, Norm, Share, add_up, columns, load, read
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.triton.byte_products import Bytes, Floats, Operand
from palladion.kernels.quantized_matmul.triton.config import Config
from palladion.kernels.quantized_matmul.triton.refs import Refs, finish, read_scales
from palladion.kernels.types import Ref
from palladion.reference.scheme import PACK_BLOCK, Scheme


def covers(problem: Problem) -> bool:
    """Returns whether this form can run a problem; sums of rows of int8 must be exact in int32."""
    return problem.rows <= MAX_ROWS and problem.quantize_x != "int8"


def can_normalize(problem: Problem) -> bool:
    """Returns whether this form can normalize x itself; x that is quantized must be normalized before."""
    return problem.quantize_x is None


def can_multiply_bytes(problem: Problem) -> bool:
    """Whether results show nothing of x in 16 bits a number, and codes are integers, or mxfp4."""
    p = problem
    narrow = "float32" not in (p.x_dtype, p.out_dtype) and p.quantize_x is None
    return narrow and p.scheme.format in ("int8", "int4", "mxfp4")


class Factors(NamedTuple):
    """The factors of a segment, float32 `[threads]`; None where the scheme has none."""

    scale: jax.Array | None
    zero: jax.Array | None
    minimum: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Codes:
    """The weight of `gpu_rows.multiply`.

    Attributes:
      ref: the arrays.
      problem: what is computed.
      multiplies: how.
      ptx: byte instructions.
    """

    ref: Refs
    problem: Problem
    multiplies: Floats | Bytes
    ptx: Ptx

    run = gpu_rows.LOAD_BYTES

    @property
    def per_thread(self) -> int:
        """Weights of a channel that a thread multiplies in a trip."""
        return per_thread(self.problem)

    @property
    def segments(self) -> int:
        """Parts of a thread's weights that may lie in different groups."""
        return 2 if self.problem.scheme.packed and self.problem.group_size % PACK_BLOCK else 1

    def load(self, share: Share, channels: Sequence[jax.Array]) -> list[tuple[jax.Array, list[Factors]]]:
        """Loads bytes of codes, int8 `[threads * 16]`, and the factors of their segments."""
        p, ref = self.problem, self.ref
        layer, per_byte = ref.layer[0], 2 if p.scheme.packed else 1
        place = share.places(self.run, self.run)
        mask = share.exist(place, p.in_features // per_byte)
        codes = [load(ref.codes, (layer, channel, place), mask) for channel in channels]
        codes = [jax.lax.bitcast_convert_type(stored, jnp.int8) for stored in codes]
        factors = [[self._factors(share, channel, n) for n in range(self.segments)] for channel in channels]
        return list(zip(self.ptx.together(codes), factors, strict=True))

    def _factors(self, share: Share, channel: jax.Array, segment: int) -> Factors:
        p, ref = self.problem, self.ref
        if not scales_segments(p.scheme) and ref.zeros is None:
            return Factors(None, None, None)
        start = share.starts(self.per_thread) + segment * self.run
        place = (ref.layer[0], channel, jax.lax.div(start, jnp.int32(p.group_size)))
        mask = share.exist(start, p.in_features)
        return Factors(
            read_scales(ref.scales, place, mask) if scales_segments(p.scheme) else None,
            None if ref.zeros is None else read(ref.zeros, place, mask),
            None if ref.minimums is None else read(ref.minimums, place, mask),
        )

    def operand(self, runs: Sequence[jax.Array]) -> list[Operand]:
        """Returns x as operands, one for each segment."""
        quads = [columns(run, 4) for run in runs]
        if self.problem.scheme.format == "mxfp4":
            low, high = quads  # nibbles of a byte stay side by side
            quads = [[low[i], high[i], low[i + 1], high[i + 1]] for i in (0, 2)]
        return [self.multiplies.operand(segment) for segment in self._segmented(quads)]

    def products(self, loaded: tuple[jax.Array, list[Factors]], operands: Sequence[Any]) -> list[jax.Array]:
        """Returns the sum of a thread's scaled products for each row of x."""
        codes, factors = loaded
        weights = self._segmented(self.multiplies.weights(codes, self.ref.layer[0]))
        return [
            add_up([self._scaled(*segment) for segment in zip(weights, operand, factors, strict=True)])
            for operand in operands
        ]

    def _segmented(self, of_words: Sequence[Any]) -> list[Sequence[Any]]:
        """Returns what belongs to words of codes, by segment."""
        length = len(of_words) // self.segments
        return [of_words[start : start + length] for start in range(0, len(of_words), length)]

    def _scaled(self, weights: Any, x: Operand, factors: Factors) -> jax.Array:
        product = self.multiplies.product(weights, x)
        left: Any = self.multiplies.left
        left = left if factors.zero is None else factors.zero + left
        product = product if isinstance(left, int) and left == 0 else product - left * x.total
        product = product * 0.5 if self.problem.scheme.format == "mxfp4" else product
        product = product if factors.scale is None else product * factors.scale
        return product if factors.minimum is None else product + factors.minimum * x.total


def kernel(ref: Refs, out: Ref, *, problem: Problem, config: Config, native: bool) -> None:
    """Computes a block of channels.

    Args:
      ref: the inputs.
      out: `[rows, result_features]`.
      problem: what is computed.
      config: block sizes, and how codes are multiplied.
      native: whether the kernel is compiled, and not interpreted.
    """
    p, ptx = problem, Ptx(native)
    exact = p.out_dtype == "float32"
    multiplies = Bytes(p.scheme, ptx) if config.multiply == "bytes" else Floats(p.scheme, ptx, exact)

    def finished(m: int, products: list[jax.Array], channel: jax.Array, real: jax.Array | None) -> jax.Array:
        x_scale = None if ref.x_scale is None else plgpu.load(ref.x_scale.at[jnp.int32(m)])
        (result,) = finish(ref, p, products, channel, real, x_scale, splits=1)
        return result if ref.residual is None else result + read(ref.residual, (m, channel), real)

    weight = Codes(ref, p, multiplies, ptx)
    norm = None if p.norm_eps is None else Norm(ref.norm, p.norm_eps)
    how: dict[str, Any] = {"block_out": config.block_out, "num_warps": config.num_warps, "ahead": config.ahead}
    gpu_rows.multiply(ref.x, out, weight, finished, problem=p, norm=norm, **how)


def per_thread(problem: Problem) -> int:
    """Returns the weights of a channel that a thread multiplies in a trip: 16 bytes of codes."""
    return gpu_rows.LOAD_BYTES * (2 if problem.scheme.packed else 1)


def scales_segments(scheme: Scheme) -> bool:
    """Whether sums of segments are scaled, and not the whole sum."""
    return scheme.group_size is not None or scheme.offset == "minimums"
