"""Calls operations on arrays sharded over a mesh of eight CPU devices; a process of its own, run by test_sharding.py.

It prints a JSON object: for every run the largest error against the reference on one device, relative to the largest
number, and how often each collective operation stands in the compiled program.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import palladion
from palladion import KVCache, QuantizedArray
from palladion.reference.quantization import Order

BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, MAX_LEN = 4, 8, 4, 32, 64
ROWS, IN, OUT = 4, 256, 128
COLLECTIVES: Final = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")

Call = Callable[..., Any]


class Case(NamedTuple):
    """A call, and how its arguments are sharded over "data" (2) and "model" (4).

    Attributes:
      call: a function of the arguments, and of `backend` and `interpret` by name.
      arguments: the arguments.
      specs: their PartitionSpecs.
      result: PartitionSpec of the result.
      needed: the collective operations that the sharding needs.
    """

    call: Call
    arguments: tuple[Any, ...]
    specs: tuple[Any, ...]
    result: Any
    needed: Mapping[str, int] = MappingProxyType({})


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Returns random normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.cache
def weight(in_features: int, out_features: int, scheme: str, order: Order) -> QuantizedArray:
    """Returns a quantized weight."""
    return palladion.quantize(normal(5, in_features, out_features), scheme, order=order)


def multiply(x: jax.Array, w: Any, **named: Any) -> jax.Array:
    """Multiplies by a quantized weight, or by a dense one, for the right result."""
    return (palladion.quantized_matmul if isinstance(w, QuantizedArray) else palladion.matmul)(x, w, **named)


def attention(order: Order) -> Case:
    """Attends with sequences over "data" and heads over "model"."""
    del order
    q = normal(0, BATCH, Q_HEADS, HEAD_DIM)
    k, v = (normal(seed, BATCH, KV_HEADS, MAX_LEN, HEAD_DIM) for seed in (1, 2))
    arguments = (q, k, v, jnp.asarray([3, MAX_LEN, 0, 33], jnp.int32))
    return Case(palladion.decode_attention, arguments, (*[P("data", "model")] * 3, P("data")), P("data", "model"))


def append(order: Order) -> Case:
    """Appends a token to a cache with sequences over "data" and heads over "model"."""
    del order
    cache = KVCache(*(normal(seed, BATCH, KV_HEADS, MAX_LEN, HEAD_DIM) for seed in (1, 2)))
    k, v = (normal(seed, BATCH, KV_HEADS, HEAD_DIM) for seed in (3, 4))
    sharded = P("data", "model")
    arguments = (cache, k, v, jnp.asarray([3, MAX_LEN, 1, 33], jnp.int32))
    return Case(palladion.append_kv, arguments, (cache.specs(sharded), sharded, sharded, P("data")), sharded)


def joined(order: Order) -> Case:
    """Rotates and appends joined heads, which all devices of "model" have, to a cache with heads over "model"."""
    del order
    cache = KVCache(*(normal(seed, BATCH, KV_HEADS, MAX_LEN, HEAD_DIM) for seed in (1, 2)))
    qkv, angles = normal(7, BATCH, Q_HEADS + 2 * KV_HEADS, HEAD_DIM), normal(8, BATCH, HEAD_DIM // 4)
    arguments = (cache, qkv, jnp.asarray([3, MAX_LEN, 1, 33], jnp.int32), jnp.cos(angles), jnp.sin(angles))
    sharded = P("data", "model")
    return Case(palladion.append_qkv, arguments, (cache.specs(sharded), *[P("data")] * 4), sharded)


def paged(order: Order) -> Case:
    """Appends to an int8 cache in pages with heads over "model", and attends; pages and table are on every device."""
    del order
    table = jnp.asarray(np.random.default_rng(7).permutation(8).reshape(BATCH, 2), jnp.int32)
    cache = KVCache.paged(8, KV_HEADS, 32, HEAD_DIM, table, jnp.int8)
    k, v = (normal(seed, BATCH, 3, KV_HEADS, HEAD_DIM) for seed in (1, 2))

    def call(q: jax.Array, cache: KVCache, k: jax.Array, v: jax.Array, lengths: jax.Array, **named: Any) -> Any:
        cache = palladion.append_kv(cache, k, v, lengths, **named)
        scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
        return palladion.decode_attention(q, cache.k, cache.v, lengths, page_table=table, **scales, **named)

    arguments = (normal(0, BATCH, 3, Q_HEADS, HEAD_DIM), cache, k, v, jnp.asarray([3, MAX_LEN, 1, 33], jnp.int32))
    heads = P(None, None, "model")
    return Case(call, arguments, (heads, cache.specs(P(None, "model")), heads, heads, P()), heads)


def pages(order: Order) -> Case:
    """Appends to a cache with pages over "model"; entries of the table that are no pages are not written."""
    del order
    table = jnp.asarray([[5, 99], [7, 0], [2, -1], [3, 6]], jnp.int32)
    cache = KVCache(*(normal(seed, 8, KV_HEADS, 32, HEAD_DIM) for seed in (1, 2)), page_table=table)
    k, v = (normal(seed, BATCH, 3, KV_HEADS, HEAD_DIM) for seed in (3, 4))
    arguments = (cache, k, v, jnp.asarray([33, MAX_LEN, 3, 33], jnp.int32))
    sharded = cache.specs(P("model"))
    return Case(palladion.append_kv, arguments, (sharded, P(), P(), P()), sharded)


def columns(order: Order) -> Case:
    """Multiplies rows over "data" by a weight with `out` over "model"."""
    w = weight(IN, OUT, "int8", order)
    specs = (P("data"), w.specs(P(None, "model")))
    return Case(multiply, (normal(6, ROWS, IN), w), specs, P("data", "model"))


def under_vmap(order: Order) -> Case:
    """Multiplies a batch over "data" under vmap, inside of the shard_map, by a weight with `out` over "model"."""
    w = weight(IN, OUT, "int8", order)

    def call(x: jax.Array, w: QuantizedArray, **named: Any) -> jax.Array:
        return jax.vmap(functools.partial(multiply, **named), in_axes=(0, None))(x, w)

    specs = (P("data"), w.specs(P(None, "model")))
    return Case(call, (normal(6, 2, 2, IN), w), specs, P("data", None, "model"))


def rows(order: Order) -> Case:
    """Multiplies by a weight with `in` over "model" and one scale per channel."""
    case = columns(order)
    specs = (P("data", "model"), case.arguments[1].specs(P("model")))
    return case._replace(specs=specs, result=P("data"), needed={"all-reduce": 1})


def fused_rows(order: Order) -> Case:
    """Multiplies by a gated weight in packed groups with `in` over "model", with everything that a product fuses."""
    w = weight(IN, OUT, "int4-g32-minimums", order)
    arguments = (normal(6, ROWS, IN), w, normal(8, OUT), normal(9, IN), normal(10, ROWS, OUT // 2))
    specs = (P(None, "model"), w.specs(P("model")), P(), P("model"), P())
    # The mean square of the norm, and the product.
    return Case(fused, arguments, specs, P(), {"all-reduce": 2})


def fused(x: jax.Array, w: Any, bias: jax.Array, norm: jax.Array, residual: jax.Array, **named: Any) -> jax.Array:
    """Computes a gated product with everything that it fuses."""
    options = {"bias": bias, "norm": norm, "residual": residual, "gated": True, "activation": jax.nn.silu}
    return multiply(x, w, **options, **named)


def gated(order: Order) -> Case:
    """Runs an MLP whose gates and ups are joined: `out` of the first product and `in` of the second over "model"."""
    w, down = weight(IN, OUT, "int8", order), weight(OUT // 2, IN, "int8", order)
    arguments = (normal(6, ROWS, IN), w, normal(8, OUT), normal(9, IN), normal(10, ROWS, OUT // 2), down)
    specs = (P("data"), w.specs(P(None, "model")), P(), P(), P("data", "model"), down.specs(P("model")))

    def call(*arrays: Any, **named: Any) -> jax.Array:
        return multiply(fused(*arrays[:-1], **named), arrays[-1], **named)

    return Case(call, arguments, specs, P("data"), {"collective-permute": 2, "all-reduce": 1})


def dense_rows(order: Order) -> Case:
    """Multiplies by a dense weight with `in` over "model"."""
    w, spec = normal(7, IN // 2, OUT), P("model")
    w, spec = (w.T, P(None, "model")) if order == "out_in" else (w, spec)
    call = functools.partial(palladion.matmul, order=order)
    return Case(call, (normal(6, ROWS, IN // 2), w), (P(None, "model"), spec), P(), {"all-reduce": 1})


def derivative(order: Order) -> Case:
    """Differentiates a dense product by a weight with `out` over "model"."""
    del order

    def call(x: jax.Array, w: jax.Array, **named: Any) -> jax.Array:
        return jax.grad(lambda w: jnp.sum(palladion.matmul(x, w, **named) ** 2))(w)

    return Case(call, (normal(6, ROWS, IN), normal(7, IN, OUT)), (P(), P(None, "model")), P(None, "model"))


def lengths(order: Order, **options: Any) -> Case:
    """Appends three tokens to a cache with tokens over "model", and attends: with all three, and with the newest alone.

    Parts have 16 tokens. The new ones stand in one part, at its end, in two, at the end of the cache, and some are
    padding.
    """
    del order
    filled = jnp.asarray([2, 17, 48, MAX_LEN], jnp.int32)
    behind = jnp.arange(MAX_LEN) >= filled[:, None] - 3  # what is not overwritten before it is read, must not be read
    k, v = (normal(seed, BATCH, KV_HEADS, MAX_LEN, HEAD_DIM) for seed in (1, 2))
    cache = KVCache(*(jnp.where(behind[:, None, :, None], jnp.nan, part) for part in (k, v)))
    new_k, new_v = (normal(seed, BATCH, 3, KV_HEADS, HEAD_DIM) for seed in (3, 4))
    options = options or {"sinks": normal(5, Q_HEADS), "logits_soft_cap": 2.0}

    def call(cache: KVCache, k: jax.Array, v: jax.Array, q: jax.Array, filled: jax.Array, **named: Any) -> Any:
        cache = palladion.append_kv(cache, k, v, filled, **named)
        attend = functools.partial(palladion.decode_attention, k=cache.k, v=cache.v, lengths=filled, **named)
        return attend(q, **options, return_lse=True), attend(q[:, -1], return_lse=True)

    arguments = (cache, new_k, new_v, normal(6, BATCH, 3, Q_HEADS, HEAD_DIM), filled)
    data = P("data")
    specs = (cache.specs(P("data", None, "model")), data, data, data, data)
    return Case(call, arguments, specs, data, {"all-gather": 2})


def windows(order: Order) -> Case:
    """Attends with a sliding window to a cache with tokens over "model": keys and values are gathered."""
    return lengths(order, sliding_window=5)._replace(needed={"all-gather": 3})


SHARES: Final = ("attention", "append", "columns", "under_vmap")
"""Cases that may run inside `jax.shard_map`: they communicate nothing."""

RUNS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("checked", "xla"): SHARES,
    ("checked", "mosaic_tpu"): ("append", "columns"),
    ("checked", "triton"): ("attention", "under_vmap"),
    ("unchecked", "xla"): ("attention",),
    ("Auto", "xla"): ("attention", "append", "columns", "paged", "pages", "joined", "derivative"),
    ("Auto", "mosaic_tpu"): ("under_vmap", "rows", "fused_rows", "gated"),
    ("Auto", "triton"): ("attention", "columns", "lengths"),
    ("Explicit", "xla"): ("attention", "joined", "rows", "windows", "dense_rows", "derivative"),
    ("Explicit", "mosaic_tpu"): ("pages", "columns", "under_vmap", "gated"),
    ("Explicit", "triton"): ("append", "rows"),
    ("eager", "xla"): ("attention", "dense_rows"),
    ("mixed", "xla"): ("attention", "rows"),
}
"""The cases that are run each way with each backend; one kernel is enough for what does not depend on it.

