"""Instructions of NVIDIA GPUs that Pallas has no operation for, written as PTX.

A program is a few lines of PTX. Compiled kernels contain it as inline assembly; interpreted kernels evaluate the same
lines one by one, so that tests without a GPU check what a GPU executes. To Triton a program is one operation, which
keeps its compile time down (some of its passes are quadratic in the operations). NVIDIA's assembler sees the single
instructions: it reorders them freely and merges instructions that several programs have in common.
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
from jax.typing import DTypeLike

NAME: Final = re.compile(r"(?<![.\w])[a-z]\w*(?![.\w])")
"""Name of a register; numbers begin with a digit, and instruction names contain a dot."""


@dataclasses.dataclass(frozen=True)
class Program:
    """PTX instructions on 32-bit registers, executed for each element; the last line computes the result.

    There is one result, because Pallas mistakes several results of inline assembly for one, at least up to jax 0.12.

    Attributes:
      lines: instructions, "name result, operand, …"; operands are register names or numbers.
      inputs: names of the input registers.
    """

    lines: tuple[str, ...]
    inputs: tuple[str, ...]

    def run(self, *operands: jax.Array, native: bool) -> jax.Array:
        """Returns the result for every element, int32.

        Args:
          operands: inputs, int32 or float32, with shapes that broadcast.
          native: whether the kernel is compiled for an NVIDIA GPU; otherwise the instructions are evaluated.
        """
        registers = dict(zip(self.inputs, operands, strict=True))
        return self._assemble(registers) if native else self._evaluate(registers)

    def _assemble(self, inputs: dict[str, jax.Array]) -> jax.Array:
        shape = jnp.broadcast_shapes(*(operand.shape for operand in inputs.values()))
        placeholders = {name: f"${number}" for number, name in enumerate(inputs, 1)}
        lines = [NAME.sub(lambda match: placeholders.get(match[0], match[0]), line) for line in self.lines]
        results = [_parse(line)[1] for line in self.lines]
        # The result may share a register with an input, so it is written after the last read.
        text = f"{{ .reg .b32 {', '.join(dict.fromkeys(results))}; {'; '.join(lines)}; mov.b32 $0, {results[-1]}; }}"
        (result,) = plgpu.elementwise_inline_asm(
            text,
            args=[jnp.broadcast_to(operand, shape) for operand in inputs.values()],
            constraints=",".join(
                ["=r"] + ["f" if operand.dtype == jnp.float32 else "r" for operand in inputs.values()]
            ),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
        )
        return result

    def _evaluate(self, inputs: dict[str, jax.Array]) -> jax.Array:
        registers: dict[str, Any] = dict(inputs)
        result = ""
        for line in self.lines:
            name, result, operands = _parse(line)
            values = [registers[operand] if NAME.match(operand) else _constant(operand) for operand in operands]
            registers[result] = INSTRUCTIONS[name](*values)
        last = registers[result]
        return last if last.dtype == jnp.int32 else jax.lax.bitcast_convert_type(last, jnp.int32)


def _parse(line: str) -> tuple[str, str, list[str]]:
    """Returns the name of an instruction, its result register and its operands."""
    name, registers = line.split(" ", 1)
    result, *operands = registers.split(", ")
    return name, result, operands


def _constant(text: str) -> int:
    """Returns the bits of a constant as an int32; 0f introduces the bits of a float32."""
    bits = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
    return bits - (bits >> 31 << 32)


def _float(register: Any) -> jax.Array:
    """Returns the bits of a register as a float32."""
    bits = jnp.int32(register) if isinstance(register, int) else register
    return bits if bits.dtype == jnp.float32 else jax.lax.bitcast_convert_type(bits, jnp.float32)


def _prmt(low: Any, high: Any, selector: Any) -> jax.Array:
    """Evaluates `prmt`, which selects four of the eight bytes of two words.

    Each hexadecimal digit of the selector, the lowest first, is the index of a byte; with 8 added, all bits of the
    result's byte are the sign of the selected byte.
    """
    if isinstance(selector, int) and not selector & 0x8888:
        table = [_bytes(word, jnp.uint8)[..., byte] for word in (low, high) for byte in range(4)]
        selected = jnp.stack([table[(selector >> (4 * digit)) & 7] for digit in range(4)], axis=-1)
        return jax.lax.bitcast_convert_type(selected, jnp.int32)
    digits = jnp.stack([jnp.int32(selector) >> (4 * digit) & 15 for digit in range(4)], axis=-1)
    eight_bytes = jnp.concatenate([_bytes(low, jnp.uint8), _bytes(high, jnp.uint8)], axis=-1).astype(jnp.int32)
    is_selected = (digits & 7)[..., None] == jax.lax.broadcasted_iota(jnp.int32, (8,), 0)
    selected = jnp.sum(jnp.where(is_selected, eight_bytes[..., None, :], 0), axis=-1)
    selected = jnp.where(digits >= 8, -(selected >> 7), selected)
    return jax.lax.bitcast_convert_type(selected.astype(jnp.uint8), jnp.int32)


def _dp4a(dtypes: tuple[Any, Any], first: jax.Array, second: Any, total: Any) -> jax.Array:
    """Evaluates `dp4a`, which adds the products of four pairs of bytes to a total, in int32."""
    factors = [_bytes(word, dtype).astype(jnp.int32) for word, dtype in zip((first, second), dtypes, strict=True)]
    return jnp.sum(factors[0] * factors[1], axis=-1) + total


def _xor(word: jax.Array, mask: Any) -> jax.Array:
    return word ^ jnp.int32(mask)


def _shr_u32(word: jax.Array, bits: Any) -> jax.Array:
    return jax.lax.shift_right_logical(word, jnp.int32(bits))


def _bytes(word: Any, dtype: DTypeLike) -> jax.Array:
    """Returns the bytes of words, `[..., 4]`, the lowest first."""
    return jax.lax.bitcast_convert_type(jnp.int32(word), dtype)


def _cvt_rni(number: jax.Array) -> jax.Array:
    """Evaluates `cvt.rni`, which rounds to the nearest integer, ties to even."""
    return jnp.round(number).astype(jnp.int32)


def _mul(first: Any, second: Any) -> jax.Array:
    return _float(first) * _float(second)


def _add(first: Any, second: Any) -> jax.Array:
    return _float(first) + _float(second)


def _fma(first: Any, second: Any, third: Any) -> jax.Array:
    """Evaluates `fma`, which a GPU rounds once and this function may round twice."""
    return _float(first) * _float(second) + _float(third)


INSTRUCTIONS: Final[dict[str, Callable[..., jax.Array]]] = {
    "abs.f32": jnp.abs,
    "add.f32": _add,
    "fma.rn.f32": _fma,
    "mul.f32": _mul,
    "max.NaN.f32": jnp.maximum,
    "prmt.b32": _prmt,
    "or.b32": jnp.bitwise_or,
    "xor.b32": _xor,
    "shr.u32": _shr_u32,
    "cvt.rni.s32.f32": _cvt_rni,
    "dp4a.s32.s32": functools.partial(_dp4a, (jnp.int8, jnp.int8)),
    "dp4a.s32.u32": functools.partial(_dp4a, (jnp.int8, jnp.uint8)),
    "dp4a.u32.s32": functools.partial(_dp4a, (jnp.uint8, jnp.int8)),
    "dp4a.u32.u32": functools.partial(_dp4a, (jnp.uint8, jnp.uint8)),
}
"""Evaluation of each instruction, as the PTX manual defines it, by its name."""
