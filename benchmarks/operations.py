"""The operations as benchmarks see them: workloads, how a backend is called, and whether a result is right.

The float64 oracle goes loop by loop, too slowly for the shapes of real models. Of these it judges a sample: whole
heads and channels at both ends and between, each computed from everything that it depends on.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels import append_kv as append_package
from palladion.kernels import append_qkv as joined_package
from palladion.kernels import decode_attention as attention_package
from palladion.kernels import matmul as dense_package
from palladion.kernels import quantized_matmul as matmul_package
from palladion.kernels.append_kv import cases as append_cases
from palladion.kernels.append_qkv import cases as joined_cases
from palladion.kernels.backend import Implementation
from palladion.kernels.checks import check
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.matmul import cases as dense_cases
from palladion.kernels.quantized_matmul import cases as matmul_cases
from palladion.reference import KVCache, oracle, quantize_kv
from palladion.reference.compare import FACTOR, ULPS, Comparison, compare

SAMPLED_HEADS: Final = 4
SAMPLED_QUERIES: Final = 3
SAMPLED_ROWS: Final = 8
SAMPLED_CHANNELS: Final = 32

ROUGH: Final = 2.0
"""Bounds that a peer may be off: it may round where we do not (weights to bfloat16, weights of the softmax), and is
shown as being off. What is further off computes something else, or in less precision than was asked for."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How right a result is.

    Attributes:
      units: its error in parts of what is accepted (`reference/compare.py`); at most 1 is right.
      error: its largest error, relative to the scale of the oracle's values; 0 or infinity where it must be exact.
      said: in words.
    """

    units: float
    error: float
    said: str

    @property
    def right(self) -> bool:
        """Whether it is accepted as right."""
        return self.units <= 1

    @property
    def comparable(self) -> bool:
        """Whether it is right, or merely rounded elsewhere, as a peer may."""
        return self.units <= ROUGH


def verdict_of(comparison: Comparison) -> Verdict:
    """A comparison in units of its bound."""
    slack = ULPS * comparison.ulp
    units = max(
        comparison.error / (FACTOR * comparison.reference_error + slack),
        comparison.rms / (FACTOR * comparison.reference_rms + slack),
    )
    return Verdict(units if comparison.same_specials else np.inf, comparison.error, str(comparison))


class Operation(abc.ABC):
    """An operation: its cases, its calls, its judge."""

    name: ClassVar[str]
    cases: ClassVar[Any]
    package: ClassVar[Any]

    @property
    def table(self) -> Sequence[Implementation]:
        """What can run it."""
        rows: Sequence[Implementation] = self.package.IMPLEMENTATIONS
        return rows

    def named_cases(self) -> dict[str, Any]:
        """Its cases by name: those of real models, then small ones."""
        return {case.name: case for case in (*self.cases.MODELS, *getattr(self.cases, "SHAPES", ()), *self.cases.TESTS)}

    def inputs(self, case: Any) -> Any:
        """Arrays of a case."""
        return self.cases.make_inputs(case)

    def bytes_moved(self, case: Any) -> int:
        """Bytes that a call must move."""
        return int(case.problem().bytes_moved())

    def flops(self, case: Any) -> int:
        """Floating-point operations of a call."""
        return int(case.problem().flops())

    @abc.abstractmethod
    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """A call of the operation as `timing.JaxRunner` takes it.

        Args:
          case: which.
          **how: backend, config and interpret.
        """

    def split(self, inputs: Any) -> tuple[Any, Any]:
        """What of the inputs is donated, or None; and the rest."""
        return None, inputs

    @abc.abstractmethod
    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """Whether a result is right, beside the reference's."""


class DecodeAttention(Operation):
    """decode_attention; a result is `out` alone, as most peers have no more."""

    name = "decode_attention"
    cases: ClassVar[Any] = attention_cases
    package: ClassVar[Any] = attention_package

    def bytes_moved(self, case: Any) -> int:
        """Bytes that a call must move, as full as its caches are."""
        return int(case.problem().bytes_moved(case.filled))

    def flops(self, case: Any) -> int:
        """Floating-point operations of a call, as full as its caches are."""
        return int(case.problem().flops(case.filled))

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""

        def attend(inputs: Any) -> jax.Array:
            return attention_package.decode_attention(**inputs._asdict(), **case.options, **how)

        return attend

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """As `Operation` has it."""
        group = case.q_heads // case.kv_heads
        layer = None if inputs.layer is None else int(inputs.layer)
        lengths = np.asarray(case.filled)
        places = [(b, h) for b in _spread(case.batch, SAMPLED_HEADS) for h in _spread(case.q_heads, SAMPLED_HEADS)]
        places = [places[i] for i in _spread(len(places), SAMPLED_HEADS)]
        # The sequences that are special first: the shortest and the longest.
        places += [(int(b), case.q_heads - 1) for b in {lengths.argmin(), lengths.argmax()}]
        ours, theirs, exact = [], [], []
        for b, h in places:
            for i in _spread(case.q_len, SAMPLED_QUERIES):
                head = h // group
                arrays = {
                    name: _of_head(getattr(inputs, name), layer, inputs.page_table, b, head)
                    for name in ("k", "v", "k_scale", "v_scale")
                }
                pages = None if inputs.page_table is None else np.arange(inputs.page_table.shape[1])[None]
                out, _ = oracle.decode_attention(
                    q=np.asarray(inputs.q[b : b + 1, i : i + 1, h : h + 1]),
                    # Query i sees what is there when it is the newest.
                    lengths=np.maximum(lengths[b : b + 1] - (case.q_len - 1 - i), 0),
                    page_table=pages,
                    sinks=None if inputs.sinks is None else np.asarray(inputs.sinks[h : h + 1]),
                    **arrays,
                    **case.options,
                )
                exact.append(out[0, 0, 0])
                ours.append(np.asarray(result[b, i, h]))
                theirs.append(np.asarray(reference[b, i, h]))
        return verdict_of(compare(np.stack(ours), np.stack(theirs), np.stack(exact)))


