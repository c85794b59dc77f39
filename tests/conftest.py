"""What holds for every test file."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_given_back() -> Iterator[None]:
    """Every program that XLA compiles for the CPU holds mappings of memory, of which Linux grants 65,530 to a process.

    Past that the compiler ends with a segmentation fault. The tests of one file stay below a third of it.
    """
    yield
    jax.clear_caches()
