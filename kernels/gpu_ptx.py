"""Instructions of NVIDIA GPUs that no operation of Pallas stands for, written as PTX.

A program is a few lines of PTX. NVIDIA's assembler takes it as it stands, an interpreter evaluates the same lines one
by one, so that tests without a GPU see what a GPU executes. It is a single operation to Triton, some of whose passes
take a time that grows with the square of the operations; the assembler sees the instructions again: it orders them
freely, and executes once what several programs have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

NAME: Final = re.compile(r"(?<![.\w])[a-z]\w*(?![.\w])")
"""Of a register: numbers begin with a digit, instructions go on behind a point."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Instructions over 32-bit registers, of each thread. The bits of the last line's result are the program's.

    (One result: Pallas takes several of inline assembly for one, at least up to JAX 0.12.)

    Attributes:
      lines: "name result, operand, …", where operands are names of registers, or numbers.
      inputs: registers that are given.
    """

    lines: tuple[str, ...]
    inputs: tuple[str, ...]

    def run(self, *operands: jax.Array, native: bool) -> jax.Array:
        """The result for every element, int32.

        Args:
          operands: the inputs, int32 or float32, of shapes that broadcast to each other.
          native: whether the kernel is compiled for an NVIDIA GPU; otherwise instructions are evaluated.
        """
        given = dict(zip(self.inputs, operands, strict=True))
        return self._assembled(given) if native else self._evaluated(given)

    def _assembled(self, given: dict[str, jax.Array]) -> jax.Array:
        shape = jnp.broadcast_shapes(*(operand.shape for operand in given.values()))
        places = {name: f"${place}" for place, name in enumerate(given, 1)}
        lines = [NAME.sub(lambda found: places.get(found[0], found[0]), line) for line in self.lines]
        results = [_parts(line)[1][0] for line in self.lines]
        # What is returned may share its register with an input: it is written when nothing is read any more.
        text = f"{{ .reg .b32 {', '.join(dict.fromkeys(results))}; {'; '.join(lines)}; mov.b32 $0, {results[-1]}; }}"
        (result,) = plgpu.elementwise_inline_asm(
            text,
            args=[jnp.broadcast_to(operand, shape) for operand in given.values()],
            constraints=",".join(["=r"] + ["f" if operand.dtype == jnp.float32 else "r" for operand in given.values()]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
        )
        return result

    def _evaluated(self, given: dict[str, jax.Array]) -> jax.Array:
        registers: dict[str, Any] = dict(given)
        result = ""
        for line in self.lines:
            name, (result, *operands) = _parts(line)
            values = [registers[operand] if NAME.match(operand) else _number(operand) for operand in operands]
            registers[result] = INSTRUCTIONS[name](*values)
        found = registers[result]
        return found if found.dtype == jnp.int32 else jax.lax.bitcast_convert_type(found, jnp.int32)


def _parts(line: str) -> tuple[str, list[str]]:
    """An instruction's name, its result and operands."""
    name, rest = line.split(" ", 1)
    return name, rest.split(", ")


def _number(text: str) -> int:
    """A constant, as an int32 has its bits; those of a float32 stand behind 0f."""
    bits = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
    return bits - (bits >> 31 << 32)


def _float(register: Any) -> jax.Array:
    """What a register holds, as a float32."""
    bits = jnp.int32(register) if isinstance(register, int) else register
    return bits if bits.dtype == jnp.float32 else jax.lax.bitcast_convert_type(bits, jnp.float32)


def permuted(low: Any, high: Any, selector: Any) -> jax.Array:
    """`prmt`: four of the eight bytes of two words.

    From the right, each digit of the selector is the place of one; with 8 added to it, its sign is taken eight times.
    """
    if isinstance(selector, int) and not selector & 0x8888:
        eight = [_bytes(word, jnp.uint8)[..., byte] for word in (low, high) for byte in range(4)]
        picked = jnp.stack([eight[(selector >> (4 * to)) & 7] for to in range(4)], axis=-1)
        return jax.lax.bitcast_convert_type(picked, jnp.int32)
    digits = jnp.stack([jnp.int32(selector) >> (4 * to) & 15 for to in range(4)], axis=-1)
    table = jnp.concatenate([_bytes(low, jnp.uint8), _bytes(high, jnp.uint8)], axis=-1).astype(jnp.int32)
    is_place = (digits & 7)[..., None] == jax.lax.broadcasted_iota(jnp.int32, (8,), 0)
    picked = jnp.sum(jnp.where(is_place, table[..., None, :], 0), axis=-1)
    picked = jnp.where(digits >= 8, -(picked >> 7), picked)
    return jax.lax.bitcast_convert_type(picked.astype(jnp.uint8), jnp.int32)


def dot(kinds: tuple[Any, Any], first: jax.Array, second: Any, total: Any) -> jax.Array:
    """`dp4a`: a total and the products of four pairs of bytes, which are signed or not, in int32."""
    factors = [_bytes(word, kind).astype(jnp.int32) for word, kind in zip((first, second), kinds, strict=True)]
    return jnp.sum(factors[0] * factors[1], axis=-1) + total


def exclusive(word: jax.Array, mask: Any) -> jax.Array:
    """`xor`."""
    return word ^ jnp.int32(mask)


def shifted(word: jax.Array, places: Any) -> jax.Array:
    """`shr.u32`: towards lower places, zeros come in."""
    return jax.lax.shift_right_logical(word, jnp.int32(places))


def _bytes(word: Any, kind: Any) -> jax.Array:
    """`[..., 4]`, the lowest first."""
    return jax.lax.bitcast_convert_type(jnp.int32(word), kind)


def rounded(number: jax.Array) -> jax.Array:
    """`cvt.rni`: the nearest integer, of two the even one."""
    return jnp.round(number).astype(jnp.int32)


def multiplied(first: Any, second: Any) -> jax.Array:
    """`mul`."""
    return _float(first) * _float(second)


def added(first: Any, second: Any) -> jax.Array:
    """`add`."""
    return _float(first) + _float(second)


def fused(first: Any, second: Any, third: Any) -> jax.Array:
    """`fma`, which a GPU rounds once, and an interpreter may round twice."""
    return _float(first) * _float(second) + _float(third)


INSTRUCTIONS: Final[dict[str, Callable[..., jax.Array]]] = {
    "abs.f32": jnp.abs,
    "add.f32": added,
    "fma.rn.f32": fused,
    "mul.f32": multiplied,
    "max.NaN.f32": jnp.maximum,
    "prmt.b32": permuted,
    "or.b32": jnp.bitwise_or,
    "xor.b32": exclusive,
    "shr.u32": shifted,
    "cvt.rni.s32.f32": rounded,
    "dp4a.s32.s32": functools.partial(dot, (jnp.int8, jnp.int8)),
    "dp4a.s32.u32": functools.partial(dot, (jnp.int8, jnp.uint8)),
    "dp4a.u32.s32": functools.partial(dot, (jnp.uint8, jnp.int8)),
    "dp4a.u32.u32": functools.partial(dot, (jnp.uint8, jnp.uint8)),
}
"""By name: what the PTX manual says that they do."""
