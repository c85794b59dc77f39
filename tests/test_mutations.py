"""The mutation check itself: its list matches the sources, and its runner tells caught bugs from surviving ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import runner
from mutations.bugs import MUTATIONS
from mutations.runner import Mutation, MutationError

ROOT = Path(__file__).parent.parent
RESULTS = runner.load(Path(runner.__file__).with_name("results.json"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_fits_the_sources(mutation: Mutation):
    changed = runner.mutated(mutation, (ROOT / mutation.file).read_text())
    compile(changed, mutation.file, "exec")
    files = [argument for argument in mutation.tests if argument.endswith(".py")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_names_are_unique_and_each_has_a_result():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    assert list(RESULTS) == names


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Returns a copy of a small repository with one function and its tests."""
    root = tmp_path / "root"
    files = {
        "src/double.py": "def double(x):\n    # Twice.\n    return x + x\n",
        "tests/test_it.py": (
            "import double\n\n\ndef test_sum():\n    assert double.double(3) == 6\n\n\n"
            "def test_broken():\n    assert double.double(3) == 7\n"
        ),
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        ".git/config": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    runner.copy_sources(root, tmp_path / "tree")
    assert not (tmp_path / "tree/.git").exists()
    return tmp_path / "tree"


def planted(old: str, new: str, *selected: str) -> Mutation:
    return Mutation("planted", "src/double.py", old, new, ("tests/test_it.py", *selected), "It is wrong.")


def judged(mutation: Mutation, tree: Path, timeout: float = 60) -> tuple[str, str]:
    before = (tree / mutation.file).read_text()
    try:
        result = runner.check(mutation, tree, timeout=timeout, commit="none")
    finally:
        assert (tree / mutation.file).read_text() == before
    assert result.seconds > 0
    return result.outcome, result.by


def test_a_bug_is_caught_and_a_harmless_edit_survives(tree: Path):
    bug = planted("return x + x", "return x", "-k", "test_sum")
    assert judged(bug, tree) == ("caught", "tests/test_it.py::test_sum")
    assert judged(planted("# Twice.", "# 2 x", "-k", "test_sum"), tree) == ("survived", "")


def test_what_crashes_or_hangs_is_caught(tree: Path):
    crash = planted("return x + x", "import os; os.abort()", "-k", "test_sum")
    assert judged(crash, tree) == ("caught", "ended by SIGABRT")
    hang = planted("return x + x", "import time; time.sleep(600)", "-k", "test_sum")
    assert judged(hang, tree, timeout=3) == ("caught", "no end within 3 s")


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (planted("x", "y"), "planted: its snippet occurs 3 times in src/double.py; accepted: once"),
        (planted("y", "x"), "planted: its snippet occurs 0 times"),
        (planted("# Twice.", "# Twice."), "its replacement is the snippet itself"),
        (planted("# Twice.", "# 2 x", "-k", "nothing"), "pytest ended with 5, no test was judged"),
        (planted("return x + x", "import os; os.kill(os.getpid(), 9)", "-k", "test_sum"), "was killed from outside"),
        (planted("return x + x", "return x", "-k", "test_broken"), "test_broken fails without it, too"),
    ],
)
def test_what_says_nothing_about_the_tests_is_an_error(mutation: Mutation, message: str, tree: Path):
    with pytest.raises(MutationError, match=message):
        judged(mutation, tree)


def test_results_are_kept_in_the_order_of_the_mutations(tmp_path: Path):
    results = {
        name: runner.Result(name, "caught", "a test", 1.0, "commit") for name in (MUTATIONS[1].name, MUTATIONS[0].name)
    }
    runner.save(tmp_path / "results.json", MUTATIONS, results | {"gone": runner.Result("gone", "caught", "", 1.0, "")})
    assert list(runner.load(tmp_path / "results.json")) == [MUTATIONS[0].name, MUTATIONS[1].name]
