"""The documentation builds without a warning, and describes everything that a user imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import palladion
import palladion.model
from palladion.benchmarks.measure.operations import OPERATIONS

ROOT = Path(__file__).parent.parent
VALUES = {"BACKENDS", "__version__"}
"""Exported values that are no classes or functions: a page's text names them."""


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of everything that has an entry in the site, under all names that it may be imported by."""
    site = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    head, body = (site / "objects.inv").read_bytes().split(b"zlib.\n", 1)
    assert b"Palladion" in head
    return {line.split()[0] for line in zlib.decompress(body).decode().splitlines()}


def test_every_export_has_an_entry(documented: set[str]):
    assert {f"palladion.{name}" for name in set(palladion.__all__) - VALUES} <= documented
    assert {f"palladion.model.{name}" for name in palladion.model.__all__} <= documented


def test_every_config_has_an_entry(documented: set[str]):
    configs = {row.config_class for operation in OPERATIONS.values() for row in operation.table if row.config_class}
    assert {f"{config.__module__}.{config.__qualname__}" for config in configs} <= documented


def test_the_frontpage_names_every_export():
    words = set(re.findall(r"\w+", palladion.__doc__ or ""))
    assert set(palladion.__all__) - VALUES <= words
