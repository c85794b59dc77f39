"""The Python examples of README.md run unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from palladion import load_tree
from palladion.model.checkpoint import CheckpointError
from palladion.model.locate import find_model

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(*blocks: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    return names


def test_operations_drop_in():
    names = run(BLOCKS[0])
    assert names["y"].shape == (8, 2048)
    assert names["out"].shape == (8, 8, 64)
    # A sequence of one token attends to that token alone.
    assert (names["out"].reshape(8, 2, 4, 64) == names["v"][:, :, None]).all()


def test_a_model_is_quantized_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    names = run(*BLOCKS[:2])
    assert "1 of 2 arrays quantized" in capsys.readouterr().out
    assert load_tree("model.safetensors")["mlp"]["up"] == names["model"]["mlp"]["up"]


@pytest.mark.peer
def test_generator(capsys: pytest.CaptureFixture[str]):
    try:
        find_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    names = run(BLOCKS[2])
    assert capsys.readouterr().out.startswith(" Paris.")
    assert len(names["generations"]) == 2
