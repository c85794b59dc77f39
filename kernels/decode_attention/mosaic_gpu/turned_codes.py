"""Loads values of a one-byte cache with their axes exchanged, as the left operand of wgmma in registers.

Codes lie as `[tokens, head_dim]`, and the operand is `[head_dim, tokens]`: a register has the numbers of two tokens,
of one feature. `ldmatrix` turns matrices of 8 by 8 elements of two bytes, here of 8 tokens by 8 pairs of features.
Thread t of group g of four gets the pair of features 2 g, 2 g + 1 of tokens 2 t and 2 t + 1:

    a word of four bytes    (token 2 t, feature 2 g)  (2 t, 2 g + 1)  (2 t + 1, 2 g)  (2 t + 1, 2 g + 1)

The even bytes are in the halves of the word where recipes (`gpu_codes.py`) want two codes, and the odd ones after a
shift. wgmma takes the former as row g of 16 and the latter as row g + 8. So of each 16 rows of a product, row r < 8 is
feature 2 r, and row r + 8 is feature 2 r + 1; `in_order` puts them in order, once for all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from palladion.kernels.gpu_codes import Word, as_array, recipe
from palladion.kernels.types import Ref

AT_ONCE: Final = 32
"""Tokens that an instruction turns: four matrices of 8."""

TILE: Final = 64
"""Features of a wgmma, 16 of each warp."""


def first_row(thread: Any, head_dim: int, swizzle: int) -> Any:
    """Returns the place in bytes of the row of 16 codes that a thread gives to its first `ldmatrix`.

    Threads 8 j to 8 j + 7 of a warp give the rows of matrix j, which are tokens; each warp has other features.
    """
    warp, matrix, row = (thread >> 5) & 3, (thread >> 3) & 3, thread & 7
    return matrix * (8 * head_dim) + row * swizzle + warp * 16


def further(tile: int, step: int, head_dim: int, swizzle: int) -> int:
    """Returns how many bytes after its first row that of another 64 features, or 32 tokens, lies."""
    column = tile * TILE
    return step * (AT_ONCE * head_dim) + column // swizzle * (8 * swizzle) + column % swizzle


def swizzled(address: Any, swizzle: int) -> Any:
    """Returns where TMA has put 16 bytes: it permutes those of a row by the number of the row."""
    return address ^ (((address >> 7) & (swizzle // 16 - 1)) << 4)


def arrange(words: np.ndarray, make: Callable[[Any], Any]) -> np.ndarray:
    """Returns words of two floats each in the order of wgmma's registers, `[tiles, blocks of 8 tokens, 2]`.

    Args:
      words: what `ldmatrix` gave to a thread, `[tiles of 64 features, blocks of 8 tokens]`.
      make: a function of a recipe.
    """
    halves = np.empty((*words.shape, 2), object)
    for index in np.ndindex(words.shape):
        halves[(*index, 0)], halves[(*index, 1)] = make(words[index]), make(words[index] >> 8)
    return halves


def sources(lane: Any) -> tuple[Any, Any, Any]:
    """Returns the two threads that have a thread's features, those of rows g and g + 8, and in which row: 0 or 1.

    Feature f of 16 is in row f / 2 if it is even, in row f / 2 + 8 otherwise: in registers of group f / 2 of threads.
    """
    group = lane >> 2
    first = ((group >> 1) << 2) + (lane & 3)
    return first, first + 16, group & 1


def load_turned(codes: Ref, format: str, dtype: str, swizzle: int) -> jax.Array:
    """Loads codes as floats, offset and factor of the recipe left to the caller.

    Args:
      codes: `[tokens, head_dim]` in shared memory.
      format: of a code.
      dtype: of the floats.
      swizzle: bytes that TMA permutes.

    Returns:
      `[head_dim, tokens]`, features of each 16 in another order.
    """
    tokens, head_dim = codes.shape
    how = recipe(format, dtype)
    makes = [how.bits] if how.less is None else [how.bits, how.less]
    floats = plgpu.ShapeDtypeStruct((head_dim, tokens), jnp.dtype(dtype), plgpu.Layout.WGMMA)
    transforms = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))

    def load(_: Any, memory: Any) -> Any:
        words = _load_words(memory, tokens, head_dim, swizzle)
        return tuple(as_array(arrange(words, make), floats) for make in makes)

    types: dict[str, Any] = {"arg_types": (plgpu.RefType(transforms),), "return_type": (floats,) * len(makes)}
    found = plgpu.inline_mgpu(**types)(load)(codes)
    return found[0] if how.less is None else found[0] - found[1]


def _load_words(memory: ir.Value, tokens: int, head_dim: int, swizzle: int) -> np.ndarray:
    """Emits `ldmatrix` for all codes; returns the words of a thread, `[tiles of 64 features, blocks of 8 tokens]`."""
    i32 = ir.IntegerType.get_signless(32)
    start = Word(llvm.ptrtoint(i32, utils.memref_ptr(memory)))
    start = start + first_row(Word(utils.thread_idx()), head_dim, swizzle)
    words = np.empty((head_dim // TILE, tokens // 8), object)
    for tile, step in np.ndindex(head_dim // TILE, tokens // AT_ONCE):
        address = swizzled(start + further(tile, step, head_dim, swizzle), swizzle)
        four: Any = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * 4),
            [address.value],
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            has_side_effects=True,
        )
        for matrix in range(4):
            words[tile, 4 * step + matrix] = Word(llvm.extractvalue(i32, four, [matrix]))
    return words


def in_order(product: jax.Array) -> jax.Array:
    """Puts the features of a float32 product `[head_dim, rows]` in order."""
    same = plgpu.ShapeDtypeStruct(product.shape, product.dtype, plgpu.Layout.WGMMA)

    def exchange(_: Any, array: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        first, second, row = sources(Word(utils.thread_idx()) & 31)
        is_odd = arith.cmpi(arith.CmpIPredicate.ne, row.value, utils.c(0, i32))

        def taken(register: ir.Value, lane: Word) -> ir.Value:
            ptx = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
            found: Any = llvm.inline_asm(i32, [register, lane.value], ptx, "=r,r,r", has_side_effects=True)
            return found

        registers = array.registers.reshape(-1, 2)  # rows g and g + 8
        ordered = np.empty_like(registers)
        for number, pair in enumerate(registers):
            words = [utils.bitcast(register, ir.VectorType.get((2,), i32)) for register in pair]
            for half, lane in enumerate((first, second)):
                vector = llvm.mlir_undef(ir.VectorType.get((2,), f32))
                for column in range(2):
                    both = [taken(_element(word, column), lane) for word in words]
                    chosen = utils.bitcast(arith.select(is_odd, both[1], both[0]), f32)
                    vector = llvm.insertelement(vector, chosen, utils.c(column, i32))
                ordered[number, half] = vector
        return mgpu.FragmentedArray(
            _registers=ordered.reshape(array.registers.shape), _layout=array.layout, _is_signed=None
        )

    types: dict[str, Any] = {"arg_types": (plgpu.Layout.WGMMA,), "return_type": same}
    result: jax.Array = plgpu.inline_mgpu(**types)(exchange)(product)
    return result


def _element(vector: ir.Value, index: int) -> ir.Value:
    """Emits the element of a vector."""
    return llvm.extractelement(vector, utils.c(index, ir.IntegerType.get_signless(32)))
