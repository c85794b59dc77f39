"""Writes a Hugging Face folder with quantized weights, which loads again as the unquantized one does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from palladion.model.checkpoint import open_checkpoint, quantized_tensors
from palladion.model.checkpoint_files import CheckpointError, JsonFile, exists
from palladion.model.huggingface_checkpoint import HuggingFaceCheckpoint
from palladion.model.quantized_methods import SECTIONS
from palladion.model.stored_quantized import METHOD, SECTION, stored_parts
from palladion.reference.quantization import QuantizedArray
from palladion.reference.saving import save_tree
from palladion.reference.scheme import Scheme

SHARD_BYTES: Final = 2 * 10**9
"""Size from which on a file of weights is closed and the next one begun."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Sizes of a checkpoint before and after.

    Attributes:
      weights: number of tensors that were quantized.
      dense: number of tensors that were copied.
      bytes_before: size of all tensors before.
      bytes_after: size of all tensors now.
    """

    weights: int
    dense: int
    bytes_before: int
    bytes_after: int


def quantize_folder(
    source: str | Path,
    target: str | Path,
    scheme: str | Scheme,
    progress: Callable[[str, float], None] = lambda _step, _fraction: None,
) -> Quantized:
    """Quantizes the weights that `load_checkpoint(quantize=…)` would, tensor by tensor, and copies everything else.

    Args:
      source: a Hugging Face folder, or its name on the hub.
      target: the folder to write, which does not exist or is empty. Its config.json is written last, so that an
        interrupted run leaves nothing that looks like a checkpoint.
      scheme: scheme to quantize to, for example "int8" or "int4-g32".
      progress: called with the tensor just written and the fraction done.

    Raises:
      CheckpointError: the source is missing, damaged, unsupported, no Hugging Face folder, or quantized already.
      ValueError: the scheme is not known, or the target is there already.
    """
    scheme, target = Scheme.parse(scheme), Path(target).expanduser()
    reader = open_checkpoint(source)
    if not isinstance(reader, HuggingFaceCheckpoint):
        raise CheckpointError(
            f"{reader.path}: quantize takes Hugging Face folders, and a GGUF file is quantized already; take the "
            "model's unquantized folder"
        )
    config = JsonFile(reader.path / "config.json").content
    if any(config.get(section) for section in SECTIONS):
        raise CheckpointError(f"{reader.path}: is quantized already; take the model's unquantized folder")
    if exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: is there already; give a folder that does not exist, or an empty one")
    target.mkdir(parents=True, exist_ok=True)
    shards, report = _Shards(target), Quantized(0, 0, 0, 0)
    names = len(reader.tensor_names())
    for count, (name, weight) in enumerate(quantized_tensors(reader, scheme), 1):
        raw = reader.raw(name)
        stored = raw if weight is None else weight
        shards.add(name, stored)
        report = Quantized(
            report.weights + (weight is not None),
            report.dense + (weight is None),
            report.bytes_before + raw.nbytes,
            report.bytes_after + stored.nbytes,
        )
        progress(name, min(count / names, 1.0))
    shards.close()
    for file in sorted(reader.path.iterdir()):
        if file.suffix in (".json", ".jinja") and file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    section = {"quant_method": METHOD, "scheme": str(scheme)}
    (target / "config.json").write_text(json.dumps({**config, SECTION: section}, indent=2) + "\n", "utf-8")
    return report


class _Shards:
    """Writes tensors and weights into files of about `SHARD_BYTES`, and the index of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str] = {}
        self._held: dict[str, np.ndarray | QuantizedArray] = {}
        self._count = 0

    def add(self, name: str, stored: np.ndarray | QuantizedArray) -> None:
        """Adds a tensor or a weight, and writes a file where enough are there."""
        self._held[name] = stored
        if sum(held.nbytes for held in self._held.values()) >= SHARD_BYTES:
            self._write()

    def close(self) -> None:
        """Writes what is left, and the index."""
        if self._held:
            self._write()
        index = json.dumps({"metadata": {}, "weight_map": self._files}, indent=2)
        (self._folder / "model.safetensors.index.json").write_text(index + "\n", "utf-8")

    def _write(self) -> None:
        self._count += 1
        file = f"model-{self._count:05d}.safetensors"
        save_tree(self._folder / file, self._held)
        for name, stored in self._held.items():
            names = [name] if isinstance(stored, np.ndarray) else [f"{name}.{part}" for part in stored_parts(stored)]
            self._files |= dict.fromkeys(names, file)
        self._held = {}
