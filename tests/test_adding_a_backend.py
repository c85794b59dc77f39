"""A kernel that is added by the steps of BUILD.md is found by tests, compilers, tuner and benchmarks, by its row alone.

The steps are carried out in a copy of the tree, with `tests/skeleton`: a TPU kernel of matmul, which has none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations.runner import copy_sources

from palladion.benchmarks.static.tpu import compiler as tpu_compiler

ROOT = Path(__file__).parent.parent

IMPORT = "from palladion.kernels.matmul.mosaic_tpu import call as mosaic_tpu\n"
BEFORE_THE_IMPORT = "from palladion.kernels.matmul.problem import Problem\n"
NO_KERNEL = 'Implementation("mosaic_tpu", "tpu", lambda _: None, _mosaic_tpu, heuristic=lambda _: XlaProduct()),'
ROW = """Implementation(
        "mosaic_tpu",
        "tpu",
        mosaic_tpu.unsupported,
        mosaic_tpu.matmul,
        mosaic_tpu.Config,
        mosaic_tpu.heuristic,
        mosaic_tpu.space,
    ),"""
NOTHING_REFUSED = "REFUSED: dict[str, set[str]] = {}"
REFUSED = """REFUSED: dict[str, set[str]] = {
    "mosaic_tpu": {
        "float16",
        "norm-gated",
        "norm-residual",
        "gated-odd",
        "llama-3-8b-gate-up",
        "smollm2-gate-up-float32",
    }
}"""

COMMANDS = """
from palladion.benchmarks.commands import main

assert main(["check", "matmul", "--interpret", "--backends=mosaic_tpu", "--cases=float32,odd-in,gated-odd"]) == 0
sizes = ["--in=128", "--out=256", "--rows=2", "--dtype=float32"]
assert main(["tune", "matmul", "--interpret", "--trials=2", "--minutes=0.2", *sizes]) == 0
"""
STATIC = """
from palladion.benchmarks.commands import main

assert main(["static", "tpu", "--operation=matmul", "--cases=llama-3-8b-output", "--chips=v6e"]) == 0
"""


def replace(path: Path, old: str, new: str) -> None:
    """Replaces a text that occurs once in a file."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {old!r} occurs {text.count(old)} times"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the tree, with the kernel in it."""
    tree = tmp_path_factory.mktemp("backend") / "tree"
    copy_sources(ROOT, tree)
    shutil.copytree(ROOT / "tests/skeleton/mosaic_tpu", tree / "kernels/matmul/mosaic_tpu", dirs_exist_ok=True)
    replace(tree / "kernels/matmul/api.py", BEFORE_THE_IMPORT, IMPORT + BEFORE_THE_IMPORT)
    replace(tree / "kernels/matmul/api.py", NO_KERNEL, ROW)
    replace(tree / "tests/test_matmul.py", NOTHING_REFUSED, REFUSED)
    return tree


def run(tree: Path, *arguments: str) -> str:
    """Runs Python in the copy; returns what it printed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree / "src"), "PALLADION_CACHE": str(tree)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_its_tests_find_it(tree: Path):
    chosen = "mosaic_tpu and (float32 or refuse or functions or docstrings or one_way)"
    found = run(tree, "-m", "pytest", "-q", "-rA", "tests/test_matmul.py", "tests/test_house.py", "-k", chosen)
    for test in (
        "test_matmul.py::test_kernels_are_right[mosaic_tpu-float32]",
        "test_matmul.py::test_kernels_refuse_only_what_is_known[mosaic_tpu]",
        "test_house.py::test_files_and_functions_are_short[kernels/matmul/mosaic_tpu/call.py]",
    ):
        assert f"PASSED tests/{test}" in found
    assert "mosaic_tpu-float16" not in found


def test_commands_find_it(tree: Path):
    found = run(tree, "-c", COMMANDS)
    assert "3 of 3 cases checked: 2 right, 1 skipped" in found
    assert "mosaic_tpu block_out=" in found


@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")
def test_the_compilers_find_it(tree: Path):
    found = run(tree, "-m", "pytest", "-q", "-rA", "tests/test_compile_tpu.py", "-k", "matmul-llama-3-8b-output-v6e")
    assert "PASSED tests/test_compile_tpu.py::test_compiles[matmul-llama-3-8b-output-v6e]" in found
    assert "matmul_bfloat16_o" in run(tree, "-c", STATIC)
