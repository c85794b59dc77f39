"""append_kv and append_qkv: what they leave in a cache must be what the definition does, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.operations.base import Operation, Verdict, verdict_of
from palladion.kernels import append_kv as package
from palladion.kernels import append_qkv as joined_package
from palladion.kernels.append_kv import cases
from palladion.kernels.append_qkv import cases as joined_cases
from palladion.reference import KVCache, oracle, quantize_kv
from palladion.reference.compare import compare


class AppendKV(Operation):
    """append_kv; what it writes and what it leaves alone must be exact: the oracle is the definition, token by token.

    A token is quantized by `quantize_kv`, as the definition has it.
    """

    name = "append_kv"
    cases: ClassVar[Any] = cases
    package: ClassVar[Any] = package

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""
        del case

        def append(cache: KVCache, rest: Any) -> KVCache:
            k, v, lengths, new_tokens, layer = rest
            options = {"new_tokens": new_tokens, "layer": layer, **how}
            return package.append_kv(cache, k, v, lengths, **options)

        return append

    def split(self, inputs: Any) -> tuple[Any, Any]:
        """The cache is donated."""
        return inputs.cache, tuple(inputs)[1:]

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """As `Operation` has it."""
        del case
        wrong = []
        for who, cache in (("result", result), ("reference", reference)):
            for name, expected in oracle_append(inputs).items():
                got = np.asarray(getattr(cache, name))
                if not identical(got, expected):
                    wrong.append(f"{who}.{name}")
        said = f"differs from the definition: {', '.join(wrong)}" if wrong else "exact"
        return Verdict(np.inf if wrong else 0.0, np.inf if wrong else 0.0, said)


class AppendQKV(Operation):
    """append_qkv; what is rotated and written is judged in float64, what else is in the cache must be left alone."""

    name = "append_qkv"
    cases: ClassVar[Any] = joined_cases
    package: ClassVar[Any] = joined_package

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""
        del case

        def append(held: tuple[jax.Array, KVCache], rest: Any) -> tuple[jax.Array, KVCache]:
            inputs = joined_package.Inputs(held[1], *rest)
            return joined_package.append_qkv(**inputs._asdict(), **how)

        return append

    def split(self, inputs: Any) -> tuple[Any, Any]:
        """The cache is donated, and with it a place for queries: what a call returns is what the next one is given."""
        batch, q_len, heads, head_dim = inputs.qkv.shape
        queries = jnp.zeros((batch, q_len, heads - 2 * inputs.cache.k.shape[-3], head_dim), inputs.qkv.dtype)
        return (queries, inputs.cache), tuple(inputs)[1:]

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """As `Operation` has it."""
        rotated = oracle.rotate(inputs.qkv, inputs.cosine, inputs.sine)
        verdicts = [verdict_of(compare(result[0], reference[0], rotated[:, :, : case.q_heads]))]
        exact = {
            "k": rotated[:, :, case.q_heads : -case.kv_heads],
            "v": oracle.widen(inputs.qkv)[:, :, -case.kv_heads :],
        }
        for name, numbers in exact.items():
            got, theirs = (_Taken.out_of(cache, inputs, case.q_len, name) for cache in (result[1], reference[1]))
            if not got.rest_is_kept:
                return Verdict(np.inf, np.inf, f"{name} differs where nothing was to be written")
            expected = np.stack([numbers[b, i] for b, i, *_ in _places(inputs, case.q_len)])
            verdicts.append(verdict_of(compare(got.tokens, theirs.tokens, expected)))
        return max(verdicts, key=lambda one: one.units)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """New tokens, taken out of a cache.

    Attributes:
      tokens: `[tokens, kv_heads, head_dim]`, times their scales where there are any.
      rest_is_kept: whether what is left is what was there before, to the last bit.
    """

    tokens: np.ndarray
    rest_is_kept: bool

    @classmethod
    def out_of(cls, cache: Any, inputs: Any, q_len: int, name: str) -> _Taken:
        found, kept = [], True
        for part in (name, f"{name}_scale"):
            if getattr(cache, part) is None:
                continue
            after, before = np.array(getattr(cache, part)), np.asarray(getattr(inputs.cache, part))
            layer = () if inputs.layer is None else (int(inputs.layer),)
            place = [(*layer, slab, slice(None), row) for _, _, slab, row in _places(inputs, q_len)]
            found.append(np.stack([after[at] for at in place]))
            for at in place:
                after[at] = before[at]
            kept &= identical(after, before)
        tokens = found[0] if len(found) == 1 else found[0].astype(np.float32) * found[1][..., None]
        return cls(tokens, kept)


def oracle_append(inputs: Any) -> dict[str, np.ndarray]:
    """What append_kv leaves in each array of a cache, token by token."""
    cache = inputs.cache
    names = [name for name in ("k", "v", "k_scale", "v_scale") if getattr(cache, name) is not None]
    parts = {name: np.array(getattr(cache, name)) for name in names}
    store = jax.jit(quantize_kv, static_argnums=1)
    new: dict[str, np.ndarray] = {}
    for name in ("k", "v"):
        codes, scales = store(getattr(inputs, name), cache.k.dtype)
        new |= {name: np.asarray(codes)} | ({} if scales is None else {f"{name}_scale": np.asarray(scales)})
    for b, i, slab, row in _places(inputs, inputs.k.shape[1]):
        for name, values in new.items():
            target = parts[name] if inputs.layer is None else parts[name][int(inputs.layer)]
            target[slab, :, row] = values[b, i]
    return parts


def _places(inputs: Any, q_len: int) -> Iterator[tuple[int, int, int, int]]:
    """Of every token that is written: its sequence, which of the new ones it is, and its slab and row in the cache."""
    cache, lengths = inputs.cache, np.asarray(inputs.lengths)
    rows = cache.k.shape[-2]
    for b, length in enumerate(lengths):
        real = q_len if inputs.new_tokens is None else int(inputs.new_tokens[b])
        for i in range(q_len - real, q_len):
            position = int(length) - q_len + i
            if not 0 <= position < cache.max_len:
                continue
            if cache.page_table is None:
                yield b, i, b, position
            else:
                yield b, i, int(cache.page_table[b, position // rows]), position % rows


def identical(got: np.ndarray, expected: np.ndarray) -> bool:
    """To the last bit, but for NaN, whose bits may change on the way: XLA on a CPU moves float8_e5m2 as float16."""
    bits = np.dtype(f"u{got.dtype.itemsize}")
    differ = got.view(bits) != expected.view(bits)
    return not differ.any() or bool((np.isnan(got[differ]) & np.isnan(expected[differ])).all())
