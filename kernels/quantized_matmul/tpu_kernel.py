"""The body of quantized_matmul's TPU kernel: what a grid step does with the blocks that lie in VMEM.

A step multiplies by a block of the weight, chunk after chunk along `in`. Products are scaled, or weights:

    products   p = x @ operand of a chunk;  y += (p - offset * sum(x)) * scale + sum(x) * minimum,  group by group
    weights    y += x @ (code - zero) * scale;  y += sums(x) @ minimums at the end

Scaled products cost the vector unit what the rows of x are, scaled weights what the weights are: products for few rows.
Groups that are smaller than the matrix unit is deep share a chunk: each has copies of the rows of x, with zeros in the
columns of the others, and so a product of its own. `Plan` says how these rows are stacked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.quantized_matmul.tpu_weights import SCALED, Widening, narrow_float, widenings
from palladion.kernels.tpu_layout import SUBLANES, round_up, tile_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up, and how the rows of x are stacked.

    Attributes:
      problem: the call.
      widening: name of the way to widen codes.
      block_rows: rows of x in a grid step.
      block_out: output channels of a grid step.
      block_in: weights along `in` of a grid step.
      chunk: weights along `in` that are multiplied at a time.
      lanes: output channels that are multiplied at a time.
    """

    problem: Problem
    widening: str
    block_rows: int
    block_out: int
    block_in: int
    chunk: int
    lanes: int

    @property
    def widen(self) -> Widening:
        """The widening of that name."""
        return widenings(self.problem.scheme)[self.widening]

    @property
    def scales_weights(self) -> bool:
        """Whether weights are scaled before they are multiplied, and not their products."""
        return self.widening == SCALED

    @property
    def x_operand(self) -> str:
        """The dtype in which x is multiplied."""
        if self.scales_weights:
            return self.problem.dot_dtype
        return "int8" if self.widen.operand == "int8" else "bfloat16"

    @property
    def pieces(self) -> int:
        """The bfloat16 numbers that a float32 x is split into: their 8 bits each are what the result shows of it."""
        if self.scales_weights or self.problem.quantize_x is not None or self.problem.x_dtype == "bfloat16":
            return 1
        return 3 if self.problem.out_dtype == "float32" else 2

    @property
    def together(self) -> int:
        """Groups that share a chunk, each with rows of x of its own."""
        if self.scales_weights or self.problem.scheme.group_size is None:
            return 1
        return self.chunk // self.problem.group_size

    @property
    def slots(self) -> int:
        """Groups whose rows share a tile of x."""
        tile = tile_rows(self.x_operand)
        fitting = tile // math.gcd(self.pieces * self.block_rows, tile)
        return fitting if self.together % fitting == 0 else 1

    @property
    def stacked_rows(self) -> int:
        """Rows of x as they are multiplied: by slot, then by piece; padded to whole tiles."""
        return round_up(self.slots * self.pieces * self.block_rows, tile_rows(self.x_operand))

    @property
    def masked(self) -> int:
        """Copies of the stacked rows that a chunk is multiplied with, each with columns of other groups."""
        return self.together // self.slots

    @property
    def in_blocks(self) -> int:
        """Grid steps along `in`."""
        return self.problem.in_features // self.block_in

    @property
    def groups(self) -> int:
        """Scales of an output channel in a grid step."""
        return 1 if self.problem.scheme.group_size is None else self.block_in // self.problem.group_size

    @property
    def needs_sums(self) -> bool:
        """Whether sums of x are needed, for what was added to codes or weights."""
        if self.scales_weights:
            return self.problem.scheme.offset == "minimums"
        return self.constant_offset != 0 or self.problem.scheme.offset != "none"

    @property
    def sum_blocks(self) -> int:
        """Blocks of sums along `in`: one where products are scaled after the last step."""
        return 1 if self.problem.scheme.group_size is None and not self.scales_weights else self.in_blocks

    @property
    def constant_offset(self) -> float:
        """What is in every operand too much, as far as it is the same in all."""
        return self.widen.offset + self.problem.scheme.implied_zero / self.widen.unit

    @property
    def sum_dtype(self) -> Any:
        """In what products are added up before they are scaled."""
        return jnp.int32 if self.x_operand == "int8" else jnp.float32

    @property
    def total_dtype(self) -> Any:
        """In what the steps along `in` are added up: products as they are where all of `in` shares a scale."""
        return self.sum_dtype if self.problem.scheme.group_size is None else jnp.float32

    def masks(self) -> np.ndarray:
        """Which columns of a chunk each stacked row keeps, as words of all ones: `[together / slots, words, chunk]`."""
        column = self.widen.arrange(np.arange(self.chunk) // self.problem.group_size, self.chunk)
        slot = np.arange(self.stacked_rows) // (self.pieces * self.block_rows)
        first = np.arange(0, self.together, self.slots)
        kept = column == (first[:, None] + slot)[:, :: tile_rows(self.x_operand) // SUBLANES, None]
        return -kept.astype(np.int32)


def kernel(
    layer_ref: Any,  # [1] in SMEM
    x_ref: Any,  # [1, in_blocks, stacked_rows, block_in]
    # As far as there are any: masks [together / slots, words, chunk]; sums of x [1, blocks, together * block_rows,
    # chunks], a row for each row of x and group of a chunk; scales of x [1, block_rows, 1]. Then for each part: codes
    # [1, rows, block_out], scales, zeros, minimums [1, groups, block_out] and bias [1, 1, block_out]. Then out
    # [block_rows, block_out], and where there are several steps along `in` a total of each part.
    *refs: Any,
    plan: Plan,
) -> None:
    """A grid step: multiplies its blocks, adds the product to those before, finishes after the last along `in`."""
    del layer_ref  # for the index maps
    p = plan.problem
    left = iter(refs)
    masks_ref = next(left) if plan.together > 1 else None
    step = pl.program_id(2)
    block = step if plan.in_blocks > 1 else 0
    sums_ref = next(left).at[0, block if plan.sum_blocks > 1 else 0] if plan.needs_sums else None
    x_scales_ref = next(left) if p.quantize_x is not None else None
    rows = _Rows(plan, x_ref.at[0, block], masks_ref, sums_ref)
    parts = [_Part.of(left, p) for _ in range(p.parts)]
    out_ref, *total_refs = left

    def finish(totals: list[jax.Array], lanes: slice) -> None:
        products = []
        for part, total in zip(parts, totals, strict=True):
            part = part.at(lanes)
            y = total
            if p.scheme.group_size is None and not plan.scales_weights:
                y = rows.scale(y.astype(jnp.float32), part, 0, 0)
            y = y if plan.widen.unit == 1 else y * plan.widen.unit
            if x_scales_ref is not None:
                y = y * x_scales_ref[0]
            products.append(y if part.bias is None else y + part.bias[0])
        out_ref[:, lanes] = p.finish(products).astype(out_ref.dtype)

    multiply = rows.times_scaled if plan.scales_weights else rows.times
    for first in range(0, plan.block_out, plan.lanes):
        lanes = slice(first, min(first + plan.lanes, plan.block_out))
        totals = [multiply(part.at(lanes)) for part in parts]
        if total_refs:
            for ref, total in zip(total_refs, totals, strict=True):
                ref[:, lanes] = jnp.where(step == 0, 0, ref[:, lanes]) + total
        else:
            finish(totals, lanes)

    if total_refs:

        @pl.when(step == plan.in_blocks - 1)
        def _() -> None:
            finish([ref[...] for ref in total_refs], slice(None))


@dataclasses.dataclass(frozen=True)
class _Part:
    """References to a block of the weight, and to what belongs to it."""

    problem: Problem
    codes: Any
    scale_ref: Any
    zero_ref: Any
    minimum_ref: Any
    bias: Any

    @classmethod
    def of(cls, left: Iterator[Any], problem: Problem) -> _Part:
        """Takes the references of a part off the list."""
        offset = problem.scheme.offset
        return cls(
            problem,
            next(left),
            next(left),
            next(left) if offset == "zeros" else None,
            next(left) if offset == "minimums" else None,
            next(left) if problem.has_bias else None,
        )

    def at(self, lanes: slice) -> _Part:
        """The same for some of the channels."""
        refs = (self.codes, self.scale_ref, self.zero_ref, self.minimum_ref, self.bias)
        return _Part(self.problem, *(None if ref is None else ref.at[:, :, lanes] for ref in refs))

    def scales(self, groups: slice) -> jax.Array:
        """Scales of some groups in float32: `[groups, out]`."""
        return _factor(self.scale_ref, groups, self.problem.scale_dtype)

    def zeros(self, groups: slice) -> jax.Array | None:
        """Zero points of some groups, where there are any."""
        return None if self.zero_ref is None else _factor(self.zero_ref, groups, self.codes.dtype.name)

    def minimums(self, groups: slice) -> jax.Array | None:
        """Minimums of some groups, where there are any."""
        return None if self.minimum_ref is None else _factor(self.minimum_ref, groups, self.problem.scale_dtype)


def bits_dtype(dtype: str) -> str:
    """In what a kernel takes factors of a dtype: their bits where Mosaic does not know the dtype."""
    return {"float8_e8m0fnu": "uint8", "float16": "int16"}.get(dtype, dtype)


def _factor(ref: Any, groups: slice, dtype: str) -> jax.Array:
    """Scales, zeros or minimums of some groups, which are of that dtype, in float32: `[groups, out]`."""
    values: jax.Array = ref[0, groups]
    if dtype == "float8_e8m0fnu":  # an exponent
        return jax.lax.bitcast_convert_type(values.astype(jnp.int32) << 23, jnp.float32)
    if dtype == "float16":
        return narrow_float(5, values.astype(jnp.int32) << 16)
    return (values.astype(jnp.int32) if dtype in ("int8", "uint8") else values).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of x in a grid step, and how they are multiplied with a part.

    Attributes:
      plan: of the call.
      x: `[stacked_rows, block_in]`.
      masks: or None where no groups share a chunk.
      sums: or None where none are needed.
    """

    plan: Plan
    x: Any
    masks: Any
    sums: Any

    def times(self, part: _Part) -> jax.Array:
        """x times the operands, products scaled but where all of `in` shares a scale: `[block_rows, block_out]`."""
        plan = self.plan
        grouped = plan.problem.scheme.group_size is not None
        total = jnp.zeros((plan.block_rows, part.codes.shape[2]), plan.total_dtype)
        for chunk in range(plan.block_in // plan.chunk):
            operands = plan.widen.widen(self._codes(part, chunk))
            products = jnp.concatenate([_dot(x, operands, plan.sum_dtype)[: self._used] for x in self._stacked(chunk)])
            for group in range(plan.together):
                product = self._one(products, group)
                if grouped:
                    product = self.scale(product.astype(jnp.float32), part, chunk, group)
                total += product
        return total

    def scale(self, product: jax.Array, part: _Part, chunk: int, group: int) -> jax.Array:
        """Applies scale and offset of a group to its product `[block_rows, block_out]` in float32."""
        plan = self.plan
        row = slice(chunk * plan.together + group, chunk * plan.together + group + 1)
        column: Any = None  # sums of x
        if self.sums is not None:
            rows = slice(group * plan.block_rows, (group + 1) * plan.block_rows)
            column = self.sums[rows, chunk : chunk + 1]
        zeros, minimums = part.zeros(row), part.minimums(row)
        if zeros is not None:
            product -= column * (plan.widen.offset + zeros / plan.widen.unit)
        elif plan.constant_offset:
            product -= column * plan.constant_offset
        product *= part.scales(row)
        return product if minimums is None else product + column / plan.widen.unit * minimums

    def times_scaled(self, part: _Part) -> jax.Array:
        """x times the scaled weights: `[block_rows, block_out]`."""
        plan, scheme = self.plan, self.plan.problem.scheme
        total = jnp.zeros((plan.block_rows, part.codes.shape[2]), jnp.float32)
        for chunk in range(plan.block_in // plan.chunk):
            numbers = plan.widen.widen(self._codes(part, chunk))
            size = scheme.group_size or plan.block_in
            groups = slice(chunk * plan.chunk // size, -(-(chunk + 1) * plan.chunk // size))
            scales, zeros = part.scales(groups)[:, None], part.zeros(groups)
            zeros = jnp.full_like(scales, scheme.implied_zero) if zeros is None else zeros[:, None]
            if scheme.packed:  # the low nibbles of every group, then the high ones
                scales, zeros = jnp.concatenate([scales, scales]), jnp.concatenate([zeros, zeros])
            weights = numbers.reshape(scales.shape[0], -1, numbers.shape[1])  # [groups, group, out]
            weights = (weights - zeros) * scales
            x = self._chunk(chunk)[: plan.block_rows]
            total += _dot(x, weights.reshape(numbers.shape).astype(x.dtype), jnp.float32)
        minimums = part.minimums(slice(None))
        return total if minimums is None else total + _dot(self.sums[...], minimums, jnp.float32)

    def _codes(self, part: _Part, chunk: int) -> jax.Array:
        rows = self.plan.chunk // (2 if self.plan.problem.scheme.packed else 1)
        codes: jax.Array = part.codes[0, chunk * rows : (chunk + 1) * rows]
        return codes

    def _chunk(self, chunk: int) -> jax.Array:
        size = self.plan.chunk
        x: jax.Array = self.x[:, chunk * size : (chunk + 1) * size]
        return x

    def _stacked(self, chunk: int) -> list[jax.Array]:
        """The columns of a chunk, once for every `slots` of the groups that share it: `[stacked_rows, chunk]` each."""
        x = self._chunk(chunk)
        if self.masks is None:
            return [x]
        words = pltpu.bitcast(x, jnp.int32)
        return [pltpu.bitcast(words & self.masks[i], x.dtype) for i in range(self.masks.shape[0])]

    @property
    def _used(self) -> int:
        """Stacked rows that are no padding."""
        return self.plan.slots * self.plan.pieces * self.plan.block_rows

    def _one(self, products: jax.Array, group: int) -> jax.Array:
        """The product of a group, the pieces of x added up: `[block_rows, block_out]`."""
        rows, pieces = self.plan.block_rows, self.plan.pieces
        starts = [(group * pieces + piece) * rows for piece in range(pieces)]
        first, *others = (products[start : start + rows] for start in starts)
        return sum(others, start=first)


def _dot(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=dtype)
