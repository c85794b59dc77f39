"""What holds for every test file."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import jax
import pytest

from palladion.kernels import devices

# Lowered programs are not told which line of Python each operation comes from: nobody looks, and it takes a tenth of
# the time. Nor does the collector find much among millions of objects: it looks less often.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_given_back() -> Iterator[None]:
    """Every program that XLA compiles for the CPU holds mappings of memory, of which Linux grants 65,530 to a process.

    Past that the compiler ends with a segmentation fault. The tests of one file stay below a third of it.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures what a machine can do in no time, on little memory and a small product."""
    monkeypatch.setitem(devices.READ_BYTES, "cpu", 2**22)
    monkeypatch.setitem(devices.SQUARE, "cpu", 64)
    yield
    devices.measured_bandwidth.cache_clear()
    devices.measured_matrix_rate.cache_clear()
