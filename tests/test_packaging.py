"""The packages install all of palladion and nothing else."""

from __future__ import annotations

import importlib
import pydoc
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import palladion
import palladion.model

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "frameworks", "kernels", "model", "reference")


def sources() -> set[str]:
    """Returns the paths in a wheel of every file that belongs in it."""
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")}
    packaged = {
        f"palladion/{path.relative_to(ROOT)}"
        for path in files
        if "__pycache__" not in path.parts and "results" not in path.parts
    }
    return packaged | {"palladion/__init__.py", "palladion/__main__.py", "palladion/py.typed"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_the_wheel_has_every_module(built: Path):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"palladion", f"palladion-{palladion.__version__}.dist-info"}
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "palladion = palladion.__main__:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_source_archive_builds_the_same(built: Path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {f"src/{name}" for name in sources()} <= names


def test_every_module_imports_on_a_cpu():
    for name in sorted(name for name in sources() if name.endswith(".py")):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if "if __name__" in (ROOT / "src" / name).read_text():
            # A command defines its flags when it is imported, so each is imported in a process of its own.
            run = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT / "src", check=False)
            assert run.returncode == 0
        else:
            importlib.import_module(module)


def test_help_lists_the_folders():
    page = pydoc.render_doc(palladion, renderer=pydoc.plaintext)
    contents = page[page.index("PACKAGE CONTENTS") : page.index("\nCLASSES") if "\nCLASSES" in page else None]
    assert "    model (package)" in contents
    for name in palladion.model.__all__:
        assert getattr(palladion.model, name).__doc__


def test_the_public_names():
    assert palladion.__all__ == sorted(
        palladion.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    for name in palladion.__all__:
        assert getattr(palladion, name).__doc__
