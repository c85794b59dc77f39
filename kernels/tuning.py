"""Block sizes: the caller's, else tuned ones, else those of a heuristic; and which of these they are.

Tuned block sizes are data: users' own under `$PALLADION_CACHE/tuned/<operation>/<device kind>.json`, which come first,
and `kernels/<operation>/tuned/<device kind>.json`. An entry was tuned for one problem. Problems of the same kind and of
similar sizes use it too if their kernel can; other problems use the heuristic.

The benchmarks' command `tune` writes these files.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.kernels.devices import target_device_kind
from palladion.kernels.implementation import Implementation, Problem
from palladion.kernels.search_space import TuningKey

SOURCES: Final = ("explicit", "tuned", "nearest", "heuristic")
"""Origins of block sizes: the caller, an entry for the same problem, an entry for a similar one, the heuristic."""

CACHE: Final = "PALLADION_CACHE"
"""Environment variable that names the folder of the user's own tuned block sizes."""

MAX_DISTANCE: Final = 2.0
"""Largest distance between a problem and an entry that it uses; see `TuningKey.distance`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Tuned block sizes for one problem, with their timings.

    Attributes:
      implementation: name of the implementation, for example "triton".
      kind: `TuningKey.kind` of the problem.
      sizes: `TuningKey.sizes` of the problem.
      config: fields of the kernel's `Config`.
      seconds: time of a call with these block sizes.
      heuristic_seconds: time of a call with the heuristic's block sizes.
      origin: "measured", or "estimated" from the compiler's schedule.
      versions: versions of the packages that were used.
    """

    implementation: str
    kind: str
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    seconds: float
    heuristic_seconds: float
    origin: str
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> TuningKey:
        """Key of the problem that the entry was tuned for."""
        return TuningKey(self.kind, self.sizes)


def resolve(operation: str, row: Implementation, problem: Problem, config: Any) -> tuple[Any, str]:
    """Returns the block sizes of a call, and their origin.

    Args:
      operation: name of the operation.
      row: the `Implementation` that runs the call.
      problem: shapes and options of the call.
      config: block sizes that the caller requires, or None.

    Returns:
      A config of the kernel and one of `SOURCES`; the caller's config and "" if the implementation has no block sizes.
    """
    if row.heuristic is None:
        return config, ""
    if config is not None:
        return config, "explicit"
    planned = problem.planned()
    block_sizes = tuned(operation, row, planned)
    return block_sizes if block_sizes is not None else (row.heuristic(planned), "heuristic")


def tuned(operation: str, row: Implementation, problem: Problem) -> tuple[Any, str] | None:
    """Returns the nearest tuned block sizes that the kernel accepts, with "tuned" or "nearest"; None without any."""
    if row.space is None or row.config_class is None:
        return None
    key = problem.tuning_key()
    entries = [entry for entry in entries_for(operation, target_device_kind()) if entry.implementation == row.name]
    near = [(entry.key.distance(key), entry) for entry in entries]
    near = sorted((pair for pair in near if pair[0] <= MAX_DISTANCE), key=lambda pair: pair[0])
    if not near:
        return None
    space = row.space(problem)
    for distance, entry in near:
        try:
            config = row.config_class(**entry.config)
        except (TypeError, ValueError):
            continue  # tuned for another version of the kernel
        if config in space:
            return config, "tuned" if distance == 0 else "nearest"
    return None


def entries_for(operation: str, device_kind: str) -> list[Entry]:
    """Returns the entries for a device: the user's own, then those of the package."""
    entries: list[Entry] = []
    for path in (user_file(operation, device_kind), package_file(operation, device_kind)):
        if path is not None and path.is_file():
            entries += _read(path, path.stat().st_mtime_ns)
    return entries


def package_file(operation: str, device_kind: str) -> Path:
    """Returns the path of the package's entries for a device."""
    folder = importlib.resources.files("palladion.kernels").joinpath(operation)
    return Path(str(folder)) / "tuned" / f"{file_stem(device_kind)}.json"


def user_file(operation: str, device_kind: str) -> Path | None:
    """Returns the path of the user's own entries for a device; None if `$PALLADION_CACHE` is not set."""
    cache = os.environ.get(CACHE)
    return Path(cache).expanduser() / "tuned" / operation / f"{file_stem(device_kind)}.json" if cache else None


def file_stem(device_kind: str) -> str:
    """Returns a device kind as a file name: "tpu_v6_lite"."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


@functools.lru_cache(maxsize=64)
def _read(path: Path, modified: int) -> tuple[Entry, ...]:
    del modified  # part of the cache key: a changed file is read again
    return tuple(load(path))


def load(path: Path) -> list[Entry]:
    """Returns the entries of a file.

    Raises:
      ValueError: the file does not contain tuned block sizes.
    """
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text())["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not tuned block sizes; tune again, or remove it ({error!r})") from error


def save(path: Path, device_kind: str, entries: Sequence[Entry]) -> None:
    """Adds entries to a file, one per line, and replaces those for the same problem and kernel."""
    kept = {_identity(entry): entry for entry in (load(path) if path.is_file() else [])}
    kept |= {_identity(entry): entry for entry in entries}
    lines = [json.dumps(dataclasses.asdict(kept[identity])) for identity in sorted(kept)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n    ".join(lines)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n  "device_kind": {json.dumps(device_kind)},\n  "entries": [\n    {text}\n  ]\n}}\n')
    partial.replace(path)


def _identity(entry: Entry) -> tuple[object, ...]:
    return entry.implementation, entry.kind, tuple(entry.sizes.items())
