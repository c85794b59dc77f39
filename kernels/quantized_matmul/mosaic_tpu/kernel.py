"""The kernel of quantized_matmul on a TPU: what a grid step does with the blocks that lie in VMEM.

A step multiplies rows of x by a block of the weight, chunk after chunk along `in`. Either products are scaled, or
weights:

    products   y += (x @ operands of a group) * scale, group by group
    weights    y += x @ (operands * scale)

Offsets of the operands (zero points, what the dequantizer adds) and minimums are one more product: sums of x over each
group times offset and minimum of the group. A float32 result would show the rounding of that, so there offsets are
subtracted from each group's product before it is scaled.

Scaling products costs the vector unit time for each row of x, scaling weights for each weight: products for few rows.
Groups smaller than a chunk share it: each has its own copy of the rows of x, with zeros in the columns of the others,
and so a product of its own (`Plan`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from palladion.kernels.quantized_matmul.float_bits import decode_e8m0, decode_float16
from palladion.kernels.quantized_matmul.mosaic_tpu.plan import Plan
from palladion.kernels.quantized_matmul.mosaic_tpu.refs import Rows, Scratch, Weight, present
from palladion.kernels.quantized_matmul.mosaic_tpu.ring import WeightRing
from palladion.kernels.tpu_layout import SUBLANES
from palladion.kernels.types import Ref


def kernel(
    layer_ref: Ref,  # [1] in SMEM
    rows_in_hbm: Rows,
    weight_in_hbm: Weight,
    out_ref: Ref,  # [block_rows, block_out]
    scratch: Scratch,
    *,
    plan: Plan,
    first_channel: int,
) -> None:
    """Runs a grid step: multiplies by its block, adds the product to those before, finishes after the last of `in`."""
    core, i, j, k = (pl.program_id(axis) for axis in range(4))
    blocks = plan.weight_blocks(first_channel)
    ring = WeightRing(blocks, core, layer_ref[0], weight_in_hbm, scratch.weights, scratch.weights_arrived)
    step = blocks.step(i, j, k)

    @pl.when((j == 0) & (k == 0))
    def _load_rows() -> None:
        copies = [
            pltpu.make_async_copy(source.at[i if source.shape[0] > 1 else 0], to, scratch.rows_arrived.at[n])
            for n, (source, to) in enumerate(zip(present(rows_in_hbm), present(scratch.rows), strict=True))
        ]
        for copy in copies:
            copy.start()
        pl.when(step == 0)(ring.prefetch)
        for copy in copies:
            copy.wait()

    slot = ring.wait(step)
    x = _RowBlock.of_step(plan, scratch.rows, k)
    parts = [weight.at_slot(slot) for weight in scratch.weights]

    for start in range(0, plan.block_out, plan.lanes):
        lanes = slice(start, min(start + plan.lanes, plan.block_out))
        weights = [part.at_lanes(lanes) for part in parts]
        products = [x.multiply(weight) for weight in weights]
        if scratch.accumulators:
            for ref, product in zip(scratch.accumulators, products, strict=True):
                ref[:, lanes] = jnp.where(k == 0, 0, ref[:, lanes]) + product
        else:
            out_ref[:, lanes] = x.finish(products, weights).astype(out_ref.dtype)

    if scratch.accumulators:

        @pl.when(k == plan.in_blocks - 1)
        def _finish() -> None:
            out_ref[...] = x.finish([ref[...] for ref in scratch.accumulators], parts).astype(out_ref.dtype)


@dataclasses.dataclass(frozen=True)
class _RowBlock:
    """The rows of x of a grid step, and their products with a weight.

    Attributes:
      plan: the plan of the call.
      x_ref: `[stacked_rows, block_in]`.
      masks_ref: `[masked_copies, words, chunk]`, or None where groups do not share a chunk.
      sums_ref: `[block_rows, groups]`, or None where sums are not needed.
      scales_ref: `[1, block_rows, 1]`, or None where x is not quantized.
    """

    plan: Plan
    x_ref: Ref
    masks_ref: Ref
    sums_ref: Ref
    scales_ref: Ref

    @classmethod
    def of_step(cls, plan: Plan, rows: Rows, k: Any) -> _RowBlock:
        """Returns the references to what step k along `in` reads of a row block."""
        sums_ref = None if rows.sums is None else rows.sums.at[k if plan.sum_blocks > 1 else 0]
        return cls(plan, rows.x.at[k if plan.in_blocks > 1 else 0], rows.masks, sums_ref, rows.scales)

    def multiply(self, weight: Weight) -> jax.Array:
        """Returns x times the weights, `[block_rows, lanes]`, but for a scale that all of `in` shares."""
        plan = self.plan
        total = jnp.zeros((plan.block_rows, weight.codes.shape[2]), plan.accumulator_dtype)
        # All groups are read at once: rows that are read one by one would be transposed before they are broadcast.
        scales, offset = self._scales(weight), self._offset(weight)
        for chunk in range(plan.block_in // plan.chunk):
            operands = plan.dequantizer.to_operands(self._codes(weight, chunk))
            if plan.scales_weights:
                x = self._columns(chunk)[: plan.block_rows]
                total += _dot(x, self._scale_weights(operands, scales, offset, chunk), plan.product_dtype)
                continue
            products = _dot(jnp.concatenate(self._masked_copies(chunk)), operands, plan.product_dtype)
            for group in range(plan.groups_per_chunk):
                product = self._product_of_group(products, group)
                total += self._scale_product(product, scales, offset, chunk * plan.groups_per_chunk + group)
        if plan.grouped and self.sums_ref is not None:
            total = total + self._product_of_sums(scales, offset, self._minimums(weight))
        return total

    def finish(self, totals: list[jax.Array], weights: list[Weight]) -> jax.Array:
        """Returns the result in float32 from the sums over all of `in`: scales, bias, activation and gate applied."""
        plan = self.plan
        products = []
        for total, weight in zip(totals, weights, strict=True):
            product = total if plan.grouped else self._scale_channels(total, weight)
            if plan.dequantizer.unit != 1:
                product = product * plan.dequantizer.unit
            if self.scales_ref is not None:
                product = product * self.scales_ref[0]
            products.append(product if weight.bias is None else product + weight.bias[0])
        return plan.problem.finish(products)

    def _scale_channels(self, product: jax.Array, weight: Weight) -> jax.Array:
        """Applies the scale and the offset that all of `in` shares to a product `[block_rows, lanes]`."""
        product = product.astype(jnp.float32)
        offset, minimums = self._offset(weight), self._minimums(weight)
        if self.sums_ref is not None:
            product -= self.sums_ref[...] * offset
        product *= self._scales(weight)
        return product if minimums is None else product + self.sums_ref[...] / self.plan.dequantizer.unit * minimums

    def _scale_product(self, product: jax.Array, scales: jax.Array, offset: jax.Array | float, group: int) -> jax.Array:
        """Applies a group's scale to its product `[block_rows, lanes]`, where groups have scales of their own."""
        plan = self.plan
        if not plan.grouped:
            return product
        row = slice(group, group + 1)
        product = product.astype(jnp.float32)
        if plan.subtracts_before_scaling and self.sums_ref is not None:
            product -= self.sums_ref[:, row] * (offset if isinstance(offset, float) else offset[row])
        return _multiply_by_row(product, scales[row])

    def _scale_weights(
        self, operands: jax.Array, scales: jax.Array, offset: jax.Array | float, chunk: int
    ) -> jax.Array:
        """Returns the weights of a chunk `[chunk, lanes]`, scaled, in the order of its operands."""
        plan, group_size = self.plan, self.plan.problem.group_size
        groups = slice(chunk * plan.chunk // group_size, pl.cdiv((chunk + 1) * plan.chunk, group_size))
        times = min(group_size, plan.chunk) // plan.dequantizer.runs
        repeated = _repeat_rows(scales[groups], times, operands.dtype)
        weights = operands.reshape(plan.dequantizer.runs, *repeated.shape)
        if plan.subtracts_before_scaling:
            weights -= offset if isinstance(offset, float) else _repeat_rows(offset[groups], times, operands.dtype)
        return (weights * repeated).reshape(operands.shape).astype(plan.x_operand)

    def _product_of_sums(
        self, scales: jax.Array, offset: jax.Array | float, minimums: jax.Array | None
    ) -> jax.Array | float:
        """Returns what minimums, and offsets not yet subtracted, add to the product: `[block_rows, lanes]`."""
        plan = self.plan
        if plan.scales_weights:
            scales = scales.astype(plan.dequantizer.operand).astype(jnp.float32)
        factors = 0.0 if plan.subtracts_before_scaling else -offset * scales
        if minimums is not None:
            factors += minimums / plan.dequantizer.unit
        if isinstance(factors, float):
            return factors
        sums = self.sums_ref[...]
        if plan.problem.out_dtype == "float32":
            return _dot(sums, factors, jnp.float32)
        # The upper 16 bits of each suffice, in half of the matrix unit's time.
        high, low = _split_in_two(factors)
        x_high, x_low = _split_in_two(sums)
        products = _dot(jnp.concatenate([x_high, x_low]), high, jnp.float32)
        return sum(jnp.split(products, 2), start=_dot(x_high, low, jnp.float32))

    def _scales(self, weight: Weight) -> jax.Array:
        """Returns scales in float32, `[groups, lanes]`."""
        return _read_factors(weight.scales, self.plan.problem.scale_dtype)

    def _minimums(self, weight: Weight) -> jax.Array | None:
        """Returns minimums in float32, `[groups, lanes]`, or None."""
        return None if weight.minimums is None else _read_factors(weight.minimums, self.plan.problem.scale_dtype)

    def _offset(self, weight: Weight) -> jax.Array | float:
        """Returns the offset of the operands: a number, or float32 `[groups, lanes]` where there are zero points."""
        plan = self.plan
        if weight.zeros is None:
            return float(plan.constant_offset)
        zeros = _read_factors(weight.zeros, weight.codes.dtype.name)
        return plan.dequantizer.offset + zeros / plan.dequantizer.unit

    def _codes(self, weight: Weight, chunk: int) -> jax.Array:
        """Returns the codes of a chunk as they are stored."""
        rows = self.plan.chunk // (2 if self.plan.problem.scheme.packed else 1)
        codes: jax.Array = weight.codes[0, chunk * rows : (chunk + 1) * rows]
        return codes

    def _columns(self, chunk: int) -> jax.Array:
        """Returns the columns of a chunk, `[stacked_rows, chunk]`."""
        size = self.plan.chunk
        x: jax.Array = self.x_ref[:, chunk * size : (chunk + 1) * size]
        return x

    def _masked_copies(self, chunk: int) -> list[jax.Array]:
        """Returns the columns of a chunk once for each tile of groups that share it, other groups' columns zero."""
        x = self._columns(chunk)
        if self.masks_ref is None:
            return [x]
        words = pltpu.bitcast(x, jnp.int32)
        return [pltpu.bitcast(words & self.masks_ref[n], x.dtype) for n in range(self.masks_ref.shape[0])]

    def _product_of_group(self, products: jax.Array, group: int) -> jax.Array:
        """Returns the product of a group, `[block_rows, lanes]`: the sum of those of the pieces of x."""
        plan, rows = self.plan, self.plan.block_rows
        copy, group_in_tile = divmod(group, plan.groups_per_tile)
        first_piece = group_in_tile * plan.pieces
        starts = [copy * plan.stacked_rows + (first_piece + piece) * rows for piece in range(plan.pieces)]
        first, *others = (products[start : start + rows] for start in starts)
        return sum(others, start=first)


def bits_dtype(dtype: str) -> str:
    """Returns the dtype in which the kernel takes scales and minimums: bits where Mosaic does not know their dtype."""
    return {"float8_e8m0fnu": "uint8", "float16": "int16"}.get(dtype, dtype)


def _read_factors(ref: Ref, dtype: str) -> jax.Array:
    """Returns scales, zeros or minimums, which stand for numbers of `dtype`, in float32: `[groups, lanes]`."""
    values: jax.Array = ref[0]
    if dtype == "float8_e8m0fnu":
        return decode_e8m0(values.astype(jnp.int32))
    if dtype == "float16":
        return decode_float16(values)
    return (values.astype(jnp.int32) if dtype in ("int8", "uint8") else values).astype(jnp.float32)


def _dot(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=dtype)


def _split_in_two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two bfloat16 arrays whose sum is a float32 array, up to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _multiply_by_row(x: jax.Array, row: jax.Array) -> jax.Array:
    """Returns x `[rows, lanes]` times `[1, lanes]`, broadcast over the sublanes once, not for every tile of x."""
    tile = jnp.broadcast_to(row, (SUBLANES, x.shape[1]))
    return (x.reshape(-1, SUBLANES, x.shape[1]) * tile[None]).reshape(x.shape)


def _repeat_rows(rows: jax.Array, times: int, dtype: DTypeLike) -> jax.Array:
    """Returns float32 rows `[n, lanes]` in another dtype, each repeated: `[n * times, lanes]`."""
    count, width = rows.shape
    if dtype != jnp.bfloat16 or times % 2:
        return jnp.broadcast_to(rows[:, None].astype(dtype), (count, times, width)).reshape(-1, width)
    # Twice the same number in a word, because Mosaic broadcasts a row of words.
    bits = pltpu.bitcast(rows.astype(dtype).astype(jnp.float32), jnp.int32)
    words = bits | jax.lax.shift_right_logical(bits, 16)
    repeated = [jnp.broadcast_to(words[row : row + 1], (times // 2, width)) for row in range(count)]
    return pltpu.bitcast(jnp.concatenate(repeated), dtype)
