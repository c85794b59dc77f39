"""Applies one mutation at a time to a scratch copy of the repository, and runs the tests that should catch it there.

A mutation is caught when a test fails with it and passes without it. A crash of the interpreter counts as a failing
test, and so does a run that does not end: both stop continuous integration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

LEFT_OUT: Final = (".*", "__pycache__", "*.egg-info", "build", "dist")
"""Names of files and folders that are not sources: environments, caches, the data of git."""

Outcome = Literal["caught", "survived"]


class MutationError(Exception):
    """A mutation cannot be applied, or its tests cannot be run, so it says nothing about the tests."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A one-line bug.

    Attributes:
      name: unique name, for the table and `--only`.
      file: path from the root of the repository.
      old: a snippet that occurs once in the file.
      new: its replacement.
      tests: arguments of pytest that select the tests that should catch the bug.
      bug: one sentence about what goes wrong.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    bug: str


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a mutation.

    Attributes:
      name: name of the mutation.
      outcome: "caught" or "survived".
      by: the test that failed, or how the run ended otherwise; empty where the mutation survived.
      seconds: duration of the run.
      commit: commit of the repository, with "+" where files differ from it.
    """

    name: str
    outcome: Outcome
    by: str
    seconds: float
    commit: str


def mutated(mutation: Mutation, text: str) -> str:
    """Returns the text of a file with the bug in it.

    Raises:
      MutationError: the snippet does not occur exactly once, or its replacement is the same.
    """
    count = text.count(mutation.old)
    if count != 1:
        raise MutationError(f"{mutation.name}: its snippet occurs {count} times in {mutation.file}; accepted: once")
    if mutation.old == mutation.new:
        raise MutationError(f"{mutation.name}: its replacement is the snippet itself; it changes nothing")
    return text.replace(mutation.old, mutation.new)


@contextlib.contextmanager
def applied(mutation: Mutation, tree: Path) -> Iterator[None]:
    """Puts the bug into a tree for the duration of a `with` block."""
    path = tree / mutation.file
    text = path.read_text()
    path.write_text(mutated(mutation, text))
    try:
        yield
    finally:
        path.write_text(text)


def copy_sources(root: Path, tree: Path) -> None:
    """Copies the sources below `root` to a folder that does not exist yet; links stay links."""
    shutil.copytree(root, tree, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))


def check(mutation: Mutation, tree: Path, *, timeout: float, commit: str) -> Result:
    """Runs a mutation's tests in a tree that has the bug, and the test that fails once more without the bug.

    Args:
      mutation: the mutation.
      tree: a copy of the repository, unchanged afterwards.
      timeout: seconds after which a run counts as failed.
      commit: the commit of which the tree is a copy.

    Raises:
      MutationError: the snippet does not occur once, no test was run to its end, or one fails without the bug, too.
    """
    start = time.perf_counter()
    with applied(mutation, tree):
        code, output = _pytest(tree, ["--exitfirst", *mutation.tests], timeout)
    seconds = round(time.perf_counter() - start, 1)
    if code == 0:
        return Result(mutation.name, "survived", "", seconds, commit)
    if code is None:
        return Result(mutation.name, "caught", f"no end within {timeout:g} s", seconds, commit)
    if code == -signal.SIGKILL:
        raise MutationError(f"{mutation.name}: pytest was killed from outside, where memory is short for example")
    if code < 0:
        return Result(mutation.name, "caught", f"ended by {signal.Signals(-code).name}", seconds, commit)
    if code != 1:
        raise MutationError(f"{mutation.name}: pytest ended with {code}, no test was judged:\n{output[-2000:]}")
    (failed,) = json.loads((tree / ".pytest_cache/v/cache/lastfailed").read_text())
    code, output = _pytest(tree, [failed], timeout)
    if code != 0:
        raise MutationError(f"{mutation.name}: {failed} fails without it, too:\n{output[-2000:]}")
    return Result(mutation.name, "caught", failed, seconds, commit)


def _pytest(tree: Path, arguments: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Runs pytest in a tree; returns its exit status, or None where it did not end, and its output."""
    shutil.rmtree(tree / ".pytest_cache", ignore_errors=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(tree / "src"),
        # Python recognizes a changed module by size and time, which two mutations may share.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "--quiet", "--no-header", *arguments],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            # Tests start processes of their own.
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None, ""
            raise
    return process.returncode, output


def commit_of(root: Path) -> str:
    """Returns the commit of a checkout, with "+" where files differ from it, or "unknown" outside of a checkout."""

    def said(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else ""

    commit = said("rev-parse", "--short=12", "HEAD")
    return commit + ("+" if said("status", "--porcelain") else "") if commit else "unknown"


def load(path: Path) -> dict[str, Result]:
    """Returns the results of earlier runs, by name."""
    if not path.is_file():
        return {}
    return {record["name"]: Result(**record) for record in json.loads(path.read_text())}


def save(path: Path, mutations: Sequence[Mutation], results: dict[str, Result]) -> None:
    """Writes the results of the existing mutations, in their order, one per line."""
    known = [results[mutation.name] for mutation in mutations if mutation.name in results]
    lines = ",\n  ".join(json.dumps(dataclasses.asdict(result)) for result in known)
    path.write_text(f"[\n  {lines}\n]\n")
