"""Commands keep compiled programs in a folder, say so once, and load them at the next start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from palladion.kernels.compilation_cache import use_compilation_cache

OFF = "JAX_ENABLE_COMPILATION_CACHE"

PROGRAM = """
import sys
import json
import jax
from palladion.kernels.compilation_cache import inherited, use_compilation_cache

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(use_compilation_cache(*sys.argv[1:]))
jax.jit(lambda x: x * 2 + 1)(1.0)
print(events.count("/jax/compilation_cache/cache_hits"))
print(json.dumps(inherited()))
"""


def start(*arguments: str, **environment: str) -> tuple[str, int, dict[str, str]]:
    """Starts a process that compiles a program.

    Returns:
      What it says, how many programs it has loaded, and the variables with which its own processes do the same.
    """
    unset = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "PALLADION_CACHE", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    src = str(Path(__file__).parent.parent / "src")
    environment = kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": src} | environment
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said, hits, variables = done.stdout.splitlines()
    return said, int(hits), json.loads(variables)


def test_the_second_start_loads_what_the_first_has_compiled(tmp_path: Path):
    folder = tmp_path / "palladion" / "compiled"
    first, second = (start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    kept = f"compiled programs are kept in {folder} for the next start (--compilation-cache=off keeps none)"
    assert first == (kept, 0, {"JAX_COMPILATION_CACHE_DIR": str(folder)})
    assert second[0] == "None"
    assert second[1] >= 1
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "folder"),
    [
        (("{}/given",), {"PALLADION_CACHE": "{}/ours", "JAX_COMPILATION_CACHE_DIR": "{}/jax"}, "given"),
        ((), {"PALLADION_CACHE": "{}/ours", "JAX_COMPILATION_CACHE_DIR": "{}/jax"}, "jax"),
        ((), {"PALLADION_CACHE": "{}/ours", "XDG_CACHE_HOME": "{}/xdg"}, "ours/compiled"),
        ((), {"HOME": "{}/home"}, "home/.cache/palladion/compiled"),
        (("off",), {"XDG_CACHE_HOME": "{}/xdg"}, None),
    ],
    ids=["option", "jax", "ours", "home", "off"],
)
def test_whose_folder_it_is(
    arguments: tuple[str, ...], environment: dict[str, str], folder: str | None, tmp_path: Path
):
    *_, variables = start(
        *(one.format(tmp_path) for one in arguments),
        **{name: value.format(tmp_path) for name, value in environment.items()},
    )
    written = {path.parent for path in tmp_path.rglob("*") if path.is_file()}
    assert written == ({tmp_path / folder} if folder else set())
    for_children = ("JAX_COMPILATION_CACHE_DIR", str(tmp_path / folder)) if folder else (OFF, "false")
    assert variables == dict([for_children])


def test_a_folder_that_cannot_be_made_ends_no_command(tmp_path: Path):
    (tmp_path / "file").write_text("")
    said, *_ = start(str(tmp_path / "file" / "folder"))
    assert said.startswith("compiled programs are not kept for the next start: [Errno 20] Not a directory")


def test_tests_keep_nothing():
    assert use_compilation_cache() is None
    assert jax.config.values["jax_compilation_cache_dir"] is None
