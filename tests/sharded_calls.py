"""Calls operations on arrays sharded over a mesh of eight CPU devices; a process of its own, run by test_sharding.py.

It prints a JSON object: for every case the largest error against the reference on one device, relative to the largest
number, and how often each collective operation stands in the compiled program.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import palladion
from palladion import KVCache, QuantizedArray

BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, MAX_LEN = 4, 8, 4, 64, 256
ROWS, IN, OUT = 4, 256, 512
BACKENDS: Final = ("xla", "mosaic_tpu", "triton")
COLLECTIVES: Final = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")

Call = Callable[..., Any]
Case = tuple[Call, tuple[Any, ...], tuple[Any, ...], Any, Any]
"""A function, its arguments, their PartitionSpecs, the PartitionSpec of its result, and the right result."""


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Returns random normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def options(backend: str) -> dict[str, Any]:
    """Returns the arguments that run a backend on a CPU."""
    return {"backend": backend, "interpret": None if backend == "xla" else True}


def attention(backend: str) -> Case:
    """Attends with sequences over "data" and heads over "model"."""
    q = normal(0, BATCH, Q_HEADS, HEAD_DIM)
    k, v = (normal(seed, BATCH, KV_HEADS, MAX_LEN, HEAD_DIM) for seed in (1, 2))
    arguments = (q, k, v, jnp.asarray([3, MAX_LEN, 0, 130], jnp.int32))
    specs = (*[P("data", "model")] * 3, P("data"))

    def call(*arrays: jax.Array) -> jax.Array:
        return palladion.decode_attention(*arrays, **options(backend))

    return call, arguments, specs, P("data", "model"), palladion.decode_attention(*arguments, backend="xla")


def append(backend: str) -> Case:
    """Appends a token to a cache with sequences over "data" and heads over "model"."""
    cache = KVCache(*(normal(seed, BATCH, KV_HEADS, MAX_LEN, HEAD_DIM) for seed in (1, 2)))
    k, v = (normal(seed, BATCH, KV_HEADS, HEAD_DIM) for seed in (3, 4))
    arguments = (cache, k, v, jnp.asarray([3, MAX_LEN, 1, 130], jnp.int32))
    sharded = P("data", "model")
    specs = (cache.specs(sharded), sharded, sharded, P("data"))

    def call(*arrays: Any) -> KVCache:
        return palladion.append_kv(*arrays, **options(backend))

    return call, arguments, specs, specs[0], palladion.append_kv(*arguments, backend="xla")


def joined(backend: str) -> Case:
    """Rotates and appends joined heads, which all devices of "model" have, to a cache with heads over "model"."""
    cache = KVCache(*(normal(seed, BATCH, KV_HEADS, MAX_LEN, HEAD_DIM) for seed in (1, 2)))
    qkv, angles = normal(7, BATCH, Q_HEADS + 2 * KV_HEADS, HEAD_DIM), normal(8, BATCH, HEAD_DIM // 4)
    arguments = (cache, qkv, jnp.asarray([3, MAX_LEN, 1, 130], jnp.int32), jnp.cos(angles), jnp.sin(angles))
    sharded = P("data", "model")
    specs = (cache.specs(sharded), *[P("data")] * 4)

    def call(*arrays: Any) -> tuple[jax.Array, KVCache]:
        return palladion.append_qkv(*arrays, **options(backend))

    return call, arguments, specs, sharded, palladion.append_qkv(*arguments, backend="xla")


def weight(scheme: str, backend: str) -> QuantizedArray:
    """Returns a quantized weight in the storage order of a backend."""
    order = "out_in" if backend == "triton" else "in_out"
    return palladion.quantize(normal(5, IN, OUT), scheme, order=order)  # type: ignore[arg-type]


def columns(backend: str) -> Case:
    """Multiplies rows over "data" by a weight with `out` over "model"."""
    x, w = normal(6, ROWS, IN), weight("int8", backend)

    def call(x: jax.Array, w: QuantizedArray) -> jax.Array:
        return palladion.quantized_matmul(x, w, **options(backend))

    right = palladion.quantized_matmul(x, w, backend="xla")
    return call, (x, w), (P("data"), w.specs(P(None, "model"))), P("data", "model"), right


def under_vmap(backend: str) -> Case:
    """Multiplies under vmap, inside of the shard_map, by a weight with `out` over "model"."""
    call, (x, w), (_, sharded), _, right = columns(backend)
    x, right = x.reshape(2, 2, IN), right.reshape(2, 2, OUT)
    return jax.vmap(call, in_axes=(0, None)), (x, w), (P(None, "data"), sharded), P(None, "data", "model"), right


def paged(backend: str) -> Case:
    """Attends over an int8 cache in pages with heads over "model"; pages and their table are on every device."""
    table = jnp.asarray(np.random.default_rng(7).permutation(8).reshape(BATCH, 2), jnp.int32)
    cache = KVCache.paged(8, KV_HEADS, 128, HEAD_DIM, table, jnp.int8)
    lengths = jnp.asarray([3, MAX_LEN, 1, 130], jnp.int32)
    k, v = (normal(seed, BATCH, MAX_LEN, KV_HEADS, HEAD_DIM) for seed in (1, 2))
    cache = palladion.append_kv(cache, k, v, jnp.full(BATCH, MAX_LEN, jnp.int32), backend="xla")
    q = normal(0, BATCH, Q_HEADS, HEAD_DIM)

    def call(q: jax.Array, cache: KVCache, lengths: jax.Array, **named: Any) -> jax.Array:
        scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
        named = {**scales, "page_table": cache.page_table, **(named or options(backend))}
        return palladion.decode_attention(q, cache.k, cache.v, lengths, **named)

    heads = P(None, "model")
    return call, (q, cache, lengths), (heads, cache.specs(heads), P()), heads, call(q, cache, lengths, backend="xla")


def rows(backend: str) -> Case:
    """Multiplies by a weight with `in` over "model" and one scale per channel."""
    call, (x, w), _, _, right = columns(backend)
    return call, (x, w), (P("data", "model"), w.specs(P("model"))), P("data"), right


def fused_rows(backend: str) -> Case:
    """Multiplies by a gated weight in packed groups with `in` over "model", with everything that a product fuses."""
    x, w = normal(6, ROWS, IN), weight("int4-g32-minimums", backend)
    arguments = (x, w, normal(8, OUT), normal(9, IN), normal(10, ROWS, OUT // 2))
    specs = (P(None, "model"), w.specs(P("model")), P(), P("model"), P())

    def call(x: jax.Array, w: Any, bias: jax.Array, norm: jax.Array, residual: jax.Array, **named: Any) -> jax.Array:
        fused = {"bias": bias, "norm": norm, "residual": residual, "gated": True, "activation": jax.nn.silu}
        return palladion.quantized_matmul(x, w, **fused, **(named or options(backend)))

    return call, arguments, specs, P(), call(*arguments, backend="xla")


def dense_rows(backend: str) -> Case:
    """Multiplies by a dense weight with `in` over "model"."""
    order: Any = "out_in" if backend == "triton" else "in_out"
    x, w = normal(6, ROWS, IN), normal(7, *((OUT, IN) if order == "out_in" else (IN, OUT)))
    specs = (P(None, "model"), P(None, "model") if order == "out_in" else P("model"))

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        return palladion.matmul(x, w, order=order, **options(backend))

    return call, (x, w), specs, P(), palladion.matmul(x, w, order=order, backend="xla")


def derivative(backend: str) -> Case:
    """Differentiates a dense product by a weight with `out` over "model"."""
    x, w = normal(6, ROWS, IN), normal(7, IN, OUT)

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sum(palladion.matmul(x, w, backend=backend) ** 2))(w)

    return call, (x, w), (P(), P(None, "model")), P(None, "model"), call(x, w)


SHARES: Final = (attention, append, columns, under_vmap)
"""Cases that may run inside `jax.shard_map`: they sum nothing over devices."""

CALLS: Final = ("checked", "unchecked", "Auto", "Explicit")

NEEDED: Final[dict[str, dict[str, int]]] = {
    "attention": {},
    "append": {},
    "columns": {},
    "paged": {},
    "joined": {},
    "under_vmap": {},
    "rows": {"all-reduce": 1},
    "fused_rows": {"all-reduce": 2},  # the mean square of the norm, and the product
    "dense_rows": {"all-reduce": 1},
    "derivative": {},
}
"""Collective operations that each case needs under jit on arrays that are sharded."""


def needed(how: str, case: str) -> dict[str, int]:
    """Returns the collective operations that a run needs; JAX adds one where it transposes a `shard_map`."""
    return {"all-reduce": 1} if (how, case) == ("Explicit", "derivative") else NEEDED.get(case, {})


def combinations() -> list[tuple[str, str, str]]:
    """Returns the names of all runs: how a case is called, the case, and its backend."""
    shares = [case.__name__ for case in SHARES]
    runs = [(call, case, backend) for call in CALLS[:2] for case in shares for backend in BACKENDS]
    # One kernel is enough for what does not depend on it.
    few = ("attention", "append", "columns", "rows")
    runs += [
        (call, case, backend)
        for call in CALLS[2:]
        for case in NEEDED
        for backend in BACKENDS
        if backend == "xla" or case in few or (backend == "mosaic_tpu" and case != "derivative")
    ]
    return [run for run in runs if run[0] != "unchecked" or run[2] == "xla"]


def run(how: str, case: Case) -> dict[str, Any]:
    """Runs a case.

    Args:
      how: inside `jax.shard_map` "checked" or "unchecked", or under jit on "Auto" or "Explicit" axes.
      case: the case.
    """
    call, arguments, specs, result, right = case
    kind = AxisType.Explicit if how == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    if how in ("checked", "unchecked"):
        call = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=result, check_vma=how == "checked")
    return measured(call, placed(mesh, arguments, specs), right)


def placed(mesh: Mesh, arguments: Any, specs: Any) -> Any:
    """Returns arguments on the devices of a mesh."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arguments, specs)


def measured(call: Call, arguments: Any, right: Any) -> dict[str, Any]:
    """Returns the error of a call and the collective operations of its program."""
    compiled = jax.jit(call).lower(*arguments).compile()
    found = COLLECTIVES.findall(compiled.as_text() or "")
    results = jax.tree.leaves(compiled(*arguments))
    pairs = zip(results, jax.tree.leaves(right), strict=True)
    errors = [float(np.max(np.abs(np.subtract(a, b))) / np.max(np.abs(b))) for a, b in pairs]
    return {"error": max(errors), "collectives": {name: found.count(name) for name in sorted(set(found))}}


def main() -> None:
    """Runs all cases; one that fails has its message instead of results."""
    outcomes: dict[str, Any] = {}
    for names in combinations():
        how, case, backend = names
        try:
            outcomes[" ".join(names)] = run(how, globals()[case](backend))
        except Exception as error:  # any, so that the others are run
            outcomes[" ".join(names)] = {"error": np.inf, "collectives": f"{type(error).__name__}: {error}"}
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
