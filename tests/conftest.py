"""Fixtures and settings for all test files."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import jax
import pytest

from palladion.kernels import devices

# Commands keep compiled programs in the user's folder: neither those that tests call nor those that they start do.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
jax.config.update("jax_enable_compilation_cache", False)
# Lowered programs do not record the Python line of each operation: no test reads it, and it takes a tenth of the time.
# The garbage collector runs less often: it finds little among millions of objects.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_given_back() -> Iterator[None]:
    """Releases compiled programs after each test file.

    Every program that XLA compiles for the CPU holds memory mappings. Linux allows a process 65,530 of them, and the
    compiler ends with a segmentation fault when there are no more. The tests of one file need less than a third.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes measurements of the machine's peak rates short: they read little memory and multiply small matrices."""
    monkeypatch.setitem(devices.READ_BYTES, "cpu", 2**22)
    monkeypatch.setitem(devices.SQUARE, "cpu", 64)
    yield
    devices.measured_bandwidth.cache_clear()
    devices.measured_matrix_rate.cache_clear()
