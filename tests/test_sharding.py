"""Operations on sharded arrays: the right results, and no more collective operations than the sharding needs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_calls
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palladion import (
    KVCache,
    Unsupported,
    append_kv,
    decode_attention,
    quantize,
    quantized_matmul,
    record_choices,
    tracing_for,
)
from palladion.benchmarks.static.gpu import program as gpu_program
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.product_shares import exchange_gates


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """Runs all sharded calls in one process with eight CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, sharded_calls.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("run", [" ".join(names) for names in sharded_calls.names()])
def test_results_and_collectives(outcomes: dict[str, Any], run: str) -> None:
    """Results on sharded arrays are right, and nothing is communicated that need not be."""
    outcome = outcomes[run]
    assert outcome["collectives"] == outcome["needed"]
    assert outcome["error"] < 1e-6


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_gates_and_ups_meet(shards: int) -> None:
    """Every device gets the gates and the ups of its results, whatever the number of devices."""
    y = jnp.arange(3 * shards * 10).reshape(3, shards * 10)
    shares = jnp.stack(jnp.split(y, shards, axis=1))
    exchange = functools.partial(exchange_gates, axes=("devices",), shards=shards)
    gates, ups = jax.jit(jax.vmap(exchange, axis_name="devices"))(shares)
    for received, all_of_them in zip((gates, ups), jnp.split(y, 2, axis=1), strict=True):
        np.testing.assert_array_equal(jnp.concatenate(list(received), axis=1), all_of_them)


@pytest.mark.parametrize("order", ["in_out", "out_in"])
@pytest.mark.parametrize("scheme", ["int8", "int4-g32-minimums", "int8-g32-zeros", "mxfp4"])
def test_specs_cut_a_weight_into_weights(scheme: str, order: Any) -> None:
    """The parts that `specs` gives to a device are the quantized weight that one would make of its share."""
    w = sharded_calls.normal(0, 2, 256, 64)
    specs = quantize(w, scheme, order=order).specs(P(None, "x", "y"), AbstractMesh((4, 2), ("x", "y")))
    for part, over_in in zip(
        jax.tree.leaves(specs), ["x", *3 * ["x" if "g" in scheme or scheme == "mxfp4" else None]], strict=False
    ):
        assert part == P(None, *((over_in, "y") if order == "in_out" else ("y", over_in)))
    assert specs.order == order


def test_specs_pad_the_spec_and_refuse_broken_groups() -> None:
    """A short spec is padded; devices that do not divide the groups, blocks or channels are an error that says so."""
    w = quantize(sharded_calls.normal(0, 256, 64), "int4-g128", order="in_out")
    mesh = AbstractMesh((4, 2), ("x", "y"))
    assert w.specs(P(), mesh).values == P(None, None)
    assert w.specs(P("y"), mesh).scales == P("y", None)
    with pytest.raises(ValueError, match=r"in = 256 over 4 devices; accepted: .* the 2 pieces of 128"):
        w.specs(P("x"), mesh)
    with pytest.raises(ValueError, match=r"in = 256 over 8 devices"):
        w.specs(P(("x", "y")), mesh)
    with pytest.raises(ValueError, match=r"out = 66 over 4 devices"):
        quantize(sharded_calls.normal(0, 256, 66), "int8", order="in_out").specs(P(None, "x"), mesh)
    with pytest.raises(ValueError, match="at most 2 dimensions"):
        w.specs(P(None, None, "x"), mesh)


def test_specs_of_a_cache() -> None:
    """Scales have no head_dim, and a page table is on every device."""
    table = jnp.zeros((2, 4), jnp.int32)
    specs = KVCache.paged(8, 4, 16, 64, table, jnp.int8, num_layers=2).specs(P(None, None, "x", None, "y"))
    assert specs.k == specs.v == P(None, None, "x", None, "y")
    assert specs.k_scale == specs.v_scale == P(None, None, "x", None)
    assert specs.page_table == P()


