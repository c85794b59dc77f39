"""Models by name: a package's, or one on the Hugging Face hub, cached, downloaded or out of reach."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import hugging_face_folder

from palladion.model.checkpoint import CheckpointError
from palladion.model.locate import find_model


def hub(monkeypatch: pytest.MonkeyPatch, cached: Path | None, remote: Path | Exception) -> list[bool]:
    """Puts a hub in the place of huggingface_hub; returns the calls that asked for local files alone."""
    calls: list[bool] = []

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert name == "owner/name"
        assert "model*.safetensors" in allow_patterns
        calls.append(local_files_only)
        if local_files_only and cached is None:
            raise FileNotFoundError("not in the cache")
        found = cached if local_files_only else remote
        if isinstance(found, Exception):
            raise found
        return str(found)

    module: Any = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_a_model_in_the_hubs_cache_needs_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hugging_face_folder(tmp_path / "cached")
    calls = hub(monkeypatch, folder, RuntimeError("no connection"))
    assert find_model("owner/name") == folder
    assert calls == [True]


def test_a_model_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hugging_face_folder(tmp_path / "downloaded")
    (tmp_path / "partial").mkdir()
    for cached in (None, tmp_path / "partial"):
        calls = hub(monkeypatch, cached, folder)
        assert find_model("owner/name") == folder
        assert calls == [True, False]


def test_a_model_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, None, RuntimeError("no connection\nand more"))
    with pytest.raises(
        CheckpointError, match=r"cannot be downloaded \(no connection\).*\(hf download owner/name --local"
    ):
        find_model("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"not installed: pip install huggingface_hub, or download it"):
        find_model("owner/name")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "owner/model.gguf", "/owner/name", "../name"])
def test_what_is_no_name_of_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder; give a \.gguf file"):
        find_model(name)
