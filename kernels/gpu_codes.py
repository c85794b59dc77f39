"""Converts codes to 16-bit floats, in the registers out of which wgmma takes its left operand.

A recipe makes two floats of two codes at a time, which lie in the halves of a 32-bit word, by masks and shifts: a code
becomes mantissa bits of a float whose exponent is known, or a narrow float moves to the places of a wider one.

wgmma wants columns 2t, 2t + 1, 2t + 8 and 2t + 9 of 16 in thread t of four. Words of four bytes are read such that even
threads have columns 0 to 7 and odd ones 8 to 15 (`Layout.WGMMA_UPCAST_2X`):

    thread             0          1          2          3
    reads              0 1 2 3    8 9 10 11  4 5 6 7    12 13 14 15
    after an exchange  0 8 1 9    2 10 3 11  4 12 5 13  6 14 7 15

Neighbours exchange their words, and each takes its own columns out of both. Then one pair of codes is in the even
bytes, the other in the odd ones. A byte of 4-bit codes has column j of 32 in its low and j + 16 in its high nibble: the
nibbles go to two blocks of 16 columns, in the same places.

Bytes for int8 rows need no exchange. wgmma wants four consecutive columns of 16 in each thread, and a word of packed
codes has them in its low nibbles, and those of the next 16 columns in its high ones (`Layout.WGMMA_8BIT`).

Tensor memory has a row for each thread, and two neighbouring columns in each word (`ROWS`): nothing is exchanged. A
thread reads 16 bytes of its row at a time and swaps the middle bytes of each word: neighbours are in its halves then.
"""

from __future__ import annotations

import dataclasses
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

MANTISSA_BITS: Final = {"bfloat16": 7, "float16": 10}
EXPONENT_BIAS: Final = {"bfloat16": 127, "float16": 15}

FLOATS: Final = {"float8_e4m3fn": (8, 3, 7), "float8_e5m2": (8, 2, 15), "mxfp4": (4, 1, 1)}
"""Bits, mantissa bits and exponent bias of the floats among formats."""

PACKED: Final = ("int4", "mxfp4")
"""Formats of which a byte has two codes."""

OWN_COLUMNS: Final = (0x5140, 0x3726)
"""Selectors of `prmt` in even and odd threads: the lowest digit chooses the lowest byte, from 4 on the neighbour's."""

SHIFTS: Final = {False: (0, 8), True: (0, 8, 4, 12)}
"""Shifts, by whether codes are packed, that bring the codes of 8 columns after the other to the lowest bits."""

SWAPPED: Final = 0x3120
"""Selector of `prmt` that swaps the middle bytes of a word."""

ROWS: Final = plgpu.Layout.TCGEN05_TMEM_NATIVE
"""Layout of 16-bit floats that go to tensor memory: a thread has a row."""

READ_ROWS: Final[Any] = plgpu.Layout.TCGEN05_TMEM_NATIVE(vector_length=16)
"""Layout of the bytes that become such floats."""

NIBBLES: Final = (0, 4)
"""Shifts that bring nibbles of 16 columns after the other to the lowest bits of bytes."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Tells how codes become numbers: `(float of bits - float of less - offset) * factor`, exact at every step.

    Attributes:
      bits: maps a word with a code in the lowest bits of each half to the bits of two floats.
      less: maps the same word to the bits of two floats that are subtracted; None for none.
      offset: number that is subtracted.
      factor: number that is multiplied by.
    """

    bits: Callable[[Any], Any]
    less: Callable[[Any], Any] | None = None
    offset: float = 0.0
    factor: float = 1.0


def recipe(format: str, dtype: str) -> Recipe:
    """Returns how codes of a format become numbers of a dtype; those of int4 are 0 to 15."""
    if format in FLOATS:
        bits, mantissa_bits, bias = FLOATS[format]
        left, magnitude = MANTISSA_BITS[dtype] - mantissa_bits, 0x00010001 * (2 ** (bits - 1) - 1)
        others = 0x7FFF7FFF  # all but the signs
        # The wider float has a larger bias: with the same exponent bits it is a power of two smaller.
        return Recipe(
            lambda word: ((word << left) & (magnitude << left)) | (((word << (16 - bits)) | others) ^ others),
            factor=2.0 ** (EXPONENT_BIAS[dtype] - bias),
        )
    if format == "int4":
        if dtype == "bfloat16":
            return Recipe(lambda word: (word & 0x000F000F) | 0x43004300, offset=128)  # 128 + code
        return Recipe(lambda word: (word & 0x000F000F) | 0x64006400, offset=1024)  # 1024 + code
    if dtype == "float16":
        return Recipe(lambda word: (word & 0x00FF00FF) ^ 0x64806480, offset=1024 + 128)  # 1024 + 128 + code
    # A mantissa of 7 bits: 128 + the lowest 7 bits of the code, less 128, or 256 where the highest bit is set.
    return Recipe(lambda word: (word & 0x007F007F) | 0x43004300, lambda word: (word & 0x00800080) | 0x43004300)


