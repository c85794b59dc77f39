"""Registers and shared memory of a warpgroup, in compiled and in interpreted kernels.

Compiled arrays have layouts, which say which thread holds which element; products of wgmma are in `Layout.WGMMA`.
jax's interpreter has no layouts and no tensor cores: there, the same operations are those of jax.numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palladion.kernels import gpu_codes
from palladion.kernels.compat import load_to_registers, store_from_registers
from palladion.kernels.decode_attention.mosaic_gpu import turned_codes
from palladion.kernels.decode_attention.mosaic_gpu.memory import swizzle_of
from palladion.kernels.types import Ref

Used = TypeVar("Used")

MATRIX: Final = plgpu.Layout.WGMMA
"""Layout of a matrix whose rows are a multiple of 64, as wgmma leaves it."""

OF_COLUMNS: Final = MATRIX.reduce(0)
"""Layout of a number for each column of such a matrix."""

OF_ROWS: Final = MATRIX.reduce(1)
"""Layout of a number for each row."""


@dataclasses.dataclass(frozen=True)
class Registers:
    """Operations of a warpgroup on its registers.

    Attributes:
      interpret: whether the kernel is interpreted.
    """

    interpret: bool

    def constant(self, shape: tuple[int, ...], value: float, layout: Any = MATRIX) -> jax.Array:
        """Returns a constant float32 array."""
        array = jnp.full(shape, value, jnp.float32)
        return array if self.interpret else plgpu.layout_cast(array, layout)

    def indices(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Returns the indices along an axis of a matrix, int32."""
        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)

    def load(self, ref: Ref, layout: Any, optimized: bool = True) -> jax.Array:
        """Loads a reference; `optimized` makes it an error where threads collide at a bank of shared memory."""
        return ref[...] if self.interpret else load_to_registers(ref, layout, optimized)

    def store(self, ref: Ref, value: jax.Array) -> None:
        """Stores an array."""
        if self.interpret:
            ref[...] = value
        else:
            store_from_registers(ref, value)

    def across(self, numbers: jax.Array, like: jax.Array, layout: Any = MATRIX) -> jax.Array:
        """Returns a number for each column of a matrix, repeated along its rows."""
        matrix = jax.lax.broadcast_in_dim(numbers, like.shape, (1,))
        return matrix if self.interpret else plgpu.layout_cast(matrix, layout)

    def store_turned(self, ref: Ref, value: jax.Array, layout: Any = plgpu.Layout.WGMMA_TRANSPOSED) -> None:
        """Stores a matrix to shared memory with its axes exchanged, as threads have it in a layout."""
        if self.interpret:
            ref[...] = value.T
        else:
            store_from_registers(ref.transpose((1, 0)), plgpu.layout_cast(value, layout))

    def commit(self) -> None:
        """Makes what was stored to shared memory visible to tensor cores and TMA."""
        plgpu.commit_smem()

    def release(self, loaded: bool) -> None:
        """Orders reads of a block before the copy that takes its place.

        Args:
          loaded: whether threads loaded the block: TMA sees no order with that, as it does with products of wgmma.
        """
        if loaded or self.interpret:
            plgpu.commit_smem()

    def numbers(self, codes: Ref, format: str, dtype: str) -> jax.Array:
        """Loads codes `[m, depth]` as numbers of a 16-bit dtype, the left operand of a product."""
        loaded = self.load(codes, plgpu.Layout.WGMMA_UPCAST_2X)
        floats = gpu_codes.convert(loaded, format, dtype, self.interpret)
        return gpu_codes.numbers(floats, gpu_codes.recipe(format, dtype), dtype)

    def floats_turned(self, codes: Ref, format: str, dtype: str) -> jax.Array:
        """Loads codes `[depth, m]` as numbers `[m, depth]`, m in another order until `in_order` is called.

        They lack the factor of their recipe, a power of two, which is left to the other operand.
        """
        if self.interpret:
            floats = gpu_codes.convert(codes[...], format, dtype, True).T
        else:
            floats = turned_codes.load_turned(codes, format, dtype, swizzle_of(codes.shape[1]))
        return gpu_codes.numbers(floats, dataclasses.replace(gpu_codes.recipe(format, dtype), factor=1.0), dtype)

    def in_order(self, product: jax.Array) -> jax.Array:
        """Puts the rows of products of `floats_turned` in order."""
        return product if self.interpret else turned_codes.in_order(product)

    def multiply(
        self, left: Ref | jax.Array, right: Ref, *, turned: bool = False, meanwhile: Callable[[], None] | None = None
    ) -> jax.Array:
        """Multiplies two 16-bit matrices on tensor cores, float32 `[m, n]`.

        Args:
          left: `[m, depth]` in registers or shared memory, or there `[depth, m]` where `turned`.
          right: `[n, depth]` in shared memory.
          turned: whether the axes of the left operand are exchanged.
          meanwhile: what is done before the product is awaited.
        """
        if self.interpret:
            values = left[...].T if turned else left[...]
            product = jnp.dot(values, right[...].T, preferred_element_type=jnp.float32)
            if meanwhile is not None:
                meanwhile()
            return product
        left = left.transpose((1, 0)) if turned else left

        def on_tensor_cores(sums: Ref) -> jax.Array:
            plgpu.wgmma(sums, left, right.transpose((1, 0)))
            if meanwhile is not None:
                meanwhile()
            return sums[...]

        shape = (left.shape[0], right.shape[0])
        result: jax.Array = pl.run_scoped(on_tensor_cores, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        return result

    def add_product(
        self, total: jax.Array, left: Ref | jax.Array, right: Ref, *, turned: bool = False, right_turned: bool = False
    ) -> jax.Array:
        """Adds the product of two 16-bit matrices to a float32 matrix `[m, n]`.

        Args:
          total: the matrix.
          left: see `multiply`.
          right: `[n, depth]` in shared memory, or `[depth, n]` where `right_turned`.
          turned: whether the axes of the left operand are exchanged.
          right_turned: whether those of the right one are.
        """
        if self.interpret:
            values, others = left[...].T if turned else left[...], right[...] if right_turned else right[...].T
            return total + jnp.dot(values, others, preferred_element_type=jnp.float32)
        left = left.transpose((1, 0)) if turned else left
        right = right if right_turned else right.transpose((1, 0))

        def on_tensor_cores(sums: Ref) -> None:
            plgpu.wgmma(sums, left, right)

        result: jax.Array = pl.run_state(on_tensor_cores)(plgpu.WGMMAAccumulatorRef.init(total))
        return result

    def multiply_and_add(
        self,
        left: Ref,
        right: Ref,
        total: jax.Array,
        weights: jax.Array,
        values: Ref,
        meanwhile: Callable[[], None],
        use: Callable[[jax.Array], Used],
    ) -> tuple[jax.Array, Used]:
        """Multiplies two matrices, and adds the product of two others to a total, both at once on tensor cores.

        Args:
          left: `[m, depth]` in shared memory.
          right: `[n, depth]` in shared memory.
          total: float32 `[m, width]`.
          weights: `[m, k]` in registers.
          values: `[k, width]` in shared memory.
          meanwhile: what is done before the first product is awaited.
          use: takes the first product, while the second one is computed.

        Returns:
          The total, and what `use` returns.
        """
        if self.interpret:
            product, total = self.multiply(left, right), self.add_product(total, weights, values, right_turned=True)
            meanwhile()
            return total, use(product)

        def on_tensor_cores(product: Ref, sums: Ref) -> tuple[jax.Array, Used]:
            sums[...] = total
            plgpu.wgmma(product, left, right.transpose((1, 0)))
            plgpu.wgmma(sums, weights, values)
            meanwhile()
            used = use(plgpu.wgmma_accumulator_load(product, wait_n=1))
            return sums[...], used

        rows = left.shape[0]
        accumulators = (plgpu.WGMMAAccumulatorRef((rows, n), jnp.float32) for n in (right.shape[0], total.shape[1]))
        result: tuple[jax.Array, Used] = pl.run_scoped(on_tensor_cores, *accumulators)
        return result
