"""Decodes on eight devices: sequences are sharded over "data", heads and channels over "model".

    python examples/sharded_decode.py

The devices are those of a CPU here; on accelerators, remove the two lines that ask for them. `specs` of a
QuantizedArray and of a KVCache say how their parts are sharded. The only communication of a step is the sum after the
output projection.
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from palladion import KVCache, append_kv, decode_attention, quantize

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

BATCH, MAX_LEN, WIDTH, Q_HEADS, KV_HEADS, HEAD_DIM = 4, 64, 256, 8, 4, 32
LENGTHS = jnp.array([1, 17, 33, 64], jnp.int32)

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def place(tree, specs):
    """Puts the parts of a tree on the devices of the mesh."""
    return jax.tree.map(lambda part, spec: jax.device_put(part, NamedSharding(mesh, spec)), tree, specs)


def step(weights, cache, x, lengths):
    """Returns x after an attention layer, for one new token of each sequence, and the cache that holds it."""
    q, k, v = (x @ weights[name] for name in ("query", "key", "value"))
    q, k, v = (heads.reshape(len(x), -1, HEAD_DIM) for heads in (q, k, v))
    cache = append_kv(cache, k, v, lengths)
    attended = decode_attention(q, cache.k, cache.v, lengths)
    return x + attended.reshape(len(x), -1) @ weights["out"], cache


key = jax.random.key(0)
heads = {"query": Q_HEADS, "key": KV_HEADS, "value": KV_HEADS}
shapes = {name: (WIDTH, count * HEAD_DIM) for name, count in heads.items()} | {"out": (Q_HEADS * HEAD_DIM, WIDTH)}
weights = {name: quantize(jax.random.normal(key, shape) / 16, "int8") for name, shape in shapes.items()}
cache = KVCache.dense(BATCH, KV_HEADS, MAX_LEN, HEAD_DIM, "float32")
cache = jax.tree.map(lambda part: jax.random.normal(key, part.shape), cache)
x = jax.random.normal(key, (BATCH, WIDTH))
expected, _ = jax.jit(step)(weights, cache, x, LENGTHS)

columns, rows = P(None, "model"), P("model", None)
arguments = (
    {name: place(w, w.specs(rows if name == "out" else columns, mesh)) for name, w in weights.items()},
    place(cache, cache.specs(P("data", "model", None, None))),
    place(x, P("data", None)),
    place(LENGTHS, P("data")),
)
with jax.set_mesh(mesh):
    compiled = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
    result, cache = compiled(*arguments)

print("the same as on one device:", bool(jnp.allclose(jax.device_get(result), expected, atol=1e-4)))
print("cached keys:", jax.typeof(cache.k))
found = re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())
print("communication:", {kind: found.count(kind) for kind in found})
