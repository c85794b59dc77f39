"""The body of quantized_matmul's TPU kernel: what a grid step does with the blocks that lie in VMEM.

A step multiplies by a block of the weight, chunk after chunk along `in`. Products are scaled, or weights:

    products   y += (x @ operands of a group) * scale, group by group
    weights    y += x @ (operands * scale)

What codes have too much (zero points, what a widening adds) and minimums are one more product, of the sums of x and of
what the groups are off by. A float32 result would show its rounding: there it is taken off before anything is scaled.

Scaled products cost the vector unit what the rows of x are, scaled weights what the weights are: products for few rows.
Groups that are smaller than the matrix unit is deep share a chunk: each has copies of the rows of x, with zeros in the
columns of the others, and so a product of its own. `plan.py` says how these rows are stacked.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.quantized_matmul.float_bits import decode_e8m0, decode_float16
from palladion.kernels.quantized_matmul.mosaic_tpu.plan import Plan
from palladion.kernels.quantized_matmul.mosaic_tpu.stream import Source, Stream
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.kernels.tpu_layout import SUBLANES


def kernel(
    layer_ref: Any,  # [1] in SMEM
    # What is multiplied, in HBM. By rows: x [row_blocks, in_blocks, stacked_rows, block_in], and as far as there are
    # any masks [1, together / slots, words, chunk], sums of x [row_blocks, blocks, block_rows, groups], scales of x
    # [row_blocks, 1, block_rows, 1]. By channels: codes [layers, rows, out], scales, zeros, minimums
    # [layers, groups, out], bias [1, 1, out].
    *refs: Any,
    plan: Plan,
    first: int,  # channel
    by_rows: int,  # arrays
    stacked: tuple[bool, ...],  # which arrays by channels have layers
) -> None:
    """A grid step: multiplies its blocks, adds the product to those before, finishes after the last along `in`."""
    p = plan.problem
    left = iter(refs)
    core, i, j, step = (pl.program_id(axis) for axis in range(4))

    def take(count: int) -> list[Any]:
        return list(itertools.islice(left, count))

    rows_in_hbm, sources = take(by_rows), take(len(stacked))
    (out_ref,) = take(1)  # [block_rows, block_out]
    rows_refs, buffers = take(by_rows), take(len(sources) * p.parts)
    loaded, arrived, *total_refs = left  # semaphores; totals of the parts where there are several steps along `in`
    stream = Stream(
        plan.blocks(first),
        core,
        tuple(
            Source(ref, layer_ref[0] if has_layers else 0, along_in=plan.in_blocks > 1 and ref.shape[1] > 1)
            for ref, has_layers in zip(sources, stacked, strict=True)
        ),
        tuple(buffers),
        arrived,
    )
    number = stream.blocks.number(i, j, step)

    @pl.when((j == 0) & (step == 0))
    def _load() -> None:
        places = [(ref.at[i if ref.shape[0] > 1 else 0], to) for ref, to in zip(rows_in_hbm, rows_refs, strict=True)]
        copies = [pltpu.make_async_copy(ref, to, loaded.at[n]) for n, (ref, to) in enumerate(places)]
        for copy in copies:
            copy.start()
        pl.when(number == 0)(stream.begin)
        for copy in copies:
            copy.wait()

    buffer = stream.take(number)
    of_rows = iter(rows_refs)
    block = step if plan.in_blocks > 1 else 0
    x_ref = next(of_rows).at[block]
    masks_ref = next(of_rows) if plan.together > 1 else None
    sums_ref = next(of_rows).at[block if plan.sum_blocks > 1 else 0] if plan.needs_sums else None
    x_scales_ref = next(of_rows) if p.quantize_x is not None else None
    rows = _Rows(plan, x_ref, masks_ref, sums_ref)
    at_hand = iter(ref.at[pl.ds(buffer, 1)] for ref in buffers)
    parts = [_Part.of(at_hand, p) for _ in range(p.parts)]

    def finish(totals: list[jax.Array], lanes: slice) -> None:
        products = []
        for part, total in zip(parts, totals, strict=True):
            part = part.at(lanes)
            y = total
            if not plan.grouped:
                y = rows.scale(y, part)
            y = y if plan.widen.unit == 1 else y * plan.widen.unit
            if x_scales_ref is not None:
                y = y * x_scales_ref[0]
            products.append(y if part.bias is None else y + part.bias[0])
        out_ref[:, lanes] = p.finish(products).astype(out_ref.dtype)

    for first in range(0, plan.block_out, plan.lanes):
        lanes = slice(first, min(first + plan.lanes, plan.block_out))
        totals = [rows.times(part.at(lanes)) for part in parts]
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

    def scales(self) -> jax.Array:
        """Scales in float32: `[groups, out]`."""
        return _factor(self.scale_ref, self.problem.scale_dtype)

    def zeros(self) -> jax.Array | None:
        """Zero points, where there are any."""
        return None if self.zero_ref is None else _factor(self.zero_ref, self.codes.dtype.name)

    def minimums(self) -> jax.Array | None:
        """Minimums, where there are any."""
        return None if self.minimum_ref is None else _factor(self.minimum_ref, self.problem.scale_dtype)


def bits_dtype(dtype: str) -> str:
    """In what a kernel takes factors of a dtype: their bits where Mosaic does not know the dtype."""
    return {"float8_e8m0fnu": "uint8", "float16": "int16"}.get(dtype, dtype)


def _factor(ref: Any, dtype: str) -> jax.Array:
    """Scales, zeros or minimums, which are of that dtype, in float32: `[groups, out]`."""
    values: jax.Array = ref[0]
    if dtype == "float8_e8m0fnu":
        return decode_e8m0(values.astype(jnp.int32))
    if dtype == "float16":
        return decode_float16(values)
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
        """x times the weights, but for a scale that all of `in` shares: `[block_rows, block_out]`."""
        plan = self.plan
        total = jnp.zeros((plan.block_rows, part.codes.shape[2]), plan.total_dtype)
        # Read whole: rows that are read one by one are turned about before they are spread.
        scales, offset = part.scales(), self._offset(part)
        for chunk in range(plan.block_in // plan.chunk):
            operands = plan.widen.widen(self._codes(part, chunk))
            if plan.scales_weights:
                x = self._chunk(chunk)[: plan.block_rows]
                total += _dot(x, self._scaled(operands, scales, offset, chunk), plan.sum_dtype)
                continue
            products = _dot(jnp.concatenate(self._stacked(chunk)), operands, plan.sum_dtype)
            for group in range(plan.together):
                product = self._one(products, group)
                if plan.grouped:
                    number = chunk * plan.together + group
                    row = slice(number, number + 1)
                    product = product.astype(jnp.float32)
                    if plan.offsets_first and self.sums is not None:
                        product -= self.sums[:, row] * (offset if isinstance(offset, float) else offset[row])
                    product = _times_row(product, scales[row])
                total += product
        if plan.grouped and self.sums is not None:
            total = total + self._offsets(scales, offset, part.minimums())
        return total

    def scale(self, product: jax.Array, part: _Part) -> jax.Array:
        """Applies the scale and the offset that all of `in` shares to the product `[block_rows, block_out]`."""
        plan = self.plan
        product = product.astype(jnp.float32)
        offset, minimums = self._offset(part), part.minimums()
        if self.sums is not None:
            product -= self.sums[...] * offset
        product *= part.scales()
        return product if minimums is None else product + self.sums[...] / plan.widen.unit * minimums

    def _offset(self, part: _Part) -> Any:
        """What is in the operands too much: a number, or `[groups, out]`."""
        widen, zeros = self.plan.widen, part.zeros()
        return float(self.plan.constant_offset) if zeros is None else widen.offset + zeros / widen.unit

    def _offsets(self, scales: jax.Array, offset: Any, minimums: jax.Array | None) -> jax.Array | float:
        """What minimums, and the offsets of the groups, add to the product: `[block_rows, block_out]`."""
        plan = self.plan
        if plan.scales_weights:
            scales = scales.astype(plan.widen.operand).astype(jnp.float32)
        factors = 0.0 if plan.offsets_first else -offset * scales
        if minimums is not None:
            factors += minimums / plan.widen.unit
        if isinstance(factors, float):
            return factors
        sums = self.sums[...]
        if plan.problem.out_dtype == "float32":
            return _dot(sums, factors, jnp.float32)
        # 16 bits of each will do, and take the matrix unit half the time.
        high, low = _halves(factors)
        x_high, x_low = _halves(sums)
        products = _dot(jnp.concatenate([x_high, x_low]), high, jnp.float32)
        return sum(jnp.split(products, 2), start=_dot(x_high, low, jnp.float32))

    def _scaled(self, numbers: jax.Array, scales: jax.Array, offset: Any, chunk: int) -> jax.Array:
        """The weights of a chunk, `[chunk, out]`, in the order in which the widening has them."""
        plan, size = self.plan, self.plan.problem.group_size
        groups = slice(chunk * plan.chunk // size, -(-(chunk + 1) * plan.chunk // size))
        times = min(size, plan.chunk) // plan.widen.runs
        spread = _spread(scales[groups], times, numbers.dtype)
        weights = numbers.reshape(plan.widen.runs, *spread.shape)
        if plan.offsets_first:
            weights -= offset if isinstance(offset, float) else _spread(offset[groups], times, numbers.dtype)
        return (weights * spread).reshape(numbers.shape).astype(plan.x_operand)

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

    def _one(self, products: jax.Array, group: int) -> jax.Array:
        """The product of a group, the pieces of x added up: `[block_rows, block_out]`."""
        plan, rows = self.plan, self.plan.block_rows
        copy, slot = divmod(group, plan.slots)
        starts = [copy * plan.stacked_rows + (slot * plan.pieces + piece) * rows for piece in range(plan.pieces)]
        first, *others = (products[start : start + rows] for start in starts)
        return sum(others, start=first)


def _dot(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=dtype)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as a sum of two numbers that bfloat16 has."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _times_row(x: jax.Array, row: jax.Array) -> jax.Array:
    """x `[rows, out]` times `[1, out]`, which is spread over the sublanes once and not for every tile of x."""
    tile = jnp.broadcast_to(row, (SUBLANES, x.shape[1]))
    return (x.reshape(-1, SUBLANES, x.shape[1]) * tile[None]).reshape(x.shape)


def _spread(rows: jax.Array, times: int, dtype: Any) -> jax.Array:
    """float32 `[rows, out]` in another dtype, every row as often as that: `[rows * times, out]`."""
    count, width = rows.shape
    if dtype != jnp.bfloat16 or times % 2:
        return jnp.broadcast_to(rows[:, None].astype(dtype), (count, times, width)).reshape(-1, width)
    # Two alike in a word: words are what a row can be spread over.
    bits = pltpu.bitcast(rows.astype(dtype).astype(jnp.float32), jnp.int32)
    words = bits | jax.lax.shift_right_logical(bits, 16)
    spread = [jnp.broadcast_to(words[row : row + 1], (times // 2, width)) for row in range(count)]
    return pltpu.bitcast(jnp.concatenate(spread), dtype)
