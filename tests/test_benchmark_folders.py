"""The folders of benchmarks: imports run one way, files and functions stay short, docstrings are sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(ROOT.rglob("*.py"))

MAY_IMPORT = {
    "commands": {"commands", "measure", "numerics", "static"},
    "measure": {"measure", "static"},
    "numerics": {"numerics"},
    "static": {"static"},
}
"""Folders of benchmarks that the modules of a folder may import."""

PREPOSITIONS = re.compile(r"(Of|By|To|That|In|For|With|What)\b")


def imported(tree: ast.Module) -> Iterator[str]:
    """Yields the folders of benchmarks that a module imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "palladion.benchmarks":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palladion.benchmarks."):
            yield (node.module or "").split(".")[2]


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yields docstrings of modules, classes and functions, and those after constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "__main__.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_run_one_way(path: Path):
    folder = path.relative_to(ROOT).parts[0]
    folders = {name for name in imported(ast.parse(path.read_text())) if (ROOT / name).is_dir()}
    assert folders <= MAY_IMPORT.get(folder, set()), f"{path.relative_to(ROOT)} imports {folders}"


def test_imports_are_found():
    tree = ast.parse("from palladion.benchmarks import text\nfrom palladion.benchmarks.static.tpu import compiler")
    assert list(imported(tree)) == ["text", "static"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{path.relative_to(ROOT)}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_stand_alone(path: Path):
    for text in docstrings(ast.parse(path.read_text())):
        assert PREPOSITIONS.match(text.strip()) is None, f"{path.relative_to(ROOT)}: {text.strip().splitlines()[0]}"