def test_no_tpu_kernel_is_chosen_on_auto_axes() -> None:
    """XLA cannot partition kernels for a TPU: "auto" takes the reference, and naming a kernel says what to do."""
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    x, w = jnp.ones((8, 256)), quantize(sharded_calls.normal(0, 256, 256), "int8", order="in_out")
    for kind, chosen in ((AxisType.Auto, "xla"), (AxisType.Manual, "mosaic_tpu")):
        mesh = AbstractMesh((2,), ("x",), axis_types=(kind,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh), record_choices() as choices:
            jax.eval_shape(quantized_matmul, x, w)
        assert [choice.backend for choice in choices] == [chosen]
    auto = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(auto), pytest.raises(Unsupported, match=r"TPUs, here x; .*explicit_axes"):
        jax.eval_shape(lambda: quantized_matmul(x, w, backend="mosaic_tpu"))


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a layer, described: a cache is appended to and attended to, and an MLP follows."""

    mesh: Mesh
    order: Literal["in_out", "out_in"]

    def __call__(self, cache: KVCache, q: Any, k: Any, lengths: Any, w: Any, gate_up: Any) -> Any:
        """Runs the step with kernels."""
        explicit = AxisType.Explicit in self.mesh.axis_types
        cache = append_kv(cache, k, k, lengths, backend="pallas")
        out = decode_attention(q, cache.k, cache.v, lengths, backend="pallas")
        out = jax.lax.reshape(out, (8, 4096), out_sharding=P("data", "model") if explicit else None)
        hidden = quantized_matmul(out, w, backend="pallas")
        hidden = quantized_matmul(hidden, gate_up, gated=True, activation=jax.nn.silu, backend="pallas")
        return cache, quantized_matmul(hidden, w, backend="pallas")

    def compiled(self, over: str) -> str:
        """Returns the program for "heads" or "tokens" of the cache over "model", which divides the weights, too."""

        def placed(array: Any, spec: P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(self.mesh, spec))

        q, k = (jax.ShapeDtypeStruct((8, heads, 128), jnp.bfloat16) for heads in (32, 8))
        cache = jax.eval_shape(lambda: KVCache.dense(8, 8, 2048, 128))
        w = jax.eval_shape(lambda: quantize(jnp.ones((4096, 4096)), "int8", order=self.order))
        gate_up = jax.eval_shape(lambda: quantize(jnp.ones((4096, 8192)), "int8", order=self.order))
        lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
        new = P("data", "model") if over == "heads" else P("data")
        specs = (
            cache.specs(new if over == "heads" else P("data", None, "model")),
            *(new, new, P("data")),
            w.specs(P("model"), self.mesh),
            gate_up.specs(P(None, "model"), self.mesh),
        )
        arguments = jax.tree.map(placed, (cache, q, k, lengths, w, gate_up), specs)
        with jax.set_mesh(self.mesh):
            return jax.jit(self, donate_argnums=0).lower(*arguments).compile().as_text() or ""

    def check(self, over: str, targets: Sequence[str], kernels: int) -> None:
        """Asserts that each device runs kernels, and that nothing but products and partial attention is communicated.

        Args:
          over: what of the cache is divided.
          targets: targets of the kernels' calls.
          kernels: how many there are.
        """
        program = self.compiled(over)
        assert sum(program.count(f'custom_call_target="{target}"') for target in targets) == kernels
        needed = ["all-gather"] * (over == "tokens") + ["all-reduce"] * 2 + ["collective-permute"] * 2
        assert sorted(sharded_calls.COLLECTIVES.findall(program)) == needed


@pytest.fixture(scope="module")
def tpus() -> np.ndarray:
    """Returns eight described TPUs, 2 x 4."""
    if not tpu_compiler.installed():
        pytest.skip("libtpu compiles for TPUs")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tpu_compiler.ENVIRONMENT.items():
            patch.setenv(name, value)
        return np.array(topologies.get_topology_desc("v5e:2x4", "tpu").devices).reshape(2, 4)


@pytest.mark.parametrize("over", ["heads", "tokens"])
def test_steps_for_tpus(tpus: np.ndarray, over: str) -> None:
    """On Explicit axes every TPU runs the kernels of its share."""
    explicit = (AxisType.Explicit,) * 2
    Step(Mesh(tpus, ("data", "model"), axis_types=explicit), "in_out").check(over, ["tpu_custom_call"], 5)


@pytest.mark.skipif(not gpu_program.installed(), reason="JAX's CUDA plugin compiles for GPUs")
@pytest.mark.parametrize(("kind", "over"), [(AxisType.Explicit, "heads"), (AxisType.Auto, "tokens")])
def test_steps_for_gpus(kind: AxisType, over: str) -> None:
    """On axes of either kind every GPU of a host runs the kernels of its share: `custom_partitioning` works there."""
    mesh = Mesh(gpu_program.devices(90, 8).reshape(2, 4), ("data", "model"), axis_types=(kind,) * 2)
    Step(mesh, "out_in").check(over, ["__gpu$xla.gpu.triton", "mosaic_gpu_v2"], 6)  # attention has two


def test_products_for_tpus_on_auto_axes(tpus: np.ndarray) -> None:
    """A jitted product on Auto axes runs XLA's form, or says how a kernel runs, however shardings are given."""
    mesh = Mesh(tpus, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    w = jax.eval_shape(lambda: quantize(jnp.ones((512, 1024)), "int8", order="in_out"))
    specs = (P("data"), w.specs(P(None, "model"), mesh))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    arguments = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (x, w), shardings)

    def kernels(call: Any, arguments: Any, **options: Any) -> int:
        program = jax.jit(call, **options).lower(*arguments).compile().as_text() or ""
        assert sharded_calls.COLLECTIVES.findall(program) == []
        return program.count('custom_call_target="tpu_custom_call"')

    by_name = functools.partial(quantized_matmul, backend="mosaic_tpu")
    # The arguments say where they are.
    assert kernels(quantized_matmul, arguments) == 0
    with pytest.raises(Unsupported, match=r"Auto axes of TPUs, here data, model; .*explicit_axes"):
        kernels(by_name, arguments)
    # Only jit knows.
    with tracing_for("v5e"), pytest.raises(Unsupported, match=r"lowered for 8, of which nothing was known"):
        kernels(quantized_matmul, (x, w), in_shardings=shardings)
    # The ways out.
    explicit = jax.sharding.explicit_axes(by_name, in_sharding=specs)
    with jax.set_mesh(mesh):
        assert kernels(quantized_matmul, (x, w), in_shardings=shardings) == 0
        assert kernels(explicit, (x, w), in_shardings=shardings) == 1
    mapped = jax.shard_map(by_name, mesh=mesh, in_specs=specs, out_specs=P("data", "model"))
    assert kernels(mapped, (x, w), in_shardings=shardings) == 1