"checked" and "unchecked" are inside `jax.shard_map`, with check_vma and without; "Auto" and "Explicit" under jit on
axes of that type; "mixed" where "data" is Explicit and "model" Auto; "eager" outside of jit on Auto axes.
"""

EXCEPTIONS: Final[dict[str, dict[str, int]]] = {
    "Explicit derivative xla": {"all-reduce": 1},
}
"""Collective operations of runs that need others than the case says."""


def needed(how: str, case: str, backend: str) -> dict[str, int]:
    """Returns the collective operations that a run should have."""
    of_case = {} if how == "eager" else dict(_case(case, "in_out").needed)
    return EXCEPTIONS.get(f"{how} {case} {backend}", of_case)


def names() -> list[tuple[str, str, str]]:
    """Returns all runs: how, the case, and the backend."""
    return [(how, case, backend) for (how, backend), cases in RUNS.items() for case in cases]


@functools.cache
def _case(name: str, order: Order) -> Case:
    case: Case = globals()[name](order)
    return case


@functools.cache
def _right(name: str) -> Any:
    """Returns the result of a case on one device."""
    case = _case(name, "in_out")
    dense = jax.tree.map(
        lambda x: palladion.dequantize(x) if isinstance(x, QuantizedArray) else x,
        case.arguments,
        is_leaf=lambda x: isinstance(x, QuantizedArray),
    )
    return jax.jit(functools.partial(case.call, backend="xla"))(*dense)


def run(how: str, name: str, backend: str) -> dict[str, Any]:
    """Runs a case, as `RUNS` says how."""
    case = _case(name, "out_in" if backend == "triton" else "in_out")
    call = functools.partial(case.call, backend=backend, interpret=None if backend == "xla" else True)
    auto, explicit = AxisType.Auto, AxisType.Explicit
    types = {"Explicit": (explicit, explicit), "mixed": (explicit, auto)}.get(how, (auto, auto))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=types)
    if how in ("checked", "unchecked"):
        call = jax.shard_map(call, mesh=mesh, in_specs=case.specs, out_specs=case.result, check_vma=how == "checked")
    arguments = placed(mesh, case.arguments, case.specs)
    if how == "eager":
        return {"error": error(call(*arguments), _right(name)), "collectives": {}}
    compiled = jax.jit(call).lower(*arguments).compile()
    found = COLLECTIVES.findall(compiled.as_text() or "")
    counts = {collective: found.count(collective) for collective in sorted(set(found))}
    return {"error": error(compiled(*arguments), _right(name)), "collectives": counts}


def placed(mesh: Mesh, arguments: Any, specs: Any) -> Any:
    """Returns arguments on the devices of a mesh."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arguments, specs)


def error(results: Any, right: Any) -> float:
    """Returns the largest error of results, relative to the largest number; infinity where other numbers are finite."""

    def one(result: Any, right: Any) -> float:
        result, right = np.asarray(result), np.asarray(right)
        finite = np.isfinite(right)
        if not np.array_equal(result[~finite], right[~finite], equal_nan=True):
            return np.inf
        largest = np.max(np.abs(np.subtract(result[finite], right[finite], dtype=np.float64)))
        return float(largest / np.max(np.abs(right[finite])))

    return max(map(one, jax.tree.leaves(results), jax.tree.leaves(right)))


def main() -> None:
    """Runs all cases; one that fails has its message instead of results."""
    outcomes: dict[str, Any] = {}
    for key in names():
        try:
            outcomes[" ".join(key)] = {**run(*key), "needed": needed(*key)}
        except Exception as failure:  # any, so that the others are run
            message = f"{type(failure).__name__}: {failure}"
            outcomes[" ".join(key)] = {"error": np.inf, "collectives": message, "needed": {}}
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
