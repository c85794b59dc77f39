"""The rules of the house: which folder may import which, how long files and functions are, how docstrings begin."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("reference", "kernels", "frameworks", "model", "benchmarks")
"""Folders from the ground up: each imports itself and those before it."""

BENCHMARKS = {
    "commands": {"commands", "measure", "numerics", "static"},
    "measure": {"measure", "static"},
    "numerics": {"numerics"},
    "static": {"static"},
}
"""Folders of benchmarks that the modules of a folder may import."""

BACKENDS = {"mosaic_tpu", "triton", "mosaic_gpu"}
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 80
MOST_NESTED = 4
LONGER: dict[str, str] = {}
"""Files, and functions as `file:name`, that may be longer, with the reason."""

PREPOSITIONS = re.compile(r"(Of|By|To|That|In|For|With|What)\b")

FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
of_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(text: str) -> Iterator[str]:
    """Yields what a module imports of palladion, with its names: "kernels.backend.dispatch"."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "palladion":
            yield from (f"{node.module}.{alias.name}".removeprefix("palladion.") for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name.removeprefix("palladion.") for name in names if name.startswith("palladion."))


def docstrings(text: str) -> Iterator[str]:
    """Yields docstrings of modules, classes and functions, and those after constants and attributes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value.strip()


def breaches(place: tuple[str, ...], text: str) -> list[str]:
    """Returns the imports of a module that the house does not allow.

    Args:
      place: the module's path from the root, in parts: ("kernels", "matmul", "api.py").
      text: its source.
    """
    floor, *rest = place
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    found = []
    for name in imported(text):
        other = name.split(".")
        if other[0] in FLOORS and other[0] not in allowed:
            found.append(f"{name} is on a floor above")
        if floor == other[0] == "benchmarks" and len(other) > 1 and place[-1] != "__main__.py":
            folders = BENCHMARKS.get(rest[0], set())
            if other[1] in BENCHMARKS and other[1] not in folders:
                found.append(f"{name}: {rest[0]} may import {', '.join(sorted(folders)) or 'no folder'}")
        backend = other[:3] if len(other) > 2 and other[0] == "kernels" and other[2] in BACKENDS else None
        if backend and list(place[:3]) != backend and list(place[:3]) != [*backend[:2], "api.py"]:
            found.append(f"{name}: a backend's folder is imported by its operation's table alone")
    return found


@of_file
def test_imports_run_one_way(path: Path):
    assert not breaches(path.relative_to(ROOT).parts, path.read_text())


@pytest.mark.parametrize(
    ("place", "line", "breach"),
    [
        ("reference/caches.py", "from palladion.kernels.checks import check", True),
        ("reference/caches.py", "import palladion.kernels", True),
        ("kernels/matmul/api.py", "from palladion.reference import KVCache", False),
        ("kernels/matmul/api.py", "from palladion.kernels.matmul.triton import call", False),
        ("kernels/matmul/api.py", "from palladion.kernels.matmul import triton", False),
        ("kernels/matmul/triton/call.py", "from palladion.kernels.matmul.triton.kernel import kernel", False),
        ("kernels/matmul/problem.py", "from palladion.kernels.matmul.triton.call import Config", True),
        ("kernels/append_qkv/api.py", "from palladion.kernels.append_kv import triton", True),
        ("model/engine.py", "from palladion.kernels.matmul.triton.call import Config", True),
        ("benchmarks/static/examiner.py", "from palladion.benchmarks.measure import timing", True),
        ("benchmarks/measure/timing.py", "from palladion.benchmarks.static.tpu import compiler", False),
    ],
)
def test_breaches_are_found(place: str, line: str, breach: bool):
    assert bool(breaches(Path(place).parts, line)) == breach


def test_the_ground_floor_has_no_kernels():
    for path in (ROOT / "reference").rglob("*.py"):
        assert "jax.experimental.pallas" not in path.read_text()


@of_file
def test_files_and_functions_are_short(path: Path):
    text, name = path.read_text(), str(path.relative_to(ROOT))
    assert text.count("\n") <= MOST_LINES or name in LONGER
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            documentation = ast.get_docstring(node, clean=False)
            lines -= documentation.count("\n") + 1 if documentation else 0
            assert lines <= MOST_LINES_OF_A_FUNCTION or f"{name}:{node.name}" in LONGER, f"{node.name}: {lines} lines"


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Returns how deep blocks are nested below a node; a branch of `elif` is as deep as its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        is_block = isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try) and not is_elif
        is_function = isinstance(child, ast.FunctionDef | ast.Lambda)
        deepest = max(deepest, nesting(child, 0 if is_function else depth + is_block))
    return deepest


def test_nesting_is_counted():
    two = "for a in b:\n  if a:\n    pass\n  elif b:\n    pass\n"
    assert nesting(ast.parse(two)) == 2
    assert nesting(ast.parse(f"with c:\n  def f():\n    {two.replace(chr(10), chr(10) + '    ')}")) == 2


@of_file
def test_blocks_are_not_deeply_nested(path: Path):
    assert nesting(ast.parse(path.read_text())) <= MOST_NESTED


@of_file
def test_docstrings_stand_alone(path: Path):
    """An editor shows a docstring without what it belongs to: it is a sentence with a subject or a verb in front."""
    for text in docstrings(path.read_text()):
        assert PREPOSITIONS.match(text) is None, text.splitlines()[0]
