"""Data of GPUs: consistent, and found by JAX's name of a device."""

from __future__ import annotations

import types

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from palladion.benchmarks.static.gpu.compiler import ARCHITECTURES
from palladion.kernels import devices
from palladion.kernels.devices import gpu_to_plan_for, gpus, target_gpu, tpu_chips, vmem_budget


@pytest.mark.parametrize("name", gpus())
def test_data_of_a_gpu_are_consistent(name: str):
    gpu = gpus()[name]
    assert gpu.shared_bytes - gpu.program_shared_bytes == 1024
    assert gpu.registers == 2**16
    assert gpu.float8 == (gpu.compute_capability >= 89)
    # Outside these bounds a figure is mistyped: decoding would not be bound by memory, or arithmetic be out of reach.
    assert gpu.bf16_flops_per_second is not None
    assert gpu.hbm_bytes_per_second is not None
    assert 50 < gpu.bf16_flops_per_second / gpu.hbm_bytes_per_second < 500


def test_device_kinds_are_distinct():
    assert len({gpu.device_kind for gpu in gpus().values()}) == len(gpus())


def test_vmem_budgets_fit_the_chip_and_without_one_all_chips():
    chips = tpu_chips().values()
    assert [vmem_budget(chip) for chip in chips] == [3 * chip.vmem_bytes // 4 for chip in chips]
    assert vmem_budget() == min(vmem_budget(chip) for chip in chips) == 12 * 2**20


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_target_gpu_is_the_gpu_traced_for(arch: int):
    device = AbstractDevice(device_kind=ARCHITECTURES[arch], num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("_",), abstract_device=device)):
        gpu = target_gpu()
        assert gpu is not None
        assert gpu.compute_capability == arch
        assert gpu_to_plan_for() == gpu


def test_an_unknown_gpu_is_planned_for_as_an_h200():
    assert target_gpu() is None
    assert gpu_to_plan_for() == gpus()["h200"]


@pytest.mark.parametrize(
    ("capability", "expected"), [("8.6", 86), ("8.7", 87), ("10.3", 103), ("7.5", None), ("gfx942", None)]
)
def test_an_unlisted_gpu_is_as_its_driver_says(monkeypatch: pytest.MonkeyPatch, capability: str, expected: int | None):
    here = types.SimpleNamespace(device_kind="NVIDIA A16", compute_capability=capability, core_count=10)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [here])
    gpu = devices.target_gpu()
    assert (gpu.compute_capability if gpu is not None else None) == expected
    if gpu is not None:
        assert (gpu.multiprocessors, gpu.hbm_bytes_per_second) == (10, None)
        assert gpu.float8 == (gpu.compute_capability >= 89)