class QuantizedMatmul(Operation):
    """quantized_matmul."""

    name = "quantized_matmul"
    cases: ClassVar[Any] = matmul_cases
    package: ClassVar[Any] = matmul_package

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""

        def multiply(inputs: Any) -> jax.Array:
            return matmul_package.quantized_matmul(**inputs._asdict(), **(case.options | how))

        return multiply

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """As `Operation` has it."""
        w = inputs.w if inputs.layer is None else jax.tree.map(lambda part: part[int(inputs.layer)], inputs.w)

        def weight(taken: np.ndarray) -> Any:
            return jax.tree.map(lambda part: part[:, taken], w)

        return _judge_product(case, inputs, weight, result, reference, quantize_x=case.quantize_x)


class Matmul(Operation):
    """matmul, of dense weights."""

    name = "matmul"
    cases: ClassVar[Any] = dense_cases
    package: ClassVar[Any] = dense_package

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""

        def multiply(inputs: Any) -> jax.Array:
            return dense_package.matmul(**inputs._asdict(), **(case.options | how))

        return multiply

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """As `Operation` has it."""
        w = inputs.w if inputs.layer is None else inputs.w[int(inputs.layer)]
        return _judge_product(case, inputs, lambda taken: np.asarray(w[:, taken]), result, reference)


def _judge_product(
    case: Any, inputs: Any, weight: Callable[[np.ndarray], Any], result: Any, reference: Any, **options: Any
) -> Verdict:
    """A sample of a product's rows and channels; `weight` takes channels out of it, `options` are the oracle's."""
    channels = np.array(_spread(case.problem().result_features, SAMPLED_CHANNELS))
    rows = np.array(_spread(case.rows, SAMPLED_ROWS))
    taken = np.concatenate([channels, channels + case.out_features // 2]) if case.gated else channels
    place = np.ix_(rows, channels)
    exact = oracle.quantized_matmul(
        np.asarray(inputs.x)[rows],
        weight(taken),
        bias=None if inputs.bias is None else np.asarray(inputs.bias)[taken],
        activation=IN_NUMPY[case.activation],
        gated=case.gated,
        norm=inputs.norm,
        residual=None if inputs.residual is None else np.asarray(inputs.residual)[place],
        **options,
    )
    return verdict_of(compare(np.asarray(result)[place], np.asarray(reference)[place], exact))


class AppendKV(Operation):
    """append_kv; what it writes and what it leaves alone must be exact: the oracle is the definition, token by token.

    A token is quantized by `quantize_kv`, as the definition has it.
    """

    name = "append_kv"
    cases: ClassVar[Any] = append_cases
    package: ClassVar[Any] = append_package

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""
        del case

        def append(cache: KVCache, rest: Any) -> KVCache:
            k, v, lengths, new_tokens, layer = rest
            options = {"new_tokens": new_tokens, "layer": layer, **how}
            return append_package.append_kv(cache, k, v, lengths, **options)

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


OPERATIONS: Final[dict[str, Operation]] = {
    one.name: one for one in (DecodeAttention(), QuantizedMatmul(), Matmul(), AppendKV(), AppendQKV())
}

IN_NUMPY: Final[dict[Any, Callable[[np.ndarray], np.ndarray] | None]] = {
    None: None,
    jax.nn.relu: lambda y: np.maximum(y, 0),
    jax.nn.silu: lambda y: y / (1 + np.exp(-y)),
    jax.nn.gelu: lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
}
"""Activations in float64."""


def operation(name: str) -> Operation:
    """An operation by name.

    Raises:
      ValueError: there is none of that name; the message lists them.
    """
    check(name in OPERATIONS, "operation", repr(name), ", ".join(OPERATIONS))
    return OPERATIONS[name]


def _spread(count: int, most: int) -> list[int]:
    """So many places in range(count) at most, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _of_head(part: Any, layer: int | None, page_table: Any, b: int, head: int) -> Any:
    """A part of the cache of one sequence and KV head, as the oracle takes it: dense, or its pages in order."""
    if part is None:
        return None
    part = part if layer is None else part[layer]
    if page_table is None:
        return np.asarray(part[b : b + 1, head : head + 1])
    # Dead entries point anywhere.
    return np.asarray(jnp.take(part[:, head : head + 1], page_table[b], axis=0, mode="clip"))


def identical(got: np.ndarray, expected: np.ndarray) -> bool:
    """To the last bit, but for NaN, whose bits may change on the way: XLA on a CPU moves float8_e5m2 as float16."""
    bits = np.dtype(f"u{got.dtype.itemsize}")
    differ = got.view(bits) != expected.view(bits)
    return not differ.any() or bool((np.isnan(got[differ]) & np.isnan(expected[differ])).all())