def arrange(
    words: np.ndarray, exchange: Callable[[Any], Any], make: Callable[[Any], Any], shifts: tuple[int, ...]
) -> np.ndarray:
    """Returns words of two floats or four bytes each, in the order of wgmma's registers.

    Args:
      words: the registers of a thread, `[tiles of 64 channels, blocks of 16 bytes, ...]`.
      exchange: returns a word of a thread with its own columns.
      make: a function of a recipe, or `less_zero`.
      shifts: `SHIFTS` for floats, `NIBBLES` for bytes.

    Returns:
      `[tiles of 64 channels, blocks of 8 columns, or of 16, ...]`.
    """
    own = np.empty_like(words)
    for index in np.ndindex(words.shape):
        own[index] = exchange(words[index])
    blocks = np.stack([make(own >> shift) for shift in shifts], axis=2)
    return blocks.reshape(words.shape[0], -1, *words.shape[2:])


def arrange_rows(
    words: np.ndarray, exchange: Callable[[Any], Any], make: Callable[[Any], Any], shifts: tuple[int, ...]
) -> np.ndarray:
    """Returns words of two floats each, in the order of a row.

    Args:
      words: the words of a row, `[blocks of 16 bytes, 4]`.
      exchange: swaps the middle bytes of a word.
      make: a function of a recipe.
      shifts: `SHIFTS`.

    Returns:
      `[blocks * 4 * len(shifts)]`.
    """
    own = np.empty_like(words)
    for index in np.ndindex(words.shape):
        own[index] = exchange(words[index])
    pairs = np.stack([make(own >> shift) for shift in shifts], axis=2)
    return pairs.reshape(*words.shape, -1, 2).swapaxes(1, 2).reshape(-1)  # nibbles before words


def less_zero(zero: int) -> Callable[[Any], Any]:
    """Returns a function of a word that has a nibble in the lowest bits of each byte: they less an integer, as int8."""
    if zero == 0:
        return lambda word: word & 0x0F0F0F0F
    # The highest bits keep differences of bytes apart.
    return lambda word: (((word & 0x0F0F0F0F) | 0x80808080) - zero * 0x01010101) ^ 0x80808080


def convert(codes: jax.Array, format: str, dtype: str, interpret: bool, rows: bool = False) -> jax.Array:
    """Returns codes as floats, packed ones unpacked; offset and factor of the recipe are left to the caller.

    Args:
      codes: `[64, bytes]`, in `Layout.WGMMA_UPCAST_2X`; for tensor memory `[128, bytes]`, in `READ_ROWS`.
      format: of a code.
      dtype: of the floats.
      interpret: whether the kernel is interpreted: arrays have no layouts then.
      rows: whether the floats go to tensor memory.

    Returns:
      `[64, in]`, in `Layout.WGMMA`; or `[128, in]`, in `ROWS`.
    """
    packed, how = format in PACKED, recipe(format, dtype)
    makes = [how.bits] if how.less is None else [how.bits, how.less]
    if interpret:
        found = [_floats_of(make(_pairs(codes, packed)), dtype) for make in makes]
    else:
        shape = (codes.shape[0], codes.shape[1] * (2 if packed else 1))
        layout, emit = (ROWS, _in_rows) if rows else (plgpu.Layout.WGMMA, _in_registers)
        read: Any = READ_ROWS if rows else plgpu.Layout.WGMMA_UPCAST_2X
        floats = plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout)
        types: dict[str, Any] = {"arg_types": (read,), "return_type": (floats,) * len(makes)}
        found = plgpu.inline_mgpu(**types)(
            lambda _, codes: tuple(emit(codes, make, floats, SHIFTS[packed]) for make in makes)
        )(codes)
    return found[0] if how.less is None else found[0] - found[1]


def convert_to_bytes(codes: jax.Array, zero: int, interpret: bool) -> jax.Array:
    """Returns packed integers less a zero as int8, `[64, in]` in `Layout.WGMMA_8BIT`.

    Args:
      codes: `[64, bytes]`, in the same layout.
      zero: the integer that is subtracted.
      interpret: whether the kernel is interpreted: arrays have no layouts then.
    """
    if interpret:
        return (_integers(codes, True) - zero).astype(jnp.int8)
    layout: Any = plgpu.Layout.WGMMA_8BIT
    result = plgpu.ShapeDtypeStruct((codes.shape[0], 2 * codes.shape[1]), jnp.int8, layout)
    emit = plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    return emit(lambda _, codes: _in_registers(codes, less_zero(zero), result, NIBBLES))(codes)


def numbers(floats: jax.Array, how: Recipe, dtype: str) -> jax.Array:
    """Returns the numbers that codes stand for, given what `convert` made of them."""
    if how.offset:
        floats = floats - jnp.asarray(how.offset, dtype)
    return floats * jnp.asarray(how.factor, dtype) if how.factor != 1 else floats


