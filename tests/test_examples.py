"""The examples run, and find what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

FOUND = {
    "decode_loop": [
        r"generated: \[\[\d+, .*\d\]\]",
        "the cache was updated in place: True",
        "one pass over the whole sequences predicts the same: True",
    ],
    "drop_in_attention": [
        "palladion.dot_product_attention agrees: True",
        "append_kv and decode_attention agree: True",
        "is an error: is_causal: got",
    ],
    "equinox_model": [r"int8: +\[\[\d+", r"5 of 12 arrays quantized: .* MB before, .* MB after, 36%"],
    "flax_model": [r"int8: +\[\[\d+", r"7 of 16 arrays quantized: .* MB before, .* MB after, 36%"],
    "sharded_decode": [
        "the same as on one device: True",
        r"cached keys: float32\[4@data,4@model,64,32\]",
        r"communication: {'all-reduce': 1}",
    ],
}
"""Patterns that each example prints."""

ALONE = ("sharded_decode",)
"""Examples that choose JAX's devices, which a process does once."""


def test_every_example_is_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == FOUND.keys()
    assert names == set(re.findall(r"\((\w+)\.py\)", (EXAMPLES / "README.md").read_text()))


@pytest.mark.parametrize("name", FOUND)
def test_it_finds_what_it_says(name: str, capsys: pytest.CaptureFixture[str]):
    path = EXAMPLES / f"{name}.py"
    text = path.read_text()
    assert f"    python examples/{name}.py\n" in text
    assert text.count("\n") <= 85
    if name in ALONE:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        printed = run.stdout
    else:
        runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr().out
    for pattern in FOUND[name]:
        assert re.search(pattern, printed), printed
