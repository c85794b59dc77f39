"""Operations on sharded arrays: the right results, and no more collective operations than the sharding needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sharded_calls
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from palladion import KVCache, quantize


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