def _integers(codes: jax.Array, packed: bool) -> jax.Array:
    """Returns the bits of each code as an int32, `[64, in]`."""
    is_integer = jnp.issubdtype(codes.dtype, jnp.integer)
    numbers = (codes if is_integer else jax.lax.bitcast_convert_type(codes, jnp.uint8)).astype(jnp.int32) & 0xFF
    if packed:
        blocks = numbers.reshape(len(codes), -1, 16)
        numbers = jnp.concatenate([blocks & 0xF, blocks >> 4], axis=2).reshape(len(codes), -1)
    return numbers


def _pairs(codes: jax.Array, packed: bool) -> jax.Array:
    """Returns words with the codes of two adjacent columns in their halves, `[64, in / 2]`."""
    numbers = _integers(codes, packed)
    return numbers[:, ::2] | (numbers[:, 1::2] << 16)


def _floats_of(words: jax.Array, dtype: str) -> jax.Array:
    """Returns the two floats of each word."""
    return jax.lax.bitcast_convert_type(words, jnp.dtype(dtype)).reshape(len(words), -1)


class Word:
    """A 32-bit register with the operators that recipes use; each emits an instruction."""

    def __init__(self, value: ir.Value) -> None:
        self.value = value

    def __and__(self, mask: int) -> Word:
        return Word(arith.andi(self.value, _in_register(mask)))

    def __or__(self, other: int | Word) -> Word:
        return Word(arith.ori(self.value, other.value if isinstance(other, Word) else _in_register(other)))

    def __xor__(self, other: int | Word) -> Word:
        return Word(arith.xori(self.value, other.value if isinstance(other, Word) else _in_register(other)))

    def __add__(self, other: int | Word) -> Word:
        return Word(arith.addi(self.value, other.value if isinstance(other, Word) else utils.c(other, self.value.type)))

    def __sub__(self, other: int) -> Word:
        return Word(arith.subi(self.value, _in_register(other)))

    def __mul__(self, factor: int) -> Word:
        return Word(arith.muli(self.value, utils.c(factor, self.value.type)))

    def __lshift__(self, count: int) -> Word:
        return Word(arith.shli(self.value, utils.c(count, self.value.type)))

    def __rshift__(self, count: int) -> Word:
        return Word(arith.shrui(self.value, utils.c(count, self.value.type)))


def _in_register(constant: int) -> Any:
    """Emits a constant that NVIDIA's assembler does not know to be one: it keeps it in a register.

    It would move known ones into a register anew for every instruction that takes two: a fifth of all. The number of a
    multiprocessor is below 2^31.
    """
    i32 = ir.IntegerType.get_signless(32)
    ptx = f"{{ .reg .b32 zero; mov.u32 zero, %smid; shr.u32 zero, zero, 31; xor.b32 $0, zero, {constant}; }}"
    return llvm.inline_asm(i32, [], ptx, "=r")


def _in_registers(codes: Any, make: Callable[[Any], Any], result: Any, shifts: tuple[int, ...]) -> Any:
    """Emits `arrange` for codes in registers, a `FragmentedArray`, and returns another of the type of `result`."""
    i32 = ir.IntegerType.get_signless(32)
    is_even = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(utils.thread_idx(), utils.c(2, i32)), utils.c(0, i32))
    columns = arith.select(is_even, *(utils.c(selector, i32) for selector in OWN_COLUMNS))

    def exchange(register: ir.Value) -> Word:
        word = utils.bitcast(register, i32)
        return Word(word if shifts == NIBBLES else utils.prmt(word, utils.shfl_bfly(word, 1), columns))

    return as_array(arrange(codes.registers, exchange, make, shifts), result)


def _in_rows(codes: Any, make: Callable[[Any], Any], result: Any, shifts: tuple[int, ...]) -> Any:
    """Emits `arrange_rows`; see `_in_registers`."""
    i32 = ir.IntegerType.get_signless(32)
    four = [utils.bitcast(register, ir.VectorType.get((4,), i32)) for register in codes.registers.flat]
    words = np.array([[llvm.extractelement(one, utils.c(place, i32)) for place in range(4)] for one in four], object)
    swapped = utils.c(SWAPPED, i32)
    return as_array(arrange_rows(words, lambda word: Word(utils.prmt(word, word, swapped)), make, shifts), result)


def as_array(words: Any, result: Any) -> Any:
    """Returns words of two floats or four int8 each, in the order of registers, as an array of the type of `result`."""
    size = jnp.dtype(result.dtype).itemsize
    several = ir.VectorType.get((4 // size,), utils.dtype_to_ir_type(result.dtype))
    layout = result.layout.to_mgpu()
    words = words.reshape(layout.registers_shape(result.shape))
    registers = np.empty_like(words)
    for index in np.ndindex(words.shape):
        registers[index] = utils.bitcast(words[index].value, several)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True if size == 1 else None)
