"""Operations on sharded arrays: the right results, and no more collective operations than the sharding needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_calls
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palladion import KVCache, Unsupported, append_kv, decode_attention, quantize, quantized_matmul, record_choices
from palladion.benchmarks.static.tpu import compiler as tpu_compiler


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """Runs all sharded calls in one process with eight CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, sharded_calls.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(("how", "case", "backend"), sharded_calls.combinations())
def test_results_and_collectives(outcomes: dict[str, Any], how: str, case: str, backend: str) -> None:
    """Results on sharded arrays are right, and nothing is communicated that need not be."""
    outcome = outcomes[f"{how} {case} {backend}"]
    assert outcome["collectives"] == sharded_calls.needed(how, case)
    assert outcome["error"] < 1e-6


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
    with jax.sharding.use_abstract_mesh(auto), pytest.raises(Unsupported, match=r"Auto axes, here x; .*explicit_axes"):
        jax.eval_shape(lambda: quantized_matmul(x, w, backend="mosaic_tpu"))


@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu compiles for TPUs")
def test_tpu_kernels_on_explicit_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step for eight TPUs: a kernel on each for its sequences and heads, and one all-reduce of the last product."""
    for name, value in tpu_compiler.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    devices = np.array(topologies.get_topology_desc("v5e:2x4", "tpu").devices).reshape(2, 4)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def step(cache: KVCache, q: Any, k: Any, lengths: Any, w: Any) -> Any:
        cache = append_kv(cache, k, k, lengths, backend="pallas")
        out = decode_attention(q, cache.k, cache.v, lengths, backend="pallas")
        out = jax.lax.reshape(out, (8, 4096), out_sharding=P("data", "model"))
        return cache, quantized_matmul(out, w, backend="pallas")

    def placed(array: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    heads = P("data", "model")
    q, k = (jax.ShapeDtypeStruct((8, heads, 128), jnp.bfloat16) for heads in (32, 8))
    cache = jax.eval_shape(lambda: KVCache.dense(8, 8, 2048, 128))
    w = jax.eval_shape(lambda: quantize(jnp.ones((4096, 4096)), "int8", order="in_out"))
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
    specs = (cache.specs(heads), heads, heads, P("data"), w.specs(P("model"), mesh))
    arguments = jax.tree.map(placed, (cache, q, k, lengths, w), specs)
    with jax.set_mesh(mesh):
        program = jax.jit(step, donate_argnums=0).lower(*arguments).compile().as_text() or ""
    assert program.count('custom_call_target="tpu_custom_call"') == 3
    assert sharded_calls.COLLECTIVES.findall(program) == ["all-reduce"]
