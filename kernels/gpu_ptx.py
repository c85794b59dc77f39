"""Byte instructions of NVIDIA GPUs that Pallas has no operation for: `prmt` and `dp4a`.

Compiled kernels contain them as inline assembly. In interpreted kernels the same functions compute what the PTX manual
defines, so that tests on a CPU check the operands that a GPU gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

Word = Any
"""Four bytes, the lowest first: an int32 array, or a Python integer of 32 bits."""


@dataclasses.dataclass(frozen=True)
class Ptx:
    """The instructions, for each element of int32 arrays of one shape.

    Attributes:
      native: whether they are inline assembly, for a compiled kernel; otherwise jax.numpy computes them.
    """

    native: bool

    def prmt(self, low: Word, high: Word, selector: Word) -> jax.Array:
        """Selects four of the eight bytes of two words.

        Args:
          low: bytes 0 to 3.
          high: bytes 4 to 7.
          selector: the index of a byte in each of its four lowest hexadecimal digits, the lowest first. With 8 added,
            all bits of the selected byte are its sign.
        """
        if self.native:
            return _assemble("prmt.b32", low, high, selector)
        if isinstance(selector, int):
            table = [_bytes(word)[..., place] for word in (low, high) for place in range(4)]
            places = [selector >> (4 * place) & 15 for place in range(4)]
            picked = [_sign(table[place & 7]) if place & 8 else table[place & 7] for place in places]
            return jax.lax.bitcast_convert_type(jnp.stack(jnp.broadcast_arrays(*picked), axis=-1), jnp.int32)
        digits = jnp.stack([selector >> (4 * place) & 15 for place in range(4)], axis=-1)
        eight = jnp.concatenate(jnp.broadcast_arrays(_bytes(low), _bytes(high)), axis=-1)
        is_selected = (digits & 7)[..., None] == jax.lax.broadcasted_iota(jnp.int32, (8,), 0)
        selected = jnp.sum(jnp.where(is_selected, eight[..., None, :], 0), axis=-1, dtype=jnp.uint8)
        return jax.lax.bitcast_convert_type(jnp.where(digits >= 8, _sign(selected), selected), jnp.int32)

    def dp4a(self, first: jax.Array, second: jax.Array, total: Word, *, signed: tuple[bool, bool]) -> jax.Array:
        """Adds the products of four pairs of bytes to a total, in int32.

        Args:
          first: four bytes.
          second: four bytes.
          total: an int32.
          signed: whether the bytes of `first`, and of `second`, are signed.
        """
        if self.native:
            types = ".".join("s32" if has_sign else "u32" for has_sign in signed)
            return _assemble(f"dp4a.{types}", first, second, total)
        kinds = [jnp.int8 if has_sign else jnp.uint8 for has_sign in signed]
        factors = [_bytes(word, kind).astype(jnp.int32) for word, kind in zip((first, second), kinds, strict=True)]
        return jnp.sum(factors[0] * factors[1], axis=-1) + total

    def together(self, loaded: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns its arguments unchanged, and issues all of their loads before the first result is used.

        By default NVIDIA's assembler places many loads right before their use, to save registers: threads then wait for
        memory again and again with a few loads in flight. It moves no load over a barrier. A barrier of one warp, whose
        threads run in lockstep anyway, takes no time, and as an operation on what was loaded it comes after the loads.

        Args:
          loaded: int8 arrays of one shape, four elements of a thread side by side.
        """
        if not self.native:
            return list(loaded)
        first, *rest = loaded
        (first,) = plgpu.elementwise_inline_asm(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
            args=loaded,
            constraints=",".join(["=r", *["r"] * len(loaded)]),
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(first.shape, first.dtype)],
        )
        return [first, *rest]


def _assemble(instruction: str, *operands: Word) -> jax.Array:
    """Returns the result of an instruction; Python integers become constants of it."""
    arrays = [operand for operand in operands if not isinstance(operand, int)]
    arrays = jnp.broadcast_arrays(*arrays)
    names = iter(range(1, len(arrays) + 1))
    text = ", ".join(f"{operand:#x}" if isinstance(operand, int) else f"${next(names)}" for operand in operands)
    (result,) = plgpu.elementwise_inline_asm(
        f"{instruction} $0, {text};",
        args=arrays,
        constraints=",".join(["=r", *["r"] * len(arrays)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, jnp.int32)],
    )
    return result


def _bytes(word: Word, dtype: DTypeLike = jnp.uint8) -> jax.Array:
    """Returns the bytes of words, `[..., 4]`, the lowest first."""
    bits = jnp.int32(word - (word >> 31 << 32)) if isinstance(word, int) else word
    return jax.lax.bitcast_convert_type(bits, dtype)


def _sign(byte: jax.Array) -> jax.Array:
    """Returns a byte of 255 for each negative byte, and of 0 for the others."""
    return (byte >> 7) * jnp.uint8(0xFF)
