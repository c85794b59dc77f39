"""Calls operations on arrays sharded over a mesh of eight CPU devices; a process of its own, run by test_sharding.py.

It prints a JSON object: for every case the largest absolute error against the reference on one device, and how often
each collective operation stands in the compiled program.
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


CASES: Final = {case.__name__: case for case in (attention, append, columns, under_vmap)}


def inside_shard_map(case: Case, check_vma: bool) -> dict[str, Any]:
    """Runs a case inside `jax.shard_map`."""
    call, arguments, specs, result, right = case
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=result, check_vma=check_vma)
    return measured(mapped, placed(mesh, arguments, specs), right)


def placed(mesh: Mesh, arguments: Any, specs: Any) -> Any:
    """Returns arguments on the devices of a mesh."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arguments, specs)


def measured(call: Call, arguments: Any, right: Any) -> dict[str, Any]:
    """Returns the error of a call and the collective operations of its program."""
    compiled = jax.jit(call).lower(*arguments).compile()
    found = COLLECTIVES.findall(compiled.as_text() or "")
    results = jax.tree.leaves(compiled(*arguments))
    errors = [float(np.max(np.abs(np.subtract(a, b)))) for a, b in zip(results, jax.tree.leaves(right), strict=True)]
    return {"error": max(errors), "collectives": {name: found.count(name) for name in sorted(set(found))}}


def main() -> None:
    """Runs all cases."""
    outcomes = {}
    for name, case in CASES.items():
        for backend in BACKENDS:
            for check_vma in (True, False):
                key = f"shard_map {name} {backend} check_vma={check_vma}"
                outcomes[key] = inside_shard_map(case(backend), check_vma)
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
