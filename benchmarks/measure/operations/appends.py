"""append_kv and append_qkv for benchmarks; the caches that they return are judged token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.operations.base import CallOptions, Operation, Verdict, verdict_of
from palladion.kernels import append_kv as package
from palladion.kernels import append_qkv as joined_package
from palladion.kernels.append_kv import Inputs, cases
from palladion.kernels.append_qkv import Inputs as JoinedInputs
from palladion.kernels.append_qkv import cases as joined_cases
from palladion.reference import KVCache, oracle, quantize_kv
from palladion.reference.compare import compare


class AppendKV(Operation):
    """append_kv. The whole cache must be exact: new tokens as `quantize_kv` stores them, the rest unchanged."""

    name = "append_kv"
    cases: ClassVar[Any] = cases
    package: ClassVar[Any] = package

    def function(self, case: cases.Case, **call: Unpack[CallOptions]) -> Callable[..., KVCache]:
        """Implements `Operation.function`."""
        del case

        def append(cache: KVCache, rest: Any) -> KVCache:
            k, v, lengths, new_tokens, layer = rest
            return package.append_kv(cache, k, v, lengths, new_tokens=new_tokens, layer=layer, **call)

        return append

    def split(self, inputs: Inputs) -> tuple[KVCache, Any]:
        """Splits inputs into the cache, which is donated, and the rest."""
        return inputs.cache, tuple(inputs)[1:]

    def judge(self, case: cases.Case, inputs: Inputs, result: KVCache, reference: KVCache) -> Verdict:
        """Implements `Operation.judge`."""
        del case
        wrong = []
        for who, cache in (("result", result), ("reference", reference)):
            for name, expected in oracle_append(inputs).items():
                got = np.asarray(getattr(cache, name))
                if not identical(got, expected):
                    wrong.append(f"{who}.{name}")
        description = f"differs from the definition: {', '.join(wrong)}" if wrong else "exact"
        return Verdict(np.inf if wrong else 0.0, np.inf if wrong else 0.0, description)


class AppendQKV(Operation):
    """append_qkv. Rotated queries and new tokens are judged in float64; the rest of the cache must be unchanged."""

    name = "append_qkv"
    cases: ClassVar[Any] = joined_cases
    package: ClassVar[Any] = joined_package

    def function(
        self, case: joined_cases.Case, **call: Unpack[CallOptions]
    ) -> Callable[..., tuple[jax.Array, KVCache]]:
        """Implements `Operation.function`."""
        del case

        def append(held: tuple[jax.Array, KVCache], rest: Any) -> tuple[jax.Array, KVCache]:
            inputs = joined_package.Inputs(held[1], *rest)
            return joined_package.append_qkv(**inputs._asdict(), **call)

        return append

    def split(self, inputs: JoinedInputs) -> tuple[tuple[jax.Array, KVCache], Any]:
        """Splits inputs into what is donated and the rest.

        A call returns queries and a cache, and the next call is given both: so an array for the queries is donated
        with the cache.
        """
        batch, q_len, heads, head_dim = inputs.qkv.shape
        queries = jnp.zeros((batch, q_len, heads - 2 * inputs.cache.k.shape[-3], head_dim), inputs.qkv.dtype)
        return (queries, inputs.cache), tuple(inputs)[1:]

    def judge(self, case: joined_cases.Case, inputs: JoinedInputs, result: Any, reference: Any) -> Verdict:
        """Implements `Operation.judge`."""
        rotated = oracle.rotate(inputs.qkv, inputs.cosine, inputs.sine)
        verdicts = [verdict_of(compare(result[0], reference[0], rotated[:, :, : case.q_heads]))]
        exact = {
            "k": rotated[:, :, case.q_heads : -case.kv_heads],
            "v": oracle.to_float64(inputs.qkv)[:, :, -case.kv_heads :],
        }
        for name, numbers in exact.items():
            got, theirs = (_AppendedTokens.of(cache, inputs, case.q_len, name) for cache in (result[1], reference[1]))
            if not got.rest_is_unchanged:
                return Verdict(np.inf, np.inf, f"{name} differs where nothing was to be written")
            expected = np.stack([numbers[b, i] for b, i, *_ in _positions(inputs, case.q_len)])
            verdicts.append(verdict_of(compare(got.tokens, theirs.tokens, expected)))
        return max(verdicts, key=lambda one: one.units)


@dataclasses.dataclass(frozen=True)
class _AppendedTokens:
    """The new tokens in a cache.

    Attributes:
      tokens: `[tokens, kv_heads, head_dim]`, dequantized.
      rest_is_unchanged: whether everything else in the cache has its old bits.
    """

    tokens: np.ndarray
    rest_is_unchanged: bool

    @classmethod
    def of(cls, cache: KVCache, inputs: JoinedInputs, q_len: int, name: str) -> _AppendedTokens:
        """Takes the new keys ("k") or values ("v") out of a cache."""
        found, unchanged = [], True
        for array in (name, f"{name}_scale"):
            if getattr(cache, array) is None:
                continue
            after, before = np.array(getattr(cache, array)), np.asarray(getattr(inputs.cache, array))
            layer = () if inputs.layer is None else (int(inputs.layer),)
            indices = [(*layer, slab, slice(None), row) for _, _, slab, row in _positions(inputs, q_len)]
            found.append(np.stack([after[index] for index in indices]))
            for index in indices:
                after[index] = before[index]
            unchanged &= identical(after, before)
        tokens = found[0] if len(found) == 1 else found[0].astype(np.float32) * found[1][..., None]
        return cls(tokens, unchanged)


def oracle_append(inputs: Inputs) -> dict[str, np.ndarray]:
    """Returns the arrays of the cache after append_kv, written token by token as the definition says."""
    cache = inputs.cache
    names = [name for name in ("k", "v", "k_scale", "v_scale") if getattr(cache, name) is not None]
    arrays = {name: np.array(getattr(cache, name)) for name in names}
    store = jax.jit(quantize_kv, static_argnums=1)
    new: dict[str, np.ndarray] = {}
    for name in ("k", "v"):
        codes, scales = store(getattr(inputs, name), cache.k.dtype)
        new |= {name: np.asarray(codes)} | ({} if scales is None else {f"{name}_scale": np.asarray(scales)})
    for b, i, slab, row in _positions(inputs, inputs.k.shape[1]):
        for name, values in new.items():
            target = arrays[name] if inputs.layer is None else arrays[name][int(inputs.layer)]
            target[slab, :, row] = values[b, i]
    return arrays


def _positions(inputs: Inputs | JoinedInputs, q_len: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields sequence, index among the new tokens, slab and row in the cache of every token that is written."""
    cache, lengths = inputs.cache, np.asarray(inputs.lengths)
    rows = cache.k.shape[-2]
    for b, length in enumerate(lengths):
        new = q_len if inputs.new_tokens is None else int(inputs.new_tokens[b])
        for i in range(q_len - new, q_len):
            position = int(length) - q_len + i
            if not 0 <= position < cache.max_len:
                continue
            if cache.page_table is None:
                yield b, i, b, position
            else:
                yield b, i, int(cache.page_table[b, position // rows]), position % rows


def identical(got: np.ndarray, expected: np.ndarray) -> bool:
    """Compares arrays to the last bit, except for NaN.

    XLA on a CPU moves float8_e5m2 as float16, which may change the bits of a NaN.
    """
    bits = np.dtype(f"u{got.dtype.itemsize}")
    differ = got.view(bits) != expected.view(bits)
    return not differ.any() or bool((np.isnan(got[differ]) & np.isnan(expected[differ])).all())
