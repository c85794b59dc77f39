"""Operations on sharded arrays: the right results, and no more collective operations than the sharding needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import sharded_calls


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


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("backend", sharded_calls.BACKENDS)
@pytest.mark.parametrize("case", sharded_calls.CASES)
def test_inside_shard_map(outcomes: dict[str, Any], case: str, backend: str, check_vma: bool) -> None:
    """Inside `jax.shard_map`, with and without its checks, the results are right and nothing is communicated."""
    outcome = outcomes[f"shard_map {case} {backend} check_vma={check_vma}"]
    assert outcome["error"] < 1e-4
    assert outcome["collectives"] == {}
